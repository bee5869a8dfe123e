"""A plugin's own graft on a run's encoder, under its name, so that the export rebuilds it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from clipgraft.config.schema import Config, GraftNode
from clipgraft.encoders import apply_grafts
from clipgraft.encoders.base import Encoder
from clipgraft.errors import ClipgraftError

if TYPE_CHECKING:
    from clipgraft.runner import Run


def grafted(run: Run, name: str, settings: Config) -> Encoder:
    """The run's encoder with ``name``, unless it has it already (a model that was trained so before)."""
    encoder = run.encoder
    if any(applied.name == name for applied in encoder.data.grafts):
        return encoder
    return apply_grafts(encoder, [GraftNode(use=name, **settings.model_dump())], run.registry)


class Fitting(Protocol):
    """A graft's settings that can tell whether they suit an encoder."""

    def fits(self, encoder: Encoder) -> None:
        """``InputError`` with the fix when they don't; the encoder stays as it is."""


def unfit(run: Run, name: str, settings: Fitting) -> list[str]:
    """Why ``grafted`` would fail, before any work."""
    if any(applied.name == name for applied in run.encoder.data.grafts):
        return []
    try:
        settings.fits(run.encoder)
    except ClipgraftError as error:
        return [str(error)]
    return []


def has_frames(settings_frames: int, data_frames: int | None, *, what: str) -> list[str]:
    """A line when a method's number of frames isn't that of the data."""
    if data_frames is None or data_frames == settings_frames:
        return []
    return [f"{what}: the method has frames={settings_frames}, data.from gives {data_frames}; make them equal"]
