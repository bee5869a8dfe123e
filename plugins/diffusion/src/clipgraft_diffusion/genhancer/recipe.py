"""GenHancer's recipe: which parts, in which order (Ma et al., ICCV 2025, arXiv 2503.19480; the continuous denoiser)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from clipgraft.config.schema import GraftNode
from clipgraft.data.base import Source
from clipgraft.data.loader import BadSamples, evaluation_batches, stack_images
from clipgraft.encoders import apply_grafts
from clipgraft.encoders.base import Encoder
from clipgraft.errors import InputError
from clipgraft.evaluation.features import EncoderFeatures
from clipgraft.recipe import StagePlan
from clipgraft.runner import Run
from clipgraft_diffusion.anchor import Anchor
from clipgraft_diffusion.condition import GlobalCondition
from clipgraft_diffusion.denoiser import FluxDenoiser, rope_axes
from clipgraft_diffusion.feedback import Feedback
from clipgraft_diffusion.flow import TimeLaw
from clipgraft_diffusion.genhancer.config import GenHancerConfig
from clipgraft_diffusion.genhancer.stages import ClipStage, GeneratorStage
from clipgraft_diffusion.latent import TokenLatent, VaeLatent, open_vae, packed_grid, token_grid, vae_problem
from clipgraft_diffusion.source import Part, held_out_split
from clipgraft_diffusion.target import TOKENS, Target


class GenHancer:
    """Stage ``generator``, then stage ``clip``; without feedback (the anchor-only control) only the latter."""

    def __init__(self, config: GenHancerConfig) -> None:
        self.config = config

    def plan(self) -> list[StagePlan]:
        """The stages in order."""
        plans = [StagePlan("generator", self._generator), StagePlan("clip", self._clip)]
        return plans if self.config.clip.weight else plans[1:]

    def check(self, run: Run) -> list[str]:
        """Sizes that don't fit and files that aren't there, seen before any work."""
        c, problems = self.config, []
        if c.denoiser.width % c.denoiser.heads:
            wrong = f"denoiser.width {c.denoiser.width} is no multiple of denoiser.heads {c.denoiser.heads}"
            problems.append(f"{wrong}; change one of them")
        else:
            problems += _said(lambda: rope_axes(c.denoiser.width // c.denoiser.heads))
        if not c.clip.weight:
            return problems
        if c.latent.kind == "vae":
            problems += [found for found in [vae_problem(c.latent.vae, c.latent.subfolder)] if found]
            problems += _said(lambda: packed_grid(run.encoder.preprocess.size))
        else:
            problems += _said(lambda: token_grid(self._teacher(run, run.encoder).image, pool=c.latent.pool))
        return problems

    # -- stages --------------------------------------------------------------------------------------------------

    def _generator(self, run: Run) -> GeneratorStage:
        c = self.config
        source, held = self._data(run, batch_size=c.generator.train.batch_size)
        base = self._base(run)
        latent = self._latent(run, base)
        if isinstance(latent, TokenLatent):
            latent.standardise.estimate(self._raw_tokens(run, latent, base, source))
        feedback = self._feedback(base, latent, times=c.flow.build())
        feedback.noise = c.generator.noise
        return GeneratorStage(
            "generator",
            train=c.generator.train,
            source=source,
            target=self._target(base, latent),
            feedback=feedback,
            held_out=held,
            crop=c.crop,
        )

    def _clip(self, run: Run) -> ClipStage:
        c = self.config
        source, held = self._data(run, batch_size=c.clip.train.batch_size)
        base, latent, feedback = self._base(run), None, None
        if c.clip.weight:
            latent = self._latent(run, base)
            feedback = self._feedback(base, latent, times=(c.clip.flow or c.flow).build())
            feedback.denoiser.load_state_dict(run.component("generator", "denoiser"))
            feedback.condition.load_state_dict(run.component("generator", "condition"))
            if isinstance(latent, TokenLatent):
                latent.standardise.load_state_dict(run.component("generator", "latent"))
        return ClipStage(
            "clip",
            train=c.clip.train,
            source=source,
            encoder=self._trainable(run),
            target=self._target(base, latent),
            feedback=feedback,
            anchor=self._anchor(base, source) if c.clip.anchor.weight else None,
            held_out=held,
            train_generator=c.clip.trainable == "all",
            generator_lr=c.clip.generator_lr,
            weight=c.clip.weight,
            anchor_weight=c.clip.anchor.weight,
            crop=c.crop,
        )

    # -- parts ---------------------------------------------------------------------------------------------------

    def _data(self, run: Run, *, batch_size: int) -> tuple[Source, Tensor]:
        """The training source without its held-out images, and those as pixels (k, 3, H, W') in [0, 1]."""
        source, held = held_out_split(run.train_source(), batch_size=batch_size)
        return source, torch.cat(list(_pixels(run, held)))

    def _base(self, run: Run) -> Encoder:
        """The untouched encoder, with the grafts that the run started with (another image size, say)."""
        return apply_grafts(run.base_encoder(), self.config.grafts, registry=run.registry)

    def _teacher(self, run: Run, base: Encoder) -> Encoder:
        """The encoder whose tokens are the latent."""
        other = self.config.latent.of
        if other == "self":
            return base
        teacher, size = run.open_encoder(other), base.preprocess.size
        if teacher.preprocess.size != size:
            raise InputError(
                f"latent.of {other} takes images of {teacher.preprocess.size[0]} px, the model of {size[0]} px, but "
                "one crop serves both; choose a teacher of the model's size"
            )
        return teacher

    def _latent(self, run: Run, base: Encoder) -> VaeLatent | TokenLatent:
        """What is denoised, frozen; the statistics of tokens are still to be set."""
        c = self.config.latent
        if c.kind == "vae":
            return VaeLatent(open_vae(c.vae, c.subfolder), size=base.preprocess.size).to(run.device)
        teacher = self._teacher(run, base)
        tower = None if teacher is base else teacher.image
        return TokenLatent(tower, like=teacher.image, preprocess=teacher.preprocess, pool=c.pool).to(run.device)

    def _target(self, base: Encoder, latent: VaeLatent | TokenLatent | None) -> Target:
        return Target(base, latent, shuffled=self.config.condition.shuffled, remember=self.config.crop is None)

    def _feedback(self, base: Encoder, latent: VaeLatent | TokenLatent, *, times: TimeLaw) -> Feedback:
        c, d = self.config, self.config.denoiser
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
        condition = GlobalCondition(base.image.embed_dim, **widths)
        return Feedback(condition, denoiser, times=times)

    def _trainable(self, run: Run) -> Encoder:
        """The encoder with its image tower trainable: everything, or adapters and the biases beside them."""
        clip, encoder = self.config.clip, run.encoder
        if clip.tune == "full":
            encoder.image.requires_grad_(True)
            return encoder
        encoder.requires_grad_(False)
        node = GraftNode(use="core/lora", towers=("image",), **clip.lora.model_dump())
        return apply_grafts(encoder, (node,), registry=run.registry)

    def _anchor(self, base: Encoder, source: Source) -> Anchor:
        """Zero-shot decisions over the source's classes where it has some and the encoder can read them."""
        settings, classes = self.config.clip.anchor, None
        if len(source.classes) > 1 and base.text is not None:
            classes = EncoderFeatures(base).classifier(source.classes, source.templates).to(base.logit_scale.device)
        scale = float(base.logit_scale.detach().exp()) if settings.temperature is None else settings.temperature
        return Anchor(classes, temperature=scale, learn_temperature=settings.learn_temperature)

    @torch.no_grad()
    def _raw_tokens(self, run: Run, latent: TokenLatent, base: Encoder, source: Source) -> Iterator[Tensor]:
        """Raw tokens of the first ``latent.samples`` images, in batches: the same in every process and resume."""
        tower, count = latent.tower or base.image, min(self.config.latent.samples, len(source))
        for pixels in _pixels(run, Part(source, range(count))):
            yield latent.raw(tower(latent.preprocess.normalize(pixels), TOKENS))


def _pixels(run: Run, source: Source) -> Iterator[Tensor]:
    """The source's readable images in batches (b, 3, H, W') in [0, 1], as the evaluation transform sees them."""
    for items in evaluation_batches(
        source, preprocess=run.encoder.preprocess, batch_size=256, bad=BadSamples(len(source))
    ):
        yield stack_images(items).to(run.device)


def _said(attempt: Callable[[], object]) -> list[str]:
    """What ``attempt`` complains about, as a list of no or one line."""
    try:
        attempt()
    except (InputError, ValueError) as error:
        return [str(error)]
    return []
