"""Which precision to compute in, by encoding a few inputs of the data in fp32 and in bf16."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from clipgraft.data.base import Source
from clipgraft.encoders.base import Encoder
from clipgraft.errors import ClipgraftError
from clipgraft.log import RunLog
from clipgraft_embedding.stream import Span, read
from clipgraft_embedding.tower import Kind, Precision, Tower

FASTER = 1.15
"""``auto`` takes bf16 from this measured ratio on: below it the gain isn't worth the rounding."""
CLOSE = 1e-3
"""``auto`` takes bf16 up to this largest 1 - cosine to fp32."""
PROBE = 8
"""Inputs that are compared, at most."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A precision and why: ``error`` is the largest 1 - cosine of the chosen one to fp32 over ``probed`` inputs.

    ``text`` says it to people, with the speed of bf16 over fp32 where that was measured.
    """

    precision: Precision
    error: float = 0.0
    probed: int = 0
    text: str = ""


def settle(encoder: Encoder, source: Source, *, kind: Kind, asked: str, most: int, log: RunLog) -> Choice:
    """The precision for ``source`` when ``asked`` is auto, fp32 or bf16; what was measured is said on ``log``."""
    if asked == "fp32":
        return Choice("fp32")
    some = [Span(0, index, index + 1) for index in range(min(len(source), 8 * PROBE))]
    found = read(source, some, kind=kind, preprocess=encoder.preprocess)
    good = list(islice((rows for rows in found if rows.ids), min(most, PROBE)))
    pixels = [rows.pixels for rows in good if rows.pixels is not None]
    probe: Tensor | list[str] = torch.cat(pixels) if pixels else [rows.captions[0] for rows in good]
    choice = choose(encoder, kind, asked, probe)
    log.info(f"precision {choice.text}")
    return choice


def choose(encoder: Encoder, kind: Kind, asked: str, probe: Tensor | Sequence[str]) -> Choice:
    """``auto`` is bf16 where that is ``FASTER`` and ``CLOSE``; ``bf16`` that isn't finite is an error."""
    if not len(probe):
        precision: Precision = "fp32" if asked == "auto" else "bf16"
        return Choice(precision, text=f"{precision}; nothing was there to compare")
    inputs = probe if isinstance(probe, Tensor) else list(probe)
    full, half = Tower(encoder, kind), Tower(encoder, kind, "bf16")
    exact, rounded = full(inputs), half(inputs)  # which warms both up
    error = float((1 - (exact.double() * rounded.double()).sum(-1)).clamp(min=0).max())
    parity = f"max cosine error of bf16 to fp32 {error:.1e} over {len(probe)}"
    if asked == "bf16":
        if not error < 1:  # NaN too
            raise ClipgraftError("this model has no usable embeddings in bf16 (not finite, or opposite); use fp32")
        return Choice("bf16", error, len(probe), f"bf16; {parity}")
    seconds = {"fp32": float("inf"), "bf16": float("inf")}
    for _ in range(2):
        for tower in (full, half):
            start = time.perf_counter()
            tower(inputs)
            seconds[tower.precision] = min(seconds[tower.precision], time.perf_counter() - start)
    ratio = seconds["fp32"] / seconds["bf16"]
    text = f"{parity}, {ratio:.2f}x as fast"
    if ratio >= FASTER and error <= CLOSE:
        return Choice("bf16", error, len(probe), f"bf16; {text}")
    return Choice("fp32", 0.0, len(probe), f"fp32; {text}")
