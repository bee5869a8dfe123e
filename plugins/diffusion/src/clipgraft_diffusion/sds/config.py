"""Settings of ``diffusion/sds-clip``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from clipgraft.config.schema import Config, RunConfig, TrainConfig
from clipgraft_diffusion.decoder import DecoderConfig
from clipgraft_diffusion.sds.loss import SdsConfig
from clipgraft_diffusion.watch import WatchConfig
from clipgraft_diffusion.weights import Origin, Sha256, Weights, chosen, refuse_both

Part = Literal["unet", "text_encoder"]
Trainable = Literal["layer-norms", "all", "given"]


class TeacherConfig(Config):
    """The frozen text-to-image model."""

    kind: Literal["diffusers", "head", "train"] = Field(
        "diffusers",
        description="a Stable Diffusion, a registered generator over a tower's patch tokens, or one that a first stage "
        "trains over the model's own tokens, told captions by its own text tower",
    )
    from_: str = Field(
        "CompVis/stable-diffusion-v1-4",
        alias="from",
        description="for diffusers: directory or Hugging Face id of a model that predicts the noise",
    )
    revision: str | None = Field(None, description="for diffusers: branch, tag or commit of a Hugging Face id")
    sha256: dict[Part, Sha256] = Field({}, description="for diffusers: pins the safetensors of unet and text_encoder")
    weights: Origin = Field(
        "pretrained", description="for diffusers: random draws all weights, from the parts' config.json alone"
    )
    latent: tuple[int, int, int] | None = Field(
        None, description="for diffusers: channels, height and width of the latent; null: what the unet was trained on"
    )
    checkpointing: bool = Field(False, description="for diffusers: recompute activations in the backward pass")
    head: str | None = Field(None, description="for head: its registered name, such as toyworld/generator-own")
    tower: str | None = Field(None, description="for head: the model whose tokens it restores, told by its text tower")
    random: bool = Field(False, description="control arm: random weights instead of the learnt ones")
    shuffled: bool = Field(False, description="control arm: the generator is told another image's caption")

    @model_validator(mode="after")
    def _head_is_named(self) -> TeacherConfig:
        if self.kind == "head" and (self.head is None or self.tower is None):
            raise ValueError(
                "kind head needs head (a registered generator) and tower (the model whose tokens it restores)"
            )
        refuse_both(self.weights, self.sha256)
        return self

    def part_weights(self, *, seed: int) -> dict[str, Weights]:
        """Where each part's weights come from."""
        parts: tuple[Part, ...] = ("unet", "text_encoder")
        return {part: chosen(self.weights, self.sha256.get(part), seed=seed) for part in parts}


class MapperConfig(Config):
    """The linear map from the image embedding to the generator's latent."""

    unit: bool = Field(True, description="z has length sqrt(D) when it is mapped; false: as the tower puts it out")
    warmup: TrainConfig | None = Field(
        None, description="a stage before, with CLIP frozen, that trains the map alone; null: none"
    )
    warmup_on: Literal["image", "text", "both"] = Field(
        "image", description="whose embeddings the warm-up maps: images', their captions', or half of the batch each"
    )
    lr_scale: float = Field(1.0, gt=0, description="its learning rate beside CLIP, times train.lr")
    train: bool = Field(True, description="train it beside CLIP; false needs warmup")


class SdsClipConfig(RunConfig):
    """``diffusion/sds-clip``."""

    train: TrainConfig
    denoiser: TeacherConfig = TeacherConfig()
    decoder: DecoderConfig = Field(DecoderConfig(), description="the generator of denoiser.kind train")
    mapper: MapperConfig = MapperConfig()
    sds: SdsConfig = SdsConfig()
    weight: float = Field(0.001, ge=0, description="lambda, of the distillation; 0 is plain contrastive training")
    contrastive: float = Field(1.0, ge=0, description="of the contrastive loss")
    trainable: Trainable = Field(
        "layer-norms",
        description="of both towers: weights and biases of their layer norms, all and the logit scale, or what the "
        "grafts left trainable (given)",
    )
    most_captions: int = Field(5, gt=0, description="captions of an image that are used, the first so many")
    max_logit_scale: float = Field(100.0, gt=0, description="logit_scale is clamped to this when it is trained")
    crop: tuple[float, float] | None = Field((0.9, 1.0), description="area range of the random crop; null: none")
    watch: WatchConfig = Field(WatchConfig(), description="what the log says about the towers during training")

    @model_validator(mode="after")
    def _consistent(self) -> SdsClipConfig:
        if self.weight == 0 and self.contrastive == 0:
            raise ValueError("weight and contrastive are both 0, nothing would be trained; raise one")
        if not self.mapper.train and self.mapper.warmup is None:
            raise ValueError("mapper.train false keeps a random map; give mapper.warmup its steps, or train it")
        return self
