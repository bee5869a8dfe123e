"""What an encoder is: two towers that return features, a scale, and the data that must travel with the weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from clipgraft.types import FeatureRequest, ImageFeatures, TextFeatures

DEFAULT_REQUEST = FeatureRequest()


@dataclass(frozen=True, slots=True)
class Preprocess:
    """How pixels reach the image tower. ``size`` (H, W') pixels; ``mean``/``std`` per channel on [0, 1] values."""

    size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: Literal["bicubic", "bilinear", "random"] = "bicubic"
    resize_mode: Literal["shortest", "longest", "squash"] = "shortest"
    fill_color: int = 0

    def normalize(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W') in [0, 1] -> standardised pixels for the tower."""
        mean = torch.as_tensor(self.mean, dtype=pixels.dtype, device=pixels.device)[:, None, None]
        std = torch.as_tensor(self.std, dtype=pixels.dtype, device=pixels.device)[:, None, None]
        return (pixels - mean).div_(std)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


class Tokenizer(Protocol):
    """Text to ids, ``context_length`` at most."""

    context_length: int

    @property
    def pad_id(self) -> int:
        """The id of padding; some tokenizers pad with their end token, so trim with ``TextEncoder.trim``."""

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """(B, context_length) int64, start and end tokens included, padded."""

    def save(self, folder: str) -> None:
        """Write what another process needs to rebuild this tokenizer into ``folder`` (nothing for built-in ones)."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Where an encoder came from: the reference it was opened by, its architecture, and a sha256 of its weights."""

    uri: str
    architecture: str
    sha256: str = ""
    lineage: tuple[dict[str, Any], ...] = ()


class ImageEncoder(nn.Module, ABC):
    """An image tower. ``width`` W, ``embed_dim`` D, ``depth`` blocks, ``grid`` (h, w) of patch tokens or None."""

    width: int
    embed_dim: int
    depth: int
    grid: tuple[int, int] | None

    @abstractmethod
    def forward(self, pixels: Tensor, want: FeatureRequest = DEFAULT_REQUEST) -> ImageFeatures:
        """Standardised pixels (B, 3, H, W') -> features."""


class TextEncoder(nn.Module, ABC):
    """A text tower. ``trim_exact`` says that dropping trailing padding leaves the pooled embedding unchanged."""

    width: int
    embed_dim: int
    context_length: int
    trim_exact: bool

    @abstractmethod
    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids (B, L) -> token embeddings (B, L, W) without positions, for prompt learning."""

    def trim(self, tokens: Tensor) -> Tensor:
        """Token ids (B, L) -> (B, L') without the columns that no pooled embedding sees; unchanged otherwise."""
        return tokens

    @abstractmethod
    def forward(
        self, tokens: Tensor, want: FeatureRequest = DEFAULT_REQUEST, *, ids: Tensor | None = None
    ) -> TextFeatures:
        """Token ids (B, L) int64 -> features; or token embeddings (B, L, W) with the ``ids`` (B, L) they stand for,

        from which pooling and masks are read (a learned token has any id that is neither the end nor padding).
        """


class Graft(Protocol):
    """A serialisable structural change of an encoder, applied in config order.

    A graft that ``merge`` can't turn into a plain CLIP has an attribute ``portable = False``: its export keeps the
    graft's name and config, and opening it applies the graft again before the weights are read.
    """

    def apply(self, encoder: Encoder) -> Encoder:
        """Change ``encoder`` in place (or wrap it) and return it."""

    def merge(self, encoder: Encoder) -> Encoder:
        """Fold the change into plain weights where that is possible; otherwise return the encoder as it is."""


@dataclass(slots=True)
class AppliedGraft:
    """A graft on an encoder, with the name and config that rebuild it. ``portable``: plain CLIP after ``merge``."""

    name: str
    config: dict[str, Any]
    graft: Graft
    portable: bool = True


@dataclass(slots=True)
class EncoderData:
    """What travels with the weights and is not a tensor."""

    preprocess: Preprocess
    tokenizer: Tokenizer | None
    origin: Origin
    model_config: dict[str, Any]
    """open_clip's ``model_cfg`` (embed_dim, vision_cfg, text_cfg, ...); empty when open_clip can't hold the encoder."""
    grafts: list[AppliedGraft] = field(default_factory=list)


class Encoder(nn.Module):
    """A CLIP: an image tower, maybe a text tower, ``logit_scale`` (log) and maybe ``logit_bias``, plus its data.

    There is no ``encode_image`` here by design: call the towers, or this module, so that wrappers keep their hooks.
    """

    def __init__(
        self,
        image: ImageEncoder,
        text: TextEncoder | None,
        *,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        data: EncoderData,
    ) -> None:
        super().__init__()
        self.image, self.text, self.data = image, text, data
        self.logit_scale = nn.Parameter(logit_scale.detach().clone())
        self.logit_bias = None if logit_bias is None else nn.Parameter(logit_bias.detach().clone())

    def train(self, mode: bool = True) -> Encoder:
        """As ``nn.Module.train``, but a module whose parameters are all frozen stays in eval mode."""
        super().train(mode)

        def hold(module: nn.Module) -> None:
            parameters = list(module.parameters())
            if parameters and not any(p.requires_grad for p in parameters):
                module.eval()
            else:
                for child in module.children():
                    hold(child)

        if mode:
            for tower in self.children():
                hold(tower)
        return self

    @property
    def preprocess(self) -> Preprocess:
        """How pixels reach the image tower."""
        return self.data.preprocess

    @property
    def tokenizer(self) -> Tokenizer:
        """Text to ids; an encoder without a text tower has none."""
        if self.data.tokenizer is None:
            from clipgraft.errors import InputError

            raise InputError(f"{self.data.origin.uri} has no text tower; use a CLIP with one, or an image-only stage")
        return self.data.tokenizer

    def forward(
        self, pixels: Tensor | None = None, text: Tensor | None = None, want: FeatureRequest = DEFAULT_REQUEST
    ) -> tuple[ImageFeatures | None, TextFeatures | None]:
        """Standardised pixels (B, 3, H, W') and/or token ids (B, L) -> features of each that was given."""
        image = None if pixels is None else self.image(pixels, want)
        if text is not None and self.text is None:
            raise ValueError("this encoder has no text tower")
        return image, None if text is None or self.text is None else self.text(text)


OpenEncoder = Callable[[str], Encoder]
