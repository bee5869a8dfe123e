"""Retrieval between images and their captions: recall at k, any hit counts."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from clipgraft.config.schema import Config
from clipgraft.data.base import Source
from clipgraft.errors import InputError
from clipgraft.evaluation.base import Evaluation
from clipgraft.evaluation.features import EncoderFeatures
from clipgraft.evaluation.statistics import Share

CHUNK = 2**24
"""Scores held at a time."""


class Retrieval(Config):
    """Share of images with one of their captions among the k best, and of captions with their image among the k best.

    A rank is the number of wrong candidates that are at least as good: ties, and captions shared by images, count
    against the model.
    """

    ks: tuple[int, ...] | None = Field(
        None, min_length=1, description="ranks at which recall is reported; null: those of 1, 5, 10 with enough images"
    )

    def __call__(self, features: EncoderFeatures, source: Source) -> Evaluation:
        """Records: id, captions, and per metric whether its best caption, or how many of its captions, are found."""
        samples = features.samples(source)
        if bare := [sample.id for sample in samples if not sample.captions]:
            raise InputError(f"{source.name}: {bare[0]} has no caption; retrieval needs a csv: with a caption column")
        ks = self.ks or tuple(k for k in (1, 5, 10) if k <= len(samples))
        if len(samples) < 2 or not 0 < min(ks) <= max(ks) <= len(samples):
            raise InputError(f"recall at {max(ks)} among {len(samples)} images of {source.name}; set ks to 1 .. images")
        captions = [caption for sample in samples for caption in sample.captions]
        owner = torch.tensor([i for i, sample in enumerate(samples) for _ in sample.captions])
        unique = {caption: k for k, caption in enumerate(dict.fromkeys(captions))}
        column = torch.tensor([unique[caption] for caption in captions])
        images, texts, index = features.images(source), features.texts(list(unique)), torch.arange(len(samples))
        found = {
            "image_to_text": _ranks(images, texts, column, query_owner=index, owner=owner),
            "text_to_image": _ranks(texts[column], images, index, query_owner=owner, owner=index),
        }
        counts = {f"{name}_r{k}": (int((r < k).sum()), len(r)) for name, r in found.items() for k in ks}
        per_caption = torch.split(found["text_to_image"], [len(sample.captions) for sample in samples])
        records = []
        for sample, best, ranks in zip(samples, found["image_to_text"].tolist(), per_caption, strict=True):
            hits = {f"image_to_text_r{k}": best < k for k in ks}
            hits |= {f"text_to_image_r{k}": int((ranks < k).sum()) for k in ks}
            placed = {"captions": len(ranks), "caption_rank": best, "image_ranks": ranks.tolist()}
            records.append({"id": sample.id, **placed, **hits})
        statistics = {name: Share(name, of="captions" if name.startswith("text") else None) for name in counts}
        metrics = {name: hits / total for name, (hits, total) in counts.items()}
        return Evaluation(metrics, counts, tuple(records), statistics)


def _ranks(queries: Tensor, gallery: Tensor, column: Tensor, *, query_owner: Tensor, owner: Tensor) -> Tensor:
    """(q, D) and (u, D) of length one, candidates as rows of the gallery (g,), owners (q,) and (g,) -> (q,) ranks."""
    ranks = []
    for rows in torch.split(torch.arange(len(queries)), max(1, CHUNK // len(column))):
        scores = (queries[rows] @ gallery.T)[:, column]  # equal texts have equal scores, to the last bit
        own = query_owner[rows][:, None] == owner
        best = scores.masked_fill(~own, -torch.inf).amax(1, keepdim=True)
        ranks.append((~(scores < best) & ~own).sum(1))
    return torch.cat(ranks)
