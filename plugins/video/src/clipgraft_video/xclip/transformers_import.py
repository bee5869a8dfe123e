"""``xclip:DIR``: a folder that transformers' ``XCLIPModel.save_pretrained`` wrote, as an encoder."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipgraft.config.schema import GraftNode
from clipgraft.encoders import apply_grafts
from clipgraft.encoders.base import Encoder
from clipgraft.encoders.huggingface import open_folder
from clipgraft.encoders.openclip import folder_weights
from clipgraft.errors import InputError
from clipgraft.files import write_json, write_tensors
from clipgraft.registry import current

LAYER = "vision_model.encoder.layers"
NEW = ("mit.", "prompts_", "message_")
VISION_ONLY = ("num_frames", "drop_path_rate", "mit_")


def open_xclip(place: str) -> Encoder:
    """The CLIP inside is opened as any ``CLIPModel``; messages, integration and prompts follow under our names."""
    folder = Path(place).expanduser()
    file = folder / "config.json"
    try:
        config = dict(json.loads(file.read_text("utf-8")))
    except (OSError, ValueError):
        raise InputError(f"xclip:{folder} has no config.json that can be read; give a folder of XCLIPModel") from None
    if config.get("model_type") != "xclip":
        raise InputError(f"xclip:{folder} holds a {config.get('model_type')!r} model, no xclip")
    state = {k: v for k, v in folder_weights(folder, usual="model.safetensors").items() if "position_ids" not in k}
    extra = {k: v for k, v in state.items() if k.startswith(NEW) or any(f".{n}" in k for n in NEW)}
    with tempfile.TemporaryDirectory() as draft:
        encoder = _plain(folder, config, {k: v for k, v in state.items() if k not in extra}, Path(draft))
    vision = config["vision_config"]
    node = {
        "frames": vision.get("num_frames", 8),
        "mit_layers": vision.get("mit_num_hidden_layers", 1),
        "prompt_layers": config.get("prompt_layers", 2),
        "alpha": config.get("prompt_alpha", 0.1),
    }
    encoder = apply_grafts(encoder, [GraftNode(use="video/x-clip", **node)], current())
    ours = _ours(extra)
    want = encoder.image.state_dict()
    fresh = [k for k in want if "message_" in k or k.startswith("video_head.")]
    if odd := set(fresh) ^ set(ours):
        raise InputError(f"xclip:{folder}: the tensor {min(odd)} does not fit X-CLIP's parts ({len(odd)} such)")
    encoder.image.load_state_dict(want | ours)
    return encoder


def _plain(folder: Path, config: dict[str, Any], state: dict[str, Tensor], place: Path) -> Encoder:
    """The CLIP without video, as a ``CLIPModel`` folder that the core opens."""
    names = {k: k.replace("vision_model.pre_layernorm", "vision_model.pre_layrnorm") for k in state}
    vision = {k: v for k, v in config["vision_config"].items() if not k.startswith(VISION_ONLY)}
    plain = {k: v for k, v in config.items() if not k.startswith("prompt_") and k != "architectures"}
    write_json(place / "config.json", plain | {"model_type": "clip", "vision_config": vision})
    write_tensors(place / "model.safetensors", {names[k]: v for k, v in state.items()})
    for file in (*folder.glob("*.json"), *folder.glob("merges.txt")):
        if "index" not in file.name and file.name not in ("config.json", "generation_config.json"):
            (place / file.name).write_bytes(file.read_bytes())
    return open_folder(place, uri=f"xclip:{folder}")


def _ours(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers' names of what X-CLIP adds -> ours, under the image tower."""
    found: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for name, value in theirs.items():
        if name.startswith(LAYER):
            number, _, rest = name.removeprefix(f"{LAYER}.").partition(".")
            ours = f"tower.transformer.resblocks.{number}.{rest}"
        elif name.startswith("mit."):
            ours = "video_head." + _mit(name)
        else:
            ours = "video_head." + (
                name.replace("prompts_generator.layernorm", "prompts.norm")
                .replace("prompts_generator.", "prompts.")
                .replace("prompts_visual_layernorm", "prompts_visual_ln")
                .replace("prompts_visual_projection", "prompts_visual_proj")
            )
        head, _, kind = ours.rpartition(".")
        owner, _, proj = head.rpartition(".")
        if proj in ("q_proj", "k_proj", "v_proj") and "cross_attn" not in owner:
            parts.setdefault(f"{owner}.in_proj_{kind}", {})[proj] = value
        else:
            found[ours] = value[0] if ours.endswith("mit.positional_embedding") else value
    fused = {k: torch.cat([v[f"{p}_proj"] for p in "qkv"]) for k, v in parts.items()}
    return found | fused


def _mit(name: str) -> str:
    for theirs, ours in (
        ("mit.position_embedding", "mit.positional_embedding"),
        ("mit.encoder.layers.", "mit.resblocks."),
        ("self_attn.", "attn."),
        ("layer_norm1", "ln_1"),
        ("layer_norm2", "ln_2"),
        ("mlp.fc1", "mlp.c_fc"),
        ("mlp.fc2", "mlp.c_proj"),
    ):
        name = name.replace(theirs, ours)
    return name
