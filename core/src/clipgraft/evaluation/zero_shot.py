"""Zero-shot classification (Radford et al. 2021, arXiv 2103.00020, section 3.1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from pydantic import Field
from torch import Tensor

from clipgraft.config.schema import Config
from clipgraft.data.base import Source
from clipgraft.evaluation.base import Evaluation
from clipgraft.evaluation.features import EncoderFeatures
from clipgraft.evaluation.statistics import Share
from clipgraft.evaluation.templates import class_names, prompt_templates


class ZeroShot(Config):
    """Classes as texts: top1, top5 from five classes on, and top1 averaged over classes. A tie is wrong.

    With ``per_class`` also top1 of each class that has samples, as class/NAME.
    """

    templates: str | tuple[str, ...] = Field(
        (),
        description="prompts with one {}, file:FILE with one per line, openai-imagenet (80) or simple (7); empty takes "
        "those of the data",
    )
    classnames: str | tuple[str, ...] = Field(
        (),
        description="names in the order of the classes, or file:FILE of names or of class and name; or as in the data",
    )
    per_class: bool = Field(False, description="report each class too")

    def __call__(self, features: EncoderFeatures, source: Source) -> Evaluation:
        """Records: id, label, prediction, top1 and top5 (whether right)."""
        templates = prompt_templates(self.templates) or source.templates
        names = class_names(self.classnames, source.classes, source=source.name)
        labels, count = features.labels(source), len(names)
        weights = features.classifier(names, templates)
        ranks, predictions = [], []
        for images, own in zip(torch.split(features.images(source), 4096), torch.split(labels, 4096), strict=True):
            scores = images @ weights.T  # (chunk, K)
            ranks.append((~(scores < scores.gather(1, own[:, None]))).sum(1) - 1)  # what isn't worse counts, NaN too
            predictions.append(scores.argmax(1))
        rank, prediction = torch.cat(ranks), torch.cat(predictions)
        right, shown = labels[rank == 0].bincount(minlength=count), labels.bincount(minlength=count)
        counts = {f"top{k}": (int((rank < k).sum()), len(rank)) for k in (1, 5) if count >= k}
        metrics = {name: hits / total for name, (hits, total) in counts.items()}
        metrics["mean_per_class"] = float((right[shown > 0].double() / shown[shown > 0]).mean())
        rows = zip(features.samples(source), labels.tolist(), prediction.tolist(), rank.tolist(), strict=True)
        records = tuple(
            {"id": s.id, "label": own, "prediction": p, **{name: r < int(name[3:]) for name in counts}}
            for s, own, p, r in rows
        )
        statistics = {name: Share(name) for name in counts} | {"mean_per_class": Share("top1", groups="label")}
        if self.per_class:
            each = _each(names, right, shown)
            counts |= {name: pair for name, (_, pair) in each.items()}
            metrics |= {name: hits / total for name, (_, (hits, total)) in each.items()}
            statistics |= {name: Share("top1", where=("label", k)) for name, (k, _) in each.items()}
        return Evaluation(metrics, counts, records, statistics)


def _each(names: Sequence[str], right: Tensor, shown: Tensor) -> Mapping[str, tuple[int, tuple[int, int]]]:
    """(K,) right and (K,) shown -> {class/NAME: (k, (right, shown))} where shown; a name of several gets its number."""
    unique = [name if names.count(name) == 1 else f"{name} {k}" for k, name in enumerate(names)]
    rows = zip(unique, right.tolist(), shown.tolist(), strict=True)
    return {f"class/{name}": (k, (hits, total)) for k, (name, hits, total) in enumerate(rows) if total}
