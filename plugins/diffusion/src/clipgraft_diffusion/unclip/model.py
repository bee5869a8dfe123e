"""Stable unCLIP as a frozen decoder: a latent diffusion model that is told an image embedding as its class label.

Read from a diffusers directory or Hugging Face id. The UNet's cross-attention gets the states of the empty prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from clipgraft.errors import InputError
from clipgraft.log import RunLog
from clipgraft_diffusion.eps import Target
from clipgraft_diffusion.opening import local_settings, open_part, part_problem
from clipgraft_diffusion.unclip.label import BETAS, LEVELS, UnclipLabel
from clipgraft_diffusion.unet import PARTS as PLAIN
from clipgraft_diffusion.unet import SETTING, StableDiffusion, prompt_states
from clipgraft_diffusion.weights import Weights

PARTS = PLAIN | {"image_normalizer": "config.json", "image_noising_scheduler": "scheduler_config.json"}
TRAIN = "train a decoder for this tower with denoiser.kind train"
OTHERWISE = f"name another Stable unCLIP with {SETTING}, or {TRAIN}"
TARGETS: dict[str, Target] = {"epsilon": "noise", "v_prediction": "velocity"}
"""diffusers' ``prediction_type`` of a schedule, and what the model then puts out."""
Settings = Mapping[str, Mapping[str, Any] | None]
"""By part, what its JSON file says; None when it can't be read without the network."""


class StableUnclip(nn.Module):
    """(x_t, t, labels) -> noise or v, for latents of images of any size that the UNet can halve often enough.

    Frozen, but the labels get their gradient. ``prompt`` (1, L, width) are the constant prompt's states.
    """

    def __init__(self, unet: Any, vae: Any, prompt: Tensor, *, checkpointing: bool = False) -> None:
        super().__init__()
        self.parts: StableDiffusion = StableDiffusion(unet, vae, prompt, checkpointing=checkpointing)
        self.width = int(unet.config.projection_class_embeddings_input_dim)

    def latents(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W') in [0, 1] -> the scaled mean of the posterior (B, 4, H/8, W'/8), in fp32."""
        return self.parts.latents(pixels)

    def forward(self, x_t: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """x_t (B, 4, h, w), steps (B,), labels (B, 2D) -> noise or v (B, 4, h, w) in fp32."""
        prompt = self.parts.prompt.expand(len(x_t), -1, -1)
        (found,) = self.parts.unet(x_t, t, encoder_hidden_states=prompt, class_labels=condition, return_dict=False)
        result: Tensor = found.float()
        return result


@dataclass(frozen=True, slots=True)
class OpenUnclip:
    """A decoder, the label it was made for, with its released statistics, and what it puts out."""

    decoder: StableUnclip
    label: UnclipLabel
    target: Target


def unclip_problems(
    name: str,
    *,
    size: int,
    embed_dim: int,
    noise: Mapping[str, Any],
    revision: str | None = None,
    weights: Mapping[str, Weights] | None = None,
    log: RunLog | None = None,
) -> list[str]:
    """What can be seen without the network: missing parts, or the first thing that doesn't fit the tower.

    ``embed_dim`` D of the tower; ``noise`` are the settings of the schedule by their names in diffusers; ``weights`` by
    part are looked for and compared with their sha256.
    """
    for part, file in PARTS.items():
        problem = part_problem(
            name,
            part,
            setting=SETTING,
            what=part.replace("_", " "),
            otherwise=OTHERWISE,
            file=file,
            revision=revision,
            weights=(weights or {}).get(part),
            log=log,
        )
        if problem:
            return [problem]
    settings = {part: local_settings(name, part, file, revision=revision) for part, file in PARTS.items()}
    return settings_problems(name, settings, size=size, embed_dim=embed_dim, noise=noise)


def settings_problems(
    name: str, settings: Settings, *, size: int, embed_dim: int, noise: Mapping[str, Any]
) -> list[str]:
    """One line per setting of the parts that doesn't fit the tower, the other parts, or what the label does."""
    said = []
    if (unet := settings["unet"]) is not None:
        said += _unet_problems(name, unet, embed_dim=embed_dim)
        said += _neighbour_problems(name, unet, vae=settings["vae"] or {}, text=settings["text_encoder"] or {})
        halves = len((settings["vae"] or {}).get("block_out_channels", (0,) * 4)) + len(
            unet.get("block_out_channels", (0,) * 4)
        )
        if size % (step := 2 ** (halves - 2)):
            said.append(
                f"denoiser.size {size} can't be halved often enough; set it to a multiple of {step}, such as "
                f"{max(step, round(size / step) * step)}"
            )
    width = (settings["image_normalizer"] or {}).get("embedding_dim", embed_dim)
    if not said and width != embed_dim:
        said.append(
            f"{SETTING}: the image normalizer of {name} holds {width} means, this tower's embeddings have {embed_dim}; "
            "bring parts of one model together"
        )
    return said + _schedule_problems(name, settings, noise=noise)


def _unet_problems(name: str, unet: Mapping[str, Any], *, embed_dim: int) -> list[str]:
    if (found := unet.get("class_embed_type")) != "projection":
        return [
            f"{SETTING}: the unet of {name} takes no image embedding (class_embed_type {found}, an unCLIP's is "
            f"projection); {OTHERWISE}"
        ]
    if (width := unet.get("projection_class_embeddings_input_dim")) != 2 * embed_dim:
        made = f"embeddings of width {width // 2}" if isinstance(width, int) else "no embedding"
        return [
            f"{SETTING}: {name} was made for {made}, this tower's have {embed_dim}; public decoders exist for OpenAI's "
            f"ViT-L/14 (768) and OpenCLIP's ViT-H/14 (1024): name one that fits, or {TRAIN}"
        ]
    return []


def _neighbour_problems(
    name: str, unet: Mapping[str, Any], *, vae: Mapping[str, Any], text: Mapping[str, Any]
) -> list[str]:
    said, together = [], "bring parts of one model together"
    width, channels = unet.get("cross_attention_dim", 1280), unet.get("in_channels", 4)
    if (states := text.get("hidden_size", width)) != width:
        said.append(
            f"{SETTING}: the unet of {name} has cross-attention of width {width}, its text encoder's states have "
            f"{states}; {together}"
        )
    if (latent := vae.get("latent_channels", channels)) != channels:
        said.append(
            f"{SETTING}: the unet of {name} takes {channels} channels, its autoencoder gives {latent}; {together}"
        )
    return said


def _schedule_problems(name: str, settings: Settings, *, noise: Mapping[str, Any]) -> list[str]:
    said, schedule = [], settings["scheduler"] or {}
    if (target := schedule.get("prediction_type", "epsilon")) not in TARGETS:
        said.append(f"{SETTING}: {name} predicts {target}; this recipe reads {' and '.join(TARGETS)}; {OTHERWISE}")
    plain: dict[str, Any] = {"rescale_betas_zero_snr": False, "trained_betas": None}
    said += [
        f"noise: {name} was trained with {key} {schedule[key]}, the setting says {value}; make them equal"
        for key, value in {**plain, **noise}.items()
        if schedule.get(key, value) != value
    ]
    level = settings["image_noising_scheduler"] or {}
    said += [
        f"{SETTING}: {name} noises embeddings with {key} {level[key]}, a Stable unCLIP with {value}; {OTHERWISE}"
        for key, value in {**plain, "beta_schedule": BETAS, "num_train_timesteps": LEVELS}.items()
        if level.get(key, value) != value
    ]
    return said


def open_unclip(
    name: str,
    *,
    size: int,
    embed_dim: int,
    noise: Mapping[str, Any],
    noise_level: Any = 0,
    prompt: str = "",
    checkpointing: bool = False,
    revision: str | None = None,
    weights: Mapping[str, Weights] | None = None,
    log: RunLog | None = None,
) -> OpenUnclip:
    """All parts in fp32, safetensors only; the text encoder is dropped when the prompt is encoded.

    ``weights`` by part pin files or draw random weights; ``log`` is told the sha256 of each. A hub id whose parts don't
    fit is refused here, after the small files and before the large ones where these come first.
    """
    import transformers
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    def part(opener: Any, folder: str, **more: Any) -> Any:
        more |= {"revision": revision, "weights": (weights or {}).get(folder), "log": log}
        return open_part(opener, name, folder, setting=SETTING, otherwise=OTHERWISE, **more)

    heavy: dict[str, Any] = {"use_safetensors": True, "torch_dtype": torch.float32}
    scheduler, noising = part(DDPMScheduler, "scheduler"), part(DDPMScheduler, "image_noising_scheduler")
    normalizer = part(StableUnCLIPImageNormalizer, "image_normalizer", **heavy)
    tokenizer = part(transformers.CLIPTokenizer, "tokenizer")
    encoder = part(transformers.CLIPTextModel, "text_encoder", use_safetensors=True, dtype=torch.float32)
    unet = part(UNet2DConditionModel, "unet", **heavy)
    vae = part(AutoencoderKL, "vae", **heavy)
    opened = {
        "unet": unet,
        "vae": vae,
        "image_normalizer": normalizer,
        "scheduler": scheduler,
        "image_noising_scheduler": noising,
    }
    settings: Settings = {key: dict(found.config) for key, found in opened.items()} | {
        "text_encoder": encoder.config.to_dict()
    }
    if problems := settings_problems(name, settings, size=size, embed_dim=embed_dim, noise=noise):
        raise InputError(problems[0])
    label = UnclipLabel(embed_dim=embed_dim, noise_level=noise_level)
    label.mean.copy_(normalizer.mean.detach())
    label.std.copy_(normalizer.std.detach())
    decoder = StableUnclip(unet, vae, prompt_states(tokenizer, encoder, prompt), checkpointing=checkpointing)
    return OpenUnclip(decoder, label, TARGETS[scheduler.config.prediction_type])
