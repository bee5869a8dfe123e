"""The other tower: any model reference with an image tower, or a DINOv2 as transformers writes it.

B images, N patch tokens, W width.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn import functional as F

from clipgraft.encoders.base import DEFAULT_REQUEST, ImageEncoder, Preprocess
from clipgraft.errors import InputError
from clipgraft.types import FeatureRequest, ImageFeatures

if TYPE_CHECKING:
    from clipgraft.registry import Registry

DINOV2 = ("dinov2", "dinov2_with_registers")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""ImageNet's, where a folder says nothing."""


class SecondTower(nn.Module):
    """A frozen image tower with its own size and normalisation."""

    def __init__(self, image: ImageEncoder, preprocess: Preprocess) -> None:
        super().__init__()
        self.image, self.preprocess = image.requires_grad_(False).eval(), preprocess

    def forward(self, pixels: Tensor, want: FeatureRequest) -> ImageFeatures:
        """(B, 3, H, W') in [0, 1] of any size -> features with tokens on this tower's grid."""
        size = self.preprocess.size
        if tuple(pixels.shape[-2:]) != tuple(size):
            pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
        found: ImageFeatures = self.image(self.preprocess.normalize(pixels), want)
        return found


class Dinov2Image(ImageEncoder):
    """transformers' DINOv2, with or without registers. Blocks count from 0; class and register tokens are dropped."""

    def __init__(self, model: Any, *, grid: tuple[int, int]) -> None:
        super().__init__()
        self.model, config = model, model.config
        self.width = self.embed_dim = config.hidden_size
        self.depth, self.grid = config.num_hidden_layers, grid
        self.prefix = 1 + getattr(config, "num_register_tokens", 0)

    def forward(self, pixels: Tensor, want: FeatureRequest = DEFAULT_REQUEST) -> ImageFeatures:
        """Standardised pixels (B, 3, H, W'), multiples of the patch -> features after the last norm."""
        out = self.model(pixels, output_hidden_states=bool(want.layers))
        x, grid = out.last_hidden_state, tuple(side // self.model.config.patch_size for side in pixels.shape[-2:])
        # hidden_states[0] is the embedding; block i left hidden_states[i + 1]
        layers = {i: out.hidden_states[i % self.depth + 1][:, self.prefix :] for i in want.layers}
        tokens = x[:, self.prefix :] if want.tokens else None
        return ImageFeatures(x[:, 0], tokens=tokens, cls=x[:, 0], grid=grid, layers=layers)


def open_second(reference: str, *, grid: tuple[int, int], registry: Registry | None = None) -> SecondTower:
    """A directory or ``hf:`` id of a DINOv2, else any model reference; ``grid`` (h, w) is the first tower's.

    A DINOv2 takes pictures of any size: it gets one that gives it the same grid.
    """
    folder = _folder(reference)
    if folder is not None:
        return _dinov2(folder, reference, grid)
    from clipgraft.encoders import load

    encoder = load(reference, registry=registry).eval()
    if encoder.image.grid is None:
        raise InputError(f"{reference} has no grid of patch tokens; take a second tower that is a transformer")
    return SecondTower(encoder.image, encoder.preprocess)


def _folder(reference: str) -> Path | None:
    """The folder of a DINOv2; None for any other reference."""
    if reference.startswith("hf:"):
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(reference[3:], allow_patterns=["*.json", "*.safetensors"]))
        except Exception as error:  # network, name and permission errors alike
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"{reference} could not be fetched: {reason}") from None
    else:
        folder = Path(reference)
    try:
        kind = json.loads((folder / "config.json").read_text("utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError):
        return None
    return folder if kind in DINOV2 else None


def _dinov2(folder: Path, reference: str, grid: tuple[int, int]) -> SecondTower:
    from transformers import Dinov2Model, Dinov2WithRegistersModel

    config = json.loads((folder / "config.json").read_text("utf-8"))
    cls = Dinov2Model if config["model_type"] == "dinov2" else Dinov2WithRegistersModel
    try:
        model = cls.from_pretrained(folder, use_safetensors=True, local_files_only=True).float()
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{reference} can't be opened as a DINOv2 with safetensors weights: {reason}") from None
    how = folder / "preprocessor_config.json"
    told = json.loads(how.read_text("utf-8")) if how.is_file() else {}
    patch = model.config.patch_size
    preprocess = Preprocess(
        size=(grid[0] * patch, grid[1] * patch),
        mean=tuple(told.get("image_mean", MEAN)),
        std=tuple(told.get("image_std", STD)),
    )
    return SecondTower(Dinov2Image(model, grid=grid), preprocess)
