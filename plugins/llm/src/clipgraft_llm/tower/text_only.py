"""A text model alone as an encoder, ``llm:DIR``: to train it on captions, and to measure what it knows of them."""

from __future__ import annotations

from functools import partial
from typing import NoReturn

import torch
from torch import Tensor, nn

from clipgraft.encoders.base import DEFAULT_REQUEST, Encoder, EncoderData, ImageEncoder, Origin, Preprocess
from clipgraft.errors import InputError
from clipgraft.types import FeatureRequest
from clipgraft_llm.tower.caption_tokens import CaptionTokenizer
from clipgraft_llm.tower.language_model import LanguageModel, read_language_model
from clipgraft_llm.tower.model_folder import SCHEME, find_model
from clipgraft_llm.tower.settings import TextModelConfig, settled
from clipgraft_llm.tower.text_tower import LlmText, Referred

BLANK = Preprocess(size=(1, 1), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
"""Pictures have no part in it."""


class NoImages(ImageEncoder):
    """Stands where an image tower would be."""

    depth, grid = 0, None

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = self.embed_dim = width
        self.place = nn.Parameter(torch.zeros(()), requires_grad=False)  # says where the encoder is

    def forward(self, pixels: Tensor, want: FeatureRequest = DEFAULT_REQUEST) -> NoReturn:
        """Raises."""
        raise InputError(
            "a text model alone has no image tower; put it into a CLIP with the recipe llm2clip (text.model) or the "
            "graft llm/transformer-text, or measure it with llm/caption-retrieval"
        )


def open_text_model(uri: str) -> Encoder | None:
    """``llm:DIR``, ``llm:ORG/NAME`` or ``llm:plugin/head`` as an encoder without images; None for other references."""
    if not uri.startswith(SCHEME):
        return None
    return text_encoder(TextModelConfig(model=uri))


def text_encoder(config: TextModelConfig, *, trainable: bool = False) -> Encoder:
    """The model, its features unprojected. ``trainable``: its tensors are the encoder's own."""
    folder = find_model(config.model)
    settings = settled(config, folder)
    tokens, pin = CaptionTokenizer.of(folder, settings), folder.fingerprint()
    read = partial(read_language_model, folder, settings)
    language: LanguageModel | Referred = read() if trainable else Referred(read)
    tower = LlmText(
        language, nn.Identity(), tokens=tokens, embed_dim=settings.width, fingerprint=pin, reference=config.model
    )
    uri = config.model if config.model.startswith(SCHEME) else f"{SCHEME}{config.model}"
    data = EncoderData(BLANK, tokens, Origin(uri, "text", pin), {})
    return Encoder(NoImages(settings.width), tower, logit_scale=torch.tensor(50.0).log(), data=data)
