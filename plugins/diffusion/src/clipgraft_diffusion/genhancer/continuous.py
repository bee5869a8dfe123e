"""The continuous denoiser: a VAE latent or standardised tokens, restored by FLUX blocks along a rectified flow."""

from __future__ import annotations

from typing import Any

from clipgraft.data.base import Source
from clipgraft.encoders.base import Encoder
from clipgraft.runner import Run
from clipgraft_diffusion.condition import GlobalCondition
from clipgraft_diffusion.denoiser import FluxDenoiser, rope_axes
from clipgraft_diffusion.feedback import Feedback
from clipgraft_diffusion.genhancer.begin import begin, begin_problems
from clipgraft_diffusion.genhancer.config import GenHancerConfig
from clipgraft_diffusion.genhancer.parts import Kept, StageName, raw_tokens, said, teacher
from clipgraft_diffusion.genhancer.stages import AnyFeedback
from clipgraft_diffusion.latent import (
    VAE,
    TokenLatent,
    VaeLatent,
    halvings,
    open_vae,
    packed_grid,
    token_grid,
    vae_problem,
)
from clipgraft_diffusion.target import Latent
from clipgraft_diffusion.weights import chosen


class Continuous:
    """The parts that ``GenHancerConfig`` names."""

    def __init__(self, config: GenHancerConfig) -> None:
        self.config = config

    def sizes(self) -> list[str]:
        """A width that its heads divide, into heads that hold the rotary axes."""
        d = self.config.denoiser
        if d.width % d.heads:
            return [f"denoiser.width {d.width} is no multiple of denoiser.heads {d.heads}; change one of them"]
        return said(lambda: rope_axes(d.width // d.heads))

    def files(self, run: Run) -> list[str]:
        """The blocks to start from, the autoencoder and the packed grid, or the teacher and its pooled grid."""
        c = self.config.latent
        if problems := begin_problems(run, self.config):
            return problems
        if c.kind == "vae":
            if problem := vae_problem(c.vae, c.subfolder, **self._weights(run)):
                return [problem]
            channels = (VAE.settings(c.vae, c.subfolder, revision=c.revision) or {}).get("block_out_channels", (0,) * 4)
            return said(lambda: packed_grid(run.encoder.preprocess.size, factor=halvings(channels)))
        return said(lambda: token_grid(self._teacher(run, run.encoder).image, pool=c.pool))

    def latent(self, run: Run, base: Encoder) -> VaeLatent | TokenLatent:
        """What is denoised, frozen; the statistics of tokens are still to be set."""
        c = self.config.latent
        if c.kind == "vae":
            vae = open_vae(c.vae, c.subfolder, **self._weights(run))
            return VaeLatent(vae, size=base.preprocess.size).to(run.device)
        other = self._teacher(run, base)
        tower = None if other is base else other.image
        return TokenLatent(tower, like=other.image, preprocess=other.preprocess, pool=c.pool).to(run.device)

    def kept(self, latent: Latent) -> Kept | None:
        """The autoencoder's moments, where a folder is named."""
        c = self.config.latent
        if c.cache is None or not isinstance(latent, VaeLatent):
            return None
        return Kept(c.cache, latent.vae, c.cache_precision)

    def fit(self, run: Run, latent: Latent, base: Encoder, source: Source) -> None:
        """The tokens' mean and spread."""
        if isinstance(latent, TokenLatent):
            samples = self.config.latent.samples
            latent.standardise.estimate(raw_tokens(run, latent, base, source, samples=samples))

    def begin(self, run: Run, feedback: AnyFeedback) -> None:
        """Blocks that are given in place of random ones."""
        if isinstance(feedback.denoiser, FluxDenoiser):
            begin(run, self.config, feedback.denoiser)

    def feedback(self, base: Encoder, latent: Latent, *, stage: StageName) -> Feedback:
        """Projectors, denoiser and the stage's law of noise levels."""
        if not isinstance(latent, VaeLatent | TokenLatent):
            raise TypeError(f"the continuous denoiser restores no {type(latent).__name__}")
        c, d = self.config, self.config.denoiser
        flow = c.flow if stage == "generator" else c.clip.flow or c.flow
        widths = {"vec_dim": c.condition.vec_dim, "txt_dim": c.condition.txt_dim}
        denoiser = FluxDenoiser(
            latent.channels,
            latent.grid,
            width=d.width,
            heads=d.heads,
            depth=d.depth,
            single_depth=d.single_depth,
            guidance=d.guidance,
            prediction=d.prediction,
            positions=d.positions,
            compat=c.flow.compat,
            checkpointing=d.checkpointing,
            **widths,
        )
        return Feedback(GlobalCondition(base.image.embed_dim, **widths), denoiser, times=flow.build())

    def _weights(self, run: Run) -> dict[str, Any]:
        c = self.config.latent
        return {"revision": c.revision, "weights": chosen(c.weights, c.sha256, seed=run.seed), "log": run.log}

    def _teacher(self, run: Run, base: Encoder) -> Encoder:
        return teacher(run, base, of=self.config.latent.of, setting="latent.of")
