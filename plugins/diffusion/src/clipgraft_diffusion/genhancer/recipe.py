"""GenHancer's recipe: which parts, in which order (Ma et al., ICCV 2025, arXiv 2503.19480), for either denoiser."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from clipgraft.config.schema import GraftNode, TrainConfig
from clipgraft.data.base import Source
from clipgraft.encoders import apply_grafts
from clipgraft.encoders.base import Encoder
from clipgraft.evaluation.features import EncoderFeatures
from clipgraft.recipe import StagePlan
from clipgraft.runner import Run
from clipgraft_diffusion.anchor import Anchor
from clipgraft_diffusion.genhancer.config import GenHancerConfig
from clipgraft_diffusion.genhancer.continuous import Continuous
from clipgraft_diffusion.genhancer.discrete_config import DiscreteConfig
from clipgraft_diffusion.genhancer.parts import Generator, pixel_batches
from clipgraft_diffusion.genhancer.stages import ClipStage, GeneratorStage
from clipgraft_diffusion.pictures import patch_side, picture_problems
from clipgraft_diffusion.recompute import blocks_of
from clipgraft_diffusion.source import held_out_split
from clipgraft_diffusion.store import LatentStore, about, chunk
from clipgraft_diffusion.target import Latent, Target, stored_part
from clipgraft_diffusion.watch import watch, watch_problems


class GenHancer:
    """Stage ``generator``, then stage ``clip``; without feedback (the anchor-only control) only the latter.

    ``generator`` says what is restored and by whom; without it the continuous denoiser that the config names.
    """

    def __init__(self, config: GenHancerConfig | DiscreteConfig, *, generator: Generator | None = None) -> None:
        if generator is None:
            if isinstance(config, DiscreteConfig):
                raise TypeError("a discrete config needs its generator; call genhancer_discrete")
            generator = Continuous(config)
        self.config, self.generator = config, generator

    def plan(self) -> list[StagePlan]:
        """The stages in order."""
        plans = [StagePlan("generator", self._generator), StagePlan("clip", self._clip)]
        return plans if self.config.clip.weight else plans[1:]

    def check(self, run: Run) -> list[str]:
        """Sizes that don't fit and files that aren't there, seen before any work."""
        c, problems = self.config, watch_problems(run, self.config.watch) + self.generator.sizes()
        problems += picture_problems(run, smallest=patch_side(run.encoder))
        if c.clip.checkpointing and not blocks_of(run.encoder.image):
            problems.append("clip.checkpointing needs an image tower of transformer blocks; set it to false")
        setting, cache = ("codes", c.codes.cache) if isinstance(c, DiscreteConfig) else ("latent", c.latent.cache)
        if cache is not None and c.crop is not None:
            problems.append(f"{setting}.cache needs images that are cropped alike every time; set crop to null")
        return problems + self.generator.files(run) if c.clip.weight else problems

    # -- stages --------------------------------------------------------------------------------------------------

    def _generator(self, run: Run) -> GeneratorStage:
        c = self.config
        source, held = self._data(run, batch_size=c.generator.train.batch_size)
        base = self._base(run)
        latent = self.generator.latent(run, base)
        self.generator.fit(run, latent, base, source)
        feedback = self.generator.feedback(base, latent, stage="generator")
        self.generator.begin(run, feedback)
        feedback.noise = c.generator.noise
        return GeneratorStage(
            "generator",
            train=c.generator.train,
            source=source,
            target=self._target(run, base, latent, train=c.generator.train),
            feedback=feedback,
            held_out=held,
            crop=c.crop,
        )

    def _clip(self, run: Run) -> ClipStage:
        c = self.config
        source, held = self._data(run, batch_size=c.clip.train.batch_size)
        base, latent, feedback = self._base(run), None, None
        if c.clip.weight:
            latent = self.generator.latent(run, base)
            feedback = self.generator.feedback(base, latent, stage="clip")
            feedback.denoiser.load_state_dict(run.component("generator", "denoiser"))
            feedback.condition.load_state_dict(run.component("generator", "condition"))
            if (fitted := latent.fitted()) is not None:
                fitted.load_state_dict(run.component("generator", "latent"))
        stage = ClipStage(
            "clip",
            train=c.clip.train,
            source=source,
            encoder=self._trainable(run),
            target=self._target(run, base, latent, train=c.clip.train),
            feedback=None if feedback is None else feedback.to(run.device),
            anchor=self._anchor(base, source) if c.clip.anchor.weight else None,
            held_out=held,
            train_generator=c.clip.trainable == "all",
            generator_lr=c.clip.generator_lr,
            weight=c.clip.weight,
            anchor_weight=c.clip.anchor.weight,
            crop=c.crop,
            checkpointing=c.clip.checkpointing,
        )
        return watch(run, stage, c.watch, base=base)

    # -- parts ---------------------------------------------------------------------------------------------------

    def _data(self, run: Run, *, batch_size: int) -> tuple[Source, Tensor]:
        """The training source without its held-out images, and those as pixels (k, 3, H, W') in [0, 1]."""
        source, held = held_out_split(run.train_source(), batch_size=batch_size)
        return source, torch.cat(list(pixel_batches(run, held)))

    def _base(self, run: Run) -> Encoder:
        """The untouched encoder, with the grafts that the run started with (another image size, say)."""
        return apply_grafts(run.base_encoder(), self.config.grafts, registry=run.registry)

    def _target(self, run: Run, base: Encoder, latent: Latent | None, *, train: TrainConfig) -> Target:
        store = None if latent is None else self._store(run, base, latent, train=train)
        c = self.config
        return Target(base, latent, shuffled=c.condition.shuffled, remember=c.crop is None, store=store)

    def _store(self, run: Run, base: Encoder, latent: Latent, *, train: TrainConfig) -> LatentStore | None:
        """What is restored, on disk for all images, where a folder is named."""
        if (kept := self.generator.kept(latent)) is None:
            return None
        whole, shape = run.train_source(), base.preprocess
        told = {**kept.settings, "resize": f"{shape.resize_mode} {shape.interpolation} {shape.fill_color}"}
        known = about(whole, kept.model, precision=kept.precision, size=shape.size, **told)
        store = LatentStore(Path(kept.folder).expanduser(), known, log=run.log)
        store.fill(
            whole,
            lambda pixels: stored_part(latent, pixels.to(run.device)),
            preprocess=shape,
            batch_size=chunk(train),
            workers=run.config.data.workers,
        )
        return store

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
