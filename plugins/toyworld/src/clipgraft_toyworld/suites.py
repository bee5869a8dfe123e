"""What training should not cost, measured on data that is always here: `clipgraft eval MODEL --suite retention`."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch

from clipgraft_toyworld.captions import TEMPLATES
from clipgraft_toyworld.tokenizer import encode
from clipgraft_toyworld.world import class_names

if TYPE_CHECKING:
    from clipgraft.encoders.base import Encoder

WORLD = "toyworld/images?split=test&n=1024"
DIGITS = "toyworld/digits?split=test"
PHOTOS = "toyworld/photos"
KNN = "evaluation/knn?k=[5]&votes=[weighted]"
CLUSTERING = "evaluation/clustering?starts=3"


def retention(encoder: Encoder) -> list[str]:
    """Entries "NAME@SRC" for this encoder, some hundred images at most beyond the toy world; empty without packages.

    A model of the toy world: its 64 coarse classes and short captions. Any other: 359 real digits by their names and
    twenty photographs by their captions. One without a text tower: a linear probe on the digits. On the same classes
    the nearest images and k-means clusters, which the registry leaves out where the evaluation plugin isn't in use.
    """
    sklearn = find_spec("sklearn") is not None
    if speaks_toy(encoder):
        return [f"zero-shot@{WORLD}", f"retrieval@{WORLD}", f"{KNN}@{WORLD}"] + [f"{CLUSTERING}@{WORLD}"] * sklearn
    if not sklearn:
        return []
    structure = [f"{KNN}@{DIGITS}", f"{CLUSTERING}@{DIGITS}"]
    if encoder.text is None:
        return [f"linear-probe@{DIGITS}", *structure]
    photos = find_spec("skimage") is not None
    return [f"zero-shot@{DIGITS}", *[f"retrieval@{PHOTOS}"] * photos, *structure]


def speaks_toy(encoder: Encoder) -> bool:
    """Whether the tokenizer gives the ids of the toy world's; its class and name don't survive every export."""
    tokenizer = encoder.data.tokenizer
    if encoder.text is None or tokenizer is None:
        return False
    texts = [TEMPLATES[0].format(name) for name in class_names()[:8]]
    theirs = tokenizer(texts)
    ours = encode(texts, context_length=tokenizer.context_length)  # it may have been lengthened
    return ours.shape == theirs.shape and torch.equal(ours, theirs.to(ours.dtype))
