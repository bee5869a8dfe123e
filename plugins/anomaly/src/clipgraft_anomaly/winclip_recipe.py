"""WinCLIP's recipe: one stage, ``gather``, that remembers a few normal pictures of every kind of part; no training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field

from clipgraft.config.schema import RunConfig
from clipgraft.data.base import Sample, Source
from clipgraft.data.exclude import exclude
from clipgraft.data.transforms import evaluation_transform
from clipgraft.errors import ClipgraftError, InputError
from clipgraft.recipe import StagePlan
from clipgraft.runner import Run
from clipgraft.stage import JobStage, StageResult
from clipgraft_anomaly.current_head import switch_on
from clipgraft_anomaly.detector import Fits
from clipgraft_anomaly.handwritten import Texts, WordsConfig
from clipgraft_anomaly.inspection import open_inspection
from clipgraft_anomaly.same_data import DataRecord
from clipgraft_anomaly.winclip import MemoryConfig, WinClip, WinClipDetector, WindowsConfig
from clipgraft_anomaly.winclip_references import Chosen, draw, normal_pictures, too_few, training_part
from clipgraft_anomaly.windows import Views


class WinClipRunConfig(RunConfig):
    """``anomaly/winclip``."""

    shots: int = Field(1, ge=0, description="normal pictures of every kind of part to remember; 0 for prompts alone")
    name: str | None = Field(None, description="what prompts and the memory call all parts; null: their own names")
    words: WordsConfig = WordsConfig()
    windows: WindowsConfig = WindowsConfig()
    reference: Literal["own", "other", "noise"] = Field(
        "own",
        description="remember pictures of the kind itself; other: of the next kind, noise: of nothing, which are "
        "controls that tell what the right pictures are worth",
    )
    batch_size: int = Field(8, gt=0, description="pictures per forward pass while gathering")


class WinClipRecipe:
    """One stage, ``gather``."""

    def __init__(self, config: WinClipRunConfig) -> None:
        self.config = config

    def plan(self) -> list[StagePlan]:
        """The stage."""
        return [StagePlan("gather", lambda run: JobStage("gather", self._gather))]

    def check(self, run: Run) -> list[str]:
        """A tower that can be read, texts, and normal pictures enough, seen before any work."""
        switch_on(run)
        problems = []
        for attempt in (
            lambda: self.config.windows.dense(run.encoder),
            lambda: Texts(run.encoder, self.config.words),
            lambda: self._normal(run),
        ):
            try:
                attempt()
            except (ClipgraftError, ValueError) as error:
                problems.append(str(error))
        return problems

    def _normal(self, run: Run) -> tuple[Source, dict[str, list[int]]]:
        """The source and where its normal pictures are; raises when there are too few."""
        data, shots = run.config.data, self.config.shots
        reference = training_part(data.from_, registry=run.registry)
        source = open_inspection(reference, registry=run.registry, max_pixels=data.max_pixels)
        source = source if data.exclude is None else exclude(source, data.exclude, log=run.log)
        normal = normal_pictures(source, log=run.log) if shots else {}
        if self.config.name is not None and shots:
            normal = {self.config.name: sorted(place for places in normal.values() for place in places)}
        if problem := too_few(normal, shots, source=source):
            raise InputError(problem)
        if shots and self.config.reference == "other" and len(normal) < 2:
            raise InputError(f"reference: other needs two kinds of part, {source.name} has {', '.join(normal)}")
        return source, normal

    def _gather(self, run: Run) -> StageResult:
        c, encoder = self.config, run.encoder.requires_grad_(False).eval()
        dense = c.windows.dense(encoder)
        windows = c.windows.model_copy(update={"size": dense.size})
        fits = Fits.of(encoder)
        if not c.shots:
            head = WinClip(words=c.words, windows=windows, memory=MemoryConfig(), fits=fits)
            return StageResult(components={"winclip": head})
        source, normal = self._normal(run)
        drawn = draw(source, normal, c.shots, seed=run.seed)
        seen = Chosen(source, [place for places in drawn.places.values() for place in places])
        reference = training_part(run.config.data.from_, registry=run.registry)
        memory = MemoryConfig(
            objects=tuple(normal), shots=c.shots, grid=dense.grid, seen=DataRecord.of(reference, seen, log=run.log)
        )
        head = WinClip(words=c.words, windows=windows, memory=memory, fits=fits).to(run.device)
        detector = head.detector(encoder)
        with torch.inference_mode(), run.log.progress("gathering normal pictures", len(normal)) as bar:
            for number, name in enumerate(normal):
                shown = drawn.samples[memory.objects[(number + (c.reference == "other")) % len(normal)]]
                head.remember(name, self._views(detector, shown, run))
                bar.advance(note=name)
        run.log.info(f"remembered {c.shots} normal pictures of each: {', '.join(normal)}")
        return StageResult(components={"winclip": head}, metrics={"objects": float(len(normal))})

    def _views(self, detector: WinClipDetector, shown: Sequence[Sample], run: Run) -> Views:
        """Views of some pictures, or of as much noise."""
        transform = evaluation_transform(detector.preprocess)
        pixels = torch.stack([transform(sample.image) for sample in shown])
        if self.config.reference == "noise":
            pixels = torch.rand(pixels.shape, generator=torch.Generator().manual_seed(run.seed))
        found = [detector.views(some.to(run.device)) for some in torch.split(pixels, self.config.batch_size)]
        windows = {k: torch.cat([views.windows[k] for views in found]) for k in found[0].windows}
        return Views(
            torch.cat([views.whole for views in found]), windows, torch.cat([views.patches for views in found])
        )
