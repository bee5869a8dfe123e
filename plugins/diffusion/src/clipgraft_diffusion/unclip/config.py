"""Settings of ``diffusion/un2clip``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from clipgraft.config.schema import Config, RunConfig, TrainConfig
from clipgraft_diffusion.decoder import DecoderConfig
from clipgraft_diffusion.genhancer.config import AnchorConfig, LoraConfig
from clipgraft_diffusion.objectives import NoiseConfig
from clipgraft_diffusion.store import Precision
from clipgraft_diffusion.unclip.label import NoiseLevel
from clipgraft_diffusion.watch import WatchConfig
from clipgraft_diffusion.weights import Origin, Sha256, Weights, chosen, refuse_both

Part = Literal["unet", "vae", "text_encoder", "image_normalizer"]
PARTS: tuple[Part, ...] = ("unet", "vae", "text_encoder", "image_normalizer")
"""The parts of a Stable unCLIP that have weights."""


class InverterConfig(Config):
    """The decoder that must restore an image from its embedding."""

    kind: Literal["diffusers", "train", "head"] = Field(
        "train",
        description="a Stable unCLIP, one that a first stage trains over the model's own patch tokens, or a registered "
        "generator over a tower's patch tokens that is told an unCLIP label",
    )
    from_: str | None = Field(
        None, alias="from", description="for diffusers: directory or Hugging Face id of a Stable unCLIP"
    )
    revision: str | None = Field(None, description="for diffusers: branch, tag or commit of a Hugging Face id")
    sha256: dict[Part, Sha256] = Field({}, description="for diffusers: pins the safetensors of parts with weights")
    weights: Origin = Field(
        "pretrained", description="for diffusers: random draws all weights, from the parts' config.json alone"
    )
    size: int = Field(768, gt=0, description="for diffusers: side of its crops [pixels]")
    cache: str | None = Field(
        None, description="for diffusers: folder that keeps the images' latents between runs, filled before the stage"
    )
    cache_precision: Precision = Field("fp32", description="of the latents on disk; fp16 halves their size")
    checkpointing: bool = Field(False, description="for diffusers: recompute activations in the backward pass")
    head: str | None = Field(None, description="for head: its registered name")
    tower: str | None = Field(None, description="for head: the model whose tokens it restores")
    samples: int = Field(2048, gt=1, description="for head: training images for the label's mean and spread")
    random: bool = Field(False, description="control arm: random weights instead of the learnt ones")

    @model_validator(mode="after")
    def _is_named(self) -> InverterConfig:
        if self.kind == "diffusers" and self.from_ is None:
            raise ValueError("kind diffusers needs from (a Stable unCLIP: directory or Hugging Face id)")
        if self.kind == "head" and (self.head is None or self.tower is None):
            raise ValueError(
                "kind head needs head (a registered generator) and tower (the model whose tokens it restores)"
            )
        refuse_both(self.weights, self.sha256)
        if self.cache is not None and self.kind != "diffusers":
            raise ValueError(f"cache keeps an autoencoder's latents, kind {self.kind} has none; set it to null")
        return self

    def part_weights(self, *, seed: int) -> dict[str, Weights]:
        """Where each part's weights come from."""
        return {part: chosen(self.weights, self.sha256.get(part), seed=seed) for part in PARTS}


class OwnDecoderConfig(DecoderConfig):
    """The decoder that a first stage trains."""

    noise_level: NoiseLevel = Field(
        "uniform", description="noise on the embedding while it learns: a level below 1000, uniform (drawn), or off"
    )
    noise: float = Field(0.0, ge=0, description="blur on the label besides, in its standard deviations")


class ConditionConfig(Config):
    """The label that the frozen decoder is told."""

    noise_level: NoiseLevel = Field(
        0, description="noise on the embedding: a level below 1000, uniform (drawn), or off; 0 still adds a little"
    )
    shuffled: bool = Field(False, description="control arm: the decoder restores another image's latent")


class ClipConfig(Config):
    """The stage that fine-tunes the image tower."""

    train: TrainConfig
    tune: Literal["full", "lora"] = Field("full", description="train all of the image tower, or adapters in it")
    lora: LoraConfig = LoraConfig()
    checkpointing: bool = Field(False, description="recompute the image tower's activations in the backward pass")
    weight: float = Field(1.0, ge=0, description="of the decoder's error; 0 is the anchor-only control arm")
    anchor: AnchorConfig = AnchorConfig()

    @model_validator(mode="after")
    def _trains_something(self) -> ClipConfig:
        if self.weight == 0 and self.anchor.weight == 0:
            raise ValueError("weight and anchor.weight are both 0, nothing would be trained; raise one")
        return self


class Un2ClipConfig(RunConfig):
    """``diffusion/un2clip``."""

    denoiser: InverterConfig = InverterConfig()
    decoder: OwnDecoderConfig = OwnDecoderConfig()
    condition: ConditionConfig = ConditionConfig()
    noise: NoiseConfig = NoiseConfig()
    passes: int = Field(1, gt=0, description="noisy passes per image and step")
    clip: ClipConfig
    crop: tuple[float, float] | None = Field((0.9, 1.0), description="area range of the random crop; null: none")
    watch: WatchConfig = WatchConfig()
