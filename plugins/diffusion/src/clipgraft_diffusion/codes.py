"""What is masked and predicted: the code of every position of an image, from a frozen VQ model or a k-means codebook.

``Codes`` are modules ``pixels (B, 3, H, W') in [0, 1] -> indices (B, L) int64`` without gradient, with ``size`` K codes
of ``width`` d_q on a ``grid`` (h, w), L = h*w, and the table ``vectors`` (K, d_q).
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from clipgraft.encoders.base import ImageEncoder
from clipgraft.errors import InputError
from clipgraft.log import Bar, RunLog
from clipgraft.types import ImageFeatures
from clipgraft_diffusion.latent import TOKENS, Standardise, TokenLatent, halvings
from clipgraft_diffusion.pretrained import Pretrained

VQ = Pretrained("VQModel", "codes.vq", "VQ model", "set codes.kind to tokens")


class Codes(Protocol):
    """A frozen quantiser of images."""

    size: int
    width: int
    grid: tuple[int, int]

    @property
    def vectors(self) -> Tensor:
        """(K, d_q), the embedding of every code."""

    def __call__(self, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Pixels (B, 3, H, W') in [0, 1] -> indices (B, L) int64 in [0, K)."""


def embed(codes: Codes, indices: Tensor) -> Tensor:
    """Indices (B, L) -> their embeddings (B, L, d_q)."""
    return codes.vectors[indices]


def code_grid(size: tuple[int, int], *, factor: int) -> tuple[int, int]:
    """The grid of codes of an image of ``size`` when one code covers ``factor`` x ``factor`` pixels."""
    if size[0] % factor or size[1] % factor:
        near = tuple(max(factor, round(s / factor) * factor) for s in size)
        raise InputError(
            f"the VQ model has one code per {factor} x {factor} px, {size[0]} x {size[1]} px is no multiple of that; "
            f"resize the encoder with the graft core/resize-positions to {near[0]} x {near[1]}, or set codes.kind to "
            "tokens"
        )
    return size[0] // factor, size[1] // factor


class VqCodes(nn.Module):
    """The indices of a frozen diffusers ``VQModel`` at the encoder's own resolution, in fp32 outside autocast.

    One crop serves CLIP and the quantiser. ``pixels`` is the range that the model was trained on: ``symmetric`` feeds
    2 * pixels - 1, ``unit`` the pixels themselves (aMUSEd's model).
    """

    def __init__(self, vq: Any, *, size: tuple[int, int], pixels: Literal["symmetric", "unit"] = "symmetric") -> None:
        super().__init__()
        self.vq: Any = vq.requires_grad_(False).eval()
        self.grid = code_grid(size, factor=halvings(vq.config.block_out_channels))
        self.size, self.width = (int(n) for n in vq.quantize.embedding.weight.shape)
        self.pixels = pixels

    @property
    def vectors(self) -> Tensor:
        """(K, d_q)."""
        table: Tensor = self.vq.quantize.embedding.weight.detach()
        return table

    @torch.no_grad()
    def forward(self, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Pixels (B, 3, H, W') in [0, 1] -> indices (B, L) int64; nothing is drawn."""
        with torch.autocast(pixels.device.type, enabled=False):
            seen = pixels.float() if self.pixels == "unit" else 2 * pixels.float() - 1
            _, _, (_, _, indices) = self.vq.quantize(self.vq.encode(seen).latents)
        rows: Tensor = indices.reshape(len(pixels), -1)
        return rows

    def fitted(self) -> nn.Module | None:
        """Nothing here was fitted to the training images."""
        return None


class Codebook(nn.Module):
    """Standardised tokens and their nearest of K vectors: raw tokens (B, L, C) -> indices (B, L) int64."""

    def __init__(self, standardise: Standardise, *, size: int) -> None:
        super().__init__()
        self.standardise: Standardise = standardise
        self.vectors: Tensor
        self.register_buffer("vectors", torch.zeros(size, standardise.mean.shape[1]))

    def forward(self, raw: Tensor) -> Tensor:
        """(B, L, C) -> (B, L) int64."""
        return nearest(self.standardise(raw).flatten(0, 1), self.vectors).view(raw.shape[:2])

    @torch.no_grad()
    def fit(self, batches: Iterable[Tensor], *, seed: int = 0, most: int = 32768, log: RunLog | None = None) -> None:
        """Statistics from all batches of raw tokens (B, L, C), the vectors from the first ``most`` tokens or so."""
        kept: list[Tensor] = []

        def passing() -> Iterable[Tensor]:
            for raw in batches:
                if sum(k.shape[0] * k.shape[1] for k in kept) < most:
                    kept.append(raw)
                yield raw

        self.standardise.estimate(passing())
        tokens = self.standardise(torch.cat(kept)).flatten(0, 1)[:most]
        self.vectors.copy_(kmeans(tokens, self.vectors.shape[0], seed=seed, log=log))


class TokenCodes(nn.Module):
    """The codes of a frozen tower's patch tokens, by k-means on the training images.

    Deviation: the paper quantises pixels with a pretrained VQ-GAN. A codebook of a tower's own tokens needs no
    download, and its codes mean more to a small predictor than pixels do. ``tower`` as in ``TokenLatent``.
    """

    def __init__(self, tokens: TokenLatent, *, size: int) -> None:
        super().__init__()
        self.tokens: TokenLatent = tokens
        self.codebook = Codebook(tokens.standardise, size=size)
        self.size, self.width, self.grid = size, tokens.channels, tokens.grid

    @property
    def tower(self) -> ImageEncoder | None:
        """The foreign tower, or None when the caller has the features already."""
        tower: ImageEncoder | None = self.tokens.tower
        return tower

    @property
    def vectors(self) -> Tensor:
        """(K, d_q)."""
        return self.codebook.vectors

    def from_features(self, features: ImageFeatures) -> Tensor:
        """Features with tokens -> indices (B, L)."""
        indices: Tensor = self.codebook(self.tokens.raw(features))
        return indices

    @torch.no_grad()
    def forward(self, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Pixels (B, 3, H, W') in [0, 1] -> indices (B, L) int64; nothing is drawn."""
        if self.tower is None:
            raise ValueError("these codes are made from features that the caller computed; call from_features")
        features: ImageFeatures = self.tower(self.tokens.preprocess.normalize(pixels), TOKENS)
        return self.from_features(features)

    def fitted(self) -> nn.Module | None:
        """Statistics and vectors."""
        return self.codebook


def nearest(x: Tensor, vectors: Tensor) -> Tensor:
    """Rows of x (n, d) -> index (n,) of the nearest of vectors (K, d), in fp32."""
    with torch.autocast(x.device.type, enabled=False):
        x, vectors = x.float(), vectors.float()
        return (vectors.square().sum(1) - 2 * x @ vectors.T).argmin(1)


@torch.no_grad()
def kmeans(x: Tensor, size: int, *, seed: int = 0, steps: int = 20, log: RunLog | None = None) -> Tensor:
    """Lloyd's algorithm from a k-means++ start: rows x (n, d) -> centres (size, d), the same for the same seed.

    A centre that loses all its rows moves to the row that is worst served.
    """
    if len(x) < size:
        raise InputError(
            f"{len(x)} tokens can't make {size} codes; lower codes.size, or raise codes.samples or the number of images"
        )
    x = x.float()
    with log.progress("fitting codes", size + steps) if log else nullcontext() as bar:
        centres = _spread(x, size, seed=seed, bar=bar)
        owner = nearest(x, centres)
        for step in range(steps):
            count = torch.bincount(owner, minlength=size)
            sums = torch.zeros_like(centres).index_add_(0, owner, x)
            if empty := int((count == 0).sum()):
                sums[count == 0] = x[(x - centres[owner]).square().sum(1).topk(empty).indices]
            centres, before = sums / count.clamp_min(1)[:, None], owner
            owner = nearest(x, centres)
            settled = torch.equal(before, owner)
            if bar is not None:
                bar.advance(steps - step if settled else 1)
            if settled:
                break
    return centres


def _spread(x: Tensor, size: int, *, seed: int, bar: Bar | None) -> Tensor:
    """k-means++: ``size`` rows of x (n, d), each drawn in proportion to its squared distance from those before."""
    g = torch.Generator().manual_seed(seed)
    centres = x.new_empty(size, x.shape[1])
    centres[0] = x[int(torch.randint(len(x), (), generator=g))]
    far = (x - centres[0]).square().sum(1)
    for k in range(1, size):
        mass = far.double().cumsum(0)
        at = torch.searchsorted(mass, mass[-1] * torch.rand((), generator=g, dtype=torch.float64).to(mass))
        centres[k] = x[at.clamp_max(len(x) - 1)]
        far = torch.minimum(far, (x - centres[k]).square().sum(1))
        if bar is not None:
            bar.advance()
    if bar is not None:
        bar.advance()
    return centres
