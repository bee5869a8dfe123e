"""``video/cost``: what one video costs an image tower, in floating-point operations and in seconds of this machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from clipgraft.config.schema import Config
from clipgraft.data.base import PairSource, Source
from clipgraft.evaluation.base import Evaluation
from clipgraft.evaluation.features import EncoderFeatures
from clipgraft_video.evaluator import model_of, videos_of
from clipgraft_video.model import VideoModel
from clipgraft_video.reading import Clips


@torch.no_grad()
def operations(model: VideoModel, clips: Tensor) -> int:
    """Multiplications and additions of matrix products and convolutions, for clips (B, T, 3, S, S), by torch's counter.

    The counter knows no fused attention of a CPU, so attention is taken apart while it counts.
    """
    with _plain_attention(), FlopCounterMode(display=False) as counter:
        model(clips)
    return counter.get_total_flops()


@contextmanager
def _plain_attention() -> Iterator[None]:
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@torch.no_grad()
def seconds(model: VideoModel, clips: Tensor) -> float:
    """CPU seconds of this process for clips (B, T, 3, S, S); on a GPU, seconds of the wall clock."""
    clock = time.perf_counter if clips.is_cuda else time.process_time
    start = clock()
    model(clips)
    if clips.is_cuda:
        torch.cuda.synchronize(clips.device)
    return clock() - start


class Cost(Config):
    """Operations and seconds per video, beside another model on the same videos in the same process.

    ``gigaflops`` and ``milliseconds`` per video of the model at hand; with ``beside``, ``flops_saved`` and
    ``time_saved``: 1 minus its share of the other's. Times are medians over rounds in which both take turns.
    """

    beside: str | None = Field(None, description="model to compare with, such as the CLIP before the run")
    videos: int = Field(64, gt=0, description="videos per round, the source's first")
    rounds: int = Field(5, gt=0, description="rounds that are timed")

    def __call__(self, features: EncoderFeatures, source: Source | PairSource) -> Evaluation:
        """Nothing is said of samples."""
        from clipgraft.registry import current
        from clipgraft_video.model import open_video_model

        clips, own = Clips(videos_of(source)), model_of(features, None)
        device = next(own.parameters()).device
        seen = torch.stack([clips[k].image for k in range(min(self.videos, len(clips)))]).to(device)  # type: ignore[arg-type]
        models = {"own": own} | (
            {} if self.beside is None else {"other": open_video_model(self.beside, registry=current()).to(device)}
        )
        was, flops, times = own.training, dict[str, float](), {name: list[float]() for name in models}
        own.eval()
        try:
            for name, model in models.items():
                flops[name] = operations(model, seen) / len(seen)
            for _ in range(self.rounds):
                for name, model in models.items():
                    times[name].append(seconds(model, seen) / len(seen))
        finally:
            own.train(was)
        spent = {name: statistics.median(each) for name, each in times.items()}
        metrics = {"gigaflops": flops["own"] / 1e9, "milliseconds": spent["own"] * 1e3}
        if self.beside is not None:
            metrics["flops_saved"] = 1 - flops["own"] / flops["other"]
            metrics["time_saved"] = 1 - spent["own"] / spent["other"]
        return Evaluation(metrics, lower=frozenset({"gigaflops", "milliseconds"}))
