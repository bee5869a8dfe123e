"""Real images from ordinary wheels: scikit-learn's handwritten digits and scikit-image's photographs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from pydantic import Field
from torch.nn import functional as F

from clipgraft.config.schema import Config
from clipgraft.data.base import Sample
from clipgraft.errors import InputError
from clipgraft_toyworld.captions import DIGITS
from clipgraft_toyworld.world import SPLITS, Split


class DigitsConfig(Config):
    """Handwritten digits."""

    split: Split = Field("train", description="never share a digit")
    size: int = Field(32, ge=8, le=512, description="image side; the originals have 8 [pixels]")


class Digits:
    """`toyworld/digits`: 1,797 real 8 x 8 digits (UCI), enlarged; every fifth is `tune`, the next one `test`."""

    def __init__(self, *, split: Split = "train", size: int = 32) -> None:
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise InputError('digits need scikit-learn; type: pip install "clipgraft-toyworld[real]"') from error
        if split not in SPLITS:
            raise InputError(f"unknown split {split!r}; expected one of {', '.join(SPLITS)}")
        data = load_digits()
        pixels = torch.from_numpy(data.images).float() / 16  # (1797, 8, 8)
        turn = torch.arange(len(pixels)) % 5
        self._rows = torch.nonzero({"train": turn > 1, "tune": turn == 0, "test": turn == 1}[split])[:, 0].tolist()
        large = F.interpolate(pixels[self._rows][:, None], size=(size, size), mode="bilinear")
        self._pixels = large.mul(255).round().to(torch.uint8).expand(-1, 3, -1, -1)
        self._labels = [int(data.target[row]) for row in self._rows]
        self.name = "toyworld/digits"
        self.fingerprint = f"digits-{split}-{size}-{len(self._rows)}"
        self.classes: Sequence[str] = DIGITS
        self.templates: Sequence[str] = ("a photo of the digit {}", "the handwritten number {}", "digit {}")
        self.attributes: Mapping[str, Sequence[str]] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Sample:
        label = self._labels[index]
        return Sample(
            id=f"digit-{self._rows[index]}",
            image=self._pixels[index],
            captions=tuple(template.format(DIGITS[label]) for template in self.templates),
            label=label,
        )
