"""Videos of a source once through, as batches of clips, in worker processes where that is worth it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Literal

from torch import Tensor

from clipgraft.data.base import BadSample, Sample, Source
from clipgraft.data.loader import BadSamples
from clipgraft.data.reading import read, stack_images, without_images
from clipgraft.errors import InputError
from clipgraft_video.sources import Videos


class Clips:
    """One view of every video of ``source``, with the frames (T, 3, S, S) in the place of the image."""

    def __init__(
        self, source: Source, *, view: int = 0, views: int = 1, crop: int = 0, crops: Literal[1, 3] = 1
    ) -> None:
        if (views, crops) != (1, 1) and not isinstance(source, Videos):
            raise InputError(f"{source.name} gives clips that are already cut; several views need video files")
        self.source, self.name, self.fingerprint = source, source.name, source.fingerprint
        self.classes: Sequence[str] = source.classes
        self.templates: Sequence[str] = source.templates
        self.attributes: Mapping[str, Sequence[str]] = source.attributes
        self._view = {"view": view, "views": views, "crop": crop, "crops": crops}

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Sample:
        if isinstance(self.source, Videos) and (self._view["views"], self._view["crops"]) != (1, 1):
            file = self.source.files[index]
            frames = self.source.view(index, **self._view)  # type: ignore[arg-type]
            return Sample(file.id, frames, file.captions, file.label)
        sample = self.source[index]
        if "frames" not in sample.extra:
            raise InputError(
                f"{self.name} holds pictures, no videos; use video:DIR, video:LIST, msrvtt:DIR or toyworld/videos"
            )
        return replace(sample, image=sample.extra["frames"], extra={})


def as_it_is(frames: Tensor) -> Tensor:
    """Clips need no transform."""
    return frames


def clip_batches(
    clips: Clips, *, batch_size: int, bad: BadSamples, workers: int | None = None, rank: int = 0, world: int = 1
) -> Iterator[tuple[list[Sample], Tensor]]:
    """This rank's videos once, in order: what is known of them, and (b, T, 3, S, S) uint8; others go to ``bad``."""
    starts = range(0, len(clips), batch_size)
    starts = starts[rank * len(starts) // world : (rank + 1) * len(starts) // world]
    places = [range(start, min(start + batch_size, len(clips))) for start in starts]
    for part in read(clips, as_it_is, places, workers=workers, world=world):
        for index, error in part.bad.items():
            bad.add(index, error if isinstance(error, BadSample) else BadSample(str(index), str(error)))
        if part.items:
            yield (
                [item for item in map(without_images, part.items) if isinstance(item, Sample)],
                stack_images(part.items),
            )
