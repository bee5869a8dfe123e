"""A folder of ``onnx-towers`` as a model: embed, search, classify and measure with the very graphs that are shipped."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from clipgraft.encoders.base import (
    DEFAULT_REQUEST,
    Encoder,
    EncoderData,
    ImageEncoder,
    Origin,
    Preprocess,
    TextEncoder,
)
from clipgraft.encoders.tokenizers import tokenizer_for
from clipgraft.errors import InputError
from clipgraft.files import sha256_of
from clipgraft.types import FeatureRequest, ImageFeatures, TextFeatures
from clipgraft_embedding.onnx_towers import ABOUT, Session

SHUT = "a graph gives pooled embeddings alone and can't be trained; use the model that it was exported from"


def _fingerprint(sha256: str) -> nn.Parameter:
    """The hash of a graph as a tensor: two graphs are told apart by their state, as other towers are."""
    return nn.Parameter(torch.tensor(list(bytes.fromhex(sha256)), dtype=torch.float32), requires_grad=False)


class OnnxImage(ImageEncoder):
    """``image.onnx``."""

    grid = None

    def __init__(self, session: Session, preprocess: Preprocess, *, embed_dim: int, sha256: str) -> None:
        super().__init__()
        self.sha256 = _fingerprint(sha256)
        self.session, self.preprocess = session, preprocess
        self.width = self.embed_dim = embed_dim
        self.depth = 0

    def forward(self, pixels: Tensor, want: FeatureRequest = DEFAULT_REQUEST) -> ImageFeatures:
        """Standardised pixels (B, 3, H, W') -> pooled features; the graph standardises itself, so that is undone."""
        if want.tokens or want.layers:
            raise InputError(SHUT)
        mean, std = (
            torch.tensor(v, device=pixels.device)[:, None, None] for v in (self.preprocess.mean, self.preprocess.std)
        )
        return ImageFeatures(self.session(pixels * std + mean).pooled.to(pixels.device))


class OnnxText(TextEncoder):
    """``text.onnx``."""

    trim_exact = False

    def __init__(self, session: Session, *, embed_dim: int, context_length: int, sha256: str) -> None:
        super().__init__()
        self.sha256 = _fingerprint(sha256)
        self.session, self.context_length = session, context_length
        self.width = self.embed_dim = embed_dim

    def embed(self, tokens: Tensor) -> Tensor:
        """Not in the graph."""
        raise InputError(SHUT)

    def forward(
        self, tokens: Tensor, want: FeatureRequest = DEFAULT_REQUEST, *, ids: Tensor | None = None
    ) -> TextFeatures:
        """Token ids (B, L) -> pooled features."""
        if ids is not None or want.tokens or want.layers:
            raise InputError(SHUT)
        return TextFeatures(self.session(tokens).pooled.to(tokens.device))


def open_towers(uri: str) -> Encoder | None:
    """The encoder of a folder that holds ``towers.json``; None for anything else."""
    folder = Path(uri)
    if not (folder / ABOUT).is_file():
        return None
    if find_spec("onnxruntime") is None:
        raise InputError(f"{uri} holds ONNX graphs, which onnxruntime runs: pip install 'clipgraft-embedding[onnx]'")
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        told, inputs, dim = dict(about["preprocess"]), about["inputs"], int(about["outputs"]["unit"][1])
        shas = dict(about["sha256"])
        told.pop("inside_the_graph")
        preprocess = Preprocess(**{k: tuple(v) if isinstance(v, list) else v for k, v in told.items()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{folder / ABOUT} is damaged; write the export again") from None
    for name, sha in shas.items():
        if Path(name).name != name or not (folder / name).is_file() or sha256_of(folder / name) != sha:
            raise InputError(f"{folder / name} is missing or damaged; write the export again")
    if "image" not in inputs:
        raise InputError(f"{uri} holds the text tower alone; export both towers to use it as a model")
    session = Session(folder / "image.onnx")
    image = OnnxImage(session, preprocess, embed_dim=dim, sha256=shas["image.onnx"])
    text, tokenizer = None, None
    if "text" in inputs:
        length, session = inputs["text"]["shape"][1], Session(folder / "text.onnx")
        text = OnnxText(session, embed_dim=dim, context_length=length, sha256=shas["text.onnx"])
        tokenizer = tokenizer_for(about["text_cfg"], folder=folder)
    bias = about["logit_bias"]
    return Encoder(
        image,
        text,
        logit_scale=torch.tensor(about["logit_scale"]).log(),
        logit_bias=None if bias is None else torch.tensor(bias),
        data=EncoderData(preprocess, tokenizer, Origin(uri, "onnx", lineage=tuple(about["lineage"])), {}),
    )
