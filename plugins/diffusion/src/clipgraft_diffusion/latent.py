"""What is denoised: a VAE's latent, or the standardised patch tokens of a frozen tower.

Both are modules ``(pixels in [0, 1]) -> (B, N, C)`` without gradient, with ``channels`` C and ``grid`` (h, w).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipgraft.encoders.base import ImageEncoder, Preprocess
from clipgraft.errors import InputError
from clipgraft.types import FeatureRequest, ImageFeatures
from clipgraft_diffusion.pretrained import Pretrained

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

TOKENS = FeatureRequest(tokens=True)


def pack(latent: Tensor) -> Tensor:
    """(B, c, 2h, 2w) -> (B, h*w, 4c): 2 x 2 neighbours become one token, channels in the order (c, row, column)."""
    return F.pixel_unshuffle(latent, 2).flatten(2).transpose(1, 2)


def unpack(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """The inverse of ``pack`` for a token grid (h, w)."""
    return F.pixel_shuffle(tokens.transpose(1, 2).reshape(len(tokens), -1, *grid), 2)


def halvings(channels: Sequence[int]) -> int:
    """Pixels per side that one position of a diffusers encoder covers: every block but the last halves the image."""
    return 1 << (len(channels) - 1)


def packed_grid(size: tuple[int, int], *, factor: int = 8) -> tuple[int, int]:
    """Token grid of a VAE latent for an image of ``size``; 378 px leaves an odd latent, which can't be packed."""
    step = 2 * factor
    if size[0] % step or size[1] % step:
        near = tuple(max(step, round(s / step) * step) for s in size)
        raise InputError(
            f"a VAE latent of {size[0]} x {size[1]} px can't be packed 2 x 2, its sides must be multiples of {step}; "
            f"resize the encoder with the graft core/resize-positions to {near[0]} x {near[1]}, or set latent.kind to "
            "tokens"
        )
    return size[0] // step, size[1] // step


class VaeLatent(nn.Module):
    """The latent of a frozen ``AutoencoderKL`` at the encoder's own resolution: sampled, scaled, shifted, packed.

    One crop serves CLIP and VAE: the VAE sees it as 2 * pixels - 1. Runs in fp32 outside autocast, as official.
    """

    def __init__(self, vae: Any, *, size: tuple[int, int]) -> None:
        super().__init__()
        self.vae: Any = vae.requires_grad_(False).eval()
        self.grid = packed_grid(size, factor=halvings(vae.config.block_out_channels))
        self.channels = 4 * int(vae.config.latent_channels)
        self.scale = float(vae.config.scaling_factor)
        self.shift = float(vae.config.shift_factor or 0.0)

    @torch.no_grad()
    def forward(self, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Pixels (B, 3, H, W') in [0, 1] -> (B, N, C)."""
        return self.from_moments(self.moments(pixels), generator)

    @torch.no_grad()
    def moments(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W') in [0, 1] -> the posterior's mean and log variance (B, 2c, 2h, 2w)."""
        with torch.autocast(pixels.device.type, enabled=False):
            found: Tensor = self.vae.encode(2 * pixels.float() - 1).latent_dist.parameters
        return found

    @torch.no_grad()
    def from_moments(self, moments: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Moments (B, 2c, 2h, 2w) -> a drawn latent (B, N, C)."""
        from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

        posterior = DiagonalGaussianDistribution(moments)
        return pack(self.scale * (posterior.sample(generator) - self.shift))

    def fitted(self) -> nn.Module | None:
        """Nothing here was fitted to the training images."""
        return None


VAE = Pretrained("AutoencoderKL", "latent.vae", "autoencoder", "set latent.kind to tokens")


def vae_problem(name: str, subfolder: str | None, **more: Any) -> str | None:
    """Why this autoencoder can't be opened, as far as can be seen without the network; None when nothing speaks so.

    ``more`` as ``Pretrained.problem`` takes it.
    """
    return VAE.problem(name, subfolder, **more)


def open_vae(name: str, subfolder: str | None, **more: Any) -> Any:
    """diffusers' ``AutoencoderKL`` from a local directory or a Hugging Face id, safetensors only.

    ``more`` as ``Pretrained.open`` takes it.
    """
    return VAE.open(name, subfolder, **more)


class Standardise(nn.Module):
    """Token statistics of a training set: ``mean`` (N, C) per position, ``std`` (C,) over positions and samples."""

    def __init__(self, tokens: int, channels: int) -> None:
        super().__init__()
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.zeros(tokens, channels))
        self.register_buffer("std", torch.ones(channels))

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C) of mean 0 and variance about 1."""
        return (tokens - self.mean) / self.std

    @torch.no_grad()
    def estimate(self, batches: Iterable[Tensor]) -> None:
        """Set the statistics from batches of raw tokens, each (B, N, C); two moments in float64, order-free enough."""
        count, total, square = 0, torch.zeros(()), torch.zeros(())
        for tokens in batches:
            x = tokens.double()
            count, total, square = count + len(x), total + x.sum(0).cpu(), square + x.square().sum(0).cpu()
        if not count:
            raise InputError("no readable image to estimate latent statistics from; check data.from")
        mean = total / count
        self.mean.copy_(mean)
        # the spread over samples *and* positions, around each position's own mean
        self.std.copy_(((square / count - mean.square()).clamp_min(0).mean(0)).sqrt() + 1e-4)


class TokenLatent(nn.Module):
    """Patch tokens of a frozen tower, averaged over ``pool`` x ``pool`` neighbours and standardised.

    Deviation: the official code denoises VAE latents. Features of a tower are a richer target than pixels where a
    generator must be small, and they need no download. ``tower`` None means that the caller already has the features
    (the untouched base serves as target and as anchor in one pass) and uses ``from_features``.
    """

    def __init__(
        self, tower: ImageEncoder | None, *, like: ImageEncoder, preprocess: Preprocess, pool: int = 1
    ) -> None:
        super().__init__()
        self.grid = token_grid(like, pool=pool)
        self.channels, self.pool, self.preprocess = like.width, pool, preprocess
        self.tower = None if tower is None else tower.requires_grad_(False).eval()
        self.standardise = Standardise(self.grid[0] * self.grid[1], self.channels)

    def fitted(self) -> nn.Module | None:
        """What was fitted to the training images and belongs to the generator."""
        return self.standardise

    def raw(self, features: ImageFeatures) -> Tensor:
        """Features with tokens -> (B, N, C), pooled, not standardised."""
        return F.avg_pool2d(features.map().float(), self.pool).flatten(2).transpose(1, 2)

    def from_features(self, features: ImageFeatures) -> Tensor:
        """Features with tokens -> (B, N, C)."""
        tokens: Tensor = self.standardise(self.raw(features))
        return tokens

    @torch.no_grad()
    def forward(self, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Pixels (B, 3, H, W') in [0, 1] -> (B, N, C); ``generator`` is for latents that are sampled, these aren't."""
        if self.tower is None:
            raise ValueError("this latent is made from features that the caller computed; call from_features")
        features: ImageFeatures = self.tower(self.preprocess.normalize(pixels), TOKENS)
        return self.from_features(features)


def token_grid(tower: ImageEncoder, *, pool: int, setting: str = "latent") -> tuple[int, int]:
    """The pooled token grid of a tower; ``setting`` is the config block that messages name."""
    if tower.grid is None:
        other = {"latent": "vae", "codes": "vq"}[setting]
        raise InputError(
            f"{setting}.kind tokens needs a tower with a patch grid; choose a ViT or set {setting}.kind to {other}"
        )
    if tower.grid[0] % pool or tower.grid[1] % pool:
        raise InputError(
            f"{setting}.pool {pool} doesn't divide the {tower.grid[0]} x {tower.grid[1]} patch grid; set "
            f"{setting}.pool to 1"
        )
    return tower.grid[0] // pool, tower.grid[1] // pool
