"""The frozen generators that are told a caption: a Stable Diffusion without its autoencoder, or a small flow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from clipgraft.encoders.base import Encoder
from clipgraft.errors import InputError
from clipgraft.log import RunLog
from clipgraft_diffusion.generator import FlowGenerator
from clipgraft_diffusion.opening import local_settings, open_part, part_problem
from clipgraft_diffusion.sds.captions import Read
from clipgraft_diffusion.weights import Weights

SETTING = "denoiser.from"
OTHERWISE = "name another model with denoiser.from"
PARTS = {
    "unet": "config.json",
    "text_encoder": "config.json",
    "tokenizer": "tokenizer_config.json",
    "scheduler": "scheduler_config.json",
}
"""What is read; the autoencoder is neither looked for nor opened."""


class Told(Protocol):
    """A frozen generator over latents (B, *latent). ``read`` None: it reads CLIP's own ids."""

    latent: tuple[int, ...]
    read: Read | None

    def tell(self, ids: Tensor) -> Tensor:
        """Ids (B, L) of captions -> condition (B, ...), without gradient."""

    def __call__(self, x_t: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """Noisy latents (B, *latent), steps (B,), condition -> noise (B, *latent) in fp32."""


class ToldDiffusion(nn.Module):
    """A text-to-image UNet with the text encoder that it was trained with; both frozen.

    The condition is the encoder's last states (B, L, width), padding included, as in diffusers' pipeline.
    """

    def __init__(
        self, unet: Any, text: Any, read: Read, *, latent: tuple[int, ...], checkpointing: bool = False
    ) -> None:
        super().__init__()
        self.unet: Any = unet.requires_grad_(False).eval()
        self.text: Any = text.requires_grad_(False).eval()
        self.read: Read | None = read
        self.latent = latent
        if checkpointing:
            self.unet.enable_gradient_checkpointing()

    @torch.no_grad()
    def tell(self, ids: Tensor) -> Tensor:
        """Ids (B, L) -> (B, L, width)."""
        states: Tensor = self.text(ids)[0].float()
        return states

    def forward(self, x_t: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """x_t (B, C, h, w), steps (B,), condition (B, L, width) -> noise (B, C, h, w) in fp32."""
        (noise,) = self.unet(x_t, t, encoder_hidden_states=condition, return_dict=False)
        found: Tensor = noise.float()
        return found


class ToldFlow(nn.Module):
    """A small flow over a tower's patch tokens, told the unit embedding of a caption by that tower's text side."""

    def __init__(self, flow: FlowGenerator, *, latent: tuple[int, ...], read: Read | None) -> None:
        super().__init__()
        if flow.tower.text is None:
            raise InputError("a generator that is told captions needs a tower with a text side; name another tower")
        self.flow: FlowGenerator = flow
        self.latent, self.read = latent, read

    @torch.no_grad()
    def tell(self, ids: Tensor) -> Tensor:
        """Ids (B, L) -> (B, 1, D) of length one."""
        assert self.flow.tower.text is not None
        told: Tensor = self.flow.tower.text(ids).unit().float()
        return told[:, None]

    def forward(self, x_t: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """x_t (B, N, W), steps (B,), condition (B, 1, D) -> noise (B, N, W) in fp32."""
        noise: Tensor = self.flow(x_t, t, condition)
        return noise


def tokens_shape(flow: Any, tower: Encoder) -> tuple[int, ...]:
    """(N, W) of the latent that a registered generator restores."""
    image = tower.image
    if image.grid is None:
        raise InputError("a generator over patch tokens needs a tower with a patch grid; choose a ViT")
    weight = next(image.parameters())
    with torch.no_grad():
        found = flow.standardise(weight.new_zeros(1, image.grid[0] * image.grid[1], image.width))
    return tuple(found.shape[1:])


class CaptionReader:
    """Texts -> ids of a diffusers model's own tokenizer, cut and padded to ``length``."""

    def __init__(self, tokenizer: Any, *, length: int) -> None:
        self.tokenizer, self.length = tokenizer, length

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """(n, length) int64."""
        found: Tensor = self.tokenizer(
            list(texts), padding="max_length", max_length=self.length, truncation=True, return_tensors="pt"
        ).input_ids
        return found


def told_problems(
    name: str,
    *,
    noise: Mapping[str, Any],
    latent: tuple[int, ...] | None,
    revision: str | None = None,
    weights: Mapping[str, Weights] | None = None,
    log: RunLog | None = None,
) -> list[str]:
    """What can be seen without the network: missing parts, another target or schedule, a latent that doesn't fit.

    ``noise`` are the settings of the schedule by their names in diffusers, ``latent`` the shape if it is set.
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
    unet, text, scheduler = (
        local_settings(name, part, PARTS[part], revision=revision) for part in ("unet", "text_encoder", "scheduler")
    )
    said = []
    if scheduler is not None:
        said += _target_problems(name, scheduler)
        said += [
            f"sds: {name} was trained with {key} {scheduler[key]}, the setting says {value}; make them equal"
            for key, value in noise.items()
            if scheduler.get(key, value) != value
        ]
    return said + ([] if unet is None else _unet_problems(name, unet, text=text, latent=latent))


def _target_problems(name: str, scheduler: Mapping[str, Any]) -> list[str]:
    target = scheduler.get("prediction_type", "epsilon")
    if target == "epsilon":
        return []
    return [
        f"{SETTING}: {name} predicts {target}, score distillation needs a model that predicts the noise (epsilon), "
        "such as Stable Diffusion 1.4, 1.5 or 2.1 *base*"
    ]


def _unet_problems(
    name: str, unet: Mapping[str, Any], *, text: Mapping[str, Any] | None, latent: tuple[int, ...] | None
) -> list[str]:
    said, width = [], unet.get("cross_attention_dim", 1280)
    asks = ("class_embed_type", "num_class_embeds", "addition_embed_type", "encoder_hid_dim_type")
    if more := [key for key in asks if unet.get(key)]:
        said.append(f"{SETTING}: the unet of {name} wants more than a caption ({more[0]} {unet[more[0]]})")
    elif unet.get("in_channels", 4) != unet.get("out_channels", 4):
        said.append(f"{SETTING}: the unet of {name} wants more than a latent (inpainting and upscaling don't fit)")
    if text is not None and text.get("hidden_size", width) != width:
        said.append(
            f"{SETTING}: the unet of {name} has cross-attention of width {width}, but its text encoder's states have "
            f"{text['hidden_size']}; bring parts of one model together"
        )
    if said:
        return [f"{problem}; name a plain text-to-image model such as Stable Diffusion 1.5" for problem in said[:1]]
    shape = latent or latent_of(unet)
    channels, step = int(unet.get("in_channels", 4)), 2 ** (len(unet.get("block_out_channels", (0,) * 4)) - 1)
    if len(shape) != 3 or shape[0] != channels or shape[1] % step or shape[2] % step:
        return [
            f"denoiser.latent {list(shape)} doesn't fit the unet of {name}; give [{channels}, height, width] with "
            f"sides that are multiples of {step}"
        ]
    return []


def latent_of(unet: Mapping[str, Any]) -> tuple[int, ...]:
    """(C, h, w) that a UNet was trained on, from its settings."""
    size = unet.get("sample_size") or 64
    sides = (size, size) if isinstance(size, int) else tuple(size)
    return int(unet.get("in_channels", 4)), *sides


def open_told_diffusion(
    name: str,
    *,
    latent: tuple[int, ...] | None = None,
    checkpointing: bool = False,
    revision: str | None = None,
    weights: Mapping[str, Weights] | None = None,
    log: RunLog | None = None,
) -> ToldDiffusion:
    """A diffusers directory or Hugging Face id: UNet, text encoder and tokenizer, safetensors only, in fp32."""
    import transformers
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    def part(opener: Any, folder: str, **more: Any) -> Any:
        more |= {"revision": revision, "weights": (weights or {}).get(folder), "log": log}
        return open_part(opener, name, folder, setting=SETTING, otherwise=OTHERWISE, **more)

    scheduler: Any = part(DDPMScheduler, "scheduler")
    if problems := _target_problems(name, scheduler.config):
        raise InputError(problems[0])
    tokenizer = part(transformers.CLIPTokenizer, "tokenizer")
    text = part(transformers.CLIPTextModel, "text_encoder", use_safetensors=True, dtype=torch.float32)
    unet = part(UNet2DConditionModel, "unet", use_safetensors=True, torch_dtype=torch.float32)
    length = min(tokenizer.model_max_length, text.config.max_position_embeddings)
    reader = CaptionReader(tokenizer, length=length)
    return ToldDiffusion(unet, text, reader, latent=latent or latent_of(unet.config), checkpointing=checkpointing)
