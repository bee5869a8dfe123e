"""One caption for two readers: CLIP's text tower and the generator's text encoder.

The loader draws a caption and tokenises it for CLIP. ``TwiceRead`` adds every caption's ids for both tokenizers to the
sample, so that the drawn one can be found again by its CLIP ids: weights, epochs, ranks and resuming stay the loader's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from clipgraft.data.base import BadSample, Sample, Source
from clipgraft.errors import ClipgraftError, InputError
from clipgraft.types import Batch

Read = Callable[[Sequence[str]], Tensor]
"""Texts -> ids (n, L) int64."""
KEY = "captions_twice"
"""Name in ``Sample.extra``: (K, L + L') int64, CLIP's ids first; the captions are repeated until there are K."""


class TwiceRead:
    """``source`` with the first ``most`` captions of every image, and their ids by both tokenizers in ``extra``."""

    def __init__(self, source: Source, *, clip: Read, other: Read, most: int) -> None:
        self.source, self.clip, self.other, self.most = source, clip, other, most
        self.name = source.name
        self.fingerprint = f"{source.fingerprint}[{most} captions read twice]"
        self.classes: Sequence[str] = source.classes
        self.templates: Sequence[str] = source.templates
        self.attributes: Mapping[str, Sequence[str]] = source.attributes

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Sample:
        sample = self.source[index]
        require_caption(self.source, sample)
        captions = sample.captions[: self.most]
        ids = torch.cat([self.clip(captions), self.other(captions)], 1)  # (k, L + L')
        rows = torch.arange(self.most) % len(captions)
        return replace(
            sample,
            captions=captions,
            caption_weights=sample.caption_weights[: self.most],
            extra={**sample.extra, KEY: ids[rows]},
        )


def other_ids(batch: Batch) -> Tensor:
    """The other tokenizer's ids (B, L') of the caption whose CLIP ids are in ``batch.text`` (B, L)."""
    assert batch.text is not None
    both, length = batch.extra[KEY], batch.text.shape[1]
    same = (both[..., :length] == batch.text[:, None]).all(-1)  # (B, K)
    which = same.int().argmax(1)  # the first of equal ones
    return both[torch.arange(len(both), device=both.device), which, length:]


def refuse_strangers(batch: Batch) -> None:
    """Raise when a text of ``batch`` is none of its image's captions: two tokenizers of the model would disagree."""
    assert batch.text is not None
    known = (batch.extra[KEY][..., : batch.text.shape[1]] == batch.text[:, None]).all(-1).any(1)
    if not bool(known.all()):
        raise ClipgraftError(f"the text of {batch.ids[int((~known).int().argmax())]} is none of its captions")


def require_caption(source: Source, sample: Sample) -> None:
    """Refuse an image without a caption; class names would tell the generator nothing new."""
    if not sample.captions:
        raise InputError(
            f"{source.name}: {sample.id} has no caption; SDS-CLIP learns from captioned images, such as csv:FILE with "
            "a caption column"
        )


def caption_problems(source: Source) -> list[str]:
    """Judged by the first readable sample."""
    for index in range(len(source)):
        try:
            require_caption(source, source[index])
        except BadSample:
            continue
        except InputError as error:
            return [str(error)]
        break
    return []
