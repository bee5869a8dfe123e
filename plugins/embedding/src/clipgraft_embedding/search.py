"""The nearest rows to some queries: exact in chunks of a mapped file, or by a faiss index whose recall is measured.

Shape legend: q queries, n rows, k hits, D joint embedding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from clipgraft.errors import InputError
from clipgraft_embedding.store import Embeddings

IVF_FROM = 100_000
"""From this number of rows on, the faiss index has lists (IVF) and is no longer exact."""


def exact(found: Embeddings, queries: Tensor, k: int = 10) -> tuple[Tensor, Tensor]:
    """(q, D) of any length -> cosines (q, k) and rows (q, k), best first, equal scores in row order.

    k is at most n. One chunk of rows is in memory at a time.
    """
    queries, k = _units(found, queries), _at_most(found, k)
    best = torch.empty(len(queries), 0), torch.empty(len(queries), 0, dtype=torch.int64)
    for start, rows in found.chunks():
        scores = queries @ rows.T  # (q, m)
        index = torch.arange(start, start + len(rows)).expand(len(queries), -1)
        best = _top(torch.cat([best[0], scores], 1), torch.cat([best[1], index], 1), k)
    return best


def _top(scores: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best of each line, ties in order of ``rows``, which ascend; a full sort is avoided."""
    if scores.shape[1] > 4 * k:
        least = scores.topk(k, dim=1).values[:, -1:]
        width = int((scores >= least).sum(1).max())  # more than k where scores are equal
        order = torch.where(scores >= least, scores, -torch.inf).argsort(dim=1, descending=True, stable=True)[:, :width]
    else:
        order = scores.argsort(dim=1, descending=True, stable=True)
    order = order[:, :k]
    return scores.gather(1, order), rows.gather(1, order)


@dataclass
class FaissIndex:
    """``IndexFlatIP`` below ``ivf_from`` rows, else inverted lists: 4 sqrt(n) of them, ``probes`` are visited."""

    found: Embeddings
    ivf_from: int = IVF_FROM
    probes: int = 32

    def __post_init__(self) -> None:
        try:
            import faiss
        except ImportError:
            raise InputError("--index faiss needs faiss; pip install 'clipgraft-embedding[faiss]'") from None
        n, dim = len(self.found), self.found.about.dim
        self.lists = 0 if n < self.ivf_from else round(4 * n**0.5)
        index: Any = faiss.IndexFlatIP(dim)
        if self.lists:
            index = faiss.IndexIVFFlat(index, dim, self.lists, faiss.METRIC_INNER_PRODUCT)
            index.nprobe = self.probes
            index.train(self._training_rows(40 * self.lists).numpy())
        for _, rows in self.found.chunks():
            index.add(rows.contiguous().numpy())
        self.index = index

    def search(self, queries: Tensor, k: int = 10) -> tuple[Tensor, Tensor]:
        """As ``exact``; a row of -1 says that the visited lists held fewer than k."""
        queries, k = _units(self.found, queries), _at_most(self.found, k)
        scores, rows = self.index.search(queries.contiguous().numpy(), k)
        return torch.from_numpy(scores), torch.from_numpy(rows)

    def recall(self, queries: Tensor, k: int = 10) -> float:
        """The share of the k exact hits of ``queries`` that this index finds too."""
        own, true = self.search(queries, k)[1], exact(self.found, queries, k)[1]
        return float((true[:, :, None] == own[:, None, :]).any(2).float().mean())

    def _training_rows(self, count: int) -> Tensor:
        """(at most ``count``, D): every so many rows."""
        step = max(len(self.found) // count, 1)
        return torch.cat([rows[-start % step :: step] for start, rows in self.found.chunks()])[:count]


def _units(found: Embeddings, queries: Tensor) -> Tensor:
    if queries.ndim != 2 or queries.shape[1] != found.about.dim:
        raise InputError(
            f"queries have the shape {tuple(queries.shape)}, {found.path} holds embeddings of {found.about.dim} "
            "numbers; encode the queries with the model of the file"
        )
    return F.normalize(queries.float(), dim=-1)


def _at_most(found: Embeddings, k: int) -> int:
    if k < 1:
        raise InputError(f"k is {k}; ask for one hit or more")
    return min(k, len(found))
