"""CPU time of a ViT's image tower under what torch offers to make it faster: layouts, attention, compiling, bf16.

Random weights, one batch of noise pixels, one thread. Options take turns in one process, block by block; per option the
median over blocks of its CPU time over plain eager fp32 in the same block counts. ``error`` is the largest 1 - cosine
to eager fp32. Compiled options are also started in a process of their own, twice on one cache: what the first call
costs beyond the usual call (cold, then with inductor's files there), what a batch of another size costs, and after how
many images the cold start is won back from the same option without compiling. ``--train`` measures a step instead:
forward, backward, clipping and fused AdamW.

    OMP_NUM_THREADS=1 python benchmarks/inference_options.py [--model ViT-B-32] [--batch-size 32] [--repeats 3]
        [--only NAME,NAME] [--train] [--json | --markdown]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from table import table
from usage import cpu_seconds

PLAIN = "eager fp32"
COMPILED = {
    "compile": PLAIN,
    "compile, frozen": PLAIN,
    "compile bf16": "bf16 weights",
    "compile bf16, frozen": "bf16 weights",
    "compile autocast": "bf16 autocast",
}
"""Compiled options, and what each is without compiling."""
OPTIONS = (
    PLAIN, "inference mode", "no fast path", "written attention", "matmul patches", "channels last", "class token only",
    "medium matmuls", "compile", "compile, frozen", "bf16 weights", "bf16 class token", "bf16 autocast", "compile bf16",
    "compile bf16, frozen", "compile autocast",
)  # fmt: skip
CACHE = "TORCHINDUCTOR_CACHE_DIR"
STEPS = ("plain", "compile", "bf16 autocast", "compile autocast")


@dataclass
class Option:
    """A way from pixels (B, 3, H, W') to embeddings (B, D), and what surrounds its calls."""

    encode: Callable[[Any], Any]
    around: Callable[[], Any]


@contextmanager
def eager() -> Iterator[None]:
    import torch

    with torch.no_grad():
        yield


@contextmanager
def autocast() -> Iterator[None]:
    import torch

    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        yield


@contextmanager
def medium() -> Iterator[None]:
    """fp32 products may be computed from bf16 factors."""
    import torch

    torch.set_float32_matmul_precision("medium")
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_float32_matmul_precision("highest")


@contextmanager
def slow_path() -> Iterator[None]:
    import torch

    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def written(image: Any) -> Callable[[Any], Any]:
    """The same tower with attention as one product for queries, keys and values and torch's fused kernel."""
    from torch.nn import functional as F

    tower = image.tower

    def attend(attn: Any, x: Any) -> Any:
        batch, length, width = x.shape
        parts = F.linear(x, attn.in_proj_weight, attn.in_proj_bias).view(batch, length, 3, attn.num_heads, -1)
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, width)
        return attn.out_proj(mixed)

    def encode(pixels: Any) -> Any:
        x = tower._embeds(pixels)
        for block in tower.transformer.resblocks:
            x = x + block.ls_1(attend(block.attn, block.ln_1(x)))
            x = x + block.ls_2(block.mlp(block.ln_2(x)))
        return tower._pool(x)[0] @ tower.proj

    return encode


def as_products(image: Any) -> Any:
    """The same tower whose first convolution is cut into patches and multiplied."""
    from torch import nn
    from torch.nn import functional as F

    class Patches(nn.Module):
        def __init__(self, conv: Any) -> None:
            super().__init__()
            self.conv, self.weight = conv, conv.weight

        def forward(self, pixels: Any) -> Any:
            batch, channels, height, width = pixels.shape
            side = self.conv.kernel_size[0]
            h, w = height // side, width // side
            cut = pixels.view(batch, channels, h, side, w, side).permute(0, 2, 4, 1, 3, 5).reshape(batch, h * w, -1)
            return F.linear(cut, self.weight.flatten(1)).transpose(1, 2).unflatten(2, (h, w))

    twin = without_copies(image)
    twin.tower.conv1 = Patches(twin.tower.conv1)
    return twin


def without_copies(image: Any) -> Any:
    """A second module over the same tensors."""
    return deepcopy(image, {id(p): p for p in image.parameters()})


def option(name: str, image: Any) -> Option:
    """``name`` of ``OPTIONS`` over the image tower, compiled on its first call where it is compiled."""
    import torch

    def pooled(tower: Any) -> Callable[[Any], Any]:
        return lambda pixels: tower(pixels).pooled

    def short(tower: Any) -> Callable[[Any], Any]:
        from clipgraft_embedding.tower import _class_token_only

        return lambda pixels: _class_token_only(tower, pixels.to(next(tower.parameters()).dtype))

    def bf16() -> Any:
        return deepcopy(image).bfloat16()

    if name in COMPILED:
        around = autocast if "autocast" in name else eager
        tower = bf16() if "bf16" in name else image
        frozen = {"options": {"freezing": True}} if "frozen" in name else {}
        compiled = torch.compile(pooled(tower), **frozen)
        return Option((lambda x: compiled(x.bfloat16())) if "bf16" in name else compiled, around)
    if name == "written attention":
        return Option(written(image), eager)
    if name == "matmul patches":
        return Option(pooled(as_products(image)), eager)
    if name == "channels last":
        twin = deepcopy(image)
        twin.tower.conv1 = twin.tower.conv1.to(memory_format=torch.channels_last)
        return Option(lambda x: twin(x.to(memory_format=torch.channels_last)).pooled, eager)
    if name in ("class token only", "bf16 class token"):
        return Option(short(bf16() if "bf16" in name else image), eager)
    if name == "bf16 weights":
        half = bf16()
        return Option(lambda x: half(x.bfloat16()).pooled, eager)
    around = {"inference mode": torch.inference_mode, "no fast path": slow_path, "medium matmuls": medium,
              "bf16 autocast": autocast}.get(name, eager)  # fmt: skip
    return Option(pooled(image), around)


def opened(model: str) -> Any:
    """An encoder with random weights."""
    import torch

    from clipgraft.encoders import load
    from clipgraft.testing.tiny import tiny_clip

    torch.set_num_threads(1)
    torch.manual_seed(0)
    return (tiny_clip(image_size=64, width=128, depth=4) if model == "tiny" else load(f"open_clip:{model}")).eval()


def noise(encoder: Any, count: int) -> Any:
    import torch

    return torch.randn(count, 3, *encoder.preprocess.size, generator=torch.Generator().manual_seed(1))


def timed(run: Callable[[], Any]) -> tuple[float, float, Any]:
    """CPU seconds, wall seconds, result."""
    cpu, wall = cpu_seconds(), time.perf_counter()
    found = run()
    return cpu_seconds() - cpu, time.perf_counter() - wall, found


def steps(encoder: Any, size: int) -> dict[str, Callable[[], Any]]:
    """A training step of the image tower in each way of ``STEPS``, over shared weights; returns the loss."""
    import torch
    from torch.nn import functional as F

    encoder.text = None
    image, pixels = encoder.image.train(), noise(encoder, size)
    target = F.normalize(torch.randn(size, image.embed_dim), dim=-1)
    optimizer = torch.optim.AdamW(image.parameters(), lr=1e-6, fused=True)

    def step(forward: Callable[[Any], Any], half: bool) -> Any:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            found = forward(pixels)
        loss = 1 - (F.normalize(found.float(), dim=-1) * target).sum(-1).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(image.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()[None, None]

    def plain(x: Any) -> Any:
        return image(x).pooled

    ways = {name: torch.compile(plain) if "compile" in name else plain for name in STEPS}
    return {name: lambda f=f, half="autocast" in name: step(f, half) for name, f in ways.items()}  # type: ignore[misc]


def calls(options: argparse.Namespace, names: list[str]) -> dict[str, Callable[[int], Any]]:
    """One call per name: its argument is how many images it takes (training ignores it)."""
    encoder = opened(options.model)
    if options.train:
        return {name: lambda _, run=run: run() for name, run in steps(encoder, options.batch_size).items()}  # type: ignore[misc]
    encoder.text = None
    pixels = noise(encoder, options.batch_size)

    def caller(way: Option) -> Callable[[int], Any]:
        def run(count: int) -> Any:
            with way.around():
                return way.encode(pixels[:count]).float()

        return run

    return {name: caller(option(name, encoder.image)) for name in names}


def start(name: str, options: argparse.Namespace) -> dict[str, float]:
    """What the first call of a compiled option costs in this process, and a batch of another size."""
    run, size = calls(options, [name])[name], options.batch_size
    first, first_wall, _ = timed(lambda: run(size))
    usual, usual_wall = min(timed(lambda: run(size))[:2] for _ in range(2))
    found = {"cpu_seconds": first - usual, "wall_seconds": first_wall - usual_wall}
    if not options.train and size > 3:
        other = timed(lambda: run(size - 3))[0] - usual
        found["other_size_cpu_seconds"] = max(other, 0.0)
    found["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return found


def starts(name: str, options: argparse.Namespace, cache: Path) -> dict[str, dict[str, float]]:
    """``start`` in processes of its own: with an empty ``cache`` of inductor, then with what the first one left."""
    found = {}
    for case in ("cold", "warm"):
        print(f"{case} start of {name}", file=sys.stderr)
        command = [sys.executable, __file__, "--start", name, "--model", options.model]
        command += ["--batch-size", str(options.batch_size)] + ["--train"] * options.train
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, CACHE: str(cache)})
        if done.returncode:
            sys.exit(f"{name} could not be compiled: {done.stderr.strip().splitlines()[-1]}")
        found[case] = json.loads(done.stdout.splitlines()[-1])
    return found


def measured(options: argparse.Namespace, names: list[str], folder: Path) -> dict[str, dict[str, Any]]:
    """Rows by option; ``folder`` takes what is compiled."""
    from torch.nn import functional as F

    size, base = options.batch_size, "plain" if options.train else PLAIN
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    started = {n: starts(n, options, folder / n.replace(" ", "-")) for n in names if n in COMPILED}
    ways = {name: run for name, run in calls(options, names).items() if name in names}
    rows: dict[str, dict[str, Any]] = {}
    exact = ways[base](size)
    for name, run in ways.items():
        print(f"first call of {name}", file=sys.stderr)
        os.environ[CACHE] = str(folder / name.replace(" ", "-"))  # inductor reads it whenever it compiles
        found = run(size)
        rows[name] = {"blocks": [], "wall": []}
        if not options.train:
            rows[name]["error"] = max(float((1 - F.cosine_similarity(found.double(), exact.double())).max()), 0.0)
    for turn in range(options.repeats):
        for name, run in ways.items():
            cpu, wall, _ = timed(lambda run=run: run(size))
            rows[name]["blocks"].append(cpu)
            rows[name]["wall"].append(wall)
        print(f"turn {turn + 1} of {options.repeats}", file=sys.stderr)
    plain = rows[base]["blocks"]
    for row in rows.values():
        row["cpu_ms_per_image"] = statistics.median(row["blocks"]) / size * 1e3
        row["times_as_fast"] = statistics.median(p / b for p, b in zip(plain, row["blocks"], strict=True))
        row["spread"] = [min(x := [p / b for p, b in zip(plain, row["blocks"], strict=True)]), max(x)]
    for name, found in started.items():
        same = ("bf16 autocast" if "autocast" in name else "plain") if options.train else COMPILED[name]
        rows[name]["start"] = found
        if same in rows:
            gain = (rows[same]["cpu_ms_per_image"] - rows[name]["cpu_ms_per_image"]) / 1e3
            rows[name]["pays_after_images"] = round(found["cold"]["cpu_seconds"] / gain) if gain > 0 else None
    return rows


def cells_of(rows: dict[str, dict[str, Any]], *, train: bool) -> list[list[str]]:
    """Header and cells."""
    head = ["step" if train else "option", "CPU ms per image", "times as fast", "blocks from", "to"]
    head += [] if train else ["error"]
    cells = [[*head, "start, CPU s", "start, warm", "pays after images"]]
    for name, row in rows.items():
        low, high = row["spread"]
        line = [name, f"{row['cpu_ms_per_image']:.1f}", f"{row['times_as_fast']:.2f}", f"{low:.2f}", f"{high:.2f}"]
        line += [] if train else [f"{row['error']:.0e}"]
        if begun := row.get("start"):
            pays = row.get("pays_after_images")
            line += [f"{begun[k]['cpu_seconds']:.1f}" for k in ("cold", "warm")]
            line.append("never" if pays is None else f"{pays:,}")
        else:
            line += ["", "", ""]
        cells.append(line)
    return cells


def main() -> None:
    """Print the table, markdown or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-B-32", help="open_clip architecture with random weights, or tiny")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", help="options, comma or semicolon separated (names with a comma: semicolons)")
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--start", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.start:
        print(json.dumps(start(options.start, options)))
        return
    known = STEPS if options.train else OPTIONS
    asked = [n.strip() for n in (options.only or ";".join(known)).split(";" if ";" in (options.only or ";") else ",")]
    if odd := [name for name in asked if name not in known]:
        parser.error(f"{odd[0]!r} is none of: {'; '.join(known)}")
    with tempfile.TemporaryDirectory() as folder:
        rows = measured(options, [known[0], *(n for n in known[1:] if n in asked)], Path(folder))
    if options.json:
        print(json.dumps({"model": options.model, "batch_size": options.batch_size, "options": rows}))
        return
    header, *cells = cells_of(rows, train=options.train)
    print(table(header, cells, markdown=options.markdown))


if __name__ == "__main__":
    main()
