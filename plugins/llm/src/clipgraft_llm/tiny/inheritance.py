"""Weight inheritance: a smaller, plain open_clip model from the tensors of a larger one (Wu et al., TinyCLIP, ICCV

2023, arXiv 2309.12314, section 3.2). Fused query, key and value are taken head by head, never as a flat prefix.
W tower width, H heads of D_h channels, M hidden units.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from clipgraft.config.schema import Config
from clipgraft.encoders.base import Encoder
from clipgraft.errors import InputError
from clipgraft_llm.tiny.plan import Choice, Depth, TowerPlan, TowerShape, TowerSize, plan_tower

AXES: dict[str, tuple[str | None, ...]] = {
    "class_embedding": ("channels",),
    "positional_embedding": (None, "channels"),
    "token_embedding.weight": (None, "channels"),
    "conv1.weight": ("channels", None, None, None),
    "conv1.bias": ("channels",),
    "proj": ("channels", None),
    "text_projection": ("channels", None),
    "text_projection.weight": (None, "channels"),
    "text_projection.bias": (None,),
    "attn.in_proj_weight": ("qkv", "channels"),
    "attn.in_proj_bias": ("qkv",),
    "attn.out_proj.weight": ("channels", "heads"),
    "attn.out_proj.bias": ("channels",),
    "mlp.c_fc.weight": ("hidden", "channels"),
    "mlp.c_fc.bias": ("hidden",),
    "mlp.c_proj.weight": ("channels", "hidden"),
    "mlp.c_proj.bias": ("channels",),
    **{
        f"{norm}.{part}": ("channels",)
        for norm in ("ln_pre", "ln_post", "ln_final", "ln_1", "ln_2")
        for part in ("weight", "bias")
    },
    "ls_1.gamma": ("channels",),
    "ls_2.gamma": ("channels",),
}
"""What each axis of a tensor counts; other axes are kept whole."""


class Inherit(Config):
    """A smaller CLIP from the weights of the one it is applied to; heads, channels and layers by index."""

    image: TowerSize = TowerSize()
    text: TowerSize = TowerSize()
    depth: Depth = Field(
        "spaced", description="layers: spaced as in the official code, even over the whole depth, or first"
    )
    choice: Choice = Field(
        "leading",
        description="channels, heads and hidden units: leading as in the paper, or strongest by their weights",
    )
    weights: Literal["inherited", "random"] = Field(
        "inherited", description="random: the same sizes and nothing inherited, a control"
    )
    seed: int = Field(0, ge=0, description="of random weights")

    def apply(self, encoder: Encoder) -> Encoder:
        """The smaller encoder; ``encoder`` itself stays as it is."""
        return inherit(encoder, self)[0]

    def merge(self, encoder: Encoder) -> Encoder:
        """Nothing to fold: it is a plain CLIP already."""
        return encoder


@dataclass(frozen=True, slots=True)
class Inheritance:
    """What was taken over, and the numbers of parameters before and after, per tower."""

    image: TowerPlan
    text: TowerPlan
    before: Mapping[str, int]
    after: Mapping[str, int]

    @property
    def share(self) -> float:
        """Parameters kept, of one."""
        return sum(self.after.values()) / sum(self.before.values())

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        plans = {"image": self.image.as_dict(), "text": self.text.as_dict()}
        return plans | {"parameters": {"before": dict(self.before), "after": dict(self.after)}, "share": self.share}

    def __str__(self) -> str:
        told = [f"{tower} {self.before[tower]:,} -> {self.after[tower]:,}" for tower in ("image", "text")]
        return f"parameters {', '.join(told)}: {self.share:.1%} of the teacher"


def shapes_of(encoder: Encoder) -> dict[str, TowerShape]:
    """Sizes of both towers; ``InputError`` for towers that aren't open_clip's own transformers."""
    from clipgraft.encoders.towers import ClipText, VitImage

    image, text, config = encoder.image, encoder.text, encoder.data.model_config
    if not isinstance(image, VitImage) or not isinstance(text, ClipText) or not config:
        got = f"{type(image).__name__} and {type(text).__name__ if text is not None else 'no text tower'}"
        raise InputError(f"inheritance knows open_clip's ViT and its text transformer, this model has {got}")
    if image.tower.attn_pool is not None:
        raise InputError("inheritance doesn't know image towers with attention pooling; use a ViT with pool_type tok")
    found = {}
    for name, tower in (("image", image.tower), ("text", text.tower)):
        block = tower.transformer.resblocks[0]
        if not hasattr(block.attn, "in_proj_weight"):
            raise InputError(
                f"inheritance doesn't know the attention of the {name} tower ({type(block.attn).__name__})"
            )
        heads, hidden = block.attn.num_heads, block.mlp.c_fc.out_features
        found[name] = TowerShape(len(tower.transformer.resblocks), tower.transformer.width, heads, hidden)
    return found


def inherit(encoder: Encoder, settings: Inherit) -> tuple[Encoder, Inheritance]:
    """A new encoder of the wanted sizes, and what it took over."""
    from clipgraft.encoders.openclip import architecture_name, build, open_clip_state

    shapes, plans = shapes_of(encoder), {}
    state = {k: v.detach() for k, v in open_clip_state(encoder).items()}
    config, new = deepcopy(encoder.data.model_config), dict[str, Tensor]()
    custom = any(k.startswith("text.") for k in state)
    prefixes = {"image": "visual.", "text": "text." if custom else ""}
    own = {"image": {k for k in state if k.startswith("visual.")}}
    own["text"] = {k for k in state if k not in own["image"] and not k.startswith("logit_")}
    for tower, wanted in (("image", settings.image), ("text", settings.text)):
        tensors = {k.removeprefix(prefixes[tower]): state[k] for k in own[tower]}
        plans[tower] = plan_tower(
            tensors, shapes[tower], wanted, depth=settings.depth, choice=settings.choice, what=tower
        )
        taken = take_over(tensors, plans[tower], heads=shapes[tower].heads)
        new |= {prefixes[tower] + k: v for k, v in taken.items()}
    new |= {k: v.clone() for k, v in state.items() if k.startswith("logit_")}
    _resize(config["vision_cfg"], plans["image"], image=True)
    _resize(config["text_cfg"], plans["text"], image=False)
    make = {"preprocess": encoder.preprocess.as_dict(), "tokenizer": encoder.data.tokenizer}
    origin = replace(encoder.data.origin, architecture=architecture_name(config))
    small = build(config, new, origin=origin, **make)
    if settings.weights == "random":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            fresh = build(config, None, origin=origin, **make)
        with torch.no_grad():
            fresh.logit_scale.copy_(small.logit_scale)
        small = fresh
    small.data.grafts = list(encoder.data.grafts)
    small = small.to(encoder.logit_scale.device).train(encoder.training)
    return small, Inheritance(plans["image"], plans["text"], _counts(encoder), _counts(small))


def take_over(state: Mapping[str, Tensor], plan: TowerPlan, *, heads: int) -> dict[str, Tensor]:
    """The tensors of one tower by open_clip's names -> those of the smaller one, copied. ``heads``: the teacher's."""
    place = {layer: k for k, layer in enumerate(plan.layers)}
    found = {}
    for name, tensor in state.items():
        block = re.search(r"resblocks\.(\d+)\.", name)
        layer = int(block[1]) if block else 0
        short = name[block.end() :] if block else name
        if short not in AXES:
            raise InputError(f"inheritance doesn't know the tensor {name}; merge adapters first, or use a plain ViT")
        if block and layer not in place:
            continue
        k = place.get(layer, 0)
        for axis, kind in enumerate(AXES[short]):
            if kind is not None:
                index = _index(kind, plan, k, heads=heads, size=tensor.shape[axis])
                tensor = tensor.index_select(axis, index.to(tensor.device))
        found[f"{name[: block.start(1)]}{k}{name[block.end(1) :]}" if block else name] = tensor.clone()
    return found


def _index(kind: str, plan: TowerPlan, k: int, *, heads: int, size: int) -> Tensor:
    """Indices of one axis of block ``k``; ``qkv`` is three times the heads' channels, one after the other."""
    if kind == "channels":
        return torch.tensor(plan.channels)
    if kind == "hidden":
        return torch.tensor(plan.hidden[k])
    parts = 3 if kind == "qkv" else 1
    place = torch.arange(size).view(parts, heads, -1)  # (3 or 1, H, D_h)
    return place[:, list(plan.heads[k])][:, :, list(plan.head_channels)].flatten()


def _resize(cfg: dict[str, Any], plan: TowerPlan, *, image: bool) -> None:
    """open_clip's vision_cfg or text_cfg of the smaller tower, in place."""
    width, heads, hidden = len(plan.channels), len(plan.heads[0]), len(plan.hidden[0])
    cfg |= {"width": width, "layers": len(plan.layers), "mlp_ratio": hidden / width}
    cfg |= {"head_width": width // heads} if image else {"heads": heads}
    if int(width * cfg["mlp_ratio"]) != hidden:  # how open_clip counts
        cfg["mlp_ratio"] = (hidden + 0.5) / width


def _counts(encoder: Encoder) -> dict[str, int]:
    assert encoder.text is not None  # shapes_of saw it
    return {
        name: sum(p.numel() for p in t.parameters()) for name, t in (("image", encoder.image), ("text", encoder.text))
    }
