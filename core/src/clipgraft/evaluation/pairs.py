"""Minimal pairs, scored as MMVP-VLM does (Tong et al. 2024, arXiv 2401.06209, section 3)."""

from __future__ import annotations

import torch

from clipgraft.config.schema import Config
from clipgraft.data.base import PairSource
from clipgraft.evaluation.base import Evaluation
from clipgraft.evaluation.features import EncoderFeatures
from clipgraft.evaluation.statistics import Share


class Pairs(Config):
    """For each of two texts, which of two images? A pair is right when both answers are; chance is 1/4.

    The softmax over two images prefers the first where its cosine is larger, so that logit scale and bias can't matter.
    Deviation: a tie is wrong for both texts; the official script takes the second image.
    """

    def __call__(self, features: EncoderFeatures, source: PairSource) -> Evaluation:
        """mean over patterns, total over pairs, and each pattern. Records: id, pattern, correct, both margins."""
        pairs, (first, second) = features.pairs(source), features.pair_images(source)  # (n, D) each
        texts = features.texts([text for pair in pairs for text in pair.texts]).view(len(pairs), 2, -1)
        margin = torch.einsum("ntd,nd->nt", texts.double(), (first - second).double())
        margin = margin * torch.tensor([1, -1])  # (n, 2): how much the right image is preferred
        right = (margin > 0).all(1).tolist()
        counts = {"total": (sum(right), len(right))}
        for pattern in [p for p in source.patterns if any(pair.pattern == p for pair in pairs)]:
            own = [ok for ok, pair in zip(right, pairs, strict=True) if pair.pattern == pattern]
            counts[pattern] = (sum(own), len(own))
        metrics = {name: hits / total for name, (hits, total) in counts.items()}
        mean = sum(v for name, v in metrics.items() if name != "total") / max(len(metrics) - 1, 1)
        rows = zip(pairs, right, margin.tolist(), strict=True)
        records = tuple({"id": p.id, "pattern": p.pattern, "correct": ok, "margins": m} for p, ok, m in rows)
        shares = {name: Share("correct", where=("pattern", name)) for name in counts if name != "total"}
        statistics = {"mean": Share("correct", groups="pattern"), "total": Share("correct"), **shares}
        return Evaluation({"mean": mean, **metrics}, counts, records, statistics)
