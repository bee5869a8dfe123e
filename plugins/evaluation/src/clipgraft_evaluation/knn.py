"""Classification by the nearest images (Wu et al. 2018, arXiv 1805.01978; DINO, Caron et al. 2021, arXiv 2104.14294).

q queries, m training images, D width, K classes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from clipgraft.config.schema import Config
from clipgraft.data import open_source
from clipgraft.data.base import Sample, Source
from clipgraft.errors import InputError
from clipgraft.evaluation.base import Evaluation
from clipgraft.evaluation.features import EncoderFeatures
from clipgraft.evaluation.statistics import Share
from clipgraft.log import Bar, RunLog

Vote = Literal["majority", "weighted"]

QUERIES, NEIGHBOURS = 1024, 16384
"""Queries and training images compared at a time: 128 MiB of similarities."""

STEPS = 2.0**20
"""Similarities are rounded to this many steps per unit: below that, fp32 embeddings can't tell neighbours apart."""


class Knn(Config):
    """The class of the k most similar training images: by majority, and weighted by exp(similarity / temperature).

    A tie is wrong: among neighbours that are equally similar the wrong ones come first, and the own class must have
    strictly more votes than any other.
    """

    train: str | None = Field(None, description="data to search in; null searches the half with even hashes of ids")
    k: tuple[PositiveInt, ...] = Field((1, 10, 20), min_length=1, description="numbers of neighbours")
    votes: tuple[Vote, ...] = Field(("majority", "weighted"), min_length=1, description="how neighbours vote")
    temperature: float = Field(0.07, gt=0, description="of the weighted vote; DINO's")

    def __call__(self, features: EncoderFeatures, source: Source) -> Evaluation:
        """``top1_VOTE_kK`` and ``mean_per_class_VOTE_kK``. Records: id, label, whether right per vote and k."""
        samples, labels, x = features.samples(source), features.labels(source), features.images(source)
        even = even_half(samples)
        if self.train is None:
            pool, pool_labels, rows = x[even], labels[even], ~even
        else:
            opened = open_labelled(self.train, like=source)
            pool, pool_labels, rows = features.images(opened), features.labels(opened), torch.ones_like(even)
        if max(self.k) > len(pool):
            raise InputError(f"k={max(self.k)} neighbours among {len(pool)} training images; set k to 1 .. {len(pool)}")
        if not rows.any():
            raise InputError(f"{source.name} has nothing left to measure beside the training half; add samples")
        tested, own = x[rows], labels[rows]
        right: dict[str, list[Tensor]] = {f"{vote}_k{k}": [] for vote in self.votes for k in self.k}
        with progress(features, f"neighbours in {source.name}", len(tested)) as bar:
            for queries, truth in zip(torch.split(tested, QUERIES), torch.split(own, QUERIES), strict=True):
                near, classes = neighbours(queries, pool, pool_labels, k=max(self.k), avoid=truth)
                for vote in self.votes:
                    weights = ((near - near[:, :1]) / self.temperature).exp() if vote == "weighted" else near * 0 + 1
                    for k in self.k:
                        won = _won(classes[:, :k], weights[:, :k], truth, count=len(source.classes))
                        right[f"{vote}_k{k}"].append(won & queries.isfinite().all(1))
                bar.advance(len(queries))
        hits = {name: torch.cat(parts) for name, parts in right.items()}
        kept = [sample for sample, row in zip(samples, rows.tolist(), strict=True) if row]
        answers = zip(*(h.tolist() for h in hits.values()), strict=True)
        records = tuple(
            {"id": s.id, "label": label, **dict(zip(hits, answer, strict=True))}
            for s, label, answer in zip(kept, own.tolist(), answers, strict=True)
        )
        shown, metrics = own.bincount(minlength=len(source.classes)), dict[str, float]()
        for name, h in hits.items():
            metrics[f"top1_{name}"] = float(h.double().mean())
            per_class = own[h].bincount(minlength=len(shown))[shown > 0] / shown[shown > 0].double()
            metrics[f"mean_per_class_{name}"] = float(per_class.mean())
        counts = {f"top1_{name}": (int(h.sum()), len(h)) for name, h in hits.items()}
        top1 = {f"top1_{name}": Share(name) for name in hits}
        return Evaluation(
            metrics, counts, records, top1 | {f"mean_per_class_{name}": Share(name, groups="label") for name in hits}
        )


def neighbours(
    queries: Tensor, pool: Tensor, labels: Tensor, *, k: int, avoid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Unit queries (q, D), pool (m, D) and its labels (m,) -> similarities (q, k), falling, and labels (q, k).

    Exact, in blocks. Of equal similarities, labels other than ``avoid`` (q,) come first, so that neither the order of
    rows nor the size of blocks matters. Rows of NaN are as far as can be.
    """
    best = torch.full((len(queries), 0), -torch.inf, dtype=torch.float64)
    classes = torch.empty(len(queries), 0, dtype=torch.long)
    for block, block_labels in zip(torch.split(pool, NEIGHBOURS), torch.split(labels, NEIGHBOURS), strict=True):
        found = (queries.double() @ block.double().T).nan_to_num(nan=-2.0).mul_(STEPS).round_().mul_(2)  # even numbers
        if avoid is not None:
            found += block_labels != avoid[:, None]  # odd ones are wrong and go first
        found, column = found.topk(min(k, len(block)), dim=1)
        best, classes = torch.cat([best, found], 1), torch.cat([classes, block_labels[column]], 1)
        best, column = best.topk(min(k, best.shape[1]), dim=1)
        classes = classes.gather(1, column)
    return best.div(2).floor() / STEPS, classes


def _won(classes: Tensor, weights: Tensor, own: Tensor, *, count: int) -> Tensor:
    """Labels (q, k) and weights (q, k) of neighbours, true labels (q,) -> (q,) whether those lead alone."""
    votes = torch.zeros(len(own), count, dtype=torch.float64).scatter_add_(1, classes, weights)
    mine = votes.gather(1, own[:, None]).squeeze(1)
    others = votes.scatter(1, own[:, None], -torch.inf).amax(1)
    return mine > others + 1e-9 * weights.sum(1)  # sums in another order differ by less


def digest(sample_id: str) -> bytes:
    """A hash by which samples are halved, as in ``core/probe``, and put into an order of their own."""
    return hashlib.sha256(sample_id.encode()).digest()


def even_half(samples: Sequence[Sample]) -> Tensor:
    """(n,) whether a sample is in the half that ``core/probe`` fits on: it depends on the id alone."""
    return torch.tensor([digest(sample.id)[-1] % 2 == 0 for sample in samples])


def open_labelled(ref: str, *, like: Source) -> Source:
    """Training data with the classes of ``like`` that isn't ``like`` itself."""
    opened = open_source(ref)
    if not isinstance(opened, Source) or list(opened.classes) != list(like.classes):
        raise InputError(f"train: {ref} doesn't have the classes of {like.name}; give matching data")
    if opened.fingerprint == like.fingerprint:
        raise InputError(f"train: {ref} is the data that is measured; give other data, or leave train out to halve it")
    return opened


@contextmanager
def progress(features: EncoderFeatures, title: str, total: int) -> Iterator[Bar]:
    """A bar where the features show one."""
    log = getattr(features, "log", None) or RunLog(is_main=False)
    with log.progress(title, total) as bar:
        yield bar
