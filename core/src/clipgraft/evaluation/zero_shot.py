"""Zero-shot classification (Radford et al. 2021, arXiv 2103.00020, section 3.1)."""

from __future__ import annotations

import torch
from pydantic import Field

from clipgraft.config.schema import Config
from clipgraft.data.base import Source
from clipgraft.evaluation.base import Evaluation
from clipgraft.evaluation.features import EncoderFeatures
from clipgraft.evaluation.statistics import Share


class ZeroShot(Config):
    """Classes as texts: top1, top5 from five classes on, and top1 averaged over classes. A tie is wrong."""

    templates: tuple[str, ...] = Field((), description="prompts with one {}; empty takes those of the data")

    def __call__(self, features: EncoderFeatures, source: Source) -> Evaluation:
        """Records: id, label, prediction, top1 and top5 (whether right)."""
        labels, count = features.labels(source), len(source.classes)
        weights = features.classifier(source.classes, self.templates or source.templates)
        ranks, predictions = [], []
        for images, own in zip(torch.split(features.images(source), 4096), torch.split(labels, 4096), strict=True):
            scores = images @ weights.T  # (chunk, K)
            ranks.append((~(scores < scores.gather(1, own[:, None]))).sum(1) - 1)  # what isn't worse counts, NaN too
            predictions.append(scores.argmax(1))
        rank, prediction = torch.cat(ranks), torch.cat(predictions)
        right, shown = labels[rank == 0].bincount(minlength=count), labels.bincount(minlength=count)
        counts = {f"top{k}": (int((rank < k).sum()), len(rank)) for k in (1, 5) if count >= k}
        metrics = {name: hits / total for name, (hits, total) in counts.items()}
        metrics["mean_per_class"] = float((right[shown > 0] / shown[shown > 0]).double().mean())
        rows = zip(features.samples(source), labels.tolist(), prediction.tolist(), rank.tolist(), strict=True)
        records = tuple(
            {"id": s.id, "label": own, "prediction": p, **{name: r < int(name[3:]) for name in counts}}
            for s, own, p, r in rows
        )
        statistics = {f"top{k}": Share(f"top{k}") for k in (1, 5) if count >= k}
        return Evaluation(metrics, counts, records, statistics | {"mean_per_class": Share("top1", groups="label")})
