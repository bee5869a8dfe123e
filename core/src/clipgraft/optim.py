"""Optimizer groups, the learning rate as a function of the step, and averaged weights."""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import Tensor, nn

from clipgraft.config.schema import TrainConfig
from clipgraft.errors import ClipgraftError
from clipgraft.sharding import local
from clipgraft.stage import TrainStage

_BLOCK = re.compile(r"^(?P<tower>.*?)\.(?:resblocks|blocks|layers|layer)\.(?P<index>\d+)\.")
_STEM = re.compile(
    r"(conv1|patch_embed|class_embedding|cls_token|positional_embedding|pos_embed|token_embedding|ln_pre)"
)


def depth_of(name: str, depths: dict[str, int]) -> int | None:
    """How many blocks lie above this parameter in its tower (0: in the last block); None outside a tower."""
    if found := _BLOCK.match(name):
        return depths[found["tower"]] - 1 - int(found["index"])
    if _STEM.search(name):
        owners = [tower for tower in depths if name.startswith(tower.rsplit(".", 1)[0])]
        return max((depths[tower] for tower in owners), default=None)
    return None


def build_optimizer(stage: TrainStage, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW (fused) or SGD over the stage's groups; biases, norms and scalars don't decay, lower blocks learn slower.

    Every group carries ``lr_scale``, its factor on the scheduled learning rate.
    """
    names = {id(p): name for name, p in stage.named_parameters()}
    depths: dict[str, int] = {}
    for name in names.values():
        if found := _BLOCK.match(name):
            depths[found["tower"]] = max(depths.get(found["tower"], 0), int(found["index"]) + 1)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for group in stage.param_groups():
        decay = group.get("weight_decay", config.weight_decay)
        for p in group["params"]:
            if not p.requires_grad:
                raise ClipgraftError(f"stage {stage.name}: {names[id(p)]} is frozen but listed for the optimizer")
            below = depth_of(names[id(p)], depths) if config.layer_decay < 1 else None
            scale = group.get("lr_scale", 1.0) * (1.0 if below is None else config.layer_decay**below)
            groups.setdefault((scale, decay if p.ndim >= 2 else 0.0), []).append(p)
    if not groups:
        raise ClipgraftError(f"stage {stage.name}: nothing to train, every parameter is frozen")
    params: list[dict[str, Any]] = [
        {"params": ps, "lr_scale": scale, "weight_decay": decay, "lr": config.lr * scale}
        for (scale, decay), ps in groups.items()
    ]
    if config.optimizer == "sgd":
        return torch.optim.SGD(params, lr=config.lr, momentum=config.momentum)
    return torch.optim.AdamW(params, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def learning_rate(config: TrainConfig, step: int) -> float:
    """Learning rate of optimizer step ``step`` (from 0): linear warm-up, then constant or cosine to zero."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if config.schedule == "constant":
        return config.lr
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set every group's rate to ``lr`` times its ``lr_scale``."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


class Average:
    """Exponential moving average of a stage's trained parameters, kept in fp32."""

    def __init__(self, stage: TrainStage, decay: float) -> None:
        self.decay = decay
        self.live = {name: p for name, p in stage.named_parameters() if p.requires_grad}
        self.shadow = {name: p.detach().clone() for name, p in self.live.items()}

    @torch.no_grad()
    def update(self) -> None:
        """shadow <- decay * shadow + (1 - decay) * live."""
        live: list[Tensor] = [local(p) for p in self.live.values()]
        torch._foreach_lerp_([local(x) for x in self.shadow.values()], live, 1 - self.decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange live and averaged weights: once before evaluation or export, once after."""
        for name, p in self.live.items():
            held = p.detach().clone()
            p.copy_(self.shadow[name])
            self.shadow[name].copy_(held)
