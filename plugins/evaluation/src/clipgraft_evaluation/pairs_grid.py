"""Minimal pairs under the choices that published MMVP-VLM numbers differ by: whose weights, which activation, pooling.

DIVA (Wang et al. 2024, arXiv 2407.20171) measures after training with patches added to the class token, and reports
the plain class token as before: part of a gain can be the pooling. A run that lists this evaluator has both columns
before and after, which ``pooling_table`` joins. b images, N patches, D joint embedding, R repeats.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from open_clip.transformer import QuickGELU
from pydantic import Field
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from clipgraft.config.schema import Config
from clipgraft.data.base import Pair, PairSource
from clipgraft.data.loader import BadSamples, evaluation_batches
from clipgraft.data.reading import stack_images
from clipgraft.encoders import load
from clipgraft.encoders.base import Encoder
from clipgraft.encoders.towers import ClipText, ResNetImage, VitImage
from clipgraft.errors import InputError
from clipgraft.evaluation.base import Evaluation, Features
from clipgraft.evaluation.features import EncoderFeatures
from clipgraft.evaluation.progress import LateBar
from clipgraft.evaluation.statistics import Bound, Records, Share, Statistic, mcnemar
from clipgraft.types import FeatureRequest

Pooling = Literal["openai", "metaclip", "dfn-378"]
ACTIVATIONS: Mapping[str, type[nn.Module]] = {"gelu": nn.GELU, "quickgelu": QuickGELU}


@dataclass(frozen=True, slots=True)
class Spread:
    """Standard deviation over R repeats of the mean over groups; ``hits`` names a column of lists of R times 0 or 1."""

    hits: str
    groups: str

    def bind(self, samples: Records) -> Bound:
        """One share per repeat."""
        repeats = range(len(samples[0][self.hits]))
        rows = [{self.groups: row[self.groups], "hit": row[self.hits]} for row in samples]
        shares = [
            Share("hit", groups=self.groups).bind([row | {"hit": row["hit"][k]} for row in rows]) for k in repeats
        ]
        return lambda weights: torch.stack([share(weights) for share in shares]).std(0)


class PairsGrid(Config):
    """Pairs as ``pairs`` scores them, for two rows by two columns.

    Rows are ``before`` and ``after`` (this model) if ``before`` is given, this model with each activation if
    ``activations`` is set, and ``own``, this model as it is, otherwise. Columns are ``cls``, the class token alone,
    and ``official``, the class token with patches as DIVA's evaluation of the named backbone has it; for DFN at 224
    pixels and SigLIP that is the tower's own embedding, so there is nothing to compare. An axis that a model doesn't
    have is left out: a tower without activations to exchange has one row ``own``, one without class token one column
    ``pooled``.
    """

    before: str | None = Field(None, description="model whose weights are those before training; a run measures both")
    activations: bool = Field(False, description="rows gelu and quickgelu: the scores if the wrong one is built in")
    official: Pooling = Field("openai", description="whose patches the second pooling adds: openai draws 76 of them")
    repeats: int = Field(5, gt=0, description="how often patches are drawn; the score is the mean")
    seed: int = Field(0, ge=0, description="of drawing patches")

    def __call__(self, features: Features, source: PairSource) -> Evaluation:
        """``row/column``: mean over patterns, and ``row/column/sd`` over repeats where patches are drawn.

        ``row/column/total`` counts the pairs that are right in more than half of the repeats. With ``before``,
        ``column/p`` is McNemar's for these counts. Records: id, pattern, per cell the share of repeats that are right
        and the smaller of two margins (mean over repeats); correct and margin are those of this model as it is, by its
        class token.
        """
        if not isinstance(source, PairSource):
            raise InputError(f"{source.name} holds single images; this needs minimal pairs, such as mmvp:DIR")
        encoder = features.encoder
        records: dict[str, dict[str, Any]] = {}
        statistics: dict[str, Statistic] = {}
        counts: dict[str, tuple[int, int]] = {}
        for row, other in self._rows(encoder):
            with _activation(other, row) if row in ACTIVATIONS else nullcontext():
                cells = self._cells(other, source, features, title=f"encoding {source.name}, {row}")
            own = row in ("after", "own") or (row in ACTIVATIONS and _kind(encoder) == row)
            for column, (pairs, margins) in cells.items():
                cell, drawn = f"{row}/{column}", margins.shape[1] > 1
                hits = (margins > 0).all(2)  # (n, R)
                counted = hits.double().mean(1) > 0.5  # (n,)
                counts[f"{cell}/total"] = (int(counted.sum()), len(counted))
                statistics[cell] = Share(cell, groups="pattern")
                statistics |= {f"{cell}/sd": Spread(f"{cell}/hits", "pattern")} if drawn else {}
                statistics[f"{cell}/total"] = Share(f"{cell}/counted")
                smaller = margins.amin(2).mean(1).tolist()
                for pair, right, most, margin in zip(pairs, hits.tolist(), counted.tolist(), smaller, strict=True):
                    found = records.setdefault(pair.id, {"id": pair.id, "pattern": pair.pattern})
                    found |= {cell: sum(right) / len(right), f"{cell}/counted": int(most), f"{cell}/margin": margin}
                    found |= {f"{cell}/hits": [int(hit) for hit in right]} if drawn else {}
                    if own and column != "official":
                        found |= {"correct": right[0], "margin": margin}
        rows = tuple(records.values())
        once = torch.ones(1, len(rows), dtype=torch.float64)
        metrics = {name: float(statistic.bind(rows)(once)) for name, statistic in statistics.items()}
        metrics |= {"skipped": float(len(source) - len(rows))} if len(source) > len(rows) else {}
        for column in ("cls", "official", "pooled"):
            if {f"before/{column}/total", f"after/{column}/total"} <= counts.keys():
                both = [(row[f"before/{column}/counted"], row[f"after/{column}/counted"]) for row in rows]
                metrics[f"{column}/p"] = mcnemar(sum(a > b for a, b in both), sum(b > a for a, b in both))
        spread = frozenset(name for name, statistic in statistics.items() if isinstance(statistic, Spread))
        return Evaluation(metrics, counts, rows, statistics, lower=spread)

    def _rows(self, encoder: Encoder) -> Iterator[tuple[str, Encoder]]:
        """Names and encoders."""
        if self.before is None:
            exchange = self.activations and _kind(encoder)
            yield from [(name, encoder) for name in ACTIVATIONS] if exchange else [("own", encoder)]
            return
        base = load(self.before).to(next(encoder.image.parameters()))
        if base.text is None:
            raise InputError(f"{self.before} has no text tower; set before to the CLIP that training started from")
        yield "before", base
        yield "after", encoder

    def _cells(
        self, encoder: Encoder, source: PairSource, features: Features, *, title: str
    ) -> dict[str, tuple[list[Pair], Tensor]]:
        """{column: (pairs, margins (n, R, 2): how much text 0 and 1 prefer their image)}."""
        classed, parameter = _has_class_token(encoder), next(encoder.image.parameters())
        want, generator = FeatureRequest(tokens=classed), Generator().manual_seed(self.seed)
        plain, mixed, pairs, bad = list[Tensor](), list[Tensor](), list[Pair](), BadSamples(len(source))
        log, workers = getattr(features, "log", None), getattr(features, "workers", 0)
        size, preprocess = getattr(features, "batch_size", 256), encoder.preprocess
        with LateBar(log, title, len(source)) as bar, _measuring(encoder):
            for batch in evaluation_batches(source, preprocess=preprocess, batch_size=size, bad=bad, workers=workers):
                found = encoder.image(preprocess.normalize(stack_images(batch).to(parameter)), want)
                plain.append(F.normalize(found.pooled.float(), dim=-1)[:, None, None].cpu())
                if found.tokens is not None:
                    projection = getattr(encoder.image.tower, "proj", None)
                    patches = found.tokens if projection is None else found.tokens @ projection
                    mixed.append(self._mix(found.pooled.float().cpu(), patches.float().cpu(), generator))
                pairs += [item for item in batch if isinstance(item, Pair)]
                bar.advance(len(batch))
        if not pairs:
            raise InputError(f"{source.name} has nothing that can be read: {bad}")
        texts = EncoderFeatures(encoder, batch_size=size, log=log).texts(
            [text for pair in pairs for text in pair.texts]
        )
        pooled = {"cls" if classed else "pooled": plain} | ({"official": mixed} if classed else {})
        return {name: (pairs, _margins(torch.cat(rows), texts)) for name, rows in pooled.items()}

    def _mix(self, cls: Tensor, patches: Tensor, generator: Generator) -> Tensor:
        """Class token (b, D) and patches (b, N, D) in the joint space -> (b, R, 2, D), one draw for each text.

        openai: class token + mean of 76 patches drawn with replacement, normalised. metaclip: unit class token + mean
        of all unit patches, normalised. dfn-378: the same with half as many drawn as there are, not normalised.
        """
        if self.official != "openai":
            cls, patches = F.normalize(cls, dim=-1), F.normalize(patches, dim=-1)
        if self.official == "metaclip":
            return F.normalize(cls + patches.mean(1), dim=-1)[:, None, None]
        k = 76 if self.official == "openai" else patches.shape[1] // 2
        mixed = []
        for token, own in zip(cls, patches, strict=True):
            drawn = torch.randint(len(own), (self.repeats, 2, k), generator=generator)
            mixed.append(token + own[drawn].mean(2))
        found = torch.stack(mixed)
        return F.normalize(found, dim=-1) if self.official == "openai" else found


def _margins(images: Tensor, texts: Tensor) -> Tensor:
    """Images (2n, R, 1 or 2, D), first and second of every pair; texts (2n, D) likewise -> (n, R, 2)."""
    first, second = images[0::2].double(), images[1::2].double()
    own = texts.double().view(len(first), 1, 2, -1)
    return (own * (first - second)).sum(-1) * torch.tensor([1, -1])


def _has_class_token(encoder: Encoder) -> bool:
    """Whether the pooled embedding is the class token, normed and projected like the patches."""
    image = encoder.image
    return isinstance(image, VitImage) and image.tower.pool_type == "tok" and image.tower.attn_pool is None


def _places(encoder: Encoder) -> list[tuple[nn.Module, str, nn.Module]]:
    """(owner, name, activation) of every activation of open_clip's own towers."""
    if not (isinstance(encoder.image, VitImage | ResNetImage) and isinstance(encoder.text, ClipText)):
        return []
    kinds = tuple(ACTIVATIONS.values())
    return [(m, name, child) for m in encoder.modules() for name, child in m.named_children() if type(child) in kinds]


def _kind(encoder: Encoder) -> str:
    """The name of the one activation in both towers; empty where there are several or others."""
    found = {
        "tanh" if getattr(child, "approximate", "none") != "none" else name
        for _, _, child in _places(encoder)
        for name, kind in ACTIVATIONS.items()
        if type(child) is kind
    }
    return found.pop() if len(found) == 1 and found <= ACTIVATIONS.keys() else ""


@contextmanager
def _activation(encoder: Encoder, name: str) -> Iterator[None]:
    """Every activation is ``name``'s meanwhile."""
    places = _places(encoder)
    for owner, place, child in places:
        if type(child) is not ACTIVATIONS[name]:
            setattr(owner, place, ACTIVATIONS[name]())
    try:
        yield
    finally:
        for owner, place, child in places:
            setattr(owner, place, child)


@contextmanager
def _measuring(encoder: Encoder) -> Iterator[None]:
    """Eval mode without gradients; what trained before trains afterwards."""
    modes = {module: module.training for module in encoder.modules()}
    encoder.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
