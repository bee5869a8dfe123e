"""Stable Diffusion as a frozen critic: UNet, autoencoder and one constant prompt, behind the eps objective.

A pretrained text-to-image model told what CLIP sees instead of words (Wang et al., DIVA, ICLR 2025, arXiv 2407.20171).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from clipgraft.encoders.base import Preprocess
from clipgraft.errors import InputError
from clipgraft.log import RunLog
from clipgraft_diffusion.latent import halvings
from clipgraft_diffusion.opening import local_settings, open_part, part_problem
from clipgraft_diffusion.passes import Compat
from clipgraft_diffusion.weights import Weights

SETTING = "denoiser.from"
OTHERWISE = "name another model with denoiser.from"
PARTS = {
    "unet": "config.json",
    "vae": "config.json",
    "text_encoder": "config.json",
    "tokenizer": "tokenizer_config.json",
    "scheduler": "scheduler_config.json",
}
WEIGHED = ("unet", "vae", "text_encoder")
"""The parts that have weights, which a sha256 can pin."""
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
OPENAI = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
"""Mean and standard deviation per channel of pixels in [0, 1]."""


def autoencoder_pixels(pixels: Tensor, *, compat: Compat) -> Tensor:
    """Pixels (B, 3, H, W') in [0, 1] -> what the autoencoder sees, -1 to 1.

    ``official`` standardises with OpenAI's statistics and undoes it with ImageNet's, which squeezes the range: black
    becomes about -.86 and white about +.82 (official code, ``VQVAEUnNormalize``). ``fixed`` is 2 * pixels - 1.
    """
    if compat == "fixed":
        return 2 * pixels - 1
    (mean, std), (mean_in, std_in) = (
        [torch.tensor(values, dtype=pixels.dtype, device=pixels.device)[:, None, None] for values in pair]
        for pair in (OPENAI, IMAGENET)
    )
    return 2 * ((pixels - mean) / std * std_in + mean_in) - 1


class StableDiffusion(nn.Module):
    """(x_t, t, condition) -> noise, for latents of images of any size that the UNet can halve often enough.

    ``prompt`` (1, L, width) are the states of the constant prompt; the text encoder that made them is gone. Frozen,
    but the condition gets its gradient; ``checkpointing`` recomputes the UNet's activations in the backward pass.
    """

    prompt: Tensor

    def __init__(
        self, unet: Any, vae: Any, prompt: Tensor, *, compat: Compat = "fixed", checkpointing: bool = False
    ) -> None:
        super().__init__()
        self.unet: Any = unet.requires_grad_(False).eval()
        self.vae: Any = vae.requires_grad_(False).eval()
        self.width, self.compat = int(unet.config.cross_attention_dim), compat
        self.scale, self.shift = float(vae.config.scaling_factor), float(vae.config.shift_factor or 0.0)
        self.register_buffer("prompt", prompt, persistent=False)
        if checkpointing:
            self.unet.enable_gradient_checkpointing()

    @torch.no_grad()
    def latents(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W') in [0, 1] -> the scaled mean of the posterior (B, 4, H/8, W'/8), in fp32.

        The mean, not a sample: two calls agree.
        """
        with torch.autocast(pixels.device.type, enabled=False):
            posterior = self.vae.encode(autoencoder_pixels(pixels.float(), compat=self.compat)).latent_dist
            found: Tensor = self.scale * (posterior.mean - self.shift)
        return found

    def forward(self, x_t: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """x_t (B, 4, h, w), steps (B,), condition (B, L, width) -> noise (B, 4, h, w) in fp32."""
        (noise,) = self.unet(x_t, t, encoder_hidden_states=condition, return_dict=False)
        found: Tensor = noise.float()
        return found


def diffusion_problems(
    name: str,
    *,
    size: int,
    noise: dict[str, Any],
    tokens: int | None,
    prompt: bool = True,
    revision: str | None = None,
    weights: Mapping[str, Weights] | None = None,
    log: RunLog | None = None,
) -> list[str]:
    """What can be seen without the network: missing parts, another target, another schedule, a size that doesn't fit.

    ``noise`` are the settings of the schedule by their names in diffusers; ``tokens`` is the number of condition
    tokens that are added to the prompt's states, None when these are averaged. ``prompt``: whether any state is added.
    ``weights`` by part are looked for and compared with their sha256.
    """
    if unknown := sorted(set(weights or {}) - set(WEIGHED)):
        return [f"a sha256 is given for {unknown[0]}, but the parts with weights are {', '.join(WEIGHED)}"]
    found = [
        part_problem(
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
        for part, file in PARTS.items()
    ]
    if problems := [problem for problem in found if problem]:
        return problems[:1]

    def settings(part: str) -> dict[str, Any] | None:
        return local_settings(name, part, PARTS[part], revision=revision)

    said, scheduler = [], settings("scheduler")
    if scheduler is not None:
        said += [said_of] if (said_of := _target_problem(name, scheduler)) else []
        said += [
            f"noise: {name} was trained with {key} {scheduler[key]}, the setting says {value}; make them equal"
            for key, value in noise.items()
            if scheduler.get(key, value) != value
        ]
    unet, text, vae = settings("unet"), settings("text_encoder"), settings("vae")
    if unet is not None:
        said += _unet_problems(name, unet, vae=vae or {}, text=text if prompt else None)
        blocks = [part.get("block_out_channels", (0,) * 4) for part in (vae or {}, unet)]
        step = halvings(blocks[0]) * halvings(blocks[1])
        if size % step:
            said.append(
                f"denoiser.size {size} can't be halved often enough; set it to a multiple of {step}, such as "
                f"{max(step, round(size / step) * step)}"
            )
    length = 77 if text is None else int(text.get("max_position_embeddings", 77))
    if tokens is not None and tokens != length:
        said.append(
            f"condition.combine add needs as many tokens as the prompt has states, {length}, but the recap gives "
            f"{tokens}; set recap to {{kind: random, k: {length - 1}}} or condition.combine to mean-add"
        )
    return said


def _unet_problems(
    name: str, unet: Mapping[str, Any], *, vae: Mapping[str, Any], text: Mapping[str, Any] | None
) -> list[str]:
    """A UNet that doesn't fit the parts beside it, or wants to be told more than tokens."""
    said, width = [], unet.get("cross_attention_dim", 1280)
    asks = ("class_embed_type", "num_class_embeds", "addition_embed_type", "encoder_hid_dim_type")
    if more := [key for key in asks if unet.get(key)]:
        said.append(
            f"{SETTING}: the unet of {name} wants more than tokens and a step ({more[0]} {unet[more[0]]}); "
            "name a plain text-to-image model such as Stable Diffusion 1.5 or 2.1 base"
        )
    if not isinstance(width, int):
        said.append(f"{SETTING}: the unet of {name} has cross-attention of widths {width}; name one with one width")
    elif text is not None and int(text.get("hidden_size", width)) != width:
        said.append(
            f"{SETTING}: the unet of {name} has cross-attention of width {width}, but its text encoder's states have "
            f"{text['hidden_size']}; bring parts of one model together, or set condition.combine to none"
        )
    channels, latent = int(unet.get("in_channels", 4)), int(vae.get("latent_channels", 4))
    if channels != latent:
        said.append(
            f"{SETTING}: the unet of {name} takes {channels} channels, but its autoencoder gives {latent}; bring parts "
            "of one model together (inpainting and upscaling models don't fit)"
        )
    return said


def _target_problem(name: str, scheduler: dict[str, Any]) -> str:
    target = scheduler.get("prediction_type", "epsilon")
    if target == "epsilon":
        return ""
    return (
        f"{SETTING}: {name} predicts {target}, this objective needs a model that predicts the noise (epsilon), such as "
        "a Stable Diffusion 2.1 *base*"
    )


def open_stable_diffusion(
    name: str,
    *,
    prompt: str,
    compat: Compat = "fixed",
    checkpointing: bool = False,
    revision: str | None = None,
    weights: Mapping[str, Weights] | None = None,
    log: RunLog | None = None,
) -> StableDiffusion:
    """A diffusers directory or Hugging Face id, safetensors only, in fp32; the prompt is encoded once.

    ``weights`` by part (``unet``, ``vae``, ``text_encoder``) pin files or draw random weights; ``log`` is told the
    sha256 of each.
    """
    import transformers
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    def part(opener: Any, folder: str, **more: Any) -> Any:
        more |= {"revision": revision, "weights": (weights or {}).get(folder), "log": log}
        return open_part(opener, name, folder, setting=SETTING, otherwise=OTHERWISE, **more)

    tokenizer = part(transformers.CLIPTokenizer, "tokenizer")
    encoder = part(transformers.CLIPTextModel, "text_encoder", use_safetensors=True, dtype=torch.float32)
    scheduler: Any = part(DDPMScheduler, "scheduler")
    if problem := _target_problem(name, dict(scheduler.config)):
        raise InputError(problem)
    unet = part(UNet2DConditionModel, "unet", use_safetensors=True, torch_dtype=torch.float32)
    vae = part(AutoencoderKL, "vae", use_safetensors=True, torch_dtype=torch.float32)
    return StableDiffusion(
        unet, vae, prompt_states(tokenizer, encoder, prompt), compat=compat, checkpointing=checkpointing
    )


@torch.no_grad()
def prompt_states(tokenizer: Any, encoder: Any, prompt: str) -> Tensor:
    """The prompt, padded to the tokenizer's length -> the text encoder's last states (1, L, width)."""
    length = min(tokenizer.model_max_length, encoder.config.max_position_embeddings)
    ids = tokenizer(prompt, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
    states: Tensor = encoder.eval()(ids)[0].float()
    return states


def clip_pixels(preprocess: Preprocess, pixels: Tensor, *, compat: Compat) -> Tensor:
    """Pixels in [0, 1] as the tower gets them: its own statistics; ``official`` takes OpenAI's for every backbone.

    It makes a difference for SigLIP, whose own are .5 and .5.
    """
    if compat == "fixed":
        return preprocess.normalize(pixels)
    mean, std = (torch.tensor(v, dtype=pixels.dtype, device=pixels.device)[:, None, None] for v in OPENAI)
    return (pixels - mean) / std
