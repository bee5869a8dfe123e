"""AnomalyCLIP's object-agnostic prompts: two learnt texts, normal and anomalous, that name no object.

P = 2 prompts, V text width, D joint embedding (Zhou et al., ICLR 2024, section 3; official code for positions).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from clipgraft.config.schema import Config
from clipgraft.encoders.base import Encoder
from clipgraft.errors import InputError
from clipgraft_anomaly.detector import Detection, Detector, DetectorHead, Fits
from clipgraft_anomaly.reading import ReadConfig, Reader, detection
from clipgraft_anomaly.same_data import DataRecord
from clipgraft_anomaly.text_path import encode_embeddings, why_not_prompted


class PromptConfig(Config):
    """What is learnt, and the words around it."""

    context: int = Field(12, gt=0, description="learnt tokens in front of the words, for each prompt its own")
    deep_tokens: int = Field(4, ge=0, description="learnt tokens that overwrite hidden states of the text tower")
    deep_layers: int | None = Field(
        None, ge=0, description="how many text layers, from the second on, get such tokens; null: 8, or what there is"
    )
    normal: str = Field("object.", description="words of the normal prompt")
    anomalous: str = Field("damaged object.", description="words of the anomalous prompt")
    legacy_half: bool = Field(False, description="round deep tokens to fp16, as the official code does")

    def resolved(self, encoder: Encoder) -> PromptConfig:
        """The number of layers chosen for this text tower; raises when the prompts don't fit it."""
        if problem := why_not_prompted(encoder.text):
            raise InputError(f"prompt: {problem}")
        text: Any = encoder.text
        depth = len(text.tower.transformer.resblocks)
        layers = min(8, max(depth - 2, 0)) if self.deep_layers is None else self.deep_layers
        layers = layers if self.deep_tokens else 0
        if layers >= depth:
            raise InputError(
                f"prompt.deep_layers {layers} must be below the {depth} layers of this text tower; lower it"
            )
        if layers and self.deep_tokens > self.context:
            raise InputError(f"prompt.deep_tokens {self.deep_tokens} exceeds prompt.context {self.context}; lower it")
        longest = max(int(ids.argmax()) + 1 for ids in encoder.tokenizer([self.normal, self.anomalous]))
        if longest + self.context > text.context_length:
            raise InputError(
                f"prompt.context {self.context} and the words take {longest + self.context} tokens, this text tower "
                f"has {text.context_length}; set prompt.context to {max(text.context_length - longest, 1)} or less"
            )
        return self.model_copy(update={"deep_layers": layers})


class AnomalyClipConfig(Config):
    """The head ``anomaly/anomalyclip``: settings that were resolved for one tower."""

    prompt: PromptConfig = PromptConfig()
    read: ReadConfig = ReadConfig()
    fits: Fits = Fits()
    trained: DataRecord = DataRecord()


class AnomalyClip(DetectorHead):
    """Learnt: ``context`` (2, n, V) and ``deep`` (layers, m, V). Kept beside them: ``texts`` (2, D), which is all that

    inspection needs, so that the text tower isn't run again.
    """

    texts: Tensor

    def __init__(
        self, *, prompt: PromptConfig, read: ReadConfig, fits: Fits, trained: DataRecord | None = None
    ) -> None:
        super().__init__()
        self.prompt, self.read, self.fits, self.trained = prompt, read, fits, trained or DataRecord()
        if prompt.deep_layers is None or read.layers is None or not fits.text_width:
            raise InputError(
                "the head anomaly/anomalyclip is made by the recipe anomalyclip; run it, then give its run"
            )
        settings = AnomalyClipConfig(prompt=prompt, read=read, fits=fits, trained=self.trained)
        self.registered = ("anomaly/anomalyclip", settings.model_dump(mode="json"))
        self.context = nn.Parameter(0.02 * torch.randn(2, prompt.context, fits.text_width))
        self.deep = nn.Parameter(
            0.02 * torch.randn(prompt.deep_layers, prompt.deep_tokens, fits.text_width),
            requires_grad=prompt.deep_layers > 0,
        )
        self.register_buffer("texts", torch.zeros(2, fits.embed_dim))

    def embed(self, encoder: Encoder) -> Tensor:
        """The two texts (2, D) of [normal, anomalous], not normalised, with gradient to what is learnt.

        Tokens are [start, context, words, end]; nothing behind the end token is computed, which a causal tower ignores.
        """
        text: Any = encoder.text
        ids = encoder.tokenizer([self.prompt.normal, self.prompt.anomalous]).to(self.context.device)
        last = ids.argmax(-1)  # the end token has the highest id
        words = text.embed(ids[:, : int(last.max()) + 1]).detach()
        embedded = torch.cat([words[:, :1], self.context.to(words.dtype), words[:, 1:]], 1)
        return encode_embeddings(
            text, embedded, last + self.prompt.context, deep=list(self.deep), legacy_half=self.prompt.legacy_half
        )

    @torch.no_grad()
    def settle(self, encoder: Encoder) -> None:
        """Compute ``texts`` from what was learnt."""
        self.texts.copy_(self.embed(encoder))

    def detector(self, encoder: Encoder) -> AnomalyClipDetector:
        """The detector over ``encoder``; its text tower isn't needed."""
        return AnomalyClipDetector(encoder, self)


class AnomalyClipDetector(Detector):
    """Reader, two texts, maps; the object's name plays no part."""

    method: ClassVar[str] = "anomalyclip"

    def __init__(self, encoder: Encoder, head: AnomalyClip) -> None:
        super().__init__()
        self.encoder = encoder
        self.reader = Reader(encoder, head.read)
        self.trained_on = head.trained if head.trained.pictures else None
        self.size, self.read = self.reader.size, head.read
        self.texts: Tensor
        self.register_buffer("texts", head.texts.detach().clone())

    def forward(self, pixels: Tensor, names: Any = None) -> Detection:
        """Pixels (B, 3, S, S) in [0, 1] -> scores and maps."""
        return detection(self.reader(pixels), self.texts, self.read, size=self.size)

    def header(self) -> dict[str, Any]:
        """Method, size and how the tower was read."""
        return super().header() | {"read": self.read.model_dump()}
