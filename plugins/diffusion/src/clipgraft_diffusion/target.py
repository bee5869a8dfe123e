"""The frozen side of both stages: what the untouched base says of a batch, and the latent that is to be restored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clipgraft.encoders.base import Encoder
from clipgraft.types import Batch, FeatureRequest, ImageFeatures
from clipgraft_diffusion.codes import TokenCodes, VqCodes
from clipgraft_diffusion.latent import TokenLatent, VaeLatent
from clipgraft_diffusion.store import LatentStore

Latent = VaeLatent | TokenLatent | VqCodes | TokenCodes
"""What can be restored: continuous tokens, or codes."""
POOLED, TOKENS = FeatureRequest(), FeatureRequest(tokens=True)
MEMORY = 2**30
"""Bytes of frozen outputs that are kept at most."""


@dataclass(frozen=True, slots=True)
class Seen:
    """Embedding of the base ``z`` (B, D), not normalised, and the clean latent ``x1`` (B, N, C), both in fp32.

    Codes are indices ``x1`` (B, N) int64. Without a latent (nothing is to be restored) N is 0.
    """

    z: Tensor
    x1: Tensor


class Target(nn.Module):
    """The base and the latent, in one pass where the latent is made of the base's own tokens.

    ``shuffled`` gives every image another one's latent: the control that keeps everything but the correspondence.
    ``remember`` keeps what was computed per sample id; only for pixels that never change (no random crop) and latents
    that aren't sampled. A batch with one unknown sample is computed whole, so that its shape never depends on history.
    ``store`` keeps on disk what a VAE or VQ model makes of such pixels: a VAE's moments, a latent is drawn each time.
    """

    def __init__(
        self,
        base: Encoder,
        latent: Latent | None,
        *,
        shuffled: bool = False,
        remember: bool = False,
        store: LatentStore | None = None,
    ) -> None:
        super().__init__()
        self.base: Encoder = base
        self.latent: Latent | None = latent
        self.shuffled, self.remember = shuffled, remember and not isinstance(latent, VaeLatent)
        self.store = store
        self._known: dict[str, Seen] = {}
        self._bytes = 0

    @torch.no_grad()
    def forward(self, batch: Batch) -> Seen:
        """One batch, seen by the frozen side."""
        if self.remember and all(name in self._known for name in batch.ids):
            rows = [self._known[name] for name in batch.ids]
            seen = Seen(torch.stack([r.z for r in rows]), torch.stack([r.x1 for r in rows]))
        else:
            seen = self.look(batch.pixels, batch.ids)
            if self.remember:
                self._keep(batch.ids, seen)
        return Seen(seen.z, seen.x1.roll(1, 0)) if self.shuffled else seen

    @torch.no_grad()
    def look(self, pixels: Tensor, ids: Sequence[str] = ()) -> Seen:
        """Pixels (B, 3, H, W') in [0, 1] -> embedding and latent, each image with its own; ``ids`` name stored ones."""
        shared = isinstance(self.latent, TokenLatent | TokenCodes) and self.latent.tower is None
        features: ImageFeatures = self.base.image(self.base.preprocess.normalize(pixels), TOKENS if shared else POOLED)
        z = features.pooled.float()
        if self.latent is None:
            return Seen(z, z.new_zeros(len(z), 0, 0))
        if isinstance(self.latent, TokenLatent | TokenCodes) and shared:
            return Seen(z, self.latent.from_features(features))
        if self.store is None or not ids:
            return Seen(z, self.latent(pixels))
        kept = self.store(ids, lambda: stored_part(self.latent, pixels)).to(pixels.device)
        return Seen(z, self.latent.from_moments(kept) if isinstance(self.latent, VaeLatent) else kept)

    def _keep(self, names: list[str], seen: Seen) -> None:
        for name, z, x1 in zip(names, seen.z, seen.x1, strict=True):
            size = z.nbytes + x1.nbytes
            if name not in self._known and self._bytes + size <= MEMORY:
                self._known[name] = Seen(z.clone(), x1.clone())
                self._bytes += size


def stored_part(latent: Latent | None, pixels: Tensor) -> Tensor:
    """Pixels (B, 3, H, W') in [0, 1] -> what a store keeps of them: a VAE's moments, or codes (B, N) int64."""
    if isinstance(latent, VaeLatent):
        return latent.moments(pixels)
    if isinstance(latent, VqCodes):
        codes: Tensor = latent(pixels)
        return codes
    raise TypeError(f"nothing of a {type(latent).__name__} is kept on disk")
