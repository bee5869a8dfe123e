"""The stock open_clip architecture of the shipped models, and plain access to its towers.

Shapes: B batch, D = 64 joint, W = 128 image tower width, N = 16 patch tokens (4 x 4, 8 pixels each), L text length.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipgraft_toyworld.tokenizer import CONTEXT_LENGTH, encode, save_tokenizer, vocabulary
from clipgraft_toyworld.world import WORLD_VERSION

JOINT = 64
WIDTH = 128
PATCHES = 16
IMAGE_SIZE = 32
MEAN = (0.45, 0.42, 0.40)
STD = (0.30, 0.28, 0.29)
SCALE = 60.0
"""Inverse temperature of every contrast, fixed. A sharp one leaves embeddings in a narrow cone, as in CLIP:

cosines of about .7 between classes and .84-.90 between statements that differ in one detail (base 0). With a learnt
scale that started at 20 they were about .05 and .5-.9, and at most .44 of the minimal pairs came closer than .95.
"""


@dataclass(frozen=True)
class ImageOutput:
    """`pooled` (B, D) unit length, `tokens` (B, N, W) patch tokens after the last norm."""

    pooled: Tensor
    tokens: Tensor


def model_config() -> dict[str, Any]:
    """open_clip's `model_cfg`."""
    return {
        "embed_dim": JOINT,
        "vision_cfg": {"image_size": IMAGE_SIZE, "patch_size": 8, "width": WIDTH, "layers": 3, "head_width": 32},
        "text_cfg": {
            "context_length": CONTEXT_LENGTH,
            "vocab_size": len(vocabulary()),
            "hf_tokenizer_name": f"clipgraft-toyworld-{WORLD_VERSION}",  # open_clip reads the folder's own tokenizer
            "width": 64,
            "heads": 2,
            "layers": 2,
        },
    }


def build_clip(seed: int) -> nn.Module:
    """An untrained `open_clip.CLIP`, initialised from `seed`."""
    import open_clip

    config = model_config()
    text = {key: value for key, value in config["text_cfg"].items() if key != "hf_tokenizer_name"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        clip: nn.Module = open_clip.CLIP(config["embed_dim"], vision_cfg=config["vision_cfg"], text_cfg=text)
    return clip


def standardise(pixels: Tensor) -> Tensor:
    """(B, 3, S, S) uint8, or floats in [0, 1], to what the image tower takes."""
    values = pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels
    return (values - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def see(clip: nn.Module, pixels: Tensor) -> ImageOutput:
    """Image tower of a batch; gradients flow."""
    visual: Any = clip.visual
    out = visual.forward_intermediates(standardise(pixels), indices=1, output_fmt="NLC", normalize_intermediates=True)
    return ImageOutput(pooled=F.normalize(out["image_features"], dim=-1), tokens=out["image_intermediates"][-1])


@torch.no_grad()
def see_all(clip: nn.Module, pixels: Tensor, *, batch: int = 512) -> ImageOutput:
    """As `see` without gradient, in chunks."""
    parts = [see(clip, pixels[start : start + batch]) for start in range(0, len(pixels), batch)]
    return ImageOutput(
        pooled=torch.cat([part.pooled for part in parts]), tokens=torch.cat([part.tokens for part in parts])
    )


def read(clip: nn.Module, texts: Sequence[str]) -> Tensor:
    """(B, D) unit text embeddings; ids are cut to the longest text, which is exact for a causal tower."""
    ids = encode(texts, trim=True)
    tower: Any = clip
    length = ids.shape[1]
    x = tower.token_embedding(ids) + tower.positional_embedding[:length]
    x = tower.ln_final(tower.transformer(x, attn_mask=tower.attn_mask[:length, :length]))
    return F.normalize(x[torch.arange(len(ids)), ids.argmax(1)] @ tower.text_projection, dim=-1)


@torch.no_grad()
def read_all(clip: nn.Module, texts: Sequence[str], *, batch: int = 1024) -> Tensor:
    """As `read` without gradient, in chunks."""
    return torch.cat([read(clip, texts[start : start + batch]) for start in range(0, len(texts), batch)])


def text_parameters(clip: nn.Module) -> list[nn.Parameter]:
    """Everything but the image tower and the scale."""
    return [p for name, p in clip.named_parameters() if not name.startswith("visual.") and name != "logit_scale"]


def image_parameters(clip: nn.Module) -> list[nn.Parameter]:
    """The image tower."""
    visual: Any = clip.visual
    return list(visual.parameters())


def save_clip(clip: nn.Module, folder: Path) -> None:
    """Write a directory that stock open_clip opens with "local-dir:": fp16 weights, config, tokenizer."""
    from clipgraft.files import write_tensors

    folder.mkdir(parents=True, exist_ok=True)
    preprocess = {
        "size": [IMAGE_SIZE, IMAGE_SIZE],
        "mode": "RGB",
        "mean": list(MEAN),
        "std": list(STD),
        "interpolation": "bicubic",
        "resize_mode": "shortest",
        "fill_color": 0,
    }
    config = {"model_cfg": model_config(), "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    weights = {name: value.to(torch.float16) for name, value in clip.state_dict().items()}
    write_tensors(folder / "open_clip_model.safetensors", weights, {"world": WORLD_VERSION})
    save_tokenizer(folder)


def load_clip(folder: Path) -> nn.Module:
    """The CLIP of a directory written by `save_clip`, in fp32, through stock open_clip."""
    import open_clip

    clip: nn.Module = open_clip.create_model(f"local-dir:{folder}")
    return clip.float().eval()
