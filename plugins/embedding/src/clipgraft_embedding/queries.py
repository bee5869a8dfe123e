"""Texts and image files as queries of the model that made an embedding file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from clipgraft.data.base import BadSample
from clipgraft.data.images import read_image
from clipgraft.encoders.base import Encoder
from clipgraft.errors import InputError
from clipgraft_embedding.store import Embeddings
from clipgraft_embedding.stream import pixels_of
from clipgraft_embedding.tower import Kind, Tower, tower_sha256


def check_model(found: Embeddings, encoder: Encoder, *, images: bool) -> None:
    """``InputError`` unless the tower of the rows is the one that made them, and prepares ``images`` alike.

    The other tower may differ: a text tower that was trained against this image tower searches its embeddings.
    """
    kind: Kind = "texts" if found.about.kind == "texts" else "images"
    uri = encoder.data.origin.uri
    if tower_sha256(encoder, kind) != found.about.tower_sha256:
        raise InputError(
            f"the weights of {uri} are not those that made {found.path} ({found.about.model}); give that model with "
            "--model, or embed the data again"
        )
    ours = {k: list(v) if isinstance(v, tuple) else v for k, v in encoder.preprocess.as_dict().items()}
    if images and kind == "images" and ours != dict(found.about.preprocess):
        raise InputError(f"{uri} prepares images otherwise than when {found.path} was made; embed the data again")


def encode_texts(encoder: Encoder, texts: Sequence[str]) -> Tensor:
    """q texts -> (q, D) of length one."""
    if bad := [text for text in texts if not text.strip()]:
        raise InputError(f"the query {bad[0]!r} is empty; say what to look for")
    return Tower(encoder, "texts")(list(texts))


def encode_images(encoder: Encoder, files: Sequence[Path]) -> Tensor:
    """q image files -> (q, D) of length one."""
    pixels = pixels_of(encoder.preprocess)
    images = []
    for file in files:
        try:
            images.append(read_image(file, root=file.resolve().parent, sample_id=str(file)))
        except BadSample as error:
            raise InputError(f"{error}; give an image file") from None
    return Tower(encoder)(torch.stack([pixels(image) for image in images]))
