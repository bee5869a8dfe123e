"""Zero-shot accuracy on corrupted images (Hendrycks and Dietterich 2019, arXiv 1903.12261)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import Field, field_validator
from torch import Tensor

from clipgraft.config.schema import Config
from clipgraft.data.base import Sample, Source
from clipgraft.data.images import as_rgb
from clipgraft.data.transforms import evaluation_transform
from clipgraft.encoders.base import Preprocess
from clipgraft.errors import InputError, unknown_name
from clipgraft.evaluation.base import Evaluation
from clipgraft.evaluation.features import EncoderFeatures
from clipgraft.evaluation.statistics import Share, Statistic, value
from clipgraft_evaluation.corruptions import CORRUPTIONS, STANDARD, corrupt

if TYPE_CHECKING:
    from clipgraft.data.base import Picture

VERSION = 1
"""Of the operations: raised when one of them changes its pixels."""


class Corruption(Config):
    """Accuracy under each corruption, as the mean over severities; a tie is wrong, as in ``core/zero-shot``.

    Every (corruption, severity) is one more pass over the data. Deviation: accuracies, not errors relative to AlexNet
    (mCE); the model's own resize and crop, not 256 and 224; the deviations of the operations.
    """

    corruptions: tuple[str, ...] = Field((), description="names; empty takes those of ImageNet-C but frost")
    severities: tuple[Literal[1, 2, 3, 4, 5], ...] = Field(
        (1, 2, 3, 4, 5), min_length=1, description="strengths, averaged"
    )
    at: Literal["input", "source"] = Field(
        "input", description="corrupt what the model sees, after resize and crop as in the paper, or the whole picture"
    )
    limit: int | None = Field(None, gt=0, description="samples, drawn by the hash of their place; null takes all")
    seed: int = Field(0, description="of noise, angles and clouds")
    templates: tuple[str, ...] = Field((), description="prompts with one {}; empty takes those of the data")

    @field_validator("corruptions")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if name not in CORRUPTIONS:
                raise unknown_name("corruption", name, CORRUPTIONS, hint="frost needs photographs and isn't offered")
        return tuple(dict.fromkeys(names))

    def __call__(self, features: EncoderFeatures, source: Source) -> Evaluation:
        """``clean``, each corruption, their ``mean``, ``severity_N`` over corruptions, ``relative`` = mean / clean.

        Records: id, label, clean and CORRUPTION-SEVERITY (whether right), and shares CORRUPTION, severity_N, mean.
        """
        if not isinstance(source, Source):
            raise InputError(f"{source.name} holds minimal pairs; corruption needs single images with classes")
        names, severities = self.corruptions or STANDARD, tuple(dict.fromkeys(self.severities))
        whole = self.limit is None or self.limit >= len(source)
        rows = range(len(source)) if whole else _drawn(len(source), self.limit or 0)
        clean = source if whole else Corrupted(source, rows=rows)
        samples, labels = features.samples(clean), features.labels(clean)
        weights = features.classifier(source.classes, self.templates or source.templates)
        columns = {"clean": _right(features.images(clean), weights, labels)}
        for name in names:
            for severity in severities:
                view = Corrupted(
                    source,
                    rows=rows,
                    corruption=name,
                    severity=severity,
                    seed=self.seed,
                    preprocess=features.encoder.preprocess if self.at == "input" else None,
                )
                once = EncoderFeatures(features.encoder, batch_size=features.batch_size, log=features.log)
                found = once.images(view)  # kept no longer than this turn
                if [s.id for s in once.samples(view)] != [s.id for s in samples]:
                    raise InputError(f"{source.name} can't be read as before; is it being written to?")
                columns[f"{name}-{severity}"] = _right(found, weights, labels)
        shares = {name: _mean(columns, [f"{name}-{s}" for s in severities]) for name in names}
        shares |= {f"severity_{s}": _mean(columns, [f"{name}-{s}" for name in names]) for s in severities}
        shares["mean"] = _mean(shares, names)
        columns |= shares
        told = zip(samples, labels.tolist(), *(column.tolist() for column in columns.values()), strict=True)
        records = tuple({"id": s.id, "label": label, **dict(zip(columns, row, strict=True))} for s, label, *row in told)
        statistics: dict[str, Statistic] = {name: Share(name) for name in ("clean", "mean", *shares)}
        metrics = {name: value(statistic, records) for name, statistic in statistics.items()}
        if metrics["clean"]:
            statistics["relative"] = Share("mean", of="clean")
            metrics["relative"] = value(statistics["relative"], records)
        return Evaluation(metrics, {"clean": (int(columns["clean"].sum()), len(records))}, records, statistics)


class Corrupted:
    """A source of some rows of another, each image corrupted by its own randomness; as they are without a corruption.

    With ``preprocess`` images are brought to the model's input first: (3, H, W') uint8.
    """

    def __init__(
        self,
        source: Source,
        *,
        rows: Sequence[int],
        corruption: str = "",
        severity: int = 0,
        seed: int = 0,
        preprocess: Preprocess | None = None,
    ) -> None:
        self.source, self.rows, self.preprocess = source, rows, preprocess
        self.corruption, self.severity, self.seed = corruption, severity, seed
        self.name = f"{source.name} {corruption} {severity}" if corruption else source.name
        self.classes, self.templates, self.attributes = source.classes, source.templates, source.attributes
        told = (VERSION, source.fingerprint, list(rows), corruption, severity, seed, preprocess)
        self.fingerprint = hashlib.sha256(repr(told).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        sample = self.source[self.rows[index]]
        if not self.corruption:
            return sample
        image = _bytes(sample.image, self.preprocess)
        found = corrupt(image, self.corruption, self.severity, seed=f"{self.seed}/{sample.id}")
        as_before = Image.fromarray(found) if self.preprocess is None else torch.from_numpy(found).permute(2, 0, 1)
        return replace(sample, image=as_before, extra={})


def _bytes(picture: Picture, preprocess: Preprocess | None) -> np.ndarray:
    """(H, W, 3) uint8, of the model's input with a ``preprocess``."""
    if preprocess is not None:
        pixels = evaluation_transform(preprocess)(picture)
        return pixels.mul(255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
    return picture.permute(1, 2, 0).numpy() if isinstance(picture, Tensor) else np.asarray(as_rgb(picture))


def _right(images: Tensor, weights: Tensor, labels: Tensor) -> Tensor:
    """(n, D), (K, D), (n,) -> (n,) whether the own class alone is the best."""
    right = []
    for chunk, own in zip(torch.split(images, 4096), torch.split(labels, 4096), strict=True):
        scores = chunk @ weights.T
        right.append((scores < scores.gather(1, own[:, None])).sum(1) == scores.shape[1] - 1)
    return torch.cat(right)


def _mean(columns: Mapping[str, Tensor], names: Sequence[str]) -> Tensor:
    return torch.stack([columns[name].double() for name in names]).mean(0)


def _drawn(total: int, count: int) -> list[int]:
    """``count`` rows of ``total``, the same for the same total, in their order."""
    by_hash = sorted(range(total), key=lambda row: hashlib.sha256(str(row).encode()).digest())
    return sorted(by_hash[:count])
