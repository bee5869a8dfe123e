"""``anomaly/clipn-ood``: how well a model tells pictures of known classes from pictures of others."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import ClassVar, Self, get_args

import torch
from pydantic import Field, model_validator
from torch import Tensor

from clipgraft.config.schema import Config
from clipgraft.data import open_source
from clipgraft.data.base import PairSource, Source
from clipgraft.errors import InputError
from clipgraft.evaluation.base import Evaluation
from clipgraft.evaluation.features import EncoderFeatures
from clipgraft.evaluation.statistics import Share, Statistic, value
from clipgraft.registry import current
from clipgraft_anomaly.clipn.branch import NoBranch
from clipgraft_anomaly.clipn.current_branch import branch_for
from clipgraft_anomaly.clipn.rejection import Baseline, Judged, Rule, Score, judge, known_classes
from clipgraft_anomaly.clipn.separation import Separated


class UnknownClasses(Config):
    """Known: the source's pictures of its ``known`` classes, or all; unknown: its other classes and those of ``ood``.

    ``auroc`` and ``fpr95`` are those of ``score``; for atd and ctw a model needs a branch that says no: ``from``, else
    that of the run at work, else that of the export which the encoder came from. A model without one is measured by
    ``baseline``, so that "before" in a run of CLIPN is the baseline of the same CLIP.
    """

    lower_is_better: ClassVar[frozenset[str]] = frozenset(
        {"fpr95", "known_rejected", "ood_skipped"} | {f"fpr95_{name}" for name in get_args(Score)}
    )

    ood: str | None = Field(None, description="data of other things")
    known: tuple[str, ...] = Field((), description="classes, or words that a known class's name holds; empty: all")
    score: Score = Field("atd", description="atd, ctw (both of CLIPN), msp, max-logit, energy (of any CLIP)")
    baseline: Baseline = Field("msp", description="score of a model without a branch, where atd or ctw is asked for")
    from_: str | None = Field(None, alias="from", description="run or export whose branch to put on the model")
    scale: float | None = Field(None, gt=0, description="of cosines; null: the branch's, 100 without one")
    templates: tuple[str, ...] = Field((), description="prompts with one {}; empty takes those of the data")

    @model_validator(mode="after")
    def _something_unknown(self) -> Self:
        if self.ood is None and not self.known:
            raise ValueError("nothing is unknown; give ood: data of other things, or known: some of the classes")
        return self

    def __call__(self, features: EncoderFeatures, source: Source | PairSource) -> Evaluation:
        """``auroc``, ``fpr95``; the same of every score there is (``auroc_msp``, ...); ``known_images`` and

        ``unknown_images`` (counts); with a branch, for its rule: ``known_rejected`` and ``unknown_rejected`` (shares)
        and ``known_accuracy`` (share of known pictures that are accepted as what they are). Records: id, known, score,
        a column per score, and with a branch rejected and right.
        """
        if not isinstance(source, Source):
            raise InputError(f"{source.name} holds minimal pairs; clipn-ood needs single pictures")
        branch = branch_for(features.encoder, registry=current(), given=self.from_)
        labels = features.labels(source)
        chosen = self._chosen(source.classes)
        names = [source.classes[k] for k in chosen]
        place = torch.full((len(source.classes),), -1).index_copy_(
            0, torch.tensor(chosen), torch.arange(len(chosen))
        )  # (classes,) number among the known ones
        own = [place[labels]]
        images, ids = [features.images(source)], [s.id for s in features.samples(source)]
        other = self._other(source)
        if other is not None:
            images.append(features.images(other))
            own.append(torch.full((len(images[1]),), -1))
            ids += [f"ood:{s.id}" for s in features.samples(other)]
        judged = self._judged(features, torch.cat(images), names, source.templates, branch)
        return self._evaluation(ids, torch.cat(own), judged, 0 if other is None else features.skipped(other))

    def _chosen(self, classes: Sequence[str]) -> list[int]:
        """Numbers of the known classes."""
        if not self.known:
            return list(range(len(classes)))
        unused, found = set(self.known), []
        for number, name in enumerate(classes):
            if hits := {word for word in self.known if word == name or word in re.split(r"[\s_]+", name)}:
                found.append(number)
                unused -= hits
        if unused:
            raise InputError(
                f"known: no class is called {min(unused)!r}; the classes are {', '.join(classes[:8])}, ..."
            )
        if len(found) == len(classes) and self.ood is None:
            raise InputError("known: that is every class, so nothing is unknown; name fewer, or give ood")
        return found

    def _other(self, source: Source) -> Source | None:
        if self.ood is None:
            return None
        opened = open_source(self.ood, registry=current())
        if not isinstance(opened, Source):
            raise InputError(f"ood: {self.ood} holds minimal pairs; give single pictures of other things")
        if opened.fingerprint == source.fingerprint:
            raise InputError(f"ood: {self.ood} is the data of the known classes; give pictures of other things")
        return opened

    def _judged(
        self,
        features: EncoderFeatures,
        images: Tensor,
        names: Sequence[str],
        templates: Sequence[str],
        branch: NoBranch | None,
    ) -> Judged:
        around = self.templates or tuple(templates)
        if branch is None:
            return judge(images, features.classifier(names, around), scale=self.scale or 100.0)
        if branch.no.written and not self.templates:
            around = ()
        classes = known_classes(features.encoder, branch, names, around, batch_size=features.batch_size)
        return judge(images, classes.yes, classes.no, scale=self.scale or branch.scale)

    def _evaluation(self, ids: Sequence[str], own: Tensor, judged: Judged, skipped: int) -> Evaluation:
        branched = judged.no is not None
        scores: list[Score] = [name for name in get_args(Score) if branched or name not in get_args(Rule)]
        asked: Score = self.score if self.score in scores else self.baseline
        columns = {name: judged.score(name).tolist() for name in scores}
        known = own >= 0
        records = [
            {"id": i, "known": k, "score": columns[asked][row], **{name: columns[name][row] for name in scores}}
            for row, (i, k) in enumerate(zip(ids, known.tolist(), strict=True))
        ]
        statistics: dict[str, Statistic] = {"auroc": Separated("auroc"), "fpr95": Separated("fpr95")}
        for name in scores:
            short = name.replace("-", "_")
            statistics |= {f"auroc_{short}": Separated("auroc", name), f"fpr95_{short}": Separated("fpr95", name)}
        counts = dict[str, tuple[int, int]]()
        if branched:
            rule: Rule = "ctw" if self.score == "ctw" else "atd"
            rejected = judged.rejected(rule)
            right = ~rejected & (judged.best == own)
            for record, no, yes in zip(records, rejected.tolist(), right.tolist(), strict=True):
                record |= {"rejected": no, "right": yes}
            for share, hits, column, side in (
                ("known_rejected", rejected, "rejected", True),
                ("unknown_rejected", rejected, "rejected", False),
                ("known_accuracy", right, "right", True),
            ):
                rows = known == side
                if rows.any():
                    statistics[share] = Share(column, where=("known", side))
                    counts[share] = (int(hits[rows].sum()), int(rows.sum()))
        metrics = {name: value(statistic, records) for name, statistic in statistics.items()}
        metrics |= {"known_images": float(known.sum()), "unknown_images": float((~known).sum())}
        if skipped:
            metrics["ood_skipped"] = float(skipped)
        return Evaluation(metrics, counts, tuple(records), statistics)
