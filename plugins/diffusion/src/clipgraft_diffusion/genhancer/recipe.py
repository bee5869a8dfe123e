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
from clipgraft_diffusion.genhancer.stages import TOKENS, ClipStage, GeneratorStage, Target
from clipgraft_diffusion.latent import TokenLatent, VaeLatent, open_vae, packed_grid, token_grid, vae_problem
from clipgraft_diffusion.source import Part, held_out_split


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
            problems.append(
                f"denoiser.width {c.denoiser.width} must be a multiple of denoiser.heads {c.denoiser.heads}"
            )
        else:
            problems += _said(lambda: rope_axes(c.denoiser.width // c.denoiser.heads))
        if not c.clip.weight:
            return problems
        if c.latent.kind == "vae":
            problems += [found for found in [vae_problem(c.latent.vae, c.latent.subfolder)] if found]
            problems += _said(lambda: packed_grid(run.encoder.preprocess.size))
        else:
            problems += _said(lambda: token_grid(self._teacher(run).image, pool=c.latent.pool))
        return problems

    # -- stages --------------------------------------------------------------------------------------------------

    def _generator(self, run: Run) -> GeneratorStage:
        c = self.config
        source, held = self._data(run, batch_size=c.generator.train.batch_size)
        target = self._target(run)
        if isinstance(target.latent, TokenLatent):
            target.latent.standardise.estimate(self._raw_tokens(run, target.latent, target.base, source))
        feedback = self._feedback(target, times=c.flow.build())
        return GeneratorStage(
            "generator",
            train=c.generator.train,
            source=source,
            target=target,
            feedback=feedback,
            held_out=held,
            crop=c.crop,
        )

    def _clip(self, run: Run) -> ClipStage:
        c = self.config
        source, held = self._data(run, batch_size=c.clip.train.batch_size)
        target, feedback = self._target(run), None
        if c.clip.weight:
            feedback = self._feedback(target, times=(c.clip.flow or c.flow).build())
            feedback.denoiser.load_state_dict(run.component("generator", "denoiser"))
            feedback.condition.load_state_dict(run.component("generator", "condition"))
            if isinstance(target.latent, TokenLatent):
                target.latent.standardise.load_state_dict(run.component("generator", "latent"))
        return ClipStage(
            "clip",
            train=c.clip.train,
            source=source,
            encoder=self._trainable(run),
            target=target,
            feedback=feedback,
            anchor=self._anchor(target.base, source) if c.clip.anchor.weight else None,
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

    def _teacher(self, run: Run) -> Encoder:
        """The encoder whose tokens are the latent."""
        other = self.config.latent.of
        if other == "self":
            return run.base_encoder()
        teacher, size = run.open_encoder(other), run.encoder.preprocess.size
        if teacher.preprocess.size != size:
            raise InputError(
                f"latent.of {other} takes images of {teacher.preprocess.size[0]} px, the model of {size[0]} px, but one "
                "crop serves both; choose a teacher of the model's size"
            )
        return teacher

    def _target(self, run: Run) -> Target:
        latent, base = self.config.latent, run.base_encoder()
        made: VaeLatent | TokenLatent
        if latent.kind == "vae":
            made = VaeLatent(open_vae(latent.vae, latent.subfolder), size=base.preprocess.size)
        else:
            teacher = base if latent.of == "self" else self._teacher(run)
            tower = None if teacher is base else teacher.image
            made = TokenLatent(tower, like=teacher.image, preprocess=teacher.preprocess, pool=latent.pool)
        return Target(base, made.to(run.device), shuffled=self.config.condition.shuffled)

    def _feedback(self, target: Target, *, times: TimeLaw) -> Feedback:
        c = self.config
        condition = GlobalCondition(
            target.base.image.embed_dim, vec_dim=c.condition.vec_dim, txt_dim=c.condition.txt_dim
        )
        denoiser = FluxDenoiser(
            target.latent.channels,
            target.latent.grid,
            width=c.denoiser.width,
            heads=c.denoiser.heads,
            depth=c.denoiser.depth,
            single_depth=c.denoiser.single_depth,
            vec_dim=c.condition.vec_dim,
            txt_dim=c.condition.txt_dim,
            guidance=c.denoiser.guidance,
            prediction=c.denoiser.prediction,
            positions=c.denoiser.positions,
            compat=c.flow.compat,
            checkpointing=c.denoiser.checkpointing,
        )
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
        """Raw tokens of the first ``latent.samples`` images, in batches: the same for every process and every resume."""
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
