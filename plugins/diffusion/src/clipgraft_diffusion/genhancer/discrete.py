"""The discrete denoiser: codes of a VQ model or of a tower's tokens, most of them hidden, restored by a Perceiver.

The paper's code of this variant was never released: this is our reading of its text. Which VQ-GAN, the predictor's
width, positions and decoder, and everything about stage 2's masks are our choices.
"""

from __future__ import annotations

from typing import Any

from clipgraft.data.base import Source
from clipgraft.encoders.base import Encoder
from clipgraft.runner import Run
from clipgraft_diffusion.codes import VQ, TokenCodes, VqCodes, code_grid
from clipgraft_diffusion.condition import projector
from clipgraft_diffusion.genhancer.discrete_config import DiscreteConfig
from clipgraft_diffusion.genhancer.parts import Kept, StageName, raw_tokens, said, teacher
from clipgraft_diffusion.genhancer.recipe import GenHancer
from clipgraft_diffusion.genhancer.stages import AnyFeedback
from clipgraft_diffusion.latent import TokenLatent, halvings, token_grid
from clipgraft_diffusion.masked import MaskedFeedback
from clipgraft_diffusion.perceiver import Perceiver
from clipgraft_diffusion.target import Latent
from clipgraft_diffusion.weights import chosen


def genhancer_discrete(config: DiscreteConfig) -> GenHancer:
    """The recipe ``genhancer-discrete``: GenHancer's two stages with the discrete denoiser."""
    return GenHancer(config, generator=Discrete(config))


class Discrete:
    """The parts that ``DiscreteConfig`` names."""

    def __init__(self, config: DiscreteConfig) -> None:
        self.config = config

    def sizes(self) -> list[str]:
        """A width that its heads divide."""
        p = self.config.perceiver
        if p.width % p.heads:
            return [f"perceiver.width {p.width} is no multiple of perceiver.heads {p.heads}; change one of them"]
        return []

    def files(self, run: Run) -> list[str]:
        """The VQ model, or the teacher and its pooled grid."""
        c = self.config.codes
        if c.kind == "vq":
            if problem := VQ.problem(c.vq, c.subfolder, **self._weights(run)):
                return [problem]
            channels = (VQ.settings(c.vq, c.subfolder, revision=c.revision) or {}).get("block_out_channels")
            size = run.encoder.preprocess.size
            return said(lambda: code_grid(size, factor=halvings(channels))) if channels else []
        return said(lambda: self._token_grid(self._teacher(run, run.encoder)))

    def latent(self, run: Run, base: Encoder) -> VqCodes | TokenCodes:
        """The codes, frozen; those of tokens are still to be fitted."""
        c = self.config.codes
        if c.kind == "vq":
            vq = VQ.open(c.vq, c.subfolder, **self._weights(run))
            return VqCodes(vq, size=base.preprocess.size, pixels=c.pixels).to(run.device)
        other = self._teacher(run, base)
        tower = None if other is base else other.image
        tokens = TokenLatent(tower, like=other.image, preprocess=other.preprocess, pool=c.pool)
        return TokenCodes(tokens, size=c.size).to(run.device)

    def kept(self, latent: Latent) -> Kept | None:
        """The VQ model's codes, where a folder is named."""
        c = self.config.codes
        if c.cache is None or not isinstance(latent, VqCodes):
            return None
        return Kept(c.cache, latent.vq, settings={"pixels": c.pixels})

    def fit(self, run: Run, latent: Latent, base: Encoder, source: Source) -> None:
        """The tokens' statistics and their codes, the same in every process and resume."""
        if isinstance(latent, TokenCodes):
            raw = raw_tokens(run, latent.tokens, base, source, samples=self.config.codes.samples)
            latent.codebook.fit(raw, seed=run.seed, log=run.log)

    def begin(self, run: Run, feedback: AnyFeedback) -> None:
        """The predictor starts at random."""

    def feedback(self, base: Encoder, latent: Latent, *, stage: StageName) -> MaskedFeedback:
        """Projector, predictor and the stage's law of masks."""
        if not isinstance(latent, VqCodes | TokenCodes):
            raise TypeError(f"the discrete denoiser restores no {type(latent).__name__}")
        c, p = self.config, self.config.perceiver
        mask = c.mask if stage == "generator" else c.clip.mask or c.mask
        denoiser = Perceiver(
            latent.vectors,
            latent.grid,
            width=p.width,
            heads=p.heads,
            layers=p.layers,
            checkpointing=p.checkpointing,
        )
        return MaskedFeedback(projector(base.image.embed_dim, p.width), denoiser, masks=mask.build())

    def _weights(self, run: Run) -> dict[str, Any]:
        c = self.config.codes
        return {"revision": c.revision, "weights": chosen(c.weights, c.sha256, seed=run.seed), "log": run.log}

    def _teacher(self, run: Run, base: Encoder) -> Encoder:
        return teacher(run, base, of=self.config.codes.of, setting="codes.of")

    def _token_grid(self, other: Encoder) -> tuple[int, int]:
        grid = token_grid(other.image, pool=self.config.codes.pool, setting="codes")
        if grid[0] * grid[1] < 2:
            raise ValueError("codes.pool leaves a single position, nothing could be hidden; lower codes.pool")
        return grid
