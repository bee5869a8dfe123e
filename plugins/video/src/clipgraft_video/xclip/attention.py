"""Which frame hears which: the attention among X-CLIP's messages, block by block, for the page of a run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clipgraft.data.base import entry_of
from clipgraft.reporting import Section, Table
from clipgraft_video.film_strips import opened, videos
from clipgraft_video.model import VideoModel
from clipgraft_video.xclip.graft import MessageBlock

if TYPE_CHECKING:
    from clipgraft.registry import Registry
    from clipgraft.rundir import RunRecord

VIDEOS, SHOWN, AT_ONCE = 16, 3, 2
"""Videos that the mean is over, blocks whose heat map is on the page, videos per forward pass."""


def message_attention(run: RunRecord, *, registry: Registry) -> list[Section]:
    """Heat maps of the first, the middle and the last block, and a line per block; nothing for other runs."""
    grafts = [graft["use"] for graft in (run.export or {}).get("grafts", ())]
    names = run.measured("video/classification")
    if "video/x-clip" not in grafts or not names:
        return []
    source, model = opened(run, names[0], registry=registry)
    step = max(1, len(source) // VIDEOS)
    wanted = [entry_of(source, k).id for k in range(0, len(source), step)[:VIDEOS]]
    clips = torch.stack([sample.image for sample in videos(source, wanted, [])])  # type: ignore[misc]
    found = heard(model, clips)
    blocks, frames = found.shape[:2]
    shown = sorted({0, blocks // 2, blocks - 1}) if blocks > SHOWN else range(blocks)
    header = ("frame", *(str(t + 1) for t in range(frames)))
    maps = [
        Table(
            f"Block {k + 1} of {blocks}: what a frame (row) takes from each frame (column), per cent",
            header,
            tuple((f"frame {t + 1}", *(100 * v for v in row)) for t, row in enumerate(found[k].tolist())),
            shaded=True,
            places=1,
        )
        for k in shown
    ]
    return [
        Section(
            "Which frame hears which",
            "In every block of X-CLIP each frame sends a message, and the messages attend to each other. The share of "
            f"a frame's attention, the mean of {len(clips)} videos and all heads; if nothing were told apart, every "
            f"share would be {100 / frames:.1f} %. The first block's messages hold no picture yet: all its class "
            "tokens begin alike.",
            tables=(_by_distance(found), *maps),
        )
    ]


def _by_distance(found: Tensor) -> Table:
    """Per block the share that goes to the own frame, to its neighbours and beyond."""
    frames = found.shape[1]
    at = torch.arange(frames)
    distance = (at[:, None] - at[None]).abs()
    masks = (distance == 0, distance == 1, distance > 1)
    even = [100 * float(mask.sum()) / frames / frames for mask in masks]
    rows: list[tuple[str | float, ...]] = [
        (f"block {k + 1}", *(100 * float(one[mask].sum()) / frames for mask in masks)) for k, one in enumerate(found)
    ]
    return Table(
        "How far a message is heard, per cent of the attention",
        ("block", "own frame", "one frame away", "further"),
        (*rows, ("if all were even", *even)),
        places=1,
    )


@torch.no_grad()
def heard(model: VideoModel, clips: Tensor) -> Tensor:
    """Clips (B, T, 3, S, S) -> (blocks, T, T): row t is frame t's attention to all messages; over videos and heads."""
    blocks = [block for block in model.encoder.image.modules() if isinstance(block, MessageBlock)]
    sums = torch.zeros(len(blocks), clips.shape[1], clips.shape[1], dtype=torch.float64)
    with _listening(blocks, sums):
        for part in torch.split(clips, AT_ONCE):
            model(part.to(next(model.parameters()).device))
    return sums / len(clips)


@contextmanager
def _listening(blocks: list[MessageBlock], sums: Tensor) -> Iterator[None]:
    """Adds the attention of every video that passes to ``sums``, beside the forward pass, which stays as it is."""

    def hook(k: int) -> Any:
        def listen(module: Any, given: tuple[Tensor, ...], output: Any) -> None:
            q, key, value = given
            weights = module.forward(q, key, value, need_weights=True, average_attn_weights=True)[1]  # (B, T, T)
            sums[k] += weights.double().sum(0).cpu()

        return listen

    handles = [block.message_attn.register_forward_hook(hook(k)) for k, block in enumerate(blocks)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
