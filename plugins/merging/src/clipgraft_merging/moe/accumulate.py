"""Accumulated clusters: what earlier models found alike stays together, and each stage splits it further. n samples."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from clipgraft.data.base import Sample, Source

UNKNOWN = -1
"""Label of a sample that could not be read."""


def pair_labels(image: Tensor, text: Tensor, *, clusters: int) -> Tensor:
    """(n,) clusters of images and of texts -> (n,) their combination, text * clusters + image."""
    return text * clusters + image


def accumulated(parent: Tensor | None, new: Tensor, *, minimum: int, features: Tensor) -> Tensor:
    """(n,) labels so far, or None, and (n,) labels of this stage -> (n,) labels of both, from 0 without gaps.

    A cluster of fewer than ``minimum`` samples joins the one nearest in ``features`` (n, D) among those with the same
    parent, smallest first: none is dropped, and equal labels now still mean equal labels before. Only a parent that is
    too small itself keeps a child that is.
    """
    parent = torch.zeros_like(new) if parent is None else parent
    _, labels = torch.unique(parent * (int(new.max()) + 1) + new, return_inverse=True)
    count = int(labels.max()) + 1
    home = torch.zeros(count, dtype=parent.dtype).scatter_(0, labels, parent)
    sizes = labels.bincount(minlength=count)
    sums = torch.zeros(count, features.shape[1], dtype=torch.float64).index_add_(0, labels, features.double())
    into = torch.arange(count)
    while True:
        siblings = home[sizes > 0].bincount(minlength=int(home.max()) + 1)[home]
        tiny = ((sizes > 0) & (sizes < minimum) & (siblings > 1)).nonzero().flatten()
        if not len(tiny):
            break
        small = int(tiny[sizes[tiny].argmin()])
        centers = sums / sizes.clamp(min=1)[:, None]
        distance = (centers - centers[small]).square().sum(1)
        distance[(home != home[small]) | (sizes == 0)] = torch.inf
        distance[small] = torch.inf
        target = int(distance.argmin())
        sums[target] += sums[small]
        sizes[target] += sizes[small]
        sizes[small], into[into == small] = 0, target
    return torch.unique(into[labels], return_inverse=True)[1]


class OneClusterAtATime:
    """A source whose batches of ``size`` samples each come from one cluster.

    Per epoch every cluster of m samples gives m // size batches, drawn anew; what is left over waits for another epoch.
    ``labels`` (n,), ``UNKNOWN`` where nothing is known. All ranks see the same order, since the loader plans it.
    """

    def __init__(self, source: Source, labels: Tensor, *, size: int) -> None:
        self.source, self.together = source, size
        self.name, self.fingerprint = source.name, f"{source.fingerprint}/clusters"
        self.classes, self.templates, self.attributes = source.classes, source.templates, source.attributes
        members = [(labels == k).nonzero().flatten().tolist() for k in range(int(labels.max()) + 1)]
        kept = [rows for rows in members if len(rows) >= size]
        self.quotas: Sequence[tuple[Sequence[int], int]] = [(rows, len(rows) // size * size) for rows in kept]
        self.left_out = sum(len(rows) for rows in members) - sum(len(rows) for rows in kept)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Sample:
        return self.source[index]


def joint(images: Tensor, texts: Tensor) -> Tensor:
    """(n, D) each -> (n, 2 D) of unit halves: where a sample stands for both towers."""
    return torch.cat([F.normalize(images, dim=-1), F.normalize(texts, dim=-1)], dim=1)
