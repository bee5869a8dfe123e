"""Generators over features: they restore a tower's patch tokens from noise and a text embedding.

Pixels proved the wrong target in this world: their error rewards large areas, so only the background moved. The
denoiser is diffusers' `FluxTransformer2DModel`, saved as diffusers saves it; beside it lies `latent.safetensors` with
`mean` (N, W) and `std` (W,) that standardise the tokens, and `positions` (N, P), learnt channels that are appended to
the noisy tokens because almost pure noise says too little about where a token is.

Flow with x-prediction: x_t = (1 - t) x + t noise, the network names x from (x_t, t, condition), t = 1 is pure noise.
The condition is the unit text embedding times sqrt(D), as `pooled_projections` and as the only encoder token.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipgraft.errors import InputError
from clipgraft_toyworld.captions import detailed_captions
from clipgraft_toyworld.measure import Album
from clipgraft_toyworld.schedule import Optimizer
from clipgraft_toyworld.towers import JOINT, PATCHES, WIDTH, read_all, see_all
from clipgraft_toyworld.world import DETAILS, SIZES, Scene

STEPS, BATCH = 700, 128
POSITIONS = 16
COUNTS = (9, 9, 9, 6, 4, 2)
SIDE = 4
LATENT = "latent.safetensors"


def _flux() -> nn.Module:
    try:
        from diffusers import FluxTransformer2DModel
    except ImportError as error:
        raise InputError('the generator needs diffusers; type: pip install "clipgraft-toyworld[generators]"') from error
    model: Any = FluxTransformer2DModel(
        in_channels=WIDTH + POSITIONS,
        out_channels=WIDTH,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=JOINT,
        pooled_projection_dim=JOINT,
        guidance_embeds=False,
        axes_dims_rope=(8, 12, 12),
    )
    module: nn.Module = model
    return module


class Generator(nn.Module):
    """The denoiser with its latent's statistics."""

    mean: Tensor
    std: Tensor
    image_ids: Tensor
    text_ids: Tensor

    def __init__(self, flux: nn.Module | None = None) -> None:
        super().__init__()
        self.flux: Any = flux if flux is not None else _flux()
        self.positions = nn.Parameter(torch.randn(PATCHES, POSITIONS))
        self.register_buffer("mean", torch.zeros(PATCHES, WIDTH))
        self.register_buffer("std", torch.ones(WIDTH))
        rows, columns = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
        ids = torch.stack([torch.zeros_like(rows), rows, columns], -1).flatten(0, 1).float()
        self.register_buffer("image_ids", ids, persistent=False)
        self.register_buffer("text_ids", torch.zeros(1, 3), persistent=False)

    def standardise(self, tokens: Tensor) -> Tensor:
        """Raw patch tokens (B, N, W) to the latent."""
        return (tokens.float() - self.mean) / self.std

    def forward(self, noisy: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        """Noisy latent (B, N, W), time (B,) in [0, 1], unit condition (B, D) -> the clean latent."""
        told = condition * JOINT**0.5
        (clean,) = self.flux(
            hidden_states=torch.cat([noisy, self.positions.expand(len(noisy), -1, -1)], -1),
            encoder_hidden_states=told[:, None],
            pooled_projections=told,
            timestep=time,
            img_ids=self.image_ids,
            txt_ids=self.text_ids,
            return_dict=False,
        )
        result: Tensor = clean
        return result

    def loss(self, latent: Tensor, condition: Tensor, time: Tensor, noise: Tensor) -> Tensor:
        """(B,) squared error of the clean latent."""
        share = time[:, None, None]
        guess = self((1 - share) * latent + share * noise, time, condition)
        return F.mse_loss(guess, latent, reduction="none").mean((1, 2))

    def save(self, folder: Path) -> None:
        """Write diffusers' files in fp16 and `latent.safetensors`."""
        from clipgraft.files import write_tensors

        self.flux.half().save_pretrained(folder)
        self.flux.float()
        write_tensors(folder / LATENT, {name: getattr(self, name) for name in ("mean", "std", "positions")})
        for file in folder.glob("*.safetensors"):
            file.chmod(0o644)


def load_generator(folder: Path) -> Generator:
    """What `Generator.save` wrote, in fp32."""
    from diffusers import FluxTransformer2DModel
    from safetensors.torch import load_file

    result = Generator(FluxTransformer2DModel.from_pretrained(folder, torch_dtype=torch.float32))
    result.load_state_dict(load_file(str(folder / LATENT)), strict=False)
    return result.eval()


@dataclass(frozen=True)
class Bench:
    """Latents (n, N, W) of a pool's pictures and their scenes, computed once."""

    latent: Tensor
    scene: Scene


def bench(tower: nn.Module, pool: Album, *, n: int) -> Bench:
    """Raw patch tokens of the first n pictures."""
    return Bench(latent=see_all(tower, pool.pixels[:n]).tokens, scene=pool.scene[:n])


def train_generator(clip: nn.Module, data: Bench, *, seed: int, steps: int = STEPS) -> Generator:
    """A generator over `data` conditioned on the text tower of `clip`."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    generator = Generator()
    generator.mean.copy_(data.latent.mean(0))
    generator.std.copy_((data.latent - generator.mean).std((0, 1)) + 1e-4)
    optimizer = Optimizer([generator], steps=steps, lr=2e-3, matrix_lr=0.01, inner="blocks")
    for _ in range(steps):
        rows = torch.randint(len(data.latent), (BATCH,))
        told = read_all(clip, detailed_captions(data.scene[rows], rng, counts=COUNTS, no_color=0.05))
        told = told + torch.rand(BATCH, 1) * torch.randn_like(told) / JOINT**0.5  # image embeddings miss the text's
        time = torch.where(torch.rand(BATCH) < 0.7, 0.9 + 0.1 * torch.rand(BATCH), torch.rand(BATCH))
        latent = generator.standardise(data.latent[rows])
        optimizer.update(generator.loss(latent, told, time, torch.randn_like(latent)).mean())
    return generator.eval()


@torch.no_grad()
def sensitivity(
    generator: Generator, clip: nn.Module, data: Bench, *, n: int = 512, time: float = 0.99, seed: int = 0
) -> dict[str, float]:
    """Relative rise of the loss when one word of a complete condition is wrong, per attribute; "all" for a wrong text.

    Only attributes above about .1 can be expected to move in post-training; look here before training anything.
    """
    rows = slice(0, n)
    scene, latent = data.scene[rows], generator.standardise(data.latent[rows])
    times = torch.full((len(scene),), time)
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(seed))
    names = [detail.name for detail in DETAILS]
    rng = torch.Generator().manual_seed(seed)

    def loss(told: Scene) -> float:
        captions = detailed_captions(told, random.Random(seed), counts=(len(names),), no_color=0.0, paraphrased=0.0)
        return generator.loss(latent, read_all(clip, captions), times, noise).mean().item()

    right = loss(scene)
    result = {"loss": right, "all": loss(scene[torch.randperm(len(scene), generator=rng)]) / right - 1}
    for name, size in SIZES.items():
        step = torch.randint(1, size, (len(scene),), generator=rng)
        result[name] = loss(scene.with_values(**{name: (scene.value(name) + step) % size})) / right - 1
    return result
