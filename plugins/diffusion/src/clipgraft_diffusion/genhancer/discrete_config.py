"""Settings of ``diffusion/genhancer-discrete``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from clipgraft.config.schema import Config, RunConfig
from clipgraft_diffusion.genhancer.config import NOTHING, GeneratorConfig, TowerConfig
from clipgraft_diffusion.objectives import MaskConfig
from clipgraft_diffusion.watch import WatchConfig
from clipgraft_diffusion.weights import Origin, Sha256, refuse_both


class CodesConfig(Config):
    """What is masked and predicted."""

    kind: Literal["vq", "tokens"] = Field("tokens", description="a VQ model's codes, or a tower's tokens by k-means")
    vq: str = Field("amused/amused-512", description="directory or Hugging Face id of a diffusers VQModel")
    subfolder: str | None = Field("vqvae", description="folder of the VQ model inside the Hugging Face repository")
    revision: str | None = Field(None, description="branch, tag or commit of the Hugging Face id")
    sha256: Sha256 | None = Field(None, description="pins the VQ model's safetensors")
    weights: Origin = Field("pretrained", description="random: the VQ model's, from its config.json alone")
    cache: str | None = Field(
        None, description="folder that keeps what the VQ model makes of the images between runs; needs crop null"
    )
    pixels: Literal["symmetric", "unit"] = Field("unit", description="the VQ model's pixels: -1..1, or 0..1 (aMUSEd)")
    of: str = Field("self", description="whose tokens: self (the untouched base) or any model reference")
    pool: int = Field(1, gt=0, description="average pool x pool neighbouring tokens")
    size: int = Field(256, gt=1, description="codes that k-means makes of the tokens")
    samples: int = Field(1024, gt=1, description="training images for the tokens' statistics and codes")

    @model_validator(mode="after")
    def _pinned_or_random(self) -> CodesConfig:
        refuse_both(self.weights, self.sha256)
        if self.cache is not None and self.kind != "vq":
            raise ValueError("cache keeps what a VQ model makes of images; set it to null, or kind to vq")
        return self


class ConditionConfig(Config):
    """The projected embedding; its width is the predictor's."""

    shuffled: bool = Field(False, description="control arm: the generator sees another image's codes")


class PerceiverConfig(Config):
    """The predictor of masked codes; the paper gives its layers alone."""

    width: int = Field(1024, gt=0, description="features of a token")
    heads: int = Field(16, gt=0, description="attention heads; they divide width")
    layers: int = Field(6, gt=0, description="blocks on the latents")
    checkpointing: bool = Field(False, description="recompute activations in the backward pass to save memory")


class MaskedClipConfig(TowerConfig):
    """Stage 2 with the discrete denoiser."""

    mask: MaskConfig | None = Field(None, description="other shares than stage 1's")


class DiscreteConfig(RunConfig):
    """``diffusion/genhancer-discrete``."""

    codes: CodesConfig = CodesConfig()
    condition: ConditionConfig = ConditionConfig()
    perceiver: PerceiverConfig = PerceiverConfig()
    mask: MaskConfig = MaskConfig()
    crop: tuple[float, float] | None = Field((0.9, 1.0), description="area range of the random crop; null: none")
    watch: WatchConfig = WatchConfig()
    generator: GeneratorConfig
    clip: MaskedClipConfig

    @model_validator(mode="after")
    def _trains_something(self) -> DiscreteConfig:
        if not self.clip.trains_something:
            raise ValueError(NOTHING)
        return self
