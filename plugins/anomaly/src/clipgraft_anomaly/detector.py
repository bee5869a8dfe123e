"""What a detector is: pictures in, a score per picture and a score per pixel out; and the head that makes a CLIP one.

A method's trained tensors are a component of an export (portability L1): a registered head whose config says for which
tower it was made. ``head.detector(encoder)`` is the detector. It takes the tower as it is, nothing is patched.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from clipgraft.config.schema import Config
from clipgraft.encoders.base import Encoder, Preprocess
from clipgraft.errors import InputError
from clipgraft.registry import Registry


@dataclass(frozen=True, slots=True)
class Detection:
    """``score`` (B,) of whole pictures and ``map`` (B, S, S) of pixels at the input's size; higher is more anomalous.

    Both are raw: nothing is scaled per picture or per batch.
    """

    score: Tensor
    map: Tensor


class Fits(Config):
    """The tower a head was made for."""

    architecture: str = Field("", description="name of the architecture")
    width: int = Field(0, ge=0, description="features of the image tower")
    depth: int = Field(0, ge=0, description="its layers")
    patch: int = Field(0, ge=0, description="its patch side [pixels]")
    embed_dim: int = Field(0, ge=0, description="joint embedding")
    text_width: int = Field(0, ge=0, description="features of the text tower; 0 without one")
    sha256: str = Field("", description="of the weights, where known")

    @classmethod
    def of(cls, encoder: Encoder) -> Self:
        """An encoder's."""
        image: Any = encoder.image
        patch = getattr(getattr(image, "tower", None), "patch_size", (0, 0))[0]
        text: Any = encoder.text
        return cls(
            architecture=encoder.data.origin.architecture,
            width=image.width,
            depth=image.depth,
            patch=int(patch),
            embed_dim=image.embed_dim,
            text_width=0 if text is None else text.width,
            sha256=encoder.data.origin.sha256,
        )

    def problem(self, encoder: Encoder) -> str:
        """Why a head that was made for this tower doesn't suit ``encoder``; empty when it does."""
        other = type(self).of(encoder)
        for name in ("width", "depth", "patch", "embed_dim"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine and mine != theirs:
                return (
                    f"this detector was made for {self.architecture or 'another model'} ({name} {mine}), the model has "
                    f"{name} {theirs}; give the model it was made for"
                )
        return ""


class Detector(nn.Module, ABC):
    """``method`` is its name, ``size`` S the side of its input; pictures are squashed to S x S, as the papers do.

    ``named``: prompts hold the object's name, so ``names`` matter.
    """

    method: ClassVar[str]
    named: ClassVar[bool] = False
    encoder: Encoder
    size: int

    @abstractmethod
    def forward(self, pixels: Tensor, names: Sequence[str] | None = None) -> Detection:
        """Pixels (B, 3, S, S) in [0, 1], not normalised; B names of objects, "object" for all when None."""

    @property
    def preprocess(self) -> Preprocess:
        """How a picture becomes this detector's input."""
        return replace(self.encoder.preprocess, size=(self.size, self.size), resize_mode="squash")

    def header(self) -> dict[str, Any]:
        """What was computed and how, in plain JSON types, for whoever reads a result later."""
        return {"method": self.method, "size": self.size}


class DetectorHead(nn.Module, ABC):
    """Trained or gathered tensors of a method; its registered name and config are ``registered``, for exports."""

    registered: tuple[str, dict[str, Any]]
    fits: Fits

    @abstractmethod
    def detector(self, encoder: Encoder) -> Detector:
        """The detector over ``encoder``, which must fit."""


def open_detector(
    reference: str, *, registry: Registry, method: str | None = None, settings: dict[str, Any] | None = None
) -> Detector:
    """A run or export with a detector in it; or any model with a ``method`` that needs no training.

    ``settings`` are the head's, for a ``method`` that is built anew ("winclip", "prompts").
    """
    from clipgraft.checkpoint import MANIFEST, open_export, read_component, read_manifest
    from clipgraft.encoders import load

    folder = Path(reference)
    folder = folder / "export" if (folder / "export" / MANIFEST).is_file() else folder
    if method is None:
        if not (folder / MANIFEST).is_file():
            raise InputError(
                f"{reference} is no run or export with a detector; give one (clipgraft run anomalyclip ...), or a "
                "method that needs no training: --method winclip or --method prompts"
            )
        records = [c for c in read_manifest(folder)["components"] if c["use"].startswith("anomaly/")]
        if not records:
            raise InputError(f"{reference} holds no detector; name a method that needs no training with --method")
        record, encoder = records[-1], open_export(folder, registry=registry)
        head: DetectorHead = registry.build("head", record["use"], record["config"])
        head.load_state_dict(read_component(folder, record["name"]))
    else:
        encoder = load(str(folder) if (folder / MANIFEST).is_file() else reference, registry=registry)
        head = registry.build("head", method, settings or {})
    if not isinstance(head, DetectorHead):
        held = f"{reference} holds a {type(head).__name__}" if method is None else method
        raise InputError(f"{held}, which is no detector; methods without training are winclip and prompts")
    if problem := head.fits.problem(encoder):
        raise InputError(problem)
    encoder.requires_grad_(False).eval()
    return head.detector(encoder).requires_grad_(False).eval()


@torch.inference_mode()
def detect(detector: Detector, pixels: Tensor, names: Sequence[str] | None = None) -> Detection:
    """One batch, without gradients."""
    found: Detection = detector(pixels, names)
    return found
