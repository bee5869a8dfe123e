"""AnomalyCLIP's inference: ours against the official order of work on the same random weights, in one process.

The peer is written here from the official code's facts: one picture at a time, no fused attention, both attention
matrices (1, heads, N, N) of every block from the start layer on written out, scipy's smoothing. ``official`` sends the
prompts through the text tower for every picture, as the script for one example does; ``official, texts once`` does so
before the first picture, as the script for data sets does. Ours is the detector that ``predict`` and ``eval`` use.
Scores and maps must agree to 1e-4, else the program ends. Cases take turns; medians count. Memory is each case's peak
(VmHWM) in a process of its own, and how far that lies above what the models took.

    python benchmarks/anomaly_inference.py [--tower base|large|small] [--size 224] [--images 8] [--json]

``large`` is the official setting: ViT-L/14 at 518 px. anomalib's WinCLIP downloads its weights when it is built, so it
is no part of this.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor
from torch.nn import functional as F

from clipgraft.encoders.base import Encoder, Origin
from clipgraft.encoders.openclip import build
from clipgraft.testing.tiny import tiny_clip
from clipgraft_anomaly.anomalyclip.prompts import AnomalyClip, PromptConfig
from clipgraft_anomaly.detector import Detection, Fits, detect
from clipgraft_anomaly.reading import ReadConfig

TOWERS = {"base": ("ViT-B-16", 224), "large": ("ViT-L-14-336", 518), "small": ("", 64)}
CASES = ("official", "official, texts once", "ours, one at a time", "ours")
AIM = 2.0
"""Times as many images/s as ``official``."""
Run = Callable[[Tensor], Detection]


def opened(tower: str, size: int | None = None) -> tuple[Encoder, AnomalyClip]:
    """A random CLIP and random prompts for it, the same in every process."""
    import open_clip

    name, usual_size = TOWERS[tower]
    torch.manual_seed(0)
    if name:
        config, usual = open_clip.get_model_config(name), open_clip.transform.PreprocessCfg()
        assert config is not None
        encoder = build(config, None, preprocess={"mean": usual.mean, "std": usual.std}, origin=Origin("random", name))
    else:
        encoder = tiny_clip(image_size=64, patch=8, width=64, depth=6, context=36)
    encoder.eval().requires_grad_(False)
    torch.manual_seed(1)
    read = ReadConfig(size=size or usual_size).resolved(encoder)
    head = AnomalyClip(
        prompt=PromptConfig(context=12 if name else 8).resolved(encoder), read=read, fits=Fits.of(encoder)
    )
    head.requires_grad_(False).settle(encoder)
    return encoder, head


def attention(block: Any, x: Tensor, *, values: bool) -> tuple[Tensor, Tensor | None]:
    """Ordinary attention over (1, M, W), and with ``values`` value attention too, matrices written out."""
    a, (_, length, width) = block.attn, x.shape
    qkv = F.linear(x, a.in_proj_weight, a.in_proj_bias).view(1, length, 3, a.num_heads, -1).permute(2, 0, 3, 1, 4)
    q, k, v = qkv[0], qkv[1], qkv[2]
    scale = 1 / math.sqrt(q.shape[-1])

    def mixed(query: Tensor, key: Tensor) -> Tensor:
        weights = (query @ key.transpose(-2, -1) * scale).softmax(-1)
        out: Tensor = a.out_proj((weights @ v).transpose(1, 2).reshape(1, length, width))
        return out

    return mixed(q, k), mixed(v, v) if values else None


def official_texts(encoder: Encoder, head: AnomalyClip) -> Tensor:
    """(2, D): every position of the context, written-out causal attention."""
    text: Any = encoder.text
    tower, prompt = text.tower, head.prompt
    ids = encoder.tokenizer([prompt.normal, prompt.anomalous])
    words, last = text.embed(ids), ids.argmax(-1) + prompt.context
    x = torch.cat([words[:, :1], head.context, words[:, 1:]], 1)[:, : text.context_length]
    x = x + tower.positional_embedding
    for index, block in enumerate(tower.transformer.resblocks):
        if 1 <= index <= len(head.deep):
            x = torch.cat([x[:, :1], head.deep[index - 1].expand(2, -1, -1), x[:, 1 + prompt.deep_tokens :]], 1)
        y, a = block.ln_1(x), block.attn
        qkv = (
            F.linear(y, a.in_proj_weight, a.in_proj_bias).view(*y.shape[:2], 3, a.num_heads, -1).permute(2, 0, 3, 1, 4)
        )
        weights = qkv[0] @ qkv[1].transpose(-2, -1) / math.sqrt(qkv.shape[-1]) + tower.attn_mask
        x = x + a.out_proj((weights.softmax(-1) @ qkv[2]).transpose(1, 2).reshape(y.shape))
        x = x + block.mlp(block.ln_2(x))
    pooled: Tensor = tower.ln_final(x)[torch.arange(2), last] @ tower.text_projection
    return pooled


def official_picture(
    encoder: Encoder, head: AnomalyClip, positions: Tensor, pixels: Tensor, texts: Tensor
) -> Detection:
    """One picture (1, 3, S, S) in [0, 1]."""
    read, image = head.read, encoder.image
    tower: Any = image.tower
    size, start = pixels.shape[-1], read.first
    x = tower.conv1(encoder.preprocess.normalize(pixels)).flatten(2).transpose(1, 2)
    x = tower.ln_pre(torch.cat([tower.class_embedding.expand(1, 1, -1), x], 1) + positions)
    local, kept = None, {}
    for layer, block in enumerate(tower.transformer.resblocks, start=1):
        values = start is not None and layer >= start
        ordinary, own = attention(block, block.ln_1(x), values=values)
        if own is not None:
            local = (x if local is None else local) + own
        x = x + ordinary
        x = x + block.mlp(block.ln_2(x))
        if layer in read.needed:
            kept[layer] = x if local is None else local
    unit = F.normalize(texts, dim=-1)
    whole = F.normalize(x[:, 0] @ tower.proj, dim=-1)
    score = (whole @ unit.T / read.tau).softmax(-1)[:, 1]
    total = torch.zeros(1, size, size)
    side = size // tower.patch_size[0]
    for found in kept.values():
        patches = F.normalize(tower.ln_post(found) @ tower.proj, dim=-1)
        share = (patches @ unit.T / read.tau).softmax(-1)[:, 1:]
        square = share.reshape(1, side, side, 2).permute(0, 3, 1, 2)
        wide = F.interpolate(square, size, mode="bilinear", align_corners=False).permute(0, 2, 3, 1)
        total += (wide[..., 1] + 1 - wide[..., 0]) / 2
    return Detection(score, torch.from_numpy(gaussian_filter(total[0].numpy(), sigma=read.sigma))[None])


def prepared(case: str, encoder: Encoder, head: AnomalyClip, batch: int) -> Run:
    """A case as a function of all pictures; what it does once for all of them happens inside."""
    detector, size = head.detector(encoder).eval(), batch if case == "ours" else 1

    @torch.no_grad()
    def official(pixels: Tensor) -> Detection:
        positions = detector.reader.dense.positions()
        once, found = official_texts(encoder, head), []
        for one in pixels.split(1):
            texts = once if "once" in case else official_texts(encoder, head)
            found.append(official_picture(encoder, head, positions, one, texts))
        return Detection(torch.cat([f.score for f in found]), torch.cat([f.map for f in found]))

    def ours(pixels: Tensor) -> Detection:
        found = [detect(detector, some) for some in pixels.split(size)]
        return Detection(torch.cat([f.score for f in found]), torch.cat([f.map for f in found]))

    return ours if case.startswith("ours") else official


def check(runs: dict[str, Run], pixels: Tensor) -> float:
    """Largest difference of any case from the first; ends the program above 1e-4."""
    found = {case: run(pixels) for case, run in runs.items()}
    first, worst = next(iter(found.values())), 0.0
    if float(first.map.std()) < 1e-4:
        sys.exit("the maps say nothing, so agreeing means nothing")
    for case, other in found.items():
        gap = max(float((other.score - first.score).abs().max()), float((other.map - first.map).abs().max()))
        if not gap <= 1e-4:
            sys.exit(f"{case} differs from {next(iter(found))} by {gap:.2g}")
        worst = max(worst, gap)
    return worst


def timed(run: Run, pixels: Tensor) -> tuple[float, float]:
    """Wall and CPU seconds per picture."""
    wall, cpu = time.perf_counter(), time.process_time()
    run(pixels)
    return (time.perf_counter() - wall) / len(pixels), (time.process_time() - cpu) / len(pixels)


def peak(case: str, tower: str, batch: int, size: int) -> dict[str, float]:
    """Most memory that this process ever held for one batch's pictures, and how far above its models [MB]."""
    encoder, head = opened(tower, size)
    run, pixels = prepared(case, encoder, head, batch), pictures(batch, size)
    before = held("VmRSS")
    run(pixels)
    whole = held("VmHWM")
    return {"peak_mb": whole, "more_mb": whole - before}


def held(field: str) -> float:
    """Memory of this process [MB]: VmRSS now, VmHWM at most since it began (``ru_maxrss`` counts its parent's too)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1e3


def pictures(count: int, size: int) -> Tensor:
    """(count, 3, S, S) noise."""
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def main() -> None:
    """Compare, time and weigh the cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tower", choices=TOWERS, default="base")
    parser.add_argument("--size", type=int, help="of the input [pixels]; the tower's own when left out")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    size = options.size = options.size or TOWERS[options.tower][1]
    if options.case:
        print(json.dumps(peak(options.case, options.tower, options.batch_size, size)))
        return
    encoder, head = opened(options.tower, size)
    runs = {case: prepared(case, encoder, head, options.batch_size) for case in CASES}
    pixels = pictures(options.images, size)
    apart = check(runs, pixels[: options.batch_size])
    turns = [{case: timed(run, pixels) for case, run in runs.items()} for _ in range(options.turns)]
    del encoder, head, runs
    numbers = {"--batch-size": options.batch_size, "--threads": options.threads, "--size": size}
    shared = ["--tower", options.tower, *(str(word) for pair in numbers.items() for word in pair)]
    memory = {}
    for case in CASES:
        words = [sys.executable, __file__, *shared, "--case", case]
        memory[case] = json.loads(subprocess.run(words, check=True, stdout=subprocess.PIPE).stdout)
    rows = {}
    for case in CASES:
        wall, cpu = (statistics.median(turn[case][k] for turn in turns) for k in (0, 1))
        rows[case] = {
            "images_per_s": 1 / wall,
            "cpu_s_per_image": cpu,
            "wall_times_faster": statistics.median(turn["official"][0] / turn[case][0] for turn in turns),
            "cpu_times_faster": statistics.median(turn["official"][1] / turn[case][1] for turn in turns),
            **memory[case],
            "peak_ratio": memory[case]["peak_mb"] / memory["official"]["peak_mb"],
            "more_ratio": memory[case]["more_mb"] / memory["official"]["more_mb"],
        }
    if options.json:
        print(json.dumps({"settings": vars(options), "cases": rows, "largest_difference": apart, "aim": AIM}))
        return
    print(
        f"{options.tower}, {size} px, {options.images} pictures, {options.turns} turns; outputs differ by {apart:.1e}"
    )
    titles = f"{'case':22}{'images/s':>10}{'wall':>8}{'CPU s':>8}{'CPU':>8}"
    print(f"{titles}{'peak MB':>9}{'ratio':>7}{'more MB':>9}{'ratio':>7}")
    for case, row in rows.items():
        print(
            f"{case:22}{row['images_per_s']:10.2f}{row['wall_times_faster']:7.2f}x{row['cpu_s_per_image']:8.3f}"
            f"{row['cpu_times_faster']:7.2f}x{row['peak_mb']:9.0f}{row['peak_ratio']:7.2f}{row['more_mb']:9.0f}"
            f"{row['more_ratio']:7.2f}"
        )


if __name__ == "__main__":
    main()
