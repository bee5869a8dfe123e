"""A source whose features are given as numbers: evaluators are tested on it without a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from clipgraft.data.base import Sample


def noise(seed: int, side: int = 32) -> Tensor:
    """A picture of noise, (3, side, side) uint8."""
    return torch.randint(0, 256, (3, side, side), dtype=torch.uint8, generator=Generator().manual_seed(seed))


class Given:
    """n samples with ``labels`` and features ``x`` (n, D), made to length one; source and ``Features`` in one."""

    name = "given"
    templates: Sequence[str] = ()
    attributes: Mapping[str, Sequence[str]] = {}

    def __init__(self, x: Tensor, labels: Sequence[int], *, classes: int | None = None, prefix: str = "s") -> None:
        self.x, self.classes = F.normalize(x, dim=-1), [f"c{k}" for k in range(classes or max(labels) + 1)]
        self.rows = [Sample(f"{prefix}{i}", noise(i), label=int(label)) for i, label in enumerate(labels)]
        self.fingerprint = repr((prefix, list(labels)))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        return self.rows[index]

    def samples(self, source: Given) -> list[Sample]:
        """The samples of ``source``."""
        return source.rows

    def labels(self, source: Given) -> Tensor:
        """(n,) labels of ``source``."""
        return torch.tensor([row.label for row in source.rows])

    def images(self, source: Given) -> Tensor:
        """(n, D) features of ``source``."""
        return source.x
