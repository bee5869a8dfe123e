"""A small generator of one's own over a tower's patch tokens: what "pretrained" means where nothing can be downloaded.

DIVA, un2CLIP and SDS-CLIP ask a frozen, pretrained generator. A run can train one before: over the base's own patch
tokens, told a caption's or the image's embedding. Behind ``FlowGenerator`` it serves the eps and the v objective.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from clipgraft.config.schema import Config, TrainConfig
from clipgraft.data.base import Source
from clipgraft.encoders.base import Encoder, ImageEncoder
from clipgraft.errors import InputError
from clipgraft.stage import TrainStage
from clipgraft.types import Batch, FeatureRequest, ImageFeatures, StepOutput
from clipgraft_diffusion.condition import Condition
from clipgraft_diffusion.denoiser import FluxDenoiser
from clipgraft_diffusion.feedback import blur
from clipgraft_diffusion.flow import mix
from clipgraft_diffusion.latent import Standardise
from clipgraft_diffusion.remember import Remembered

TOKENS = FeatureRequest(tokens=True)


class DecoderConfig(Config):
    """A generator that a run trains for itself, over the base's patch tokens."""

    data: str | None = Field(None, description="data reference to train it on; null: the run's own")
    width: int = Field(96, gt=0, description="features of a token")
    heads: int = Field(4, gt=0, description="attention heads; they divide width")
    depth: int = Field(1, gt=0, description="MM-DiT blocks")
    single_depth: int = Field(1, gt=0, description="single-stream blocks")
    positions: int = Field(16, ge=0, description="learnt channels per latent position")
    pool: int = Field(1, gt=0, description="average pool x pool neighbouring tokens")
    samples: int = Field(2048, gt=1, description="training images for the tokens' mean and spread")
    noise: float = Field(1.0, ge=0, description="most blur on what it is told, in its standard deviations")
    low: float = Field(0.8, ge=0, lt=1, description="lowest noise level that it learns")
    high: float = Field(1.0, gt=0, le=1, description="highest noise level that it learns")
    train: TrainConfig = TrainConfig(steps=600, batch_size=128, lr=2e-3, warmup=20)

    @model_validator(mode="after")
    def _fits(self) -> DecoderConfig:
        if self.low >= self.high:
            raise ValueError(f"low {self.low} must be below high {self.high}")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is no multiple of heads {self.heads}; change one of them")
        return self


def decoder_grid(tower: ImageEncoder, *, pool: int) -> tuple[int, int]:
    """The grid of tokens that a decoder restores."""
    if tower.grid is None:
        raise InputError("a decoder restores patch tokens, but this tower has no patch grid; choose a ViT")
    if tower.grid[0] % pool or tower.grid[1] % pool:
        raise InputError(f"decoder.pool {pool} doesn't divide the {tower.grid[0]} x {tower.grid[1]} patch grid; set 1")
    return tower.grid[0] // pool, tower.grid[1] // pool


class Decoder(nn.Module):
    """(noisy tokens (B, N, W), noise level (B,), told (B, E)) -> the clean, standardised tokens (B, N, W).

    ``unit``: what is told is an embedding, brought to length sqrt(E); otherwise it is taken as it comes.
    """

    def __init__(self, config: DecoderConfig, tower: ImageEncoder, *, told: int, unit: bool = True) -> None:
        super().__init__()
        c, self.grid = config, decoder_grid(tower, pool=config.pool)
        self.pool, self.unit, self.told = c.pool, unit, told
        self.statistics = Standardise(self.grid[0] * self.grid[1], tower.width)
        self.denoiser = FluxDenoiser(
            tower.width,
            self.grid,
            width=c.width,
            heads=c.heads,
            depth=c.depth,
            single_depth=c.single_depth,
            vec_dim=told,
            txt_dim=told,
            guidance=None,
            prediction="velocity",  # its output as it is, here read as the clean tokens
            positions=c.positions,
        )

    def raw(self, tokens: Tensor) -> Tensor:
        """A tower's patch tokens (B, N', W) -> (B, N, W), averaged over neighbours."""
        if self.pool == 1:
            return tokens.float()
        square = (
            tokens.float().transpose(1, 2).reshape(len(tokens), -1, self.grid[0] * self.pool, self.grid[1] * self.pool)
        )
        return F.avg_pool2d(square, self.pool).flatten(2).transpose(1, 2)

    def standardise(self, tokens: Tensor) -> Tensor:
        """A tower's patch tokens (B, N', W) -> the latent (B, N, W), of mean 0 and variance about 1."""
        found: Tensor = self.statistics(self.raw(tokens))
        return found

    def forward(self, noisy: Tensor, level: Tensor, told: Tensor) -> Tensor:
        """As the class says."""
        told = F.normalize(told, dim=-1) * self.told**0.5 if self.unit else told
        clean: Tensor = self.denoiser(noisy, level, Condition(vec=told, txt=told[:, None]))
        return clean


class Teller(Protocol):
    """What the decoder is told about a batch while it learns."""

    def __call__(self, batch: Batch, features: ImageFeatures) -> Tensor:
        """A batch and the base's image features -> (B, E), without gradient."""


class DecoderStage(TrainStage):
    """Trains a ``Decoder``; the base and its text tower are frozen. ``noise`` blurs what is told, level by sample.

    ``captions``: the batch carries texts for ``teller``. Ends with the error on held-out images told rightly and told
    about another image, at the same noise.
    """

    def __init__(
        self,
        name: str,
        *,
        config: DecoderConfig,
        source: Source,
        held_out: Iterable[Batch],
        base: Encoder,
        decoder: Decoder,
        teller: Teller,
        captions: bool,
    ) -> None:
        super().__init__(name, train=config.train, source=source)
        self.training_crop = None
        self.wants_text = captions
        self.base: Encoder = base
        self.freeze(base)
        self.decoder: Decoder = decoder
        self.teller, self.config, self.held_out = teller, config, list(held_out)
        self._remembered = Remembered()

    def forward(self, batch: Batch) -> StepOutput:
        """One batch -> mean squared error of the clean tokens."""
        told, latent = self._told(batch)
        losses = self._losses(latent, blur(told, self.config.noise))
        loss = losses.mean()
        return StepOutput(loss, {"decoder": loss.detach()}, len(batch))

    @torch.no_grad()
    def _told(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """What is told (B, E), and the latent (B, N, W)."""
        width = self.base.image.embed_dim

        def compute() -> Tensor:
            features: ImageFeatures = self.base.image(self.base.preprocess.normalize(batch.pixels), TOKENS)
            assert features.tokens is not None
            return torch.cat([features.pooled.float()[:, None], features.tokens.float().flatten(1)[:, None]], -1)

        row = self._remembered(batch.ids, compute)[:, 0]
        tokens = row[:, width:].reshape(len(row), -1, self.base.image.width)
        told = self.teller(batch, ImageFeatures(row[:, :width], tokens=tokens))
        return told, self.decoder.standardise(tokens)

    def _losses(self, latent: Tensor, told: Tensor, generator: torch.Generator | None = None) -> Tensor:
        c, device = self.config, latent.device
        level = c.low + (c.high - c.low) * torch.rand(len(latent), device=device, generator=generator)
        noise = torch.randn(latent.shape, device=device, generator=generator)
        clean: Tensor = self.decoder(mix(latent, noise, level), level, told)
        return (clean - latent).square().flatten(1).mean(1)

    def components(self) -> dict[str, nn.Module]:
        """``decoder``, for the stage that asks it, and ``teller`` if that is a module with statistics of its own."""
        found: dict[str, nn.Module] = {"decoder": self.decoder}
        return found | ({"teller": self.teller} if isinstance(self.teller, nn.Module) else {})

    @torch.no_grad()
    def final_metrics(self) -> dict[str, float]:
        """Errors told rightly and wrongly, and the relative rise; 0 means that it ignores what it is told."""
        sums, count = [0.0, 0.0], 0
        for batch in self.held_out:
            told, latent = self._told(batch.to(next(self.decoder.parameters()).device))
            if len(latent) < 2:
                continue
            for k, condition in enumerate((told, told.roll(1, 0))):
                same = torch.Generator(latent.device).manual_seed(count)
                sums[k] += float(self._losses(latent, condition, same).sum())
            count += len(latent)
        if not count:
            return {}
        right, wrong = sums[0] / count, sums[1] / count
        return {"decoder_right": right, "decoder_wrong": wrong, "condition_gap": wrong / right - 1}
