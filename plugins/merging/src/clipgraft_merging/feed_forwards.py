"""Feed-forward networks of a CLIP: where they are in open_clip's transformers, by tower, and the mean of several."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from clipgraft.errors import InputError

if TYPE_CHECKING:
    from clipgraft.encoders.base import Encoder

Tower = Literal["image", "text"]


@dataclass(frozen=True, slots=True)
class FeedForward:
    """The place of one network: ``block.mlp``. ``name`` such as image.3 is stable for an architecture."""

    name: str
    block: nn.Module

    @property
    def module(self) -> nn.Module:
        """What is there now."""
        return self.block.mlp  # type: ignore[return-value]

    def put(self, module: nn.Module) -> None:
        """Have ``module`` there from now on."""
        self.block.mlp = module


def feed_forwards(
    encoder: Encoder, *, towers: Sequence[Tower] = ("image", "text"), last: int | None = None, every: int = 1
) -> list[FeedForward]:
    """Places in order, image tower first: of the ``last`` blocks of each tower (None: all), every ``every``-th of them

    counted from the top. ``InputError`` for a tower that is not made of open_clip's blocks.
    """
    found: list[FeedForward] = []
    for tower in towers:
        blocks = _blocks(encoder, tower)
        taken = range(len(blocks))[-last:] if last else range(len(blocks))
        taken = [i for i in taken if (len(blocks) - 1 - i) % every == 0]
        found += [FeedForward(f"{tower}.{i}", blocks[i]) for i in taken]
    return found


def _blocks(encoder: Encoder, tower: Tower) -> Sequence[nn.Module]:
    module = getattr(encoder, tower)
    if module is None:
        raise InputError(f"{encoder.data.origin.uri} has no {tower} tower; leave it out of towers")
    blocks = getattr(getattr(getattr(module, "tower", None), "transformer", None), "resblocks", None)
    if blocks is None or not all(hasattr(block, "mlp") for block in blocks):
        raise InputError(
            f"the {tower} tower of {encoder.data.origin.uri} is no open_clip transformer, whose feed-forward networks "
            "are known here; use a CLIP with open_clip's ViT and text transformer, or leave the tower out of towers"
        )
    return list(blocks)


def parameters(places: Sequence[FeedForward]) -> Iterator[nn.Parameter]:
    """All weights in ``places``."""
    for place in places:
        yield from place.module.parameters()


@torch.no_grad()
def mean_network(networks: nn.ModuleList) -> nn.Module:
    """Networks of one shape -> one whose weights are their means, summed in fp64 and rounded once."""
    mean = deepcopy(networks[0])
    for name, parameter in mean.named_parameters():
        stacked = torch.stack([network.get_parameter(name).double() for network in networks])
        parameter.copy_(stacked.mean(0))
    return mean
