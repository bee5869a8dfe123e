"""A language model and a projection as the text tower of a CLIP.

A frozen model that is only referred to is no part of the tower's tensors: it is in no optimizer, no resume state and no
export, and it is read when a text is first asked for. What an export keeps is the fingerprint of its files.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from clipgraft.encoders.base import DEFAULT_REQUEST, TextEncoder
from clipgraft.errors import InputError
from clipgraft.types import FeatureRequest, TextFeatures
from clipgraft_llm.tower.caption_tokens import CaptionTokenizer
from clipgraft_llm.tower.language_model import LanguageModel
from clipgraft_llm.tower.model_folder import ELSEWHERE


class Referred:
    """A model that lives outside the tower: read once, shared by copies of the tower."""

    def __init__(self, read: Callable[[], LanguageModel]) -> None:
        self._read, self.model = read, None

    def get(self, device: torch.device) -> LanguageModel:
        """The model on ``device``."""
        if self.model is None:
            self.model = self._read()
        if self.model.device != device:
            self.model.to(device)
        return self.model

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self


class LlmText(TextEncoder):
    """``language`` gives features (B, V), ``projection`` puts them into the joint space (B, D).

    ``pin`` (32,) is the fingerprint of the model's files, all zeros where the model's weights are part of the tower.
    """

    trim_exact = True
    pin: Tensor

    def __init__(
        self,
        language: LanguageModel | Referred,
        projection: nn.Module,
        *,
        tokens: CaptionTokenizer,
        embed_dim: int,
        fingerprint: str = "",
        reference: str = "",
    ) -> None:
        super().__init__()
        self.tokens, self.projection, self.reference = tokens, projection, reference
        self.width, self.embed_dim, self.context_length = tokens.settings.width, embed_dim, tokens.context_length
        self._referred = language if isinstance(language, Referred) else None
        if isinstance(language, LanguageModel):
            self.inner = language
        pin = bytes.fromhex(fingerprint) if fingerprint else bytes(32)
        self.register_buffer("pin", torch.tensor(list(pin), dtype=torch.uint8))

    @property
    def holds_model(self) -> bool:
        """Whether the language model's tensors are the tower's own."""
        return self._referred is None

    @property
    def language(self) -> LanguageModel:
        """The language model, read now if it wasn't."""
        return self.inner if self._referred is None else self._referred.get(self.pin.device)

    def extra_repr(self) -> str:
        """What the tensors don't say: features on disk are kept under it."""
        return f"{self.reference}, {bytes(self.pin.tolist()).hex()}, {self.tokens.settings}"

    def embed(self, tokens: Tensor) -> Tensor:
        """(B, L) ids -> (B, L, V) token embeddings without positions."""
        return self.language.embed(tokens)

    def trim(self, tokens: Tensor) -> Tensor:
        """(B, L) -> (B, L') without columns that are padding in every row."""
        return self.tokens.trim(tokens)

    def features(self, tokens: Tensor) -> Tensor:
        """Ids (B, L) -> (B, V) fp32 before the projection: what a cache keeps."""
        return self.language(self.trim(tokens)).pooled

    def project(self, features: Tensor) -> Tensor:
        """(B, V) -> (B, D), not normalised."""
        found: Tensor = self.projection(features)
        return found

    def forward(
        self, tokens: Tensor, want: FeatureRequest = DEFAULT_REQUEST, *, ids: Tensor | None = None
    ) -> TextFeatures:
        """Ids (B, L), or embeddings (B, L, V) with their ``ids``, -> features."""
        found = self.language(tokens, want, ids=ids)
        return TextFeatures(self.project(found.pooled), found.tokens, found.mask)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """As usual, after the stored fingerprint was compared with that of the model at hand."""
        stored = state_dict.get(f"{prefix}pin")
        if stored is not None and bool(stored.any()) and not torch.equal(stored.cpu(), self.pin.cpu()):
            raise InputError(
                f"the text model {self.reference} changed since this was saved: fingerprint "
                f"{bytes(self.pin.tolist()).hex()[:12]}, expected {bytes(stored.tolist()).hex()[:12]}; restore it, or "
                f"set {ELSEWHERE} to a folder that holds the right one"
            )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
