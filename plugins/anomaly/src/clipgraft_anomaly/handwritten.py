"""``anomaly/prompts``: texts that people wrote, normal and anomalous states of a named object; nothing is trained.

K sentences per side. The lists are WinCLIP's as its public reproductions have them (Jeong et al., CVPR 2023, appendix).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor
from torch.nn import functional as F

from clipgraft.config.schema import Config
from clipgraft.encoders.base import Encoder
from clipgraft.errors import InputError
from clipgraft_anomaly.detector import Detection, Detector, DetectorHead, Fits
from clipgraft_anomaly.reading import ReadConfig, Reader, detection

NORMAL = (
    "{}",
    "flawless {}",
    "perfect {}",
    "unblemished {}",
    "{} without flaw",
    "{} without defect",
    "{} without damage",
)
ANOMALOUS = ("damaged {}", "{} with flaw", "{} with defect", "{} with damage")
TWICE = "a jpeg corrupted photo of the {}."
TEMPLATES = (
    "a cropped photo of the {}.",
    "a close-up photo of a {}.",
    "a close-up photo of the {}.",
    "a bright photo of a {}.",
    "a bright photo of the {}.",
    "a dark photo of the {}.",
    "a dark photo of a {}.",
    TWICE,
    "a blurry photo of the {}.",
    "a blurry photo of a {}.",
    "a photo of a {}.",
    "a photo of the {}.",
    "a photo of a small {}.",
    "a photo of the small {}.",
    "a photo of a large {}.",
    "a photo of the large {}.",
    "a photo of the {} for visual inspection.",
    "a photo of a {} for visual inspection.",
    "a photo of the {} for anomaly detection.",
    "a photo of a {} for anomaly detection.",
)
UNNAMED = "object"
"""What an object is called when nobody says it."""


class WordsConfig(Config):
    """Every state in every template, ``{}`` standing for the object's name and then for the state."""

    normal: tuple[str, ...] = Field(NORMAL, min_length=1, description="states of a normal object")
    anomalous: tuple[str, ...] = Field(ANOMALOUS, min_length=1, description="states of an anomalous object")
    templates: tuple[str, ...] = Field(TEMPLATES, min_length=1, description="what is said around a state")
    legacy_templates: bool = Field(
        False, description=f"the template {TWICE!r} counts twice, as in the public lists: 21 templates instead of 20"
    )
    unit: bool = Field(
        False, description="scale every text to length one before the mean is taken; WinCLIP takes the mean as it is"
    )

    @field_validator("normal", "anomalous", "templates")
    @classmethod
    def _one_place(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if bad := [text for text in value if text.count("{}") != 1]:
            raise ValueError(f"{bad[0]!r} must hold {{}} once, where the name or the state goes")
        return value

    def sentences(self, name: str) -> tuple[list[str], list[str]]:
        """Normal and anomalous sentences about an object; underscores of the name are read as spaces."""
        templates = [t for t in self.templates for _ in range(1 + (self.legacy_templates and t == TWICE))]
        name = name.replace("_", " ")
        normal, anomalous = (
            [template.replace("{}", state.replace("{}", name)) for state in states for template in templates]
            for states in (self.normal, self.anomalous)
        )
        return normal, anomalous


class Texts:
    """Prototypes (2, D) of [normal, anomalous] for names of objects, each computed once."""

    def __init__(self, encoder: Encoder, words: WordsConfig) -> None:
        if encoder.text is None:
            raise InputError(f"{encoder.data.origin.uri} has no text tower; prompts need a whole CLIP, so give one")
        self.encoder, self.words = encoder, words
        self._known: dict[str, Tensor] = {}

    def __call__(self, names: Sequence[str], *, device: torch.device) -> Tensor:
        """B names -> (B, 2, D), not normalised."""
        for name in dict.fromkeys(names):
            if name not in self._known:
                self._known[name] = torch.stack([self._mean(told) for told in self.words.sentences(name)])
            self._known[name] = self._known[name].to(device)
        return torch.stack([self._known[name] for name in names])

    @torch.no_grad()
    def _mean(self, sentences: list[str]) -> Tensor:
        text: Any = self.encoder.text
        ids = self.encoder.tokenizer(sentences).to(next(text.parameters()).device)
        found: Tensor = text(text.trim(ids)).pooled.float()
        return (F.normalize(found, dim=-1) if self.words.unit else found).mean(0)


class PlainReadConfig(ReadConfig):
    """As ``ReadConfig``; what is null there stays CLIP's own: plain patches, and the last norm on the class token."""

    vv_start: int | Literal["none"] | None = Field("none", description="first layer of value attention; none: plain")
    ln_post_global: bool = Field(True, description="the last norm on the class token, as in every CLIP")


class PromptsConfig(Config):
    """The head ``anomaly/prompts``."""

    words: WordsConfig = WordsConfig()
    read: PlainReadConfig = PlainReadConfig()


class Prompts(DetectorHead):
    """Holds no tensors: settings for any tower that can be read."""

    def __init__(self, *, words: WordsConfig, read: PlainReadConfig) -> None:
        super().__init__()
        self.words, self.read, self.fits = words, read, Fits()
        self.registered = ("anomaly/prompts", {"words": words.model_dump(), "read": read.model_dump()})

    def detector(self, encoder: Encoder) -> PromptsDetector:
        """The detector over ``encoder``, which needs a text tower."""
        return PromptsDetector(encoder, words=self.words, read=self.read.resolved(encoder))


class PromptsDetector(Detector):
    """Reader, two texts per name, maps."""

    method: ClassVar[str] = "prompts"
    named: ClassVar[bool] = True

    def __init__(self, encoder: Encoder, *, words: WordsConfig, read: ReadConfig) -> None:
        super().__init__()
        self.encoder, self.read = encoder, read
        self.reader = Reader(encoder, read)
        self.size = self.reader.size
        self.texts = Texts(encoder, words)

    def forward(self, pixels: Tensor, names: Sequence[str] | None = None) -> Detection:
        """Pixels (B, 3, S, S) in [0, 1] -> scores and maps."""
        texts = self.texts([UNNAMED] * len(pixels) if names is None else names, device=pixels.device)
        return detection(self.reader(pixels), texts, self.read, size=self.size)

    def header(self) -> dict[str, Any]:
        """Method, size, words and how the tower was read."""
        return super().header() | {"words": self.texts.words.model_dump(), "read": self.read.model_dump()}
