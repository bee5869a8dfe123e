"""Contrastive batches at equal memory: the two-pass step (``train.accumulate``) against the plain one and open_clip's.

A batch of k chunks is encoded twice, without a graph for the loss over all of it, then chunk by chunk with the
gradients of the features (``Trainer.fit``); open_clip's ``--accum-freq`` does likewise, but computes the whole loss k
times. For a limit of memory, the largest plain batch and the largest chunk of the other cases are searched for, in
multiples of 4; so the batch of k chunks is what the same memory gives. Memory is the peak of RssAnon above the model's
weights (gradients, AdamW's averages, activations, the batch), each case in a process of its own whose allocator returns
what is freed.

Time is CPU milliseconds per sample at those batches; blocks take turns in one process on one thread, a case counts with
its fastest step. The encoders' forward runs twice, so 4/3 is what arithmetic says. Bound: 1.45. The gradient of a whole
batch in k chunks must equal that of one plain step to 1e-5 of each tensor's largest entry, else the program ends; by
what open_clip's differs is told.

    python benchmarks/two_pass.py [--memory 150] [--chunks 4 16] [--model small] [--blocks 3] [--json | --markdown]
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

from open_clip_loop import KEEP, Steps, alone, noise, opened, ours, stage_of, theirs, twin
from table import table
from usage import Peak

BOUND = 1.45
GRANULE = 4
"""Batches and chunks are multiples of this."""
RETURN = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_TOP_PAD_": "0"}
"""For glibc: memory that is freed goes back at once, so that the peak is what lives."""


def steps_of(loop: str, opening: tuple[Any, Any], *, size: int, chunks: int, steps: int, grads: bool = False) -> Steps:
    """``steps`` steps of ``loop`` ("clipgraft" or "open_clip") on one batch of ``chunks`` chunks of ``size``."""
    from clipgraft.config.schema import TrainConfig

    encoder, model = opening
    config = TrainConfig(
        steps=steps,
        batch_size=size * chunks,
        accumulate=chunks,
        lr=1e-5,
        schedule="constant",
        clip_norm=None if grads else 1.0,
    )
    batch = noise(encoder, batches=1, size=size * chunks)[0]
    if loop == "clipgraft":
        with tempfile.TemporaryDirectory() as folder:
            return ours(stage_of(encoder, config), [batch], Path(folder) / "run", precision="fp32", grads=grads)
    parts = [batch[slice(k * size, (k + 1) * size)] for k in range(chunks)]
    del batch
    return theirs(model, parts, encoder, config, precision="fp32", grads=grads)


def largest(loop: str, name: str, *, chunks: int, limit: float) -> dict[str, float]:
    """The largest chunk whose steps stay below ``limit`` [MB] in this process, and their peak [MB].

    A straight line through two small ones says where to look; its neighbour must be too large.
    """
    import torch

    torch.set_num_threads(1)
    encoder = opened(name)
    opening, tried = (encoder, twin(encoder) if loop == "open_clip" else None), dict[int, float]()

    def at(size: int, *, chunks: int = chunks) -> float:
        if size not in tried:
            with Peak() as found:
                steps_of(loop, opening, size=size, chunks=chunks, steps=2)
            for module in filter(None, opening):
                module.zero_grad(set_to_none=True)
            gc.collect()
            tried[size] = found.value - found.start
        return tried[size]

    at(GRANULE, chunks=1)  # libraries load and take their buffers
    tried.clear()
    low, high = GRANULE, 3 * GRANULE
    slope = (at(high) - at(low)) / (high - low)
    size = max(GRANULE, int((limit - at(high)) / slope + high) // GRANULE * GRANULE)
    while at(size) > limit and size > GRANULE:
        size -= GRANULE
    while at(size + GRANULE) <= limit:
        size += GRANULE
    return {"chunk": size, "samples_per_step": size * chunks, "peak_mb": round(at(size), 1)}


def gradients(name: str, *, size: int, chunks: int) -> dict[str, float]:
    """How far the gradients of a batch in chunks lie from the plain step's: of any tensor, and open_clip's scale's."""
    encoder = opened(name)
    model = twin(encoder)
    start, other = ({k: v.clone() for k, v in m.state_dict().items()} for m in (encoder, model))
    found = {}
    for key, loop, k in (("plain", "clipgraft", 1), ("ours", "clipgraft", chunks)):
        encoder.load_state_dict(start)
        found[key] = steps_of(loop, (encoder, model), size=size * chunks // k, chunks=k, steps=1, grads=True).grads
    whole, two = found["plain"], found["ours"]
    if whole.keys() != two.keys():
        sys.exit("a parameter has a gradient in one way alone")
    worst = max(float((two[k] - g).abs().max() / g.abs().max().clamp_min(1e-12)) for k, g in whole.items())
    if not worst <= 1e-5:
        sys.exit(f"a gradient of the two passes differs from the plain step's by {worst:.1e} of its largest entry")
    model.load_state_dict(other)
    plain = steps_of("open_clip", (encoder, model), size=size * chunks, chunks=1, steps=1, grads=True).grads
    model.load_state_dict(other)
    peer = steps_of("open_clip", (encoder, model), size=size, chunks=chunks, steps=1, grads=True).grads
    rest = max(float((peer[k] - g).abs().max() / g.abs().max()) for k, g in plain.items() if k != "logit_scale")
    scale = float(peer["logit_scale"] / plain["logit_scale"])
    return {"ours": worst, "open_clip": rest, "open_clip_logit_scale_times": scale}


def times(name: str, cases: list[tuple[str, int, int]], blocks: int) -> dict[str, Any]:
    """CPU milliseconds per sample of (loop, chunk, chunks), and the gradients' differences, in this process."""
    import torch

    torch.set_num_threads(1)
    apart = gradients(name, size=2 * GRANULE, chunks=4)
    encoder = opened(name)
    opening, best = (encoder, twin(encoder)), [float("inf")] * len(cases)
    for _ in range(blocks):
        for k, (loop, size, chunks) in enumerate(cases):
            ticks = steps_of(loop, opening, size=size, chunks=chunks, steps=6 if chunks == 1 else 3).ticks[1:]
            taken = min(b - a for a, b in pairwise(ticks))
            best[k] = min(best[k], 1e3 * taken / (size * chunks))
    return {"ms": best, "gradients": apart}


def main() -> None:
    """Search, time and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", type=float, default=150, help="MB above the model")
    parser.add_argument("--chunks", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--model", default="small", help="small, or an architecture of open_clip's")
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--search", help=argparse.SUPPRESS)
    parser.add_argument("--times", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.search:
        print(json.dumps(largest(options.search, options.model, chunks=options.chunks[0], limit=options.memory)))
        return
    if options.times:
        print(json.dumps(times(options.model, json.loads(options.times), options.blocks)))
        return
    loops = [("plain", "clipgraft", 1), *((f"two passes, {k} chunks", "clipgraft", k) for k in options.chunks)]
    loops += [(f"open_clip --accum-freq {k}", "open_clip", k) for k in options.chunks]
    rows: dict[str, dict[str, float]] = {}
    for case, loop, chunks in loops:
        words = ("--search", loop, "--chunks", chunks, "--memory", options.memory, "--model", options.model)
        rows[case] = alone(__file__, *words, **RETURN)
        print(f"{case}: {rows[case]}", file=sys.stderr)
    cases = [(loop, rows[case]["chunk"], chunks) for case, loop, chunks in loops]
    words = ("--times", json.dumps(cases), "--model", options.model, "--blocks", options.blocks)
    found = alone(__file__, *words, **KEEP)
    for row, ms in zip(rows.values(), found["ms"], strict=True):
        row |= {"cpu_ms_per_sample": round(ms, 3), "ratio": round(ms / found["ms"][0], 3)}
        row["times_the_batch"] = round(row["samples_per_step"] / rows["plain"]["samples_per_step"], 2)
    apart = found["gradients"]
    first, peers = options.chunks[0], found["ms"][1 + len(options.chunks) :]
    result = {"model": options.model, "memory_mb": options.memory, "cases": rows, "gradients": apart}
    result |= {"ratio": rows[f"two passes, {first} chunks"]["ratio"], "bound": BOUND}
    result["of_open_clip"] = round(found["ms"][1] / peers[0], 3)
    result["times_the_batch"] = rows[f"two passes, {options.chunks[-1]} chunks"]["times_the_batch"]
    if options.json:
        print(json.dumps(result))
        return
    header = ("step", "samples", "times plain", "chunk", "peak MB", "CPU ms per sample", "ratio")
    keys = ("samples_per_step", "times_the_batch", "chunk", "peak_mb", "cpu_ms_per_sample", "ratio")
    print(table(header, [(case, *(row[k] for k in keys)) for case, row in rows.items()], markdown=options.markdown))
    print(
        f"\nthe gradient of a whole batch in 4 chunks: two passes differ by {apart['ours']:.0e} of a tensor's largest "
        f"entry, open_clip's by {apart['open_clip']:.0e} but for its logit_scale's, which is "
        f"{apart['open_clip_logit_scale_times']:.2f} times the whole's; bound of the ratio {BOUND}"
    )


if __name__ == "__main__":
    main()
