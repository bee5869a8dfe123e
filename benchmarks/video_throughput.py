"""Clips/s from video files to embeddings against a plain loop, and what TempMe's merging saves, in one run.

Videos (H.264, 340 x 256, 300 frames) are encoded into a temporary folder. The peer decodes with the same PyAV calls,
resizes and crops each frame with torchvision, and calls open_clip's ``encode_image`` on the frames of a batch; its mean
over frames is ours. TempMe: the same tower with and without merging, tokens, floating-point operations and time. Cases
alternate; the best CPU time (workers included) of each counts.

    python benchmarks/video_throughput.py [--model ViT-B-32] [--videos 12] [--frames 12] [--repeat 2] [--json]
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import open_clip
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import functional as V
from usage import cpu_seconds

from clipgraft.data.loader import BadSamples
from clipgraft.encoders.openclip import open_architecture
from clipgraft_video.frame_rules import tsn_test
from clipgraft_video.heads import Mean
from clipgraft_video.model import VideoModel
from clipgraft_video.reading import Clips, clip_batches
from clipgraft_video.sources import ClipConfig, Videos, unlabelled
from clipgraft_video.tempme.graft import TempMeGraft


def write_videos(folder: Path, count: int, *, frames: int = 300) -> None:
    """Noise that drifts, so that the codec has work to do."""
    rng = np.random.default_rng(0)
    canvas = rng.integers(0, 256, (256 // 8, 800 // 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    for number in range(count):
        with av.open(str(folder / f"{number:03}.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=30)
            stream.width, stream.height, stream.pix_fmt = 340, 256, "yuv420p"
            for t in range(frames):
                left = (t + 17 * number) % 400
                picture = np.ascontiguousarray(canvas[:, left : left + 340])
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())


@torch.no_grad()
def peer(model: Any, files: list[Path], mean: Tensor, std: Tensor, *, frames: int, batch: int, size: int) -> Tensor:
    """The loop that one writes by hand: (n, D) of length one."""
    rows, waiting = [], list[Tensor]()
    for file in files:
        with av.open(str(file)) as container:
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1
            wanted = tsn_test(sum(1 for p in container.demux(stream) if p.size), frames)
        kept = []
        with av.open(str(file)) as container:
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1
            for number, frame in enumerate(container.decode(stream)):
                if number in wanted:
                    pixels = torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1)
                    pixels = V.center_crop(V.resize(pixels, round(size * 256 / 224)), [size, size])
                    kept.append((pixels.float() / 255 - mean) / std)
        waiting.append(torch.stack(kept))
        if len(waiting) == batch or file == files[-1]:
            features = model.encode_image(torch.cat(waiting)).unflatten(0, (-1, frames)).mean(1)
            rows.append(F.normalize(features, dim=-1))
            waiting = []
    return torch.cat(rows)


@torch.no_grad()
def ours(model: VideoModel, source: Videos, *, batch: int, workers: int) -> Tensor:
    """What ``clipgraft video search`` does: (n, D) of length one."""
    bad = BadSamples(len(source))
    return torch.cat(
        [model(clips).unit() for _, clips in clip_batches(Clips(source), batch_size=batch, bad=bad, workers=workers)]
    )


def timed(work: Callable[[], Tensor]) -> tuple[Tensor, float, float]:
    """Result, CPU and wall seconds."""
    cpu, wall = cpu_seconds(), time.perf_counter()
    found = work()
    return found, cpu_seconds() - cpu, time.perf_counter() - wall


def best(cases: dict[str, Callable[[], Tensor]], repeat: int) -> tuple[dict[str, Tensor], dict[str, dict[str, float]]]:
    """Results and the least CPU and wall seconds of each, in turns."""
    results: dict[str, Tensor] = {}
    spent: dict[str, dict[str, float]] = {}
    for _ in range(repeat):
        for name, work in cases.items():
            results[name], cpu, wall = timed(work)
            before = spent.get(name, {"cpu": float("inf"), "wall": float("inf")})
            spent[name] = {"cpu": min(cpu, before["cpu"]), "wall": min(wall, before["wall"])}
    return results, spent


def flops(work: Callable[[], Tensor]) -> int:
    """Floating-point operations of one call; torch's fused attention would hide some from the counter."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with FlopCounterMode(display=False) as counter:
            work()
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    return int(counter.get_total_flops())


@torch.no_grad()
def main() -> None:
    """Both comparisons as tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--videos", type=int, default=12)
    parser.add_argument("--frames", type=int, default=12)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    a = parser.parse_args()
    torch.set_num_threads(1)
    encoder = open_architecture(a.model).eval()
    size = encoder.preprocess.size[0]
    plain = open_clip.create_model(a.model).eval()
    plain.visual.load_state_dict(encoder.image.tower.state_dict())
    mean, std = (torch.tensor(x)[:, None, None] for x in (encoder.preprocess.mean, encoder.preprocess.std))
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_videos(folder, a.videos)
        source = unlabelled(folder, clip=ClipConfig(frames=a.frames, size=size))
        files, model = sorted(folder.iterdir()), VideoModel(encoder)
        results, reading = best(
            {
                "plain loop": lambda: peer(plain, files, mean, std, frames=a.frames, batch=a.batch, size=size),
                "clipgraft": lambda: ours(model, source, batch=a.batch, workers=a.workers),
            },
            a.repeat,
        )
    difference = float((results["plain loop"] - results["clipgraft"]).abs().max())
    clips = torch.rand(2, 12, 3, size, size)
    merged = VideoModel(TempMeGraft().apply(open_architecture(a.model)).eval(), Mean("mean_norm"))
    vanilla = VideoModel(open_architecture(a.model).eval(), Mean("mean_norm"))
    towers = {"plain": vanilla, "TempMe": merged}
    _, spent = best({name: lambda m=m: m(clips).pooled for name, m in towers.items()}, a.repeat + 1)
    work = {name: flops(lambda m=m: m(clips).pooled) for name, m in towers.items()}
    whole = (size // encoder.image.tower.patch_size[0]) ** 2 + 1
    tokens = {"plain": 12 * whole, "TempMe": merged.encoder.image.flow.counts[-1][0]}
    found = {"model": a.model, "videos": a.videos, "frames": a.frames, "largest difference": difference}
    found |= {
        "reading": {k: {**v, "clips/s": a.videos / v["wall"]} for k, v in reading.items()},
        "merging": {k: {**spent[k], "GFLOPs": work[k] / 2e9, "tokens at the end": tokens[k]} for k in towers},
    }
    if a.json:
        print(json.dumps(found, indent=2))
        return
    print(f"{a.model}, {a.videos} videos, {a.frames} frames; largest difference {difference:.1e}")
    for name, row in found["reading"].items():
        ratio = reading["plain loop"]["cpu"] / row["cpu"]
        print(f"{name:12} {row['cpu']:7.2f} CPU s  {row['clips/s']:6.2f} clips/s  {ratio:.2f}x")
    for name, row in found["merging"].items():
        ratio, saved = spent["plain"]["cpu"] / row["cpu"], work["plain"] / work[name]
        print(
            f"{name:12} {row['cpu']:7.2f} CPU s  {ratio:.2f}x  {row['GFLOPs']:7.1f} GFLOPs per video "
            f"({saved:.2f}x less)  {row['tokens at the end']} tokens at the end"
        )


if __name__ == "__main__":
    main()
