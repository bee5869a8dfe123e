"""What a run says about itself while it trains: how far the towers moved, and what that did to what they knew.

A look is one line of the log and one of ``watch.jsonl`` in the stage's folder: relative drift of the weights, cosine of
embeddings to the original's on images that are not trained on, and a zero-shot canary. It costs a forward pass of two
times ``images`` images at most and one reading of the weights; their pixels stay in memory (0.6 MB each at 224 px).
Training is the same with and without it. n images, K classes, D joint embedding.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from clipgraft.config.schema import Config
from clipgraft.data.base import BadSample, Source
from clipgraft.data.loader import class_prompts
from clipgraft.data.transforms import evaluation_transform
from clipgraft.encoders import apply_grafts
from clipgraft.encoders.base import Encoder
from clipgraft.errors import ClipgraftError, InputError
from clipgraft.evaluation.suites import open_suite
from clipgraft.log import MetricsFile
from clipgraft.retention import SUITE
from clipgraft.runner import Run
from clipgraft.spec import runhook
from clipgraft.stage import Stage, StageResult, TrainStage
from clipgraft.state import rng_state, set_rng_state
from clipgraft_diffusion.drift import weight_drift
from clipgraft_diffusion.source import Part

S = TypeVar("S", bound=TrainStage)
FILE = "watch.jsonl"
CHUNK = 64
"""Images, or texts, of one forward pass."""
STILL = 1e-4
"""A relative movement of the weights below which scores can't have changed for the method's sake."""


class WatchConfig(Config):
    """What is followed during training."""

    every: int = Field(500, ge=0, description="steps between two looks; 0: only before the first and after the last")
    canary: str = Field(
        "auto",
        description="labelled images whose zero-shot accuracy is followed: a data reference, none, or auto (held-out "
        "training images if they have classes, otherwise what the suite named retention classifies)",
    )
    images: int = Field(256, gt=1, description="most held-out images and most images of the canary")


def watch(run: Run, stage: S, settings: WatchConfig, *, base: Encoder | None = None) -> S:
    """Have ``run`` look at ``stage`` before its first step, every so many, and after its last; returns ``stage``.

    ``base`` is the encoder that the run started from, if the recipe holds one anyway; otherwise one is opened.
    """
    if stage.current_encoder() is not None:
        run.hooks.register(Watch(stage, settings, base=base), f"watch of {stage.name}")
    return stage


def watch_problems(run: Run, settings: WatchConfig) -> list[str]:
    """A canary that is named and can't sing, seen before any work."""
    if settings.canary in ("auto", "none"):
        return []
    if run.encoder.text is None:
        return [f"watch.canary {settings.canary} needs a model with a text tower; set it to none"]
    try:
        source = run.open_source(settings.canary)
    except (ClipgraftError, ValueError) as error:
        return [f"watch.canary: {error}"]
    few = len(source.classes) < 2
    return [f"watch.canary {settings.canary} has no classes; name labelled images, or none"] if few else []


@dataclass(frozen=True, slots=True)
class Shown:
    """Images read once: (n, 3, H, W') in [0, 1] on the CPU, their labels (-1: none), and where they come from."""

    pixels: Tensor
    labels: Tensor
    name: str


@dataclass(slots=True)
class Scene:
    """What every look needs: the original, its embeddings (n, D) of ``held``, and the canary with its classes.

    ``kind``: whether ``held`` are held-out or training images. ``classes`` (K, D) are None until they are needed.
    """

    base: Encoder
    held: Shown
    kind: str
    original: Tensor
    trains_text: bool
    canary: Shown | None = None
    named: Source | None = None
    classes: Tensor | None = None


class Watch:
    """The hook object of one stage. The main process looks alone, the others meet it at the next step.

    A look that fails is one line, and training goes on. A resumed stage goes on in the same file.
    """

    observer = True

    def __init__(self, stage: TrainStage, settings: WatchConfig, *, base: Encoder | None = None) -> None:
        self.settings = settings
        self._stage: TrainStage | None = stage
        self._base = base
        self._scene: Scene | None = None
        self._file: MetricsFile | None = None
        self._begun = False

    @runhook
    def before_step(self, run: Run, stage: Stage, step: int) -> None:
        """Get ready at the first step of this process; look once before anything is trained."""
        if self._stage is None or stage is not self._stage or self._begun:
            return
        self._begun = True
        with run.whole():
            if not run.is_main:
                return
            self._file = MetricsFile(run.stage_folder(stage.name) / FILE, is_main=True, after_step=step or -1)
            with _undisturbed():
                self._scene = self._prepare(run, self._stage)
            if step == 0:
                self._look(run, self._stage, self._stage.current_encoder(), step)

    @runhook
    def after_step(self, run: Run, stage: Stage, step: int) -> None:
        """Look every so many steps."""
        if self._stage is None or stage is not self._stage or not self.settings.every:
            return
        done = step + 1
        if done % self.settings.every == 0 and done < self._stage.train_config.steps:
            with run.whole():
                self._look(run, self._stage, self._stage.current_encoder(), done) if run.is_main else None

    @runhook
    def on_stage_end(self, run: Run, stage: Stage, result: StageResult) -> None:
        """Look at what the stage left, as it is on disk, and let go of everything."""
        if self._stage is None or stage is not self._stage:
            return
        if run.is_main and result.encoder is not None:
            self._look(run, self._stage, run.encoder, self._stage.train_config.steps)
        self._stage = self._base = self._scene = None

    # -- looking -------------------------------------------------------------------------------------------------

    def _prepare(self, run: Run, stage: TrainStage) -> Scene:
        """Read the images, embed them with the original, find the canary; the same again after a resume."""
        encoder = stage.current_encoder()
        assert encoder is not None
        base = self._base or apply_grafts(run.base_encoder(), run.config.grafts, registry=run.registry)
        source, new = held_out(stage)
        held = _read(source, encoder, most=self.settings.images)
        with _measuring(base):
            original = _embedded(base, held.pixels)
        trains_text = encoder.text is not None and any(p.requires_grad for p in encoder.text.parameters())
        scene = Scene(base, held, "held-out" if new else "training", original, trains_text)
        said = "none (watch.canary)" if self.settings.canary == "none" else self._choose(run, encoder, source, scene)
        run.log.info(f"{stage.name}: watching {len(held.pixels)} {scene.kind} images of {held.name}; canary: {said}")
        return scene

    def _choose(self, run: Run, encoder: Encoder, source: Source, scene: Scene) -> str:
        """Put the canary into ``scene``; a few words about it, or about its absence."""
        if encoder.text is None:
            return "none, the model has no text tower"
        wanted = self.settings.canary
        if wanted != "auto":
            return self._open(run, encoder, wanted, scene)
        if len(source.classes) > 1 and bool((scene.held.labels >= 0).all()):
            scene.canary, scene.named = scene.held, source
            return f"the same images, {len(source.classes)} classes"
        try:
            if offered := _offered(run, encoder):
                return self._open(run, encoder, offered, scene)
            why = f"no suite named {SUITE} classifies any"
        except ClipgraftError as error:
            why = str(error)
        return f"none, {source.name} has no classes and {why}; set watch.canary to labelled images"

    def _open(self, run: Run, encoder: Encoder, reference: str, scene: Scene) -> str:
        named = run.open_source(reference)
        scene.canary, scene.named = _read(named, encoder, most=self.settings.images, labelled=True), named
        return f"{len(scene.canary.pixels)} images of {named.name}, {len(named.classes)} classes"

    def _look(self, run: Run, stage: TrainStage, encoder: Encoder | None, step: int) -> None:
        """One row and one line."""
        scene = self._scene
        assert encoder is not None and scene is not None and self._file is not None
        began = time.monotonic()
        with _undisturbed(), _measuring(encoder):
            row: dict[str, Any] = {"step": step, "weight_drift": weight_drift(encoder, scene.base)}
            if scene.trains_text:
                row["text_weight_drift"] = weight_drift(encoder, scene.base, tower="text")
            seen = _embedded(encoder, scene.held.pixels)
            row["cosine_to_base"] = float((seen * scene.original).sum(-1).mean())
            if scene.canary is not None:
                row |= _sing(encoder, seen if scene.canary is scene.held else None, scene)
        row["seconds"] = round(time.monotonic() - began, 3)
        self._file.write(row)
        run.track(stage.name, step, {f"watch.{name}": value for name, value in row.items() if name != "step"})
        run.log.info(_line(stage, row, kind=scene.kind))


def held_out(stage: TrainStage) -> tuple[Source, bool]:
    """Images of the stage's source that it leaves out, and True; or those that it trains on, and False."""
    source = stage.source
    if isinstance(source, Part):
        left = torch.ones(len(source.source), dtype=torch.bool)
        left[torch.tensor(list(source.rows))] = False
        if bool(left.any()):
            return Part(source.source, left.nonzero()[:, 0].tolist()), True
    return source, False


def _offered(run: Run, encoder: Encoder) -> str:
    """What the suite named retention classifies with this encoder's texts; empty without."""
    for registered in run.registry.list("suite"):
        if registered.component.name == SUITE:
            for node in open_suite(registered.name, encoder, registry=run.registry):
                if node.use.rpartition("/")[2] == "zero-shot" and node.data:
                    return node.data
    return ""


def _read(source: Source, encoder: Encoder, *, most: int, labelled: bool = False) -> Shown:
    """At most ``most`` readable images, drawn the same in every run; ``labelled``: those with a label alone."""
    order = torch.randperm(len(source), generator=torch.Generator().manual_seed(0)).tolist()
    transform, pixels, labels = evaluation_transform(encoder.preprocess), list[Tensor](), list[int]()
    for index in order:
        try:
            sample = source[index]
        except BadSample:
            continue
        if sample.label is None and labelled:
            continue
        pixels.append(transform(sample.image))
        labels.append(-1 if sample.label is None else sample.label)
        if len(pixels) == most:
            break
    if not pixels:
        raise InputError(f"{source.name} has no readable {'labelled ' if labelled else ''}images")
    return Shown(torch.stack(pixels), torch.tensor(labels), source.name)


def _sing(encoder: Encoder, embedded: Tensor | None, scene: Scene) -> dict[str, Any]:
    """Zero-shot top-1 of the canary (n, D) as ``core/zero-shot`` counts it: a tie is wrong."""
    assert scene.canary is not None and scene.named is not None
    if scene.classes is None or scene.trains_text:
        scene.classes = _classifier(encoder, scene.named)
    labels = scene.canary.labels
    scores = (_embedded(encoder, scene.canary.pixels) if embedded is None else embedded) @ scene.classes.T  # (n, K)
    better = ~(scores < scores.gather(1, labels[:, None]))  # itself among them
    right = int((better.sum(1) == 1).sum())
    return {"canary": right / len(labels), "canary_right": right, "canary_images": len(labels)}


def _line(stage: TrainStage, row: dict[str, Any], *, kind: str) -> str:
    text = f"{stage.name} {row['step']}/{stage.train_config.steps}: weights moved by {row['weight_drift']:.2e}"
    if "text_weight_drift" in row:
        text += f" (text tower {row['text_weight_drift']:.2e})"
    text += f" of their norm, cosine to the original {row['cosine_to_base']:.4f} on {kind} images"
    if "canary" in row:
        text += f", canary {row['canary']:.1%} ({row['canary_right']}/{row['canary_images']})"
    if row["step"] == stage.train_config.steps and row["weight_drift"] < STILL:
        text += "; next to nothing moved, so a change of scores has other causes"
    return text


def _embedded(encoder: Encoder, pixels: Tensor) -> Tensor:
    """(n, 3, H, W') in [0, 1] -> (n, D) of length one on the CPU."""
    parameter, rows = next(encoder.image.parameters()), list[Tensor]()
    for part in torch.split(pixels, CHUNK):
        found = encoder.image(encoder.preprocess.normalize(part.to(parameter)))
        rows.append(F.normalize(found.pooled.float(), dim=-1).cpu())
    return torch.cat(rows)


def _classifier(encoder: Encoder, source: Source) -> Tensor:
    """(K, D) of length one: the mean over the source's templates of unit text embeddings, normalised again."""
    text, device = encoder.text, next(encoder.image.parameters()).device
    assert text is not None
    prompts: Sequence[str] = [p for name in source.classes for p in class_prompts(name, source.templates)]
    rows = [
        F.normalize(text(text.trim(ids).to(device)).pooled.float(), dim=-1).cpu()
        for ids in torch.split(encoder.tokenizer(prompts), CHUNK)
    ]
    return F.normalize(torch.cat(rows).view(len(source.classes), -1, rows[0].shape[1]).mean(1), dim=-1)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Every generator is afterwards as it was."""
    held = rng_state()
    try:
        yield
    finally:
        set_rng_state(held)


@contextmanager
def _measuring(encoder: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; what trained before trains afterwards."""
    modes = {module: module.training for module in encoder.modules()}
    encoder.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
