"""``llm/caption-retrieval``: a text tower alone, asked for the other caption of the same image.

The test by which LLM2CLIP (Huang et al., arXiv 2411.04997) shows that a plain language model is no caption encoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import Field
from torch import Tensor

from clipgraft.config.schema import Config
from clipgraft.data.base import BadSample, Sample, Source, entry_of
from clipgraft.errors import InputError
from clipgraft.evaluation.base import Evaluation, Features
from clipgraft.evaluation.retrieval import Retrieval
from clipgraft.evaluation.statistics import Share

DIRECTION = "image_to_text_"


class CaptionRetrieval(Config):
    """Share of images whose first caption has another caption of theirs among the k nearest of all images' others.

    No image is looked at. A rank is the number of wrong captions that are at least as near.
    """

    ks: tuple[int, ...] | None = Field(
        None, min_length=1, description="ranks at which recall is reported; null: those of 1, 5, 10 with enough images"
    )
    captions: int = Field(2, ge=2, description="captions of an image that are used; with more than two any one counts")

    def __call__(self, features: Features, source: Source) -> Evaluation:
        """Records: id, rank and per metric whether it is found. Images with one caption are left out, with a count."""
        samples, alone = list[Sample](), list[str]()
        for index in range(len(source)):
            try:
                entry = entry_of(source, index)
            except BadSample as error:
                alone.append(error.sample_id)
                continue
            unlike = tuple(dict.fromkeys(caption for caption in entry.captions if caption))[: self.captions]
            if len(unlike) < 2:
                alone.append(entry.id)
            else:
                samples.append(Sample(entry.id, None, unlike))  # type: ignore[arg-type]  # no image is read
        if len(samples) < 2:
            raise InputError(
                f"{source.name}: {len(samples)} images have two different captions, two or more are needed (karpathy: "
                "and coco: have five; a csv: takes a row per caption)"
            )
        found = Retrieval(ks=self.ks)(_Texts(features, samples), source)  # type: ignore[arg-type]
        counts = {name.removeprefix(DIRECTION): c for name, c in found.counts.items() if name.startswith(DIRECTION)}
        total = len(samples) + len(alone)
        records = tuple(
            {"id": row["id"], "rank": row["caption_rank"], **{name: row[DIRECTION + name] for name in counts}}
            for row in found.samples
        )
        metrics = {name: hits / of for name, (hits, of) in counts.items()} | {"left_out": len(alone) / total}
        statistics = {name: Share(name) for name in counts}
        return Evaluation(metrics, counts | {"left_out": (len(alone), total)}, records, statistics)


class _Texts:
    """Features in which a sample's first caption takes the place of its image."""

    def __init__(self, features: Features, samples: list[Sample]) -> None:
        self.features, self.rows = features, samples

    def samples(self, source: Source) -> list[Sample]:
        """Samples with their other captions."""
        return [Sample(row.id, row.image, row.captions[1:]) for row in self.rows]

    def images(self, source: Source) -> Tensor:
        """(n, D) of the first captions."""
        return self.features.texts([row.captions[0] for row in self.rows])

    def texts(self, texts: Sequence[str]) -> Tensor:
        """(n, D)."""
        return self.features.texts(texts)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.features, name)
