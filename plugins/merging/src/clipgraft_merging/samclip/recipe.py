"""SAM-CLIP's recipe: probe (stage I), multitask (II), adapt (III), each optional (Wang et al., SAM-CLIP: Merging Vision

Foundation Models towards Semantic and Spatial Understanding, CVPRW 2024, arXiv 2310.15308, section 3).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from clipgraft import distributed
from clipgraft.config.schema import GraftNode
from clipgraft.data.base import BadSample, Source
from clipgraft.data.loader import TrainLoader
from clipgraft.data.transforms import evaluation_transform
from clipgraft.errors import ClipgraftError
from clipgraft.files import tensors_digest
from clipgraft.recipe import StagePlan
from clipgraft.runner import Run
from clipgraft_merging.sam.opening import SamParts, open_sam, sam_problem, sam_settings
from clipgraft_merging.sam.settings import SamSettings
from clipgraft_merging.samclip.config import ClipStream, MaskStream, SamClipConfig
from clipgraft_merging.samclip.image import SamImage
from clipgraft_merging.samclip.kept import Kept
from clipgraft_merging.samclip.masked_source import MaskedSource, has_masks
from clipgraft_merging.samclip.stages import Begins, HeadStage, MultiTaskStage
from clipgraft_merging.samclip.teachers import ClipTeacher, MaskTeacher

if TYPE_CHECKING:
    from clipgraft.encoders.base import Encoder

SECOND_SEED = 104729
"""Added to the run's seed for the order of the mask stream, which may read the same source."""
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
HOOK = "sam-clip's steps"


class SamClipRecipe:
    """Up to three stages; the encoder becomes the student in the first of them."""

    def __init__(self, config: SamClipConfig) -> None:
        self.config = config
        self._opened: dict[str, Source] = {}

    def plan(self) -> list[StagePlan]:
        """The stages that the config doesn't skip."""
        c = self.config
        stages: list[StagePlan] = []
        if c.probe is not None:
            stages.append(StagePlan("probe", self._head("probe", c.probe)))
        if c.multitask is not None:
            stages.append(StagePlan("multitask", self._multitask))
        if c.adapt is not None:
            stages.append(StagePlan("adapt", self._head("adapt", c.adapt)))
        return stages

    def check(self, run: Run) -> list[str]:
        """A whole SAM, sizes that it takes, a CLIP with texts, batches that divide, seen before any work."""
        c, problems = self.config, []
        if HOOK not in run.hooks.names("before_step"):
            run.hooks.register(Begins(), HOOK)
        if c.grafts:
            problems.append("grafts: sam-clip replaces the image tower, so they would be lost; leave grafts empty")
        if problem := sam_problem(c.sam.from_, sha256=c.sam.sha256, setting="sam.from", registry=run.registry):
            problems.append(problem)
        elif (settings := sam_settings(c.sam.from_, registry=run.registry)) is not None:
            problems += self._sizes(settings.vision.patch_size)
        try:
            encoder = run.encoder
            if encoder.text is None:
                problems.append(
                    f"model: {c.model.from_} has no text tower; SAM-CLIP keeps the CLIP's, name one with it"
                )
            elif isinstance(encoder.image, SamImage):
                problems.append(f"model: {c.model.from_} is a SAM-CLIP already; name the CLIP to learn from")
            has_masks(self._source(run, None))
            if c.multitask is not None and c.multitask.masks.weight:
                problems += self._two_streams(run, c.multitask.masks)
        except ClipgraftError as error:
            problems.append(str(error))
        return problems

    def _sizes(self, patch: int) -> list[str]:
        c = self.config
        asked = [("student.size", c.student.size)]
        for name in ("probe", "multitask", "adapt"):
            stage = getattr(c, name)
            asked += [(f"{name}.sizes", size) for size in stage.sizes] if stage is not None else []
        return [
            f"{key}: {size} is no multiple of SAM's patch of {patch} pixels; take {max(1, round(size / patch)) * patch}"
            for key, size in asked
            if size % patch
        ]

    def _two_streams(self, run: Run, masks: MaskStream) -> list[str]:
        assert self.config.multitask is not None
        found, parts = [], run.accelerator.num_processes * self.config.multitask.train.accumulate
        if masks.batch_size % parts:
            found.append(
                f"multitask.masks.batch_size: {masks.batch_size} images must be divisible by {parts} (processes x "
                f"accumulate); take {max(1, round(masks.batch_size / parts)) * parts}"
            )
        if self.config.precision == "fp16":
            found.append("precision: the step of two backward passes has no scaling for fp16; take bf16 or fp32")
        has_masks(self._source(run, masks.data))
        return found

    # -- parts -----------------------------------------------------------------------------------------------------

    def _source(self, run: Run, reference: str | None) -> Source:
        """A source, opened once: two stages read it, and a made one costs time."""
        key = reference or self.config.data.from_
        if key not in self._opened:
            self._opened[key] = run.train_source() if reference is None else run.open_source(reference)
        return self._opened[key]

    def _sam(self, run: Run) -> SamParts:
        sam = self.config.sam
        return open_sam(
            sam.from_, revision=sam.revision, sha256=sam.sha256, setting="sam.from", registry=run.registry, log=run.log
        )

    def _student(self, run: Run, parts: SamParts) -> Encoder:
        """What an earlier stage left, or the CLIP with SAM's tower in the place of its own."""
        from clipgraft.encoders import apply_grafts

        encoder, wanted = run.encoder, self.config.student
        if not isinstance(encoder.image, SamImage):
            node = GraftNode(
                use="merging/sam-image",
                sam=SamSettings.of(parts.config).model_dump(mode="json"),
                size=wanted.size,
                blocks=wanted.blocks,
                hidden=list(wanted.hidden),
                mean=list(parts.preprocess.mean),
                std=list(parts.preprocess.std),
                origin=parts.reference,
                origin_sha256=parts.sha256,
            )
            encoder = apply_grafts(encoder, [node], run.registry).to(run.device)
            if self.config.sam.start == "pretrained":
                start_from(encoder.image, parts)  # type: ignore[arg-type]
            if wanted.mean_of:
                self._start_at_mean(run, encoder, wanted.mean_of)
            run.encoder = encoder
        assert isinstance(encoder.image, SamImage)
        encoder.image.sam.recompute = wanted.recompute
        return encoder

    def _start_at_mean(self, run: Run, encoder: Encoder, count: int) -> None:
        """The mean unit embedding of pictures spread over the data, whole and unaugmented; equal on every rank."""
        teacher, source = ClipTeacher(run.base_encoder()), self._source(run, None)
        transform, found = evaluation_transform(teacher.preprocess), []
        places = range(0, len(source), max(1, len(source) // count))[:count]
        with run.log.progress("the teacher's mean", len(places)) as bar:
            for first in range(0, len(places), 64):
                pictures = []
                for index in places[first : first + 64]:
                    with suppress(BadSample):  # the loader counts and replaces them
                        pictures.append(transform(source[index].image))
                if pictures:
                    found.append(torch.nn.functional.normalize(teacher(torch.stack(pictures).to(run.device)), dim=-1))
                bar.advance(len(places[first : first + 64]))
        assert isinstance(encoder.image, SamImage)
        encoder.image.head.start_at(torch.cat(found).mean(0))

    def _shared(self, run: Run, stream: ClipStream, encoder: Encoder) -> dict[str, Any]:
        """What every stage needs."""
        teacher, source = ClipTeacher(run.base_encoder()), self._source(run, None)
        kept = None
        if self.config.cache.clip:
            preprocess = replace(encoder.preprocess, size=(max(stream.sizes),) * 2)
            about = {"teacher": tensors_digest(teacher.image.state_dict()), "read": str(teacher.preprocess)}
            kept = self._kept(run, about | {"pictures": str(preprocess)}, source)
            kept.fill(source, lambda x: teacher(x.to(run.device)), preprocess=preprocess, batch_size=256)
        return {
            "train": stream.train,
            "source": source,
            "encoder": encoder,
            "teacher": teacher,
            "sizes": stream.sizes,
            "final_size": self.config.student.size,
            "crop": stream.crop,
            "kept": kept,
            "seed": run.seed,
        }

    def _kept(self, run: Run, about: dict[str, str], source: Source) -> Kept:
        cache = self.config.cache
        folder = run.path / "features" if cache.folder is None else Path(cache.folder).expanduser()
        return Kept(folder, about | {"source": source.fingerprint}, dtype=DTYPES[cache.dtype], log=run.log)

    # -- stages ----------------------------------------------------------------------------------------------------

    def _head(self, name: str, stream: ClipStream) -> Callable[[Run], HeadStage]:
        def build(run: Run) -> HeadStage:
            return HeadStage(name, **self._shared(run, stream, self._student(run, self._sam(run))))

        return build

    def _multitask(self, run: Run) -> MultiTaskStage:
        c = self.config.multitask
        assert c is not None
        parts, masks = self._sam(run), c.masks
        encoder = self._student(run, parts)
        streams = {"second": None, "mask_teacher": None, "masks_given": False, "kept_masks": None}
        if masks.weight:
            streams = self._mask_stream(run, masks, parts)
            run.log.info(
                f"multitask: mask loss {masks.loss}, match {masks.match}, guessed IoUs follow the "
                f"{'teacher' if masks.iou == 'teacher' else 'measured IoU'}, masks of "
                f"{'the data' if streams['masks_given'] else 'the teacher'}"
            )
        return MultiTaskStage(
            "multitask",
            stream=masks,
            tower_lr=c.tower_lr,
            decoder_lr=c.decoder_lr,
            device=run.device,
            **streams,
            **self._shared(run, c, encoder),
        )

    def _mask_stream(self, run: Run, masks: MaskStream, parts: SamParts) -> dict[str, Any]:
        raw, native = self._source(run, masks.data), parts.tower.native
        given = has_masks(raw)
        source = MaskedSource(
            raw,
            size=native,
            cells=native // parts.tower.patch * 4,
            masks=masks.masks if given else 0,
            fit=masks.fit,
            fill=parts.preprocess.mean,
        )
        preprocess = replace(parts.preprocess, size=(native, native))
        teacher, kept = MaskTeacher(parts, preprocess=preprocess).to(run.device).eval(), None
        if self.config.cache.sam:
            kept = self._kept(run, {"teacher": parts.sha256, "read": str(preprocess)}, source)
            kept.fill(source, lambda x: teacher(x.to(run.device)), preprocess=preprocess, batch_size=32)
        world = distributed.world_size()
        loader = TrainLoader(
            source,
            preprocess=preprocess,
            batch_size=masks.batch_size // world,
            seed=run.seed + SECOND_SEED,
            rank=distributed.rank(),
            world=world,
            crop=None,
            workers=self.config.data.workers,
            max_bad=self.config.data.max_bad,
        )
        return {"second": loader, "mask_teacher": teacher, "masks_given": given, "kept_masks": kept}


def start_from(image: SamImage, parts: SamParts) -> None:
    """Copy a SAM's weights into the student; the head's blocks become copies of its last block."""
    image.sam.load_state_dict(parts.tower.state_dict())
    image.promptable.load_state_dict(parts.promptable.state_dict())
    last = parts.tower.encoder.layers[-1].state_dict()
    for copy in image.head.blocks:
        copy.load_state_dict(last)
