"""Who is unknown: competing-to-win and agreeing-to-differ, without a threshold (Wang et al., ICCV 2023, section 3.4).

n pictures, C known classes, D joint embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from clipgraft.data.loader import class_prompts
from clipgraft.encoders.base import Encoder
from clipgraft.errors import InputError
from clipgraft_anomaly.clipn.branch import NoBranch

Rule = Literal["atd", "ctw"]
Baseline = Literal["msp", "max-logit", "energy"]
Score = Literal["atd", "ctw", "msp", "max-logit", "energy"]
DIGITS = 9
"""Decimals of a score: without training all are equal, and rounding errors must not rank them."""


@dataclass(frozen=True, slots=True)
class Classes:
    """Embeddings of C known classes, of length one: ``yes`` (C, D) and ``no`` (C, D)."""

    names: tuple[str, ...]
    yes: Tensor
    no: Tensor


@dataclass(frozen=True, slots=True)
class Judged:
    """Logits (n, C) float64 of "it is a j" and, with a branch, of "it is no j"."""

    yes: Tensor
    no: Tensor | None = None

    @property
    def p(self) -> Tensor:
        """(n, C) softmax over the known classes."""
        return self.yes.softmax(1)

    @property
    def q(self) -> Tensor:
        """(n, C) chance that it is no j."""
        return (self._against() - self.yes).sigmoid()

    @property
    def best(self) -> Tensor:
        """(n,) nearest known class."""
        return self.yes.argmax(1)

    def unknown(self, rule: Rule) -> Tensor:
        """(n,) chance of being unknown: q of the nearest class for ctw, the mean of q under p for atd."""
        return self.q.gather(1, self.best[:, None])[:, 0] if rule == "ctw" else (self.q * self.p).sum(1)

    def rejected(self, rule: Rule) -> Tensor:
        """(n,) whether: above one half for ctw; above the largest p for atd, as if unknown were one more class."""
        chance = self.unknown(rule)
        return chance > (0.5 if rule == "ctw" else self.p.amax(1))

    def score(self, score: Score) -> Tensor:
        """(n,) larger for known ones, in the order of the chance of being known.

        ctw, atd and msp are log odds, which don't saturate where chances do: of 1 - ``unknown``, and of the largest
        p. max-logit and energy (log sum exp) are logits.
        """
        if score == "max-logit":
            found = self.yes.amax(1)
        elif score == "energy":
            found = self.yes.logsumexp(1)
        elif score == "msp":
            top = self.yes.amax(1)
            others = self.yes.scatter(1, self.best[:, None], -torch.inf).logsumexp(1)
            found = top - others if self.yes.shape[1] > 1 else torch.zeros_like(top)
        else:
            d = self.yes - self._against()
            if score == "ctw":
                found = d.gather(1, self.best[:, None])[:, 0]
            else:
                p = self.yes.log_softmax(1)
                found = (p + F.logsigmoid(d)).logsumexp(1) - (p + F.logsigmoid(-d)).logsumexp(1)
        return found.round(decimals=DIGITS)

    def _against(self) -> Tensor:
        if self.no is None:
            raise InputError("atd and ctw need a no branch; give a run or export of clipgraft run clipn")
        return self.no


def judge(images: Tensor, yes: Tensor, no: Tensor | None = None, *, scale: float) -> Judged:
    """Unit images (n, D) against unit classes (C, D), on the CPU in float64."""
    x = images.double()
    return Judged(scale * x @ yes.double().T, None if no is None else scale * x @ no.double().T)


@torch.no_grad()
def known_classes(
    encoder: Encoder,
    branch: NoBranch,
    names: Sequence[str],
    templates: Sequence[str] = (),
    *,
    batch_size: int = 256,
) -> Classes:
    """Classes in prompts: the mean of unit embeddings over ``templates``, of length one again.

    Both towers read the same prompts, unless negations are written out: then those are the templates of either.
    """
    if not names:
        raise InputError("no known class was given; name one or more")
    written = branch.no.written
    if written and templates:
        raise InputError("this branch was trained with written negations, which are its templates; give none")
    yes_around = [yes for yes, _ in written] or templates
    no_around = [no for _, no in written] or templates
    branch.eval()
    text = encoder.text
    assert text is not None  # a branch fits no other encoder

    def said(ids: Tensor) -> Tensor:
        pooled: Tensor = text(text.trim(ids)).pooled
        return pooled

    towers: tuple[tuple[Callable[[Tensor], Tensor], Sequence[str]], ...] = ((said, yes_around), (branch, no_around))
    found = []
    for tower, around in towers:
        prompts = [prompt for name in names for prompt in class_prompts(name, around)]
        ids = encoder.tokenizer(prompts).to(next(branch.parameters()).device)
        rows = torch.cat([F.normalize(tower(part).float(), dim=-1) for part in torch.split(ids, batch_size)])
        found.append(F.normalize(rows.view(len(names), -1, rows.shape[1]).mean(1), dim=-1).cpu())
    return Classes(tuple(names), found[0], found[1])
