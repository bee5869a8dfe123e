"""How much the loss can rise when the weights of a block move by a small share of themselves.

Ours: what Kumar et al. (arXiv 2410.16476) call the sharpness of straggler layers had no public definition or code. This
is worst-case adaptive sharpness (Andriushchenko et al., ICML 2023) with the perturbation on one block: the mean over
batches of max L(theta + d) - L(theta) over |d| <= rho |theta| element by element.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from clipgraft.errors import InputError

if TYPE_CHECKING:
    from clipgraft.data.base import Source
    from clipgraft.encoders.base import Encoder

MOMENTUM = 0.75
Loss = Callable[[Sequence[Tensor]], Tensor]


@dataclass(frozen=True, slots=True)
class Ascent:
    """``value`` >= 0, and the perturbation that reached it, as ``shares`` in [-1, 1] of rho |theta|."""

    value: float
    shares: tuple[Tensor, ...]


def sharpness(
    loss: Loss, weights: Sequence[Tensor], *, rho: float, steps: int = 20, starts: Sequence[Sequence[Tensor]] = ()
) -> Ascent:
    """max of ``loss`` over the box of ``rho`` around ``weights``, minus its value there.

    Signed gradient steps with momentum, halved when they stop helping, from zero and from every start (shares, as
    ``Ascent`` has them). Zero is always a candidate, so the value is never negative, and rho = 0 gives 0.
    """
    if rho < 0:
        raise InputError(f"rho is {rho:g}; give a share of the weights' size, such as 0.002")
    sizes = [rho * w.detach().abs() for w in weights]
    zero = [torch.zeros_like(w) for w in weights]

    def at(shares: Sequence[Tensor]) -> Tensor:
        return loss([w.detach() + size * z for w, size, z in zip(weights, sizes, shares, strict=True)])

    with torch.no_grad():
        here = float(at(zero))
    best, kept = here, [z.clone() for z in zero]
    for start in (zero, *starts) if rho else ():
        shares, moved, length = [z.detach().clone() for z in start], [torch.zeros_like(z) for z in zero], 1.0
        reached = float("-inf")
        for _ in range(steps + 1):
            asked = [z.requires_grad_() for z in shares]
            value = at(asked)
            found = torch.autograd.grad(value, asked)
            now = float(value.detach())
            if now > best:
                best, kept = now, [z.detach().clone() for z in asked]
            length = length if now > reached else length / 2
            reached = max(reached, now)
            with torch.no_grad():
                moved = [MOMENTUM * m + length * g.sign() for m, g in zip(moved, found, strict=True)]
                shares = [(z + m).clamp_(-1, 1) for z, m in zip(asked, moved, strict=True)]
    return Ascent(best - here, tuple(kept))


def rising(loss: Loss, weights: Sequence[Tensor], *, radii: Sequence[float], steps: int = 20) -> list[Ascent]:
    """``sharpness`` for rising radii, each started from the perturbation before too, so that values never fall."""
    found: list[Ascent] = []
    for rho in radii:
        before = found[-1].shares if found else None
        ratio = radii[len(found) - 1] / rho if found and rho else 0.0
        starts = [] if before is None else [[z * ratio for z in before]]
        found.append(sharpness(loss, weights, rho=rho, steps=steps, starts=starts))
    return found


@dataclass(frozen=True, kw_only=True)
class SharpnessSettings:
    """``rho``: share of a weight's size. ``examples`` in batches of ``batch``. ``normalise``: logits of length one."""

    rho: float = 0.002
    steps: int = 20
    examples: int = 1024
    batch: int = 128
    normalise: bool = False


def block_sharpness(
    encoder: Encoder, source: Source, blocks: Mapping[str, Sequence[str]], *, settings: SharpnessSettings
) -> dict[str, float]:
    """{block: sharpness} of the loss on class names; ``blocks`` {name: names of the image tower's weights}."""
    from clipgraft.data.transforms import evaluation_transform
    from clipgraft.evaluation.features import EncoderFeatures

    if len(source.classes) < 2:
        raise InputError(f"{source.name} has no classes; sharpness is that of a loss on classes")
    image, device = encoder.image, next(encoder.parameters()).device
    words = EncoderFeatures(encoder).classifier(source.classes, source.templates).to(device)
    transform, scale = evaluation_transform(encoder.preprocess), float(encoder.logit_scale.detach().exp())
    held = dict(image.named_parameters())
    totals, count = dict.fromkeys(blocks, 0.0), 0
    for start in range(0, min(settings.examples, len(source)), settings.batch):
        rows = [source[i] for i in range(start, min(start + settings.batch, settings.examples, len(source)))]
        pixels = encoder.preprocess.normalize(torch.stack([transform(row.image) for row in rows]).to(device))
        labels = torch.tensor([row.label for row in rows], device=device)
        count += 1
        for name, names in blocks.items():

            def loss(
                values: Sequence[Tensor], names: Sequence[str] = names, x: Tensor = pixels, y: Tensor = labels
            ) -> Tensor:
                found = torch.func.functional_call(image, dict(zip(names, values, strict=True)), (x,))
                logits = scale * F.normalize(found.pooled, dim=-1) @ words.T
                return F.cross_entropy(F.normalize(logits, dim=-1) if settings.normalise else logits, y)

            weights = [held[n] for n in names]
            totals[name] += sharpness(loss, weights, rho=settings.rho, steps=settings.steps).value
    return {name: total / max(count, 1) for name, total in totals.items()}
