"""Settings of ``diffusion/genhancer``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from clipgraft.config.schema import Config, RunConfig, TrainConfig
from clipgraft_diffusion.objectives import TimesConfig
from clipgraft_diffusion.store import Precision
from clipgraft_diffusion.watch import WatchConfig
from clipgraft_diffusion.weights import Origin, Sha256, refuse_both

NOTHING = "clip.weight and clip.anchor.weight are both 0, nothing would be trained; raise one"


class LatentConfig(Config):
    """What is denoised."""

    kind: Literal["vae", "tokens"] = Field("tokens", description="a VAE latent, or patch tokens of a frozen tower")
    vae: str = Field("black-forest-labs/FLUX.1-dev", description="directory or Hugging Face id of an AutoencoderKL")
    subfolder: str | None = Field("vae", description="folder of the autoencoder inside the Hugging Face repository")
    revision: str | None = Field(None, description="branch, tag or commit of the Hugging Face id")
    sha256: Sha256 | None = Field(None, description="pins the autoencoder's safetensors")
    weights: Origin = Field("pretrained", description="random: the autoencoder's, from its config.json alone")
    cache: str | None = Field(
        None, description="folder that keeps what the autoencoder makes of the images between runs; needs crop null"
    )
    cache_precision: Precision = Field("fp32", description="of the cache; fp16 halves its size")
    of: str = Field("self", description="whose tokens: self (the untouched base) or any model reference")
    pool: int = Field(1, gt=0, description="average pool x pool neighbouring tokens")
    samples: int = Field(2048, gt=1, description="training images for the tokens' mean and spread")

    @model_validator(mode="after")
    def _pinned_or_random(self) -> LatentConfig:
        refuse_both(self.weights, self.sha256)
        if self.cache is not None and self.kind != "vae":
            raise ValueError("cache keeps what an autoencoder makes of images; set it to null, or kind to vae")
        return self


class ConditionConfig(Config):
    """Widths of the projected embedding."""

    vec_dim: int = Field(768, gt=0, description="pooled condition, modulates every block")
    txt_dim: int = Field(4096, gt=0, description="condition token of the joint attention")
    shuffled: bool = Field(False, description="control arm: the generator sees another image's latent")


class DenoiserConfig(Config):
    """The FLUX-like transformer."""

    from_: str | None = Field(
        None,
        alias="from",
        description="directory or Hugging Face id of a FluxTransformer2DModel of these sizes that stage 1 starts from; "
        "null: random weights, as in the paper",
    )
    subfolder: str | None = Field("transformer", description="its folder inside the Hugging Face repository")
    revision: str | None = Field(None, description="branch, tag or commit of the Hugging Face id")
    sha256: Sha256 | None = Field(None, description="pins its safetensors")
    width: int = Field(3072, gt=0, description="features of a token")
    heads: int = Field(24, gt=0, description="attention heads; they divide width")
    depth: int = Field(2, gt=0, description="MM-DiT blocks")
    single_depth: int = Field(4, gt=0, description="single-stream blocks")
    guidance: float | None = Field(4.0, description="constant fed to the guidance embedder; null leaves it out")
    prediction: Literal["velocity", "sample"] = Field("velocity", description="what the denoiser puts out")
    positions: int = Field(0, ge=0, description="learnt channels per latent position; 0: rotary embedding alone")
    checkpointing: bool = Field(False, description="recompute activations in the backward pass to save memory")


class FlowConfig(TimesConfig):
    """The law of noise levels, and how the network sees one."""

    compat: Literal["official", "fixed"] = Field("fixed", description="official: timestep and ids rounded to bf16")


class LoraConfig(Config):
    """Adapters on the image tower, as the graft core/lora takes them."""

    rank: int = Field(16, gt=0, description="columns of A and B")
    alpha: float = Field(16.0, gt=0, description="the update is scaled by alpha / rank")
    dropout: float = Field(0.1, ge=0, lt=1, description="share of an adapter's input features dropped per forward")
    targets: tuple[Literal["q", "k", "v", "o", "mlp", "projection"], ...] = Field(
        ("q", "k", "v", "o", "mlp"), description="weights to adapt"
    )
    biases: bool = Field(True, description="train the biases of the adapted layers too")


class AnchorConfig(Config):
    """Retention of the base's zero-shot decisions; the paper has none."""

    weight: float = Field(0.0, ge=0, description="of the anchor in the loss; 0 switches it off, as in the paper")
    temperature: float | None = Field(None, gt=0, description="factor on the base's cosines; null: its logit scale")
    learn_temperature: bool = Field(False, description="give the student a temperature of its own")


class GeneratorConfig(Config):
    """Stage 1: CLIP frozen, projectors and denoiser trained from scratch."""

    train: TrainConfig
    noise: float = Field(0.0, ge=0, description="most blur on the embedding, in its standard deviations; paper: none")


class TowerConfig(Config):
    """Stage 2: the image tower trained by the generator's feedback."""

    train: TrainConfig
    tune: Literal["lora", "full"] = Field("lora", description="train adapters in the image tower, or all of it")
    lora: LoraConfig = LoraConfig()
    trainable: Literal["only", "all"] = Field("only", description="all: projectors and denoiser go on learning")
    generator_lr: float = Field(1.0, gt=0, description="factor on train.lr for projectors and denoiser, with all")
    checkpointing: bool = Field(False, description="recompute the image tower's activations in the backward pass")
    weight: float = Field(1.0, ge=0, description="of the feedback; 0 is the anchor-only control arm, without stage 1")
    anchor: AnchorConfig = AnchorConfig()

    @property
    def trains_something(self) -> bool:
        """Whether any term of the loss has a weight."""
        return self.weight > 0 or self.anchor.weight > 0


class ClipConfig(TowerConfig):
    """Stage 2 with the continuous denoiser."""

    flow: FlowConfig | None = Field(None, description="another law than stage 1's")


class GenHancerConfig(RunConfig):
    """``diffusion/genhancer``."""

    latent: LatentConfig = LatentConfig()
    condition: ConditionConfig = ConditionConfig()
    denoiser: DenoiserConfig = DenoiserConfig()
    flow: FlowConfig = FlowConfig()
    crop: tuple[float, float] | None = Field((0.9, 1.0), description="area range of the random crop; null: none")
    watch: WatchConfig = WatchConfig()
    generator: GeneratorConfig
    clip: ClipConfig

    @model_validator(mode="after")
    def _trains_something(self) -> GenHancerConfig:
        if not self.clip.trains_something:
            raise ValueError(NOTHING)
        return self
