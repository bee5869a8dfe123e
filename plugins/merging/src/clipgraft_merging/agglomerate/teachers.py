"""Teachers of any kind behind one call: a CLIP, a SAM's tower, a vision model of transformers."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from clipgraft.encoders.base import Encoder, Preprocess
from clipgraft.errors import InputError
from clipgraft.types import FeatureRequest
from clipgraft_merging.sam.opening import open_sam, sam_parts
from clipgraft_merging.sam.tower import SamTower
from clipgraft_merging.samclip.teachers import resized

if TYPE_CHECKING:
    from clipgraft.log import RunLog
    from clipgraft.registry import Registry

Kind = Literal["auto", "clip", "sam", "vision"]
PREFIX = {
    "dinov2": lambda c: 1,
    "dinov2_with_registers": lambda c: 1 + c.num_register_tokens,
    "dinov3_vit": lambda c: 1 + c.num_register_tokens,
    "vit": lambda c: 1,
}
"""transformers' model types whose outputs are a class token, perhaps registers, then patches; and how many lead."""
VISION = (*PREFIX, "radio")


@dataclass(frozen=True, slots=True)
class TeacherFeatures:
    """``summary`` (B, D) and ``spatial`` (B, N, D') row-major on ``grid``; a SAM has no summary."""

    summary: Tensor | None
    spatial: Tensor
    grid: tuple[int, int]


class Teacher(nn.Module):
    """Pixels (B, 3, H, W') in [0, 1] of any size -> features, resized and standardised as this teacher wants them."""

    def __init__(self, network: nn.Module, preprocess: Preprocess) -> None:
        super().__init__()
        self.network, self.preprocess = network, preprocess

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> TeacherFeatures:
        """Frozen: nothing here has a gradient."""
        return self.network(self.preprocess.normalize(resized(pixels, self.preprocess.size)))  # type: ignore[no-any-return]


class ClipFeatures(nn.Module):
    """A CLIP's image tower: its embedding, and its patch tokens after the last norm."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.image = encoder.image

    def forward(self, pixels: Tensor) -> TeacherFeatures:
        """Standardised pixels (B, 3, H, W')."""
        found = self.image(pixels, FeatureRequest(tokens=True))
        if found.tokens is None or found.grid is None:
            raise InputError("this CLIP's image tower has no grid of patches; use a ViT")
        return TeacherFeatures(found.pooled, found.tokens, found.grid)


class SamFeatures(nn.Module):
    """A SAM's tokens before its neck, so that its own neck and decoder can read what a student learns of them."""

    def __init__(self, tower: SamTower) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, pixels: Tensor) -> TeacherFeatures:
        """Standardised pixels (B, 3, H, W')."""
        found = self.tower.tokens(pixels)
        return TeacherFeatures(None, found.tokens, found.grid)


class VisionFeatures(nn.Module):
    """A vision model of transformers: class token and patches after the last norm; of RADIO what it calls so."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.kind = model, model.config.model_type

    def forward(self, pixels: Tensor) -> TeacherFeatures:
        """Standardised pixels (B, 3, H, W')."""
        patch = int(self.model.config.patch_size)
        grid = (pixels.shape[-2] // patch, pixels.shape[-1] // patch)
        if self.kind == "radio":
            found = self.model(pixels)
            return TeacherFeatures(found.summary, found.features, grid)
        resizes = {"interpolate_pos_encoding": True} if self.kind == "vit" else {}
        tokens = self.model(pixel_values=pixels, **resizes).last_hidden_state
        return TeacherFeatures(tokens[:, 0], tokens[:, PREFIX[self.kind](self.model.config) :], grid)


def open_teacher(
    reference: str,
    *,
    kind: Kind = "auto",
    size: int | None = None,
    setting: str,
    registry: Registry,
    log: RunLog | None = None,
) -> Teacher:
    """A registered encoder or head, a directory, a hub id, or any model reference; ``size`` overrides its own."""
    found = kind_of(reference, kind, registry=registry, setting=setting)
    if found == "sam":
        parts = open_sam(reference, setting=setting, registry=registry, log=log)
        return _teacher(SamFeatures(parts.tower), parts.preprocess, parts.tower.patch, size, setting)
    if found == "vision":
        model, preprocess = _vision(reference, setting, registry)
        return _teacher(VisionFeatures(model), preprocess, int(model.config.patch_size), size, setting)
    from clipgraft.encoders import load

    encoder = load(reference, registry=registry)
    own = encoder.preprocess.size
    if size is not None and own != (size, size):
        raise InputError(
            f"{setting}.size: {reference} takes {own[0]} x {own[1]} pixels and nothing else; leave size out, or change "
            "the model with the graft core/resize-positions first"
        )
    return Teacher(ClipFeatures(encoder), encoder.preprocess).eval()


def kind_of(reference: str, kind: Kind, *, registry: Registry, setting: str) -> Literal["clip", "sam", "vision"]:
    """What a reference leads to, without opening weights."""
    if kind != "auto":
        return kind
    if reference in {found.name for found in registry.list("encoder")} or ":" in reference:
        return "clip"
    if reference in {found.name for found in registry.list("head")}:
        built = registry.build("head", reference, {})
        return "sam" if getattr(getattr(built, "config", None), "model_type", "sam") == "sam" else "vision"
    folder = Path(reference).expanduser()
    if not folder.is_dir():
        raise InputError(
            f"{setting}.from: {reference!r} is neither a registered model nor a directory; for a hub id say which kind "
            "it is: kind: clip, sam or vision"
        )
    if (folder / "clipgraft.json").is_file() or (folder / "open_clip_config.json").is_file():
        return "clip"
    named = _model_type(folder, setting)
    if named == "sam":
        return "sam"
    return "vision" if named in VISION else "clip"


def _model_type(folder: Path, setting: str) -> str:
    try:
        return str(json.loads((folder / "config.json").read_text("utf-8")).get("model_type", ""))
    except FileNotFoundError:
        raise InputError(f"{setting}.from: {folder} has no config.json; give a model's directory") from None
    except (OSError, ValueError, AttributeError):
        raise InputError(f"{setting}.from: {folder / 'config.json'} is no JSON object; fetch it again") from None


def _vision(reference: str, setting: str, registry: Registry) -> tuple[Any, Preprocess]:
    """A model of transformers and its preprocessing; only safetensors, no code from the repository."""
    from transformers import AutoModel

    if reference in {found.name for found in registry.list("head")}:
        raise InputError(
            f"{setting}.from: {reference} is a registered head; vision teachers are directories or hub ids"
        )
    folder = Path(reference).expanduser()
    if not folder.is_dir():
        folder = _fetched(reference, setting)
    named = _model_type(folder, setting)
    if named not in VISION:
        raise InputError(f"{setting}.from: {reference} is of type {named!r}; vision teachers are {', '.join(VISION)}")
    try:
        model, info = AutoModel.from_pretrained(
            str(folder),
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(
            f"{setting}.from: {reference} can't be opened ({' '.join(str(error).split())[:160]})"
        ) from None
    if missing := sorted(key for key in info["missing_keys"] if not key.startswith("pooler")):
        raise InputError(f"{setting}.from: the weights of {reference} lack {missing[0]} ({len(missing)} in all)")
    return model.eval(), _preprocess(folder, model.config, setting)


def _fetched(reference: str, setting: str) -> Path:
    from huggingface_hub import snapshot_download

    wanted = ["config.json", "preprocessor_config.json", "*.safetensors", "*.safetensors.index.json"]
    try:
        return Path(snapshot_download(reference, allow_patterns=wanted))
    except Exception as error:  # network, name and permission errors alike
        raise InputError(
            f"{setting}.from: {reference} could not be fetched ({' '.join(str(error).split())[:160]}); give a directory"
        ) from None


def _preprocess(folder: Path, config: Any, setting: str) -> Preprocess:
    """What preprocessor_config.json says; RADIO standardises by itself. Mean and std are never guessed."""
    side, file = int(getattr(config, "image_size", 224)), folder / "preprocessor_config.json"
    if config.model_type == "radio":
        return Preprocess((side, side), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    if not file.is_file():
        raise InputError(f"{setting}.from: {folder} has no preprocessor_config.json, so its mean and std are unknown")
    told = json.loads(file.read_text("utf-8"))
    given = told.get("crop_size") if told.get("do_center_crop") else told.get("size")
    given = given if isinstance(given, dict) else {"height": given}
    side = int(given.get("height") or given.get("shortest_edge") or side)
    if not told.get("image_mean") or not told.get("image_std"):
        raise InputError(
            f"{setting}.from: {file} has no image_mean and image_std; add those that the model was trained with"
        )
    return Preprocess((side, side), tuple(told["image_mean"]), tuple(told["image_std"]))


def _teacher(network: nn.Module, preprocess: Preprocess, patch: int, size: int | None, setting: str) -> Teacher:
    side = preprocess.size[0] if size is None else size
    if side % patch:
        near = max(1, round(side / patch)) * patch
        raise InputError(
            f"{setting}.size: {side} is no multiple of the teacher's patch of {patch} pixels; set it to {near}"
        )
    return Teacher(network, replace(preprocess, size=(side, side))).eval()


def sam_teacher(model: Any) -> Teacher:
    """Of a transformers ``SamModel``."""
    parts = sam_parts(model)
    return Teacher(SamFeatures(parts.tower), parts.preprocess).eval()
