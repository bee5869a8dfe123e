"""``llm/long-retrieval``: image-text retrieval that says how much of the captions the model could read."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from clipgraft.data.base import Source
from clipgraft.evaluation.base import Evaluation
from clipgraft.evaluation.features import EncoderFeatures
from clipgraft.evaluation.retrieval import Retrieval
from clipgraft.evaluation.statistics import Share
from clipgraft_llm.long_retrieval.cut import Cut, cut_tokens


class LongRetrieval(Retrieval):
    """Recall as ``core/retrieval`` has it (any of an image's captions counts), and what was cut off.

    ``truncated``: share of captions longer than the context; ``tokens_lost``: tokens behind it, mean over all captions;
    ``tokens``: tokens of a caption, start and end included.
    """

    lower_is_better: ClassVar[frozenset[str]] = frozenset({"truncated", "tokens_lost"})

    def __call__(self, features: EncoderFeatures, source: Source) -> Evaluation:
        """Records: those of ``core/retrieval`` with the sums over a sample's captions."""
        found = super().__call__(features, source)
        said = [sample.captions for sample in features.samples(source)]
        unique = list(dict.fromkeys(caption for captions in said for caption in captions))
        cut = dict(zip(unique, cut_tokens(features.encoder.tokenizer, unique), strict=True))
        records, total = [], sum(map(len, said))
        sums = {"truncated": 0, "tokens_lost": 0, "tokens": 0}
        for record, captions in zip(found.samples, said, strict=True):
            own = _sums([cut[caption] for caption in captions])
            sums = {name: value + own[name] for name, value in sums.items()}
            records.append({**record, **own})
        return replace(
            found,
            metrics=found.metrics | {name: value / total for name, value in sums.items()},
            counts=found.counts | {"truncated": (sums["truncated"], total)},
            samples=tuple(records),
            statistics={**found.statistics, **{name: Share(name, of="captions") for name in sums}},
        )


def _sums(cuts: list[Cut]) -> dict[str, int]:
    """Over the captions of one image."""
    return {
        "truncated": sum(cut.lost > 0 for cut in cuts),
        "tokens_lost": sum(cut.lost for cut in cuts),
        "tokens": sum(cut.length for cut in cuts),
    }
