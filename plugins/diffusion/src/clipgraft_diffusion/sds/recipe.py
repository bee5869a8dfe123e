"""SDS-CLIP's recipe (Basu et al., Distilling Knowledge from Text-to-Image Generative Models Improves Visio-Linguistic

Reasoning in CLIP, EMNLP 2024, arXiv 2307.09233). No official code is known; this is written from the method's formulas.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from clipgraft.data.base import BadSample, Source
from clipgraft.data.transforms import evaluation_transform
from clipgraft.encoders import apply_grafts
from clipgraft.encoders.base import Encoder
from clipgraft.errors import ClipgraftError
from clipgraft.recipe import StagePlan
from clipgraft.runner import Run
from clipgraft.types import Batch
from clipgraft_diffusion.decoder import DecoderStage
from clipgraft_diffusion.eps import NoiseSchedule
from clipgraft_diffusion.generator import FlowGenerator, forget
from clipgraft_diffusion.pretraining import STAGE as DECODER
from clipgraft_diffusion.pretraining import caption_decoder_stage, decoder_problems, level_problems, trained_decoder
from clipgraft_diffusion.sds.captions import KEY, TwiceRead, caption_problems
from clipgraft_diffusion.sds.config import SdsClipConfig
from clipgraft_diffusion.sds.loss import SdsLoss, sds_loss
from clipgraft_diffusion.sds.mapper import LatentMapper
from clipgraft_diffusion.sds.stage import Distillation, MapperStage, SdsStage, make_trainable
from clipgraft_diffusion.sds.told import Told, ToldFlow, open_told_diffusion, tokens_shape, told_problems
from clipgraft_diffusion.source import held_out_split
from clipgraft_diffusion.watch import watch, watch_problems

MAPPER = "mapper"
"""Name of the warm-up stage and of the component that it leaves."""


class SdsClip:
    """Stage ``clip``; before it ``decoder`` with ``denoiser.kind: train``, and ``mapper`` with ``mapper.warmup``."""

    def __init__(self, config: SdsClipConfig) -> None:
        self.config = config

    def plan(self) -> list[StagePlan]:
        """The stages in order; a run without distillation needs neither generator nor map."""
        c, plans = self.config, [StagePlan("clip", self._clip)]
        if not c.weight:
            return plans
        warm = [StagePlan(MAPPER, self._mapper)] if c.mapper.warmup is not None else []
        return ([StagePlan(DECODER, self._decoder)] if c.denoiser.kind == "train" else []) + warm + plans

    def check(self, run: Run) -> list[str]:
        """Data without captions, towers without norms, parts that are missing or don't fit, seen before any work."""
        c = self.config
        problems = watch_problems(run, c.watch)
        if c.precision == "fp16":
            problems.append("precision fp16 can't scale the gradient inside the generator; set it to bf16 or fp32")
        if run.encoder.text is None:
            return [
                *problems,
                "SDS-CLIP contrasts images with captions, but this model has no text tower; name another",
            ]
        problems += _said(lambda: make_trainable(run.encoder, c.trainable))
        problems += _said(run.train_source) or caption_problems(run.train_source())
        if not c.weight or problems:
            return problems
        if c.denoiser.kind == "train":
            return problems + decoder_problems(run, c.decoder, captions=True) + self._level_problems()
        if c.denoiser.kind == "head":
            return problems + _said(lambda: self._teacher(run, run.encoder))
        noise = {"beta_schedule": c.sds.beta, "beta_start": c.sds.start, "beta_end": c.sds.end}
        return problems + told_problems(
            c.denoiser.from_,
            noise=noise | {"num_train_timesteps": c.sds.steps},
            latent=c.denoiser.latent,
            revision=c.denoiser.revision,
            weights=dict(c.denoiser.part_weights(seed=run.seed)),
            log=run.log,
        )

    def _level_problems(self) -> list[str]:
        """Steps at noise levels that the decoder never meets."""
        n = self.config.sds
        return level_problems(
            self.config.decoder, self._schedule(), low=n.low, high=n.high, setting="sds", whose="generator"
        )

    # -- stages --------------------------------------------------------------------------------------------------

    def _decoder(self, run: Run) -> DecoderStage:
        """The generator's pretraining: a text-to-image model in miniature."""
        return caption_decoder_stage(run, self.config.decoder, base=self._base(run))

    def _mapper(self, run: Run) -> MapperStage:
        """The map alone, with CLIP as it was."""
        c, base = self.config, self._base(run)
        assert c.mapper.warmup is not None
        distillation = self._distillation(run, base)
        source, held = self._sources(run, base, distillation.teacher, batch_size=c.mapper.warmup.batch_size)
        return MapperStage(
            MAPPER,
            train=c.mapper.warmup,
            source=source,
            encoder=base,
            distillation=distillation,
            on=c.mapper.warmup_on,
            held_out=self._held_out(base, held, distillation.teacher),
            crop=c.crop,
        )

    def _clip(self, run: Run) -> SdsStage:
        c, base, encoder = self.config, self._base(run), run.encoder
        make_trainable(encoder, c.trainable)
        distillation = self._distillation(run, base) if c.weight else None
        if distillation is not None and c.mapper.warmup is not None:
            distillation.mapper.load_state_dict(run.component(MAPPER, MAPPER))
        teacher = None if distillation is None else distillation.teacher
        source, held = self._sources(run, base, teacher, batch_size=c.train.batch_size)
        stage = SdsStage(
            "clip",
            train=c.train,
            source=source,
            encoder=encoder,
            base=base,
            distillation=distillation,
            weight=c.weight,
            contrastive=c.contrastive,
            train_mapper=c.mapper.train,
            mapper_lr=c.mapper.lr_scale,
            max_logit_scale=c.max_logit_scale,
            held_out=self._held_out(base, held, teacher),
            crop=c.crop,
        )
        return watch(run, stage, c.watch, base=base)

    def _base(self, run: Run) -> Encoder:
        """The untouched encoder, with the grafts that the run started with (another image size, say)."""
        return apply_grafts(run.base_encoder(), self.config.grafts, registry=run.registry)

    def _sources(self, run: Run, base: Encoder, teacher: Told | None, *, batch_size: int) -> tuple[Source, Source]:
        """(training part, held-out part), their captions read by the generator's tokenizer too where it has its own."""
        whole: Source = run.train_source()
        if teacher is not None and teacher.read is not None:
            whole = TwiceRead(whole, clip=base.tokenizer, other=teacher.read, most=self.config.most_captions)
        wide = teacher is not None and self.config.denoiser.kind == "diffusers"
        return held_out_split(whole, batch_size=batch_size, most=32 if wide else 256)

    def _distillation(self, run: Run, base: Encoder) -> Distillation:
        c, teacher = self.config, self._teacher(run, base)
        mapper = LatentMapper(base.image.embed_dim, latent=teacher.latent, unit=c.mapper.unit).to(run.device)
        return Distillation(mapper, self._loss().to(run.device), teacher, shuffled=c.denoiser.shuffled)

    def _teacher(self, run: Run, base: Encoder) -> Told:
        d = self.config.denoiser
        if d.kind == "diffusers":
            real = open_told_diffusion(
                d.from_,
                latent=d.latent,
                checkpointing=d.checkpointing,
                revision=d.revision,
                weights=d.part_weights(seed=run.seed),
                log=run.log,
            ).to(run.device)
            if d.random:
                self._forget(run, real.unet)
            return real
        schedule = self._schedule().to(run.device)
        flow: nn.Module
        if d.kind == "train":
            tower, flow = (
                base,
                trained_decoder(run, self.config.decoder, base=base, told=base.image.embed_dim, unit=True),
            )
        else:
            tower, flow = run.open_encoder(d.tower or ""), run.registry.build("head", d.head or "", {})
        if d.random:
            self._forget(run, flow)
        small = FlowGenerator(flow, tower, schedule=schedule).to(run.device)
        read = None if d.kind == "train" else tower.tokenizer
        return ToldFlow(small, latent=tokens_shape(flow, tower), read=read)

    @staticmethod
    def _forget(run: Run, model: nn.Module) -> None:
        """The same random weights in every stage."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(run.seed)
            forget(model)

    def _loss(self) -> SdsLoss:
        s = self.config.sds
        return sds_loss(**{name: getattr(s, name) for name in type(s).model_fields})

    def _schedule(self) -> NoiseSchedule:
        s = self.config.sds
        return NoiseSchedule(beta=s.beta, start=s.start, end=s.end, steps=s.steps)

    @staticmethod
    def _held_out(base: Encoder, held: Source, teacher: Told | None) -> list[Batch]:
        """The readable held-out images with their first captions in batches, on the CPU."""
        transform, rows, size = evaluation_transform(base.preprocess), [], 8 if held_is_wide(teacher) else 128
        for index in range(len(held)):
            try:
                sample = held[index]
            except BadSample:
                continue
            if sample.captions:
                rows.append((sample.id, transform(sample.image), sample.captions[0], sample.extra.get(KEY)))
        found = []
        for start in range(0, len(rows), size):
            ids, pixels, texts, both = zip(*rows[start : start + size], strict=True)
            kept = [row for row in both if row is not None]
            extra = {KEY: torch.stack(kept)} if kept else {}
            found.append(Batch(torch.stack(pixels), list(ids), text=base.tokenizer(list(texts)), extra=extra))
        return found


def held_is_wide(teacher: Told | None) -> bool:
    """Whether a generator is too large for big batches of held-out images."""
    return teacher is not None and len(teacher.latent) == 3


def _said(attempt: Callable[[], object]) -> list[str]:
    """What ``attempt`` complains about, as a list of no or one line."""
    try:
        attempt()
    except (ClipgraftError, ValueError) as error:
        return [str(error)]
    return []
