"""DIVA's recipe (Wang et al., Diffusion Feedback Helps CLIP See Better, ICLR 2025, arXiv 2407.20171)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from clipgraft.data.base import BadSample, Source
from clipgraft.data.loader import class_prompts
from clipgraft.data.transforms import evaluation_transform
from clipgraft.encoders import apply_grafts
from clipgraft.encoders.base import Encoder
from clipgraft.errors import ClipgraftError, InputError
from clipgraft.evaluation.features import EncoderFeatures
from clipgraft.recipe import StagePlan
from clipgraft.runner import Run
from clipgraft.types import Batch, ImageFeatures
from clipgraft_diffusion.anchor import Anchor
from clipgraft_diffusion.crops import CROP, Crops
from clipgraft_diffusion.diva.config import DivaConfig
from clipgraft_diffusion.diva.stage import Critique, DivaStage
from clipgraft_diffusion.eps import EpsDenoiser, EpsObjective, NoiseSchedule
from clipgraft_diffusion.generator import FlowGenerator, forget
from clipgraft_diffusion.prompt import CrossCondition, fit_projection
from clipgraft_diffusion.recap import local_projection
from clipgraft_diffusion.source import Part, held_out_split
from clipgraft_diffusion.unet import StableDiffusion, diffusion_problems, open_stable_diffusion


class Diva:
    """One stage, ``clip``."""

    def __init__(self, config: DivaConfig) -> None:
        self.config = config

    def plan(self) -> list[StagePlan]:
        """The stage."""
        return [StagePlan("clip", self._clip)]

    def check(self, run: Run) -> list[str]:
        """Parts that are missing and settings that don't fit the tower or the generator, seen before any work."""
        c, problems = self.config, []
        if c.precision == "fp16":
            problems.append("precision fp16 can't scale the gradient inside the generator; set it to bf16 or fp32")
        if not c.weight:
            return problems
        problems += _said(lambda: self._told_tokens(run.encoder))
        if c.denoiser.kind == "head":
            return problems + _said(lambda: self._generator(run, run.encoder)) + self._caption_problems(run)
        if c.condition.captions is not None:
            problems.append("condition.captions needs a generator that is told one embedding; set it to null")
        noise = {"beta_schedule": c.noise.beta, "beta_start": c.noise.start, "beta_end": c.noise.end}
        tokens = None if problems or c.condition.combine != "add" else self._told_tokens(run.encoder)
        return problems + diffusion_problems(
            c.denoiser.from_, size=c.denoiser.size, noise=noise | {"num_train_timesteps": c.noise.steps}, tokens=tokens
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

    # -- the stage -----------------------------------------------------------------------------------------------

    def _clip(self, run: Run) -> DivaStage:
        c = self.config
        whole = run.train_source()
        wide = c.denoiser.kind == "diffusers" and c.weight > 0
        if wide:
            whole = Crops(whole, size=c.denoiser.size, area=c.crop, seed=run.seed)
        source, held = held_out_split(whole, batch_size=c.train.batch_size, most=32 if wide else 256)
        base = apply_grafts(run.base_encoder(), c.grafts, registry=run.registry)
        fixed, again = wide or c.crop is None, c.train.steps * c.train.batch_size > len(source)
        return DivaStage(
            "clip",
            train=c.train,
            source=source,
            encoder=run.encoder,
            base=base,
            critique=self._critique(run, base, source) if c.weight else None,
            anchor=self._anchor(base, source) if c.anchor.weight else None,
            weight=c.weight,
            anchor_weight=c.anchor.weight,
            held_out=self._held_out(run, held, size=8 if wide else 128),
            crop=None if wide else c.crop,
            remember=fixed and again,
            train_condition=c.condition.train,
            log=run.log,
        )

    def _critique(self, run: Run, base: Encoder, source: Source) -> Critique:
        c = self.config
        schedule = self._schedule().to(run.device)
        denoiser: EpsDenoiser
        if c.denoiser.kind == "head":
            denoiser = self._generator(run, base)
        else:
            denoiser = open_stable_diffusion(
                c.denoiser.from_, prompt=c.denoiser.prompt, compat=c.compat, checkpointing=c.denoiser.checkpointing
            ).to(run.device)
            if c.denoiser.random:
                forget(denoiser.unet)
        prompt = denoiser.prompt if isinstance(denoiser, StableDiffusion) else None
        condition = CrossCondition(
            base.image.embed_dim, denoiser.width, prompt=prompt, combine=c.condition.combine, unit=c.condition.unit
        ).to(run.device)
        if isinstance(denoiser, FlowGenerator) and c.condition.captions is not None:
            self._fit(run, condition, base, denoiser.tower, source)
        return Critique(
            recap=c.recap.build(),
            condition=condition,
            objective=EpsObjective(schedule, denoiser, low=c.noise.low, high=c.noise.high, error=c.noise.error),
            passes=c.passes,
            compat=c.compat,
            shuffled=c.condition.shuffled,
        )

    def _schedule(self) -> NoiseSchedule:
        n = self.config.noise
        return NoiseSchedule(beta=n.beta, start=n.start, end=n.end, steps=n.steps)

    def _generator(self, run: Run, base: Encoder) -> FlowGenerator:
        """The registered generator with the tower whose tokens it restores."""
        d = self.config.denoiser
        tower, size = run.open_encoder(d.tower or ""), base.preprocess.size
        if tower.preprocess.size != size:
            raise InputError(
                f"denoiser.tower {d.tower} takes images of {tower.preprocess.size[0]} px, the model of {size[0]} px, "
                "but one crop serves both; choose a generator over towers of the model's size"
            )
        flow = run.registry.build("head", d.head or "", {})
        return FlowGenerator(forget(flow) if d.random else flow, tower, schedule=self._schedule()).to(run.device)

    def _fit(self, run: Run, condition: CrossCondition, base: Encoder, tower: Encoder, source: Source) -> None:
        """The projection that takes CLIP's texts to where the generator's text tower puts them."""
        c = self.config.condition
        captioned = run.open_source(c.captions or "")
        texts = [
            text
            for sample in (captioned[i] for i in range(min(c.samples, len(captioned))))
            for text in (sample.captions[:1] or _class_prompt(captioned, sample.label))
        ]
        if len(texts) < 2:
            raise InputError(f"condition.captions {c.captions} holds no captions; name data with a caption column")
        seen = EncoderFeatures(base).images(Part(source, range(min(c.samples, len(source)))))
        told, wanted = EncoderFeatures(base).texts(texts), EncoderFeatures(tower).texts(texts)
        device = condition.project.weight.device
        fit = fit_projection(condition.project, told=told.to(device), wanted=wanted.to(device), seen=seen.to(device))
        run.log.info(f"clip: the projection explains {fit:.1%} of the generator's text space ({len(texts)} captions)")

    def _anchor(self, base: Encoder, source: Source) -> Anchor:
        """Zero-shot decisions over the source's classes where it has some and the encoder can read them."""
        settings, classes = self.config.anchor, None
        if len(source.classes) > 1 and base.text is not None:
            classes = EncoderFeatures(base).classifier(source.classes, source.templates).to(base.logit_scale.device)
        scale = float(base.logit_scale.detach().exp()) if settings.temperature is None else settings.temperature
        return Anchor(classes, temperature=scale, learn_temperature=settings.learn_temperature)

    @staticmethod
    def _held_out(run: Run, held: Source, *, size: int) -> list[Batch]:
        """The readable held-out images in batches, on the CPU."""
        transform, rows = evaluation_transform(run.encoder.preprocess), []
        for index in range(len(held)):
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
