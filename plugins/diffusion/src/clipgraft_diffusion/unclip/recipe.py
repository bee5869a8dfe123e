"""un2CLIP's recipe (Li et al., NeurIPS 2025, arXiv 2505.24517): a decoder of image embeddings, turned round."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipgraft.config.schema import GraftNode
from clipgraft.data.base import Source
from clipgraft.encoders import apply_grafts
from clipgraft.encoders.base import Encoder, Preprocess
from clipgraft.errors import ClipgraftError, InputError
from clipgraft.evaluation.features import EncoderFeatures
from clipgraft.recipe import StagePlan
from clipgraft.runner import Run
from clipgraft.types import ImageFeatures
from clipgraft_diffusion.anchor import Anchor
from clipgraft_diffusion.crops import Crops, crop_batches
from clipgraft_diffusion.decoder import DecoderStage
from clipgraft_diffusion.eps import EpsDenoiser, EpsObjective, NoiseSchedule, Target
from clipgraft_diffusion.generator import FlowGenerator, forget
from clipgraft_diffusion.genhancer.parts import pixel_batches
from clipgraft_diffusion.pictures import patch_side, picture_problems
from clipgraft_diffusion.pretraining import STAGE as DECODER
from clipgraft_diffusion.pretraining import decoder_problems, decoder_stage, level_problems, trained_decoder
from clipgraft_diffusion.recompute import blocks_of
from clipgraft_diffusion.source import Part, held_out_split
from clipgraft_diffusion.store import LatentStore, about, chunk
from clipgraft_diffusion.unclip.config import Un2ClipConfig
from clipgraft_diffusion.unclip.label import NoiseLevel, UnclipLabel
from clipgraft_diffusion.unclip.model import StableUnclip, open_unclip, unclip_problems
from clipgraft_diffusion.unclip.stage import Inverter, LabelTeller, Un2ClipStage
from clipgraft_diffusion.watch import watch, watch_problems


class Un2Clip:
    """Stage ``clip``; with ``denoiser.kind: train`` a stage ``decoder`` before it.

    That leaves the decoder, and as ``teller`` the statistics of the label that it was told.
    """

    def __init__(self, config: Un2ClipConfig) -> None:
        self.config = config

    def plan(self) -> list[StagePlan]:
        """The stages in order; the anchor-only control needs no decoder."""
        clip = StagePlan("clip", self._clip)
        trains = self.config.denoiser.kind == "train" and self.config.clip.weight > 0
        return [StagePlan(DECODER, self._decoder), clip] if trains else [clip]

    def check(self, run: Run) -> list[str]:
        """Parts that are missing and settings that don't fit the tower or the decoder, seen before any work."""
        c, problems = self.config, watch_problems(run, self.config.watch)
        if c.precision == "fp16":
            problems.append("precision fp16 can't scale the gradient inside the decoder; set it to bf16 or fp32")
        problems += picture_problems(run, smallest=patch_side(run.encoder))
        if c.clip.checkpointing and not blocks_of(run.encoder.image):
            problems.append("clip.checkpointing needs an image tower of transformer blocks; set it to false")
        if not c.clip.weight:
            return problems
        if c.denoiser.kind == "train":
            return problems + decoder_problems(run, c.decoder, captions=False) + self._level_problems()
        if c.denoiser.kind == "head":
            return problems + _said(lambda: self._flow(run, run.encoder))
        return problems + unclip_problems(
            c.denoiser.from_ or "", embed_dim=run.encoder.image.embed_dim, **self._parts(run)
        )

    def _level_problems(self) -> list[str]:
        """Steps at noise levels that the decoder never meets."""
        n = self.config.noise
        return level_problems(
            self.config.decoder, self._schedule(), low=n.low, high=n.high, setting="noise", whose="decoder"
        )

    # -- stages --------------------------------------------------------------------------------------------------

    def _decoder(self, run: Run) -> DecoderStage:
        """unCLIP's decoder in miniature: it restores the base's patch tokens from the base's embedding."""
        c, base = self.config.decoder, self._base(run)
        whole = run.train_source() if c.data is None else run.open_source(c.data)
        source, _ = held_out_split(whole, batch_size=c.train.batch_size)
        label = self._label(base, c.noise_level).to(run.device)
        label.estimate(_embeddings(run, base, Part(source, range(min(c.samples, len(source))))))
        told = 2 * base.image.embed_dim
        return decoder_stage(run, c, base=base, teller=LabelTeller(label), told=told, unit=False, captions=False)

    def _clip(self, run: Run) -> Un2ClipStage:
        c = self.config
        whole, wide = run.train_source(), c.denoiser.kind == "diffusers" and c.clip.weight > 0
        if wide:
            smallest = patch_side(run.encoder)
            whole = Crops(whole, size=c.denoiser.size, area=c.crop, seed=run.seed, smallest=smallest)
        source, held = held_out_split(whole, batch_size=c.clip.train.batch_size)
        base = self._base(run)
        fixed, again = wide or c.crop is None, c.clip.train.steps * c.clip.train.batch_size > len(source)
        inverter = self._inverter(run, base, source) if c.clip.weight else None
        stage = Un2ClipStage(
            "clip",
            train=c.clip.train,
            source=source,
            encoder=self._trainable(run),
            base=base,
            inverter=inverter,
            anchor=self._anchor(base, source) if c.clip.anchor.weight else None,
            weight=c.clip.weight,
            anchor_weight=c.clip.anchor.weight,
            held_out=list(crop_batches(held, base.preprocess, most=32 if wide else 256, size=8 if wide else 128)),
            crop=None if wide else c.crop,
            remember=fixed and again,
            latents=self._latents(run, whole, inverter),
            checkpointing=c.clip.checkpointing,
        )
        return watch(run, stage, c.watch, base=base)

    # -- parts ---------------------------------------------------------------------------------------------------

    def _base(self, run: Run) -> Encoder:
        """The untouched encoder, with the grafts that the run started with (another image size, say)."""
        return apply_grafts(run.base_encoder(), self.config.grafts, registry=run.registry)

    def _trainable(self, run: Run) -> Encoder:
        """The encoder with its image tower trainable: everything, or adapters and the biases beside them."""
        clip, encoder = self.config.clip, run.encoder
        encoder.requires_grad_(False)
        if clip.tune == "full":
            encoder.image.requires_grad_(True)
            return encoder
        node = GraftNode(use="core/lora", towers=("image",), **clip.lora.model_dump())
        return apply_grafts(encoder, (node,), registry=run.registry)

    def _inverter(self, run: Run, base: Encoder, source: Source) -> Inverter:
        c = self.config
        label, decoder, target = self._told_decoder(run, base, source)
        objective = EpsObjective(
            self._schedule(), decoder, low=c.noise.low, high=c.noise.high, error=c.noise.error, target=target
        ).to(run.device)
        return Inverter(label.to(run.device), objective, passes=c.passes, shuffled=c.condition.shuffled)

    def _latents(self, run: Run, whole: Source, inverter: Inverter | None) -> LatentStore | None:
        """The images' latents on disk, all of them, where a folder is named."""
        d, decoder = self.config.denoiser, None if inverter is None else inverter.objective.denoiser
        if d.cache is None or not isinstance(whole, Crops) or not isinstance(decoder, StableUnclip):
            return None
        parts = decoder.parts
        told = {"compat": parts.compat, "scale": parts.scale, "shift": parts.shift}
        known = about(whole, parts.vae, precision=d.cache_precision, size=whole.size, **told)
        store = LatentStore(Path(d.cache).expanduser(), known, log=run.log)
        store.fill(
            whole,
            lambda pixels: parts.latents(pixels.to(run.device)),
            preprocess=Preprocess(size=whole.size, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)),
            batch_size=chunk(self.config.clip.train),
            workers=run.config.data.workers,
        )
        return store

    def _told_decoder(self, run: Run, base: Encoder, source: Source) -> tuple[UnclipLabel, EpsDenoiser, Target]:
        """The label with its statistics, the decoder that it is told to, and what this puts out."""
        c, d = self.config, self.config.denoiser
        if d.kind == "diffusers":
            opened = open_unclip(
                d.from_ or "",
                embed_dim=base.image.embed_dim,
                noise_level=c.condition.noise_level,
                checkpointing=d.checkpointing,
                **self._parts(run),
            )
            if d.random:
                forget(opened.decoder.parts.unet)
            return opened.label, opened.decoder, opened.target
        label = self._label(base, c.condition.noise_level)
        if d.kind == "train":
            LabelTeller(label).load_state_dict(run.component(DECODER, "teller"))
        else:
            label.to(run.device).estimate(_embeddings(run, base, Part(source, range(min(d.samples, len(source))))))
        return label, self._flow(run, base, trained=True), "velocity"

    def _flow(self, run: Run, base: Encoder, *, trained: bool = False) -> FlowGenerator:
        """The registered generator with its tower, or (if ``trained``) the one that the first stage left."""
        d, schedule = self.config.denoiser, self._schedule()
        if d.kind == "train" and trained:
            told = 2 * base.image.embed_dim
            flow: Any = trained_decoder(run, self.config.decoder, base=base, told=told, unit=False)
            tower = base
        else:
            tower, size = run.open_encoder(d.tower or ""), base.preprocess.size
            if tower.preprocess.size != size:
                raise InputError(
                    f"denoiser.tower {d.tower} takes images of {tower.preprocess.size[0]} px, the model of {size[0]} "
                    "px, but one crop serves both; choose a generator over towers of the model's size"
                )
            flow = run.registry.build("head", d.head or "", {})
        generator = FlowGenerator(
            forget(flow) if d.random else flow, tower, schedule=schedule, unit=False, target="velocity"
        )
        return generator.to(run.device)

    def _parts(self, run: Run) -> dict[str, Any]:
        """How a Stable unCLIP is opened and what it must agree with."""
        d, n = self.config.denoiser, self.config.noise
        noise = {"beta_schedule": n.beta, "beta_start": n.start, "beta_end": n.end, "num_train_timesteps": n.steps}
        weights = d.part_weights(seed=run.seed)
        return {"size": d.size, "noise": noise, "revision": d.revision, "weights": weights, "log": run.log}

    def _schedule(self) -> NoiseSchedule:
        n = self.config.noise
        return NoiseSchedule(beta=n.beta, start=n.start, end=n.end, steps=n.steps)

    @staticmethod
    def _label(base: Encoder, noise_level: NoiseLevel) -> UnclipLabel:
        return UnclipLabel(embed_dim=base.image.embed_dim, noise_level=noise_level)

    def _anchor(self, base: Encoder, source: Source) -> Anchor:
        """Zero-shot decisions over the source's classes where it has some and the encoder can read them."""
        settings, classes = self.config.clip.anchor, None
        if len(source.classes) > 1 and base.text is not None:
            classes = EncoderFeatures(base).classifier(source.classes, source.templates).to(base.logit_scale.device)
        scale = float(base.logit_scale.detach().exp()) if settings.temperature is None else settings.temperature
        return Anchor(classes, temperature=scale, learn_temperature=settings.learn_temperature)


@torch.no_grad()
def _embeddings(run: Run, base: Encoder, source: Source) -> Iterator[Tensor]:
    """The base's embeddings of the readable images, not normalised, in batches (b, D)."""
    with run.log.progress("reading embeddings", len(source)) as bar:
        for pixels in pixel_batches(run, source):
            features: ImageFeatures = base.image(base.preprocess.normalize(pixels))
            yield features.pooled
            bar.advance(len(pixels))


def _said(attempt: Callable[[], object]) -> list[str]:
    """What ``attempt`` complains about, as a list of no or one line."""
    try:
        attempt()
    except (ClipgraftError, ValueError) as error:
        return [str(error)]
    return []
