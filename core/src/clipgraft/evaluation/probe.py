"""Linear probe: what a linear classifier can read from features, without any text."""

from __future__ import annotations

import hashlib
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from clipgraft.config.schema import Config
from clipgraft.data.base import Sample, Source
from clipgraft.errors import InputError
from clipgraft.evaluation.base import Evaluation
from clipgraft.evaluation.features import EncoderFeatures
from clipgraft.evaluation.statistics import Share
from clipgraft.heads.linear_probe import LinearProbe, Solver


class Probe(Config):
    """Accuracy for each attribute of the data, and their mean; for the class label where there are no attributes."""

    on: Literal["pooled", "tokens"] = Field("pooled", description="tokens: patch tokens averaged to a 4 x 4 grid")
    train: str | None = Field(None, description="data to fit on; null fits on the half with even hashes of sample ids")
    solver: Solver = Field("lbfgs", description="multinomial logistic regression, or least squares in closed form")
    l2: Literal["sweep"] | Annotated[float, Field(gt=0)] = Field(
        "sweep",
        description="factor of half the squared weights, beside the mean loss; sweep: the best on a fifth of the data",
    )

    @property
    def needs_tokens(self) -> bool:
        """Whether one pass should bring patch tokens too."""
        return self.on == "tokens"

    def __call__(self, features: EncoderFeatures, source: Source) -> Evaluation:
        """Records: id, per target whether it was right, and the share of those as mean, in source order."""
        samples, x = features.samples(source), self._features(features, source)
        even = torch.tensor([_hash(sample)[-1] % 2 == 0 for sample in samples])
        if self.train is None:
            fit_source, fit_rows, fit_x, rows = source, even.nonzero().flatten().tolist(), x, ~even
        else:
            from clipgraft.data import open_source

            opened = open_source(self.train)
            if not isinstance(opened, Source) or list(opened.attributes) != list(source.attributes):
                raise InputError(f"train: {self.train} doesn't have the labels of {source.name}; give matching data")
            fit_source, fit_x, rows = opened, self._features(features, opened), torch.ones_like(even)
            fit_rows = list(range(len(fit_x)))
        fit_samples = features.samples(fit_source)
        order = sorted(fit_rows, key=lambda row: _hash(fit_samples[row]))  # no trace of the order of the rows
        right = {}
        for name in source.attributes or ("label",):
            labels, fit_labels = _labels(features, source, name), _labels(features, fit_source, name)
            classes = int(torch.cat([labels, fit_labels]).max()) + 1
            probe = LinearProbe(dim=x.shape[1], classes=max(classes, 2), solver=self.solver)
            probe.fit(fit_x[order], fit_labels[order], decay=None if self.l2 == "sweep" else self.l2)
            right[name] = probe(x[rows]).argmax(1) == labels[rows]
        counts = {name: (int(hits.sum()), len(hits)) for name, hits in right.items()}
        metrics = {name: hits / total for name, (hits, total) in counts.items()}
        answers = zip(*(hits.tolist() for hits in right.values()), strict=True)
        tested = [sample for sample, row in zip(samples, rows.tolist(), strict=True) if row]
        records = tuple(
            {"id": s.id, **dict(zip(right, a, strict=True)), "mean": sum(a) / len(a)}
            for s, a in zip(tested, answers, strict=True)
        )
        statistics = {name: Share(name) for name in ("mean", *metrics)}
        return Evaluation({"mean": sum(metrics.values()) / len(metrics), **metrics}, counts, records, statistics)

    def _features(self, features: EncoderFeatures, source: Source) -> Tensor:
        """(n, D) embeddings, or (n, at most 16 W) tokens."""
        if self.on == "pooled":
            return features.images(source)
        tokens, grid = features.tokens(source), features.encoder.image.grid or (features.tokens(source).shape[1], 1)
        maps = tokens.transpose(1, 2).reshape(len(tokens), -1, *grid)  # (n, W, h, w)
        return F.adaptive_avg_pool2d(maps, (min(grid[0], 4), min(grid[1], 4))).flatten(1)


def _hash(sample: Sample) -> bytes:
    return hashlib.sha256(sample.id.encode()).digest()


def _labels(features: EncoderFeatures, source: Source, name: str) -> Tensor:
    """(n,) values of an attribute, or of the class label."""
    if name == "label":
        return features.labels(source)
    samples = features.samples(source)
    if bare := [sample.id for sample in samples if name not in sample.attributes]:
        raise InputError(f"{source.name}: {bare[0]} has no attribute {name}; every sample needs it for a probe")
    return torch.tensor([sample.attributes[name] for sample in samples])
