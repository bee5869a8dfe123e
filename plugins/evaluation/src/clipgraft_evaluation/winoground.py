"""Winoground: two images and two captions of the same words (Thrush et al. 2022, arXiv 2204.03162)."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from clipgraft.config.schema import Config
from clipgraft.data.base import PairSource
from clipgraft.errors import InputError
from clipgraft.evaluation.base import Evaluation, Features
from clipgraft.evaluation.statistics import Share
from clipgraft_evaluation.layouts import ImagePairs, PairRow, entries_of, folder_of, read_json, text_of

EXAMPLES, IMAGES = "examples.jsonl", "images"
SCORES = {"text": "text", "image": "image", "group": "correct"}
"""Column of the records for each score."""


class WinogroundConfig(Config):
    """``winoground:DIR``."""

    path: str = Field(description=f"folder with {EXAMPLES} and {IMAGES}/, or with both in data/")
    pattern: Literal["collapsed_tag", "tag"] = Field("collapsed_tag", description="what an example's pattern is")


def open_winoground(*, path: str, pattern: Literal["collapsed_tag", "tag"] = "collapsed_tag") -> ImagePairs:
    """Ids are those of the file; text i describes image i."""
    name = f"winoground:{path}"
    root = folder_of(path, source=name, holds=EXAMPLES, inside=("", "data"))
    if not (root / IMAGES).is_dir():
        raise InputError(f"{name}: there is no folder {IMAGES} beside {EXAMPLES}; unpack {IMAGES}.zip there")
    rows: dict[str, PairRow] = {}
    for k, entry in enumerate(entries_of(read_json(root / EXAMPLES, source=name, lines=True), where=name), 1):
        where = f"{name}: {EXAMPLES} entry {k}"
        if isinstance(entry.get("id"), bool) or not isinstance(entry.get("id"), int | str):
            raise InputError(f"{where} has no id; take the published file")
        image, other = (_file(text_of(entry, key, where=where)) for key in ("image_0", "image_1"))
        caption, swapped = (text_of(entry, key, where=where) for key in ("caption_0", "caption_1"))
        row = PairRow(str(entry["id"]), (image, other), (caption, swapped), text_of(entry, pattern, where=where))
        if row.id in rows:
            raise InputError(f"{where}: the id {row.id} stands there twice; keep one of them")
        rows[row.id] = row
    return ImagePairs(name, root / IMAGES, list(rows.values()))


def _file(image: str) -> str:
    return image if image.lower().endswith((".png", ".jpg", ".jpeg")) else f"{image}.png"


class WinogroundScore(Config):
    """Text: each image prefers its caption. Image: each caption prefers its image. Group: both; a tie is wrong.

    By chance 1/4, 1/4 and 1/6.
    """

    def __call__(self, features: Features, source: PairSource) -> Evaluation:
        """text, image and group over all and per pattern. Records: id, pattern, text, image, correct (group), margin,

        and similarities, the cosine of caption i and image j at 2i + j.
        """
        pairs, images = features.pairs(source), torch.stack(features.pair_images(source), 1).double()  # (n, 2, D)
        texts = features.texts([text for pair in pairs for text in pair.texts]).double().view(len(pairs), 2, -1)
        cosine = (texts[:, :, None] * images[:, None]).sum(-1)  # (n, 2 captions, 2 images)
        own = cosine.diagonal(dim1=1, dim2=2)
        by_image = (own - cosine.flip(1).diagonal(dim1=1, dim2=2)).amin(1)  # margin over the other caption
        by_text = (own - cosine.flip(2).diagonal(dim1=1, dim2=2)).amin(1)  # margin over the other image
        margins = torch.stack([by_image, by_text], 1)
        records = tuple(
            {
                "id": pair.id,
                "pattern": pair.pattern,
                "text": over_caption > 0,
                "image": over_image > 0,
                "correct": over_caption > 0 and over_image > 0,
                "margin": min(over_caption, over_image),
                "similarities": values,
            }
            for pair, (over_caption, over_image), values in zip(
                pairs, margins.tolist(), cosine.flatten(1).tolist(), strict=True
            )
        )
        statistics = {score: Share(column) for score, column in SCORES.items()}
        for pattern in [p for p in source.patterns if any(pair.pattern == p for pair in pairs)]:
            statistics |= {f"{pattern}/{s}": Share(column, where=("pattern", pattern)) for s, column in SCORES.items()}
        counts = {}
        for metric, share in statistics.items():
            rows = [row for row in records if share.where is None or row["pattern"] == share.where[1]]
            counts[metric] = sum(bool(row[share.hits]) for row in rows), len(rows)
        metrics = {metric: hits / total for metric, (hits, total) in counts.items()}
        return Evaluation(metrics, counts, records, statistics)
