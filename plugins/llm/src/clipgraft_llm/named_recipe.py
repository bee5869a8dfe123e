"""What the plain recipes of this plugin share: losses by name, a teacher by reference, one stage."""

from __future__ import annotations

from collections.abc import Iterable

from clipgraft.data.base import BadSample, Source, entry_of
from clipgraft.encoders.base import Encoder
from clipgraft.finetune import FinetuneConfig
from clipgraft.losses.base import Loss
from clipgraft.runner import Run

LOOKED_AT = 20
"""Samples that are tried until one can be read."""


def built(run: Run, config: FinetuneConfig) -> tuple[list[Loss], tuple[float, ...]]:
    """The losses of a config, and a weight for each."""
    losses = [run.registry.build("loss", node.use, node.settings) for node in config.losses]
    return losses, config.loss_weights or (1.0,) * len(losses)


def teacher_of(run: Run, reference: str | None) -> Encoder | None:
    """The frozen teacher: ``base`` is the untouched model of the run."""
    if reference is None:
        return None
    return run.base_encoder() if reference == "base" else run.open_encoder(reference)


def named(losses: Iterable[str]) -> set[str]:
    """Losses' names without their plugin."""
    return {name.rpartition("/")[2] for name in losses}


def uncaptioned(source: Source) -> str:
    """A line for a source whose first readable sample has neither caption nor class; empty otherwise."""
    for index in range(min(len(source), LOOKED_AT)):
        try:
            entry = entry_of(source, index)
        except BadSample:
            continue
        if entry.captions or (entry.label is not None and source.classes):
            return ""
        return (
            f"data: {source.name} has no captions; give a csv: with a caption column, or another source with captions"
        )
    return ""
