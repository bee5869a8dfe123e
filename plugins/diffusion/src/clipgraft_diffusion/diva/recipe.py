"""DIVA's recipe (Wang et al., Diffusion Feedback Helps CLIP See Better, ICLR 2025, arXiv 2407.20171)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from clipgraft.data.base import BadSample, Source
from clipgraft.data.loader import class_prompts
from clipgraft.data.transforms import evaluation_transform
from clipgraft.encoders import apply_grafts
from clipgraft.encoders.base import Encoder, Preprocess
from clipgraft.errors import ClipgraftError, InputError
from clipgraft.evaluation.features import EncoderFeatures
from clipgraft.recipe import StagePlan
from clipgraft.runner import Run
from clipgraft.types import Batch, ImageFeatures
from clipgraft_diffusion.anchor import Anchor
from clipgraft_diffusion.crops import CROP, Crops
from clipgraft_diffusion.decoder import DecoderStage
from clipgraft_diffusion.diva.config import DivaConfig
from clipgraft_diffusion.diva.stage import Critique, DivaStage
from clipgraft_diffusion.eps import EpsDenoiser, EpsObjective, NoiseSchedule
from clipgraft_diffusion.generator import FlowGenerator, forget
from clipgraft_diffusion.pictures import patch_side, picture_problems
from clipgraft_diffusion.pretraining import STAGE as DECODER
from clipgraft_diffusion.pretraining import caption_decoder_stage, decoder_problems, level_problems, trained_decoder
from clipgraft_diffusion.prompt import CrossCondition, fit_projection
from clipgraft_diffusion.recap import local_projection
from clipgraft_diffusion.recompute import blocks_of
from clipgraft_diffusion.source import Part, held_out_split
from clipgraft_diffusion.store import LatentStore, about, chunk
from clipgraft_diffusion.unet import StableDiffusion, diffusion_problems, open_stable_diffusion
from clipgraft_diffusion.watch import watch, watch_problems


class Diva:
    """Stage ``clip``; with ``denoiser.kind: train`` a stage ``decoder`` before it, which pretrains the generator."""

    def __init__(self, config: DivaConfig) -> None:
        self.config = config

    def plan(self) -> list[StagePlan]:
        """The stages in order; a run without feedback needs no generator."""
        clip = StagePlan("clip", self._clip)
        trains = self.config.denoiser.kind == "train" and self.config.weight > 0
        return [StagePlan(DECODER, self._decoder), clip] if trains else [clip]

    def check(self, run: Run) -> list[str]:
        """Parts that are missing and settings that don't fit the tower or the generator, seen before any work."""
        c, problems = self.config, watch_problems(run, self.config.watch)
        if c.precision == "fp16":
            problems.append("precision fp16 can't scale the gradient inside the generator; set it to bf16 or fp32")
        problems += picture_problems(run, smallest=patch_side(run.encoder))
        if c.checkpointing and not blocks_of(run.encoder.image):
            problems.append("checkpointing needs an image tower of transformer blocks; set it to false")
        if not c.weight:
            return problems
        problems += _said(lambda: self._told_tokens(run.encoder))
        if c.denoiser.kind == "train":
            problems += decoder_problems(run, c.decoder, captions=True) + self._level_problems()
            return problems + self._caption_problems(run)
        if c.denoiser.kind == "head":
            return problems + _said(lambda: self._generator(run, run.encoder)) + self._caption_problems(run)
        if c.condition.captions is not None:
            problems.append("condition.captions needs a generator that is told one embedding; set it to null")
        noise = {"beta_schedule": c.noise.beta, "beta_start": c.noise.start, "beta_end": c.noise.end}
        tokens = None if problems or c.condition.combine != "add" else self._told_tokens(run.encoder)
        return problems + diffusion_problems(
            c.denoiser.from_,
            size=c.denoiser.size,
            noise=noise | {"num_train_timesteps": c.noise.steps},
            tokens=tokens,
            prompt=c.condition.combine != "none",
            revision=c.denoiser.revision,
            weights=c.denoiser.part_weights(seed=run.seed),
            log=run.log,
        )

    def _told_tokens(self, encoder: Encoder) -> int:
        """1 + K, tried on empty features, so that a tower without suitable local tokens is refused here."""
        image, recap = encoder.image, self.config.recap.build()
        if self.config.recap.kind == "cls":
            return 1
        if image.grid is None:
            raise InputError("recap needs a tower with a patch grid; choose a ViT or set recap.kind to cls")
        weight = next(image.parameters())
        empty = ImageFeatures(
            weight.new_zeros(1, image.embed_dim), tokens=weight.new_zeros(1, image.grid[0] * image.grid[1], image.width)
        )
        with torch.no_grad():
            told: Tensor = recap(empty, project=local_projection(image))
        return told.shape[1]

    def _caption_problems(self, run: Run) -> list[str]:
        if self.config.condition.captions is None:
            return []
        if run.encoder.text is None:
            return ["condition.captions needs a model with a text tower; set it to null"]
        return _said(lambda: run.open_source(self.config.condition.captions or ""))

    def _level_problems(self) -> list[str]:
        """Steps at noise levels that the decoder never meets."""
        n = self.config.noise
        return level_problems(
            self.config.decoder, self._schedule(), low=n.low, high=n.high, setting="noise", whose="generator"
        )

    # -- stages --------------------------------------------------------------------------------------------------

    def _decoder(self, run: Run) -> DecoderStage:
        """The generator's pretraining: a text-to-image model in miniature."""
        return caption_decoder_stage(run, self.config.decoder, base=self._base(run))

    def _clip(self, run: Run) -> DivaStage:
        c = self.config
        whole = run.train_source()
        wide = c.denoiser.kind == "diffusers" and c.weight > 0
        if wide:
            smallest = patch_side(run.encoder)
            whole = Crops(whole, size=c.denoiser.size, area=c.crop, seed=run.seed, smallest=smallest)
        source, held = held_out_split(whole, batch_size=c.train.batch_size)
        base = self._base(run)
        fixed, again = wide or c.crop is None, c.train.steps * c.train.batch_size > len(source)
        critique = self._critique(run, base, source) if c.weight else None
        stage = DivaStage(
            "clip",
            train=c.train,
            source=source,
            encoder=run.encoder,
            base=base,
            critique=critique,
            anchor=self._anchor(base, source) if c.anchor.weight else None,
            weight=c.weight,
            anchor_weight=c.anchor.weight,
            held_out=self._held_out(run, held, most=32 if wide else 256, size=8 if wide else 128),
            crop=None if wide else c.crop,
            remember=fixed and again,
            latents=self._latents(run, whole, critique),
            checkpointing=c.checkpointing,
            train_condition=c.condition.train,
            log=run.log,
        )
        return watch(run, stage, c.watch, base=base)

    def _base(self, run: Run) -> Encoder:
        """The untouched encoder, with the grafts that the run started with (another image size, say)."""
        return apply_grafts(run.base_encoder(), self.config.grafts, registry=run.registry)

    def _critique(self, run: Run, base: Encoder, source: Source) -> Critique:
        c = self.config
        schedule = self._schedule().to(run.device)
        denoiser: EpsDenoiser
        if c.denoiser.kind != "diffusers":
            denoiser = self._generator(run, base)
        else:
            denoiser = open_stable_diffusion(
                c.denoiser.from_,
                prompt=c.denoiser.prompt,
                compat=c.compat,
                checkpointing=c.denoiser.checkpointing,
                revision=c.denoiser.revision,
                weights=c.denoiser.part_weights(seed=run.seed),
                log=run.log,
            ).to(run.device)
            if c.denoiser.random:
                forget(denoiser.unet)
        prompt = denoiser.prompt if isinstance(denoiser, StableDiffusion) else None
        condition = CrossCondition(
            base.image.embed_dim, denoiser.width, prompt=prompt, combine=c.condition.combine, unit=c.condition.unit
        ).to(run.device)
        if isinstance(denoiser, FlowGenerator) and self._captions:
            self._fit(run, condition, base, denoiser.tower, source)
        return Critique(
            recap=c.recap.build(),
            condition=condition,
            objective=EpsObjective(schedule, denoiser, low=c.noise.low, high=c.noise.high, error=c.noise.error),
            passes=c.passes,
            compat=c.compat,
            shuffled=c.condition.shuffled,
        )

    def _latents(self, run: Run, whole: Source, critique: Critique | None) -> LatentStore | None:
        """The images' latents on disk, all of them, where a folder is named."""
        c = self.config
        denoiser = None if critique is None else critique.objective.denoiser
        if c.denoiser.cache is None or not isinstance(whole, Crops) or not isinstance(denoiser, StableDiffusion):
            return None
        told = {"compat": c.compat, "scale": denoiser.scale, "shift": denoiser.shift}
        known = about(whole, denoiser.vae, precision=c.denoiser.cache_precision, size=whole.size, **told)
        store = LatentStore(Path(c.denoiser.cache).expanduser(), known, log=run.log)
        store.fill(
            whole,
            lambda pixels: denoiser.latents(pixels.to(run.device)),
            preprocess=Preprocess(size=whole.size, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)),
            batch_size=chunk(c.train),
            workers=run.config.data.workers,
        )
        return store

    def _schedule(self) -> NoiseSchedule:
        n = self.config.noise
        return NoiseSchedule(beta=n.beta, start=n.start, end=n.end, steps=n.steps)

    def _generator(self, run: Run, base: Encoder) -> FlowGenerator:
        """The registered generator with the tower whose tokens it restores, or the one that the first stage left."""
        d = self.config.denoiser
        if d.kind == "train":
            told = base.image.embed_dim
            own = trained_decoder(run, self.config.decoder, base=base, told=told, unit=True)
            return FlowGenerator(forget(own) if d.random else own, base, schedule=self._schedule()).to(run.device)
        tower, size = run.open_encoder(d.tower or ""), base.preprocess.size
        if tower.preprocess.size != size:
            raise InputError(
                f"denoiser.tower {d.tower} takes images of {tower.preprocess.size[0]} px, the model of {size[0]} px, "
                "but one crop serves both; choose a generator over towers of the model's size"
            )
        flow = run.registry.build("head", d.head or "", {})
        return FlowGenerator(forget(flow) if d.random else flow, tower, schedule=self._schedule()).to(run.device)

    def _fit(self, run: Run, condition: CrossCondition, base: Encoder, tower: Encoder, source: Source) -> None:
        """The projection that takes CLIP's texts to where the generator's text tower puts them.

        Between a text tower and itself that is the identity, plus the way from the images' mean to the texts'.
        """
        c = self.config.condition
        captioned = run.open_source(self._captions or "")
        texts = [
            text
            for sample in (captioned[i] for i in range(min(c.samples, len(captioned))))
            for text in (sample.captions[:1] or _class_prompt(captioned, sample.label))
        ]
        if len(texts) < 2:
            raise InputError(
                f"{self._captions} holds no captions; name data with a caption column in condition.captions"
            )
        seen = EncoderFeatures(base).images(Part(source, range(min(c.samples, len(source)))))
        told, wanted = EncoderFeatures(base).texts(texts), EncoderFeatures(tower).texts(texts)
        device = condition.project.weight.device
        fit = fit_projection(condition.project, told=told.to(device), wanted=wanted.to(device), seen=seen.to(device))
        run.log.info(f"clip: the projection explains {fit:.1%} of the generator's text space ({len(texts)} captions)")

    @property
    def _captions(self) -> str | None:
        """What the projection is fitted to."""
        c = self.config
        own = c.decoder.data or c.data.from_ if c.denoiser.kind == "train" else None
        return c.condition.captions or own

    def _anchor(self, base: Encoder, source: Source) -> Anchor:
        """Zero-shot decisions over the source's classes where it has some and the encoder can read them."""
        settings, classes = self.config.anchor, None
        if len(source.classes) > 1 and base.text is not None:
            classes = EncoderFeatures(base).classifier(source.classes, source.templates).to(base.logit_scale.device)
        scale = float(base.logit_scale.detach().exp()) if settings.temperature is None else settings.temperature
        return Anchor(classes, temperature=scale, learn_temperature=settings.learn_temperature)

    @staticmethod
    def _held_out(run: Run, held: Source, *, most: int, size: int) -> list[Batch]:
        """The readable of ``most`` held-out images at most, evenly spaced, in batches on the CPU."""
        transform, rows = evaluation_transform(run.encoder.preprocess), []
        for index in range(0, len(held), -(-len(held) // most)):
            try:
                sample = held[index]
            except BadSample:
                continue
            rows.append((sample.id, transform(sample.image), sample.extra.get(CROP)))
        found = []
        for start in range(0, len(rows), size):
            ids, pixels, crops = zip(*rows[start : start + size], strict=True)
            kept: list[Tensor] = [crop for crop in crops if crop is not None]
            found.append(Batch(torch.stack(pixels), list(ids), extra={CROP: torch.stack(kept)} if kept else {}))
        return found


def _class_prompt(source: Source, label: int | None) -> tuple[str, ...]:
    return () if label is None or not source.classes else class_prompts(source.classes[label], source.templates)[:1]


def _said(attempt: Callable[[], object]) -> list[str]:
    """What ``attempt`` complains about, as a list of no or one line."""
    try:
        attempt()
    except (ClipgraftError, ValueError) as error:
        return [str(error)]
    return []
