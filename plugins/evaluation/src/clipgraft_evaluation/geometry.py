"""The shape of the joint space: modality gap, alignment, uniformity, effective rank.

n images, each with one text; D width, b draws of the images, m points of one side.
Liang et al. 2022, arXiv 2203.02053; Wang and Isola 2020, arXiv 2005.10242.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from clipgraft.config.schema import Config
from clipgraft.data.base import Sample, Source
from clipgraft.data.loader import class_prompts
from clipgraft.errors import InputError
from clipgraft.evaluation.base import Evaluation
from clipgraft.evaluation.features import EncoderFeatures
from clipgraft.evaluation.statistics import Bound, Records, Share, Statistic, value
from clipgraft.heads.linear_probe import LinearProbe
from clipgraft_evaluation.knn import digest, even_half, progress

CHUNK = 2**23
"""Numbers of a kernel matrix held at a time."""


class Geometry(Config):
    """Where images and texts lie on the sphere. One text per image: its first caption, else a prompt of its class.

    Prompts take the source's templates in turn by the hash of the id. Means over pairs of different images (texts)
    leave out pairs of equal texts, so that captions or classes that repeat don't count as close.
    """

    lower_is_better: ClassVar[frozenset[str]] = frozenset(
        {"modality_gap", "unmatched_cosine", "alignment", "separability", "uniformity_images", "uniformity_texts"}
    )

    limit: int | None = Field(
        2000, gt=9, description="samples to look at, drawn by the hash of the id; null takes all, in time n squared"
    )
    alpha: float = Field(2.0, gt=0, description="power of the distance in alignment")
    t: float = Field(2.0, gt=0, description="sharpness of the kernel in uniformity")

    def __call__(self, features: EncoderFeatures, source: Source) -> Evaluation:
        """Distances, cosines, logarithms and ranks; only ``separability`` is a share.

        ``modality_gap``: between the means of images and of texts. ``alignment``: mean |x - y|^alpha of matched pairs.
        ``uniformity_*``: log mean exp(-t |u - v|^2), 0 when all is one point, lower when spread. ``effective_rank_*``:
        tr(C)^2 / tr(C^2) of the covariance C (Bartlett et al. 2020, arXiv 1906.11300), 1 .. D. ``separability``: how
        often a linear classifier fitted on the half with even hashes tells images from texts on the other half.
        Records: id, matched_cosine, alignment, and separability where it was measured.
        """
        x, samples = features.images(source), features.samples(source)
        by_hash = sorted(range(len(samples)), key=lambda row: digest(samples[row].id))
        kept = sorted(by_hash[: self.limit])
        samples, x = [samples[row] for row in kept], x[kept].double()
        texts = [_text(sample, source) for sample in samples]
        unique = {text: k for k, text in enumerate(dict.fromkeys(texts))}
        if len(unique) < 2:
            raise InputError(f"{source.name}: {len(unique)} text for {len(samples)} images; geometry needs two or more")
        y, place = features.texts(list(unique)).double(), torch.tensor([unique[text] for text in texts])
        matched = (x * y[place]).sum(1)
        columns = {"matched_cosine": matched, "alignment": (x - y[place]).norm(dim=1) ** self.alpha}
        rows = zip(samples, *(column.tolist() for column in columns.values()), strict=True)
        records = [{"id": s.id, **dict(zip(columns, values, strict=True))} for s, *values in rows]
        statistics: dict[str, Statistic] = {name: Share(name) for name in columns}
        even = even_half(samples)
        if min(int(even.sum()), int((~even).sum())) >= 5:
            order = [row for row in sorted(range(len(samples)), key=lambda r: digest(samples[r].id)) if even[row]]
            shares = _told_apart(x, y[place], order)
            for record, share in zip(records, shares.tolist(), strict=True):
                record |= {} if share < 0 else {"separability": share}
            statistics["separability"] = Share("separability")
        ids = {sample.id: row for row, sample in enumerate(samples)}
        uniform = partial(uniformity, t=self.t)
        sides = {"images": (x, torch.arange(len(x))), "texts": (y, place)}
        statistics |= {
            "modality_gap": Cloud(ids, partial(_gap, x=x, y=y[place])),
            "unmatched_cosine": Cloud(ids, partial(_unmatched, x=x, y=y, place=place)),
            **{f"uniformity_{side}": Cloud(ids, partial(_of_points, uniform, *at)) for side, at in sides.items()},
            **{
                f"effective_rank_{side}": Cloud(ids, partial(_of_points, effective_rank, *at))
                for side, at in sides.items()
            },
        }
        metrics = dict[str, float]()
        with progress(features, f"geometry of {source.name}", len(statistics)) as bar:
            for name, statistic in statistics.items():
                metrics[name] = value(statistic, records)
                bar.advance()
        return Evaluation(metrics, {}, tuple(records), statistics)


@dataclass(frozen=True, slots=True)
class Cloud:
    """A statistic of embeddings, which records don't hold: ``rows`` {id: row} finds those of the records.

    ``formula`` takes how often each of all n rows was drawn, (b, n) -> (b,).
    """

    rows: Mapping[str, int]
    formula: Callable[[Tensor], Tensor]

    def bind(self, samples: Records) -> Bound:
        """Where the samples' embeddings are."""
        row = torch.tensor([self.rows[sample["id"]] for sample in samples])
        return lambda weights: self.formula(weights.new_zeros(len(weights), len(self.rows)).index_add_(1, row, weights))


def uniformity(points: Tensor, weights: Tensor, *, t: float) -> Tensor:
    """Points (m, D), how often each was drawn (b, m) -> (b,): over pairs of two different points."""
    return _pair_mean(points, weights, lambda a, b: (-t * torch.cdist(a, b).square()).exp()).log()


def effective_rank(points: Tensor, weights: Tensor) -> Tensor:
    """Points (m, D), how often each was drawn (b, m) -> (b,) of the weighted covariance; NaN where all is one point."""
    points = points - points.mean(0)  # whatever is subtracted: near the mean little is lost to rounding
    total = weights.sum(1, keepdim=True)
    mean = weights @ points / total  # (b, D)
    trace = (weights @ points.square().sum(1, keepdim=True) / total).squeeze(1) - mean.square().sum(1)
    gram = _quadratic(points, weights, lambda a, b: (a @ b.T).square()) / total.squeeze(1).square()
    crossed = (weights * (mean @ points.T).square()).sum(1) / total.squeeze(1)
    squares = gram - 2 * crossed + mean.square().sum(1).square()  # tr(C^2) of C = E pp' - mean mean'
    return torch.where(trace > 1e-12, trace.square() / squares, torch.nan)


def _of_points(measure: Callable[[Tensor, Tensor], Tensor], points: Tensor, place: Tensor, weights: Tensor) -> Tensor:
    """``measure`` of points (m, D), where image i stands for the point place[i]: (b, n) -> (b,)."""
    return measure(points, weights.new_zeros(len(weights), len(points)).index_add_(1, place, weights))


def _gap(weights: Tensor, *, x: Tensor, y: Tensor) -> Tensor:
    """(b, n) -> (b,): distance between the means of x and y (n, D)."""
    return (weights @ (x - y) / weights.sum(1, keepdim=True)).norm(dim=1)


def _unmatched(weights: Tensor, *, x: Tensor, y: Tensor, place: Tensor) -> Tensor:
    """(b, n) -> (b,): mean cosine of images x (n, D) and texts y (m, D) that aren't theirs."""
    of_text = weights.new_zeros(len(weights), len(y)).index_add_(1, place, weights)  # (b, m)
    own = (weights * of_text[:, place] * (x * y[place]).sum(1)).sum(1)
    every = ((weights @ x) * (of_text @ y)).sum(1)
    return (every - own) / (weights.sum(1).square() - of_text.square().sum(1))


def _pair_mean(points: Tensor, weights: Tensor, kernel: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Mean kernel of two different points, whose kernel with themselves is 1."""
    same = weights.square().sum(1)
    return (_quadratic(points, weights, kernel) - same) / (weights.sum(1).square() - same)


def _quadratic(points: Tensor, weights: Tensor, kernel: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Points (m, D), weights (b, m) -> (b,): sum over i, j of w_i w_j kernel(p_i, p_j), the matrix in chunks."""
    size, total = max(1, CHUNK // len(points)), weights.new_zeros(len(weights))
    for rows, own in zip(torch.split(points, size), torch.split(weights, size, dim=1), strict=True):
        total += ((own @ kernel(rows, points)) * weights).sum(1)
    return total


def _told_apart(x: Tensor, y: Tensor, fit: list[int]) -> Tensor:
    """Images and texts (n, D), the rows to fit on -> (n,) share of the two told right, -1 in those rows."""
    fitted = torch.stack([x[fit], y[fit]], 1).flatten(0, 1)  # image, text, image, text, ...
    probe = LinearProbe(dim=x.shape[1], classes=2, solver="ridge")
    probe.fit(fitted, torch.tensor([0, 1]).repeat(len(fitted) // 2))
    right = (probe(x).argmax(1) == 0).double() + (probe(y).argmax(1) == 1).double()
    return (right / 2).index_fill(0, torch.tensor(fit), -1.0)


def _text(sample: Sample, source: Source) -> str:
    if sample.captions:
        return sample.captions[0]
    if sample.label is None or not 0 <= sample.label < len(source.classes):
        raise InputError(f"{source.name}: {sample.id} has neither caption nor class; geometry needs one of them")
    prompts = class_prompts(source.classes[sample.label], source.templates)
    return prompts[int.from_bytes(digest(sample.id)[:8], "big") % len(prompts)]
