"""A mixture of experts as one network: the mean of its experts, and the CLIP is a plain one again."""

from __future__ import annotations

from typing import TYPE_CHECKING

from clipgraft.errors import InputError
from clipgraft_merging.feed_forwards import FeedForward, Tower, feed_forwards, mean_network
from clipgraft_merging.moe.mixture import Mixture

if TYPE_CHECKING:
    from clipgraft.encoders.base import Encoder

GRAFT = "merging/moe"


def mixture_places(encoder: Encoder) -> list[FeedForward]:
    """Where mixtures are."""
    towers: list[Tower] = ["image"] if encoder.text is None else ["image", "text"]
    found = []
    for tower in towers:
        if any(isinstance(m, Mixture) for m in getattr(encoder, tower).modules()):
            found += [p for p in feed_forwards(encoder, towers=[tower]) if isinstance(p.module, Mixture)]
    return found


def collapse(encoder: Encoder) -> Encoder:
    """Replace every mixture by the mean of its experts, in place; ``InputError`` when there is none."""
    places = mixture_places(encoder)
    if not places:
        raise InputError(f"{encoder.data.origin.uri} has no mixture of experts; collapse an export of clip-moe")
    for place in places:
        place.put(mean_network(place.module.experts))  # type: ignore[arg-type]
    encoder.data.grafts = [g for g in encoder.data.grafts if g.name != GRAFT]
    return encoder
