"""Retrieval between images and their captions: recall at k, any hit counts."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor, nn

from clipgraft.config.schema import Config
from clipgraft.data.base import Source
from clipgraft.errors import InputError
from clipgraft.evaluation.base import Evaluation
from clipgraft.evaluation.features import EncoderFeatures
from clipgraft.evaluation.statistics import Share

CHUNK = 2**22
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
        captions = list(dict.fromkeys(caption for sample in samples for caption in sample.captions))
        column = {caption: k for k, caption in enumerate(captions)}
        own = [[column[caption] for caption in sample.captions] for sample in samples]
        images, texts = features.images(source), features.texts(captions)
        owners = [[row] for row, columns in enumerate(own) for _ in columns]
        queries = torch.tensor([k for columns in own for k in columns])
        found = {
            "image_to_text": _ranks(images, texts, own, each=queries.bincount(minlength=len(captions))),
            "text_to_image": _ranks(texts, images, owners, rows=queries),
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


def _ranks(
    queries: Tensor,
    gallery: Tensor,
    own: Sequence[Sequence[int]],
    *,
    rows: Tensor | None = None,
    each: Tensor | None = None,
) -> Tensor:
    """How many wrong candidates are at least as good as the best right one, (q,) for each query.

    Query i is row ``rows[i]`` (row i without it) of ``queries`` (n, D), its right candidates are the rows ``own[i]`` of
    ``gallery`` (g, D), and row j of the gallery stands for ``each[j]`` candidates (one without it). Memory is bounded:
    ``CHUNK`` scores at a time.
    """
    rows = torch.arange(len(own)) if rows is None else rows
    each = torch.ones(len(gallery), dtype=torch.long) if each is None else each
    kept, place = _distinct(gallery)  # equal rows have equal scores, to the last bit
    gallery = gallery if len(kept) == len(gallery) else gallery[kept]
    each = torch.zeros(len(kept), dtype=torch.long).index_add_(0, place, each)
    several, found = (each != 1).nonzero().flatten(), []
    for start in range(0, len(own), step := max(1, CHUNK // len(gallery))):
        right = [place[list(columns)] for columns in own[start : start + step]]
        count = torch.tensor([len(columns) for columns in right])
        at = nn.utils.rnn.pad_sequence(right, batch_first=True)
        outside = torch.arange(at.shape[1]) >= count[:, None]
        scores = queries[rows[start : start + step]] @ gallery.T
        mine = scores.gather(1, at).masked_fill(outside, -torch.inf)
        best = mine.amax(1, keepdim=True)
        good = ~(scores < best)  # NaN too
        among = good.sum(1) + (good[:, several] * (each[several] - 1)).sum(1)
        found.append(among - (~(mine < best) & ~outside).sum(1))
    return torch.cat(found)


def _distinct(x: Tensor) -> tuple[Tensor, Tensor]:
    """(n, D) -> (u,) rows that differ from all before them, and (n,) which of these each row equals."""
    first: dict[bytes, int] = {}
    kept, place = list[int](), list[int]()
    for k, row in enumerate(x.contiguous().numpy()):
        place.append(first.setdefault(hashlib.blake2b(row.tobytes(), digest_size=16).digest(), len(first)))
        kept += [k] if place[-1] == len(kept) else []
    return torch.tensor(kept), torch.tensor(place)
