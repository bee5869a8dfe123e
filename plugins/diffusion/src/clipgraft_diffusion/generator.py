"""A small flow generator over a tower's patch tokens, behind the eps objective: the miniature of a pretrained model.

Any registered head will do that maps (noisy tokens (B, N, W), time (B,) in [0, 1], unit text embedding (B, D)) to the
clean tokens and has ``standardise(tokens)``; the toy world ships two.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipgraft.encoders.base import Encoder
from clipgraft.errors import InputError
from clipgraft.types import FeatureRequest, ImageFeatures
from clipgraft_diffusion.eps import NoiseSchedule, Target

TOKENS = FeatureRequest(tokens=True)


class FlowGenerator(nn.Module):
    """(x_t, t, condition) -> noise (or v), for the standardised patch tokens (B, N, W) of ``tower``.

    A step of the DDPM schedule is a time of the flow: x_t divided by (sqrt(ab_t) + sqrt(1 - ab_t)) lies on the flow's
    straight line at time sqrt(1 - ab_t) / (sqrt(ab_t) + sqrt(1 - ab_t)), exactly. ``tower``'s text side is the one that
    the generator was told with; the condition is the unit mean of the tokens given, or without ``unit`` what is given.
    ``target`` says what comes out: the noise, or v.
    """

    def __init__(
        self, flow: nn.Module, tower: Encoder, *, schedule: NoiseSchedule, unit: bool = True, target: Target = "noise"
    ) -> None:
        super().__init__()
        if not hasattr(flow, "standardise"):
            raise InputError(
                f"denoiser.head: {type(flow).__name__} has no standardise(tokens), so it is no generator over patch "
                "tokens; name one, such as toyworld/generator-own"
            )
        self.flow: Any = flow.requires_grad_(False).eval()
        self.tower: Encoder = tower.requires_grad_(False).eval()
        self.schedule: NoiseSchedule = schedule
        self.width, self.unit = tower.image.embed_dim, unit
        self.target: Target = target

    @torch.no_grad()
    def latents(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W') in [0, 1] -> (B, N, W)."""
        features: ImageFeatures = self.tower.image(self.tower.preprocess.normalize(pixels), TOKENS)
        found: Tensor = self.flow.standardise(features.tokens)
        return found

    def forward(self, x_t: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """x_t (B, N, W), steps (B,), condition (B, L, width) or (B, E) -> noise or v (B, N, W) in fp32."""
        signal, rest = self.schedule.levels(t, x_t)
        both = signal + rest
        told = F.normalize(condition.float().mean(1), dim=-1) if self.unit else condition.float()
        clean: Tensor = self.flow(x_t / both, (rest / both).flatten(), told)
        noise: Tensor = (x_t - signal * clean.float()) / rest
        return noise if self.target == "noise" else signal * noise - rest * clean.float()


def forget(module: nn.Module) -> nn.Module:
    """Random weights in place of the learnt ones, of the scale that layers start with: the control of a control."""
    for part in module.modules():
        if callable(reset := getattr(part, "reset_parameters", None)):
            reset()
            continue
        for name, weight in part.named_parameters(recurse=False):
            if "norm" in type(part).__name__.lower():
                nn.init.ones_(weight) if name == "weight" else nn.init.zeros_(weight)
            else:
                nn.init.normal_(weight)
    return module
