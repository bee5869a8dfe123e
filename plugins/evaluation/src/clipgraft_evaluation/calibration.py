"""Whether zero-shot confidence is right as often as it says (Guo et al. 2017, arXiv 1706.04599).

n samples, b draws of them, K classes, M bins.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import Field
from scipy.optimize import minimize_scalar
from torch import Tensor
from torch.nn import functional as F

from clipgraft.config.schema import Config
from clipgraft.data.base import Source
from clipgraft.errors import InputError
from clipgraft.evaluation.base import Evaluation
from clipgraft.evaluation.features import EncoderFeatures
from clipgraft.evaluation.statistics import Bound, Records, Share, Statistic, value
from clipgraft_evaluation.knn import even_half

RANGE = 1e-3, 1e3
"""Temperatures that a fit may find."""


class Calibration(Config):
    """Softmax over classes of the cosines times the model's own ``logit_scale``: is confidence the share of hits?

    Models trained with a sigmoid are measured by the same softmax: their bias is the same for every class and cancels.
    A tie of the two best classes is wrong, as in ``core/zero-shot``.
    """

    lower_is_better: ClassVar[frozenset[str]] = frozenset(
        f"{name}{suffix}" for name in ("ece", "ece_equal_mass", "nll", "brier") for suffix in ("", "_scaled")
    )

    templates: tuple[str, ...] = Field((), description="prompts with one {}; empty takes those of the data")
    bins: int = Field(15, gt=0, description="bins of confidence")
    fit_temperature: bool = Field(
        False, description="fit a temperature on the half with even hashes of ids, measure on the other half"
    )

    def __call__(self, features: EncoderFeatures, source: Source) -> Evaluation:
        """``ece``, ``ece_equal_mass``, ``accuracy``, ``mean_confidence``; ``nll`` [nats], ``brier`` in [0, 2].

        With a fitted temperature also each of them after it as ``NAME_scaled``, and ``temperature``. Records: id,
        label, prediction, accuracy (whether right), confidence, nll, brier.
        """
        samples, labels = features.samples(source), features.labels(source)
        weights = features.classifier(source.classes, self.templates or source.templates)
        scale = features.encoder.logit_scale.detach().double().exp().cpu()
        logits = scale * (features.images(source).double() @ weights.double().T)  # (n, K)
        metrics, variants = dict[str, float](), {"": 1.0}
        if self.fit_temperature:
            even = even_half(samples)
            if not even.any() or even.all():
                raise InputError(f"{source.name} has too few samples to fit on one half; leave out fit_temperature")
            variants["_scaled"] = metrics["temperature"] = fitted_temperature(logits[even], labels[even])
            samples = [sample for sample, fit in zip(samples, even.tolist(), strict=True) if not fit]
            logits, labels = logits[~even], labels[~even]
        own = logits.gather(1, labels[:, None])
        right = (logits < own).sum(1) == logits.shape[1] - 1
        columns = {"label": labels, "prediction": logits.argmax(1), "accuracy": right}
        statistics: dict[str, Statistic] = {"accuracy": Share("accuracy")}
        for suffix, temperature in variants.items():
            logs = F.log_softmax(logits / temperature, dim=1)
            columns[f"confidence{suffix}"] = logs.amax(1).exp()
            columns[f"nll{suffix}"] = -logs.gather(1, labels[:, None]).squeeze(1)
            columns[f"brier{suffix}"] = (logs.exp() - F.one_hot(labels, logits.shape[1])).square().sum(1)
            confidence = f"confidence{suffix}"
            statistics[f"ece{suffix}"] = EqualWidth("accuracy", confidence, self.bins)
            statistics[f"ece_equal_mass{suffix}"] = EqualMass("accuracy", confidence, self.bins)
            statistics |= {f"{name}{suffix}": Share(f"{name}{suffix}") for name in ("brier", "nll")}
            statistics[f"mean_confidence{suffix}"] = Share(confidence)
        rows = zip(*(column.tolist() for column in columns.values()), strict=True)
        records = tuple(
            {"id": s.id, **dict(zip(columns, row, strict=True))} for s, row in zip(samples, rows, strict=True)
        )
        metrics = {name: value(statistic, records) for name, statistic in statistics.items()} | metrics
        return Evaluation(metrics, {"accuracy": (int(right.sum()), len(right))}, records, statistics)


@dataclass(frozen=True, slots=True)
class EqualWidth:
    """Expected calibration error: bins ((m-1)/M, m/M] of confidence, the gaps weighed by how many fall in each."""

    hits: str
    confidence: str
    bins: int

    def bind(self, samples: Records) -> Bound:
        """Bins don't depend on the draw."""
        gap, confidence = _gap(samples, self.hits, self.confidence)
        member = (confidence * self.bins).ceil().nan_to_num().long().clamp(1, self.bins) - 1

        def bound(weights: Tensor) -> Tensor:
            gaps = weights.new_zeros(len(weights), self.bins).index_add_(1, member, weights * gap)
            return gaps.abs().sum(1) / weights.sum(1)

        return bound


@dataclass(frozen=True, slots=True)
class EqualMass:
    """Calibration error over bins of exactly n / M samples (adaptive ECE, Nguyen and O'Connor 2015).

    A sample on a border of bins counts on both sides by its shares, and so do samples of equal confidence: neither the
    order of rows nor n modulo M matters.
    """

    hits: str
    confidence: str
    bins: int

    def bind(self, samples: Records) -> Bound:
        """Sort by confidence."""
        gap, confidence = _gap(samples, self.hits, self.confidence)
        levels, level = confidence.unique(return_inverse=True)

        def bound(weights: Tensor) -> Tensor:
            """The sum of gaps grows linearly with mass within a level; bins are differences of it."""
            mass, gaps = (
                F.pad(weights.new_zeros(len(weights), len(levels)).index_add_(1, level, w).cumsum(1), (1, 0))
                for w in (weights, weights * gap)
            )
            total = mass[:, -1:]
            borders = torch.linspace(0, 1, self.bins + 1, dtype=mass.dtype) * total  # (b, M + 1)
            after = torch.searchsorted(mass, borders).clamp(1, len(levels))
            low, high = mass.gather(1, after - 1), mass.gather(1, after)
            share = torch.where(high > low, (borders - low) / (high - low), 0.0).clamp(0, 1)
            grown = torch.lerp(gaps.gather(1, after - 1), gaps.gather(1, after), share)
            return grown.diff(dim=1).abs().sum(1) / total.squeeze(1)

        return bound


def fitted_temperature(logits: Tensor, labels: Tensor) -> float:
    """(n, K) and (n,) -> the temperature T in ``RANGE`` with the smallest mean NLL of softmax(logits / T)."""

    def nll(log: float) -> float:
        return float(F.cross_entropy(logits / math.exp(log), labels))

    bounds = math.log(RANGE[0]), math.log(RANGE[1])
    return math.exp(minimize_scalar(nll, bounds=bounds, method="bounded", options={"xatol": 1e-6}).x)


def _gap(samples: Records, hits: str, confidence: str) -> tuple[Tensor, Tensor]:
    """Two (n,): whether right minus confidence, and confidence."""
    right = torch.tensor([float(row[hits]) for row in samples], dtype=torch.float64)
    sure = torch.tensor([float(row[confidence]) for row in samples], dtype=torch.float64)
    return right - sure, sure
