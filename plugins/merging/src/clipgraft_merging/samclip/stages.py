"""SAM-CLIP's stages: the head alone (I and III), and both streams at once (II)."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from clipgraft.config.schema import TrainConfig
from clipgraft.data.base import Source
from clipgraft.data.loader import TrainLoader
from clipgraft.encoders.base import Encoder
from clipgraft.spec import runhook
from clipgraft.stage import TrainStage
from clipgraft.types import Batch, StepOutput
from clipgraft_merging.samclip.config import MaskStream
from clipgraft_merging.samclip.image import SamImage, set_size
from clipgraft_merging.samclip.kept import Kept
from clipgraft_merging.samclip.losses import cosine_distance, mask_loss
from clipgraft_merging.samclip.masked_source import INSTANCES
from clipgraft_merging.samclip.prompts import sample_prompts
from clipgraft_merging.samclip.streams import taken
from clipgraft_merging.samclip.teachers import ClipTeacher, MaskTeacher, answers, resized


class Begins:
    """Lifecycle hook: a stage of SAM-CLIP learns the number of the step that comes."""

    @runhook
    def before_step(self, stage: Any, step: int) -> None:
        """Sizes and the second stream are functions of the step, so a resumed run goes on as it would have."""
        if isinstance(stage, HeadStage):
            stage.begin(step)


class HeadStage(TrainStage):
    """The CLIP head learns the CLIP teacher's embeddings over a frozen SAM tower (stages I and III)."""

    reaches_into_blocks = True  # layers of the head are run in parts, and ``taken`` asks for all parameters at once

    def __init__(
        self,
        name: str,
        *,
        train: TrainConfig,
        source: Source,
        encoder: Encoder,
        teacher: ClipTeacher,
        sizes: Sequence[int],
        final_size: int,
        crop: tuple[float, float] | None = None,
        kept: Kept | None = None,
        seed: int = 0,
    ) -> None:
        """``encoder`` has a ``SamImage``; its preprocess takes the largest of ``sizes`` until the stage is measured."""
        super().__init__(name, train=train, source=source)
        assert isinstance(encoder.image, SamImage)
        self.encoder, self.student, self.kept, self.seed = encoder, encoder.image, kept, seed
        self.sizes, self.final_size, self.size = tuple(sizes), final_size, max(sizes)
        self.training_crop = crop  # type: ignore[misc]
        self.teacher = self.freeze(teacher)
        for scalar in (encoder.logit_scale, encoder.logit_bias):
            if scalar is not None:
                scalar.requires_grad_(False)
        for module in [encoder.text, *self.held()]:
            self.freeze(module)  # type: ignore[arg-type]
        set_size(encoder, max(sizes))

    def held(self) -> list[nn.Module]:
        """What stays as it is."""
        return [self.student.sam, self.student.promptable]

    def begin(self, step: int) -> None:
        """Draw the size of step ``step``: the same one on all ranks."""
        self.size = random.Random(f"{self.seed}/{self.name}/{step}").choice(self.sizes)

    def forward(self, batch: Batch) -> StepOutput:
        """Pixels (B, 3, R, R) in [0, 1] -> the cosine distance."""
        loss = self.clip_loss(batch)
        return StepOutput(loss, {"clip": loss}, len(batch))

    def clip_loss(self, batch: Batch) -> Tensor:
        """The student at this step's size against the teacher at its own."""
        with torch.no_grad():
            wanted = self.teacher(batch.pixels) if self.kept is None else self.kept(batch.ids).to(batch.pixels)
        pixels = resized(batch.pixels, (self.size, self.size))
        return cosine_distance(self.student(self.encoder.preprocess.normalize(pixels)).pooled, wanted)

    def current_encoder(self) -> Encoder:
        """At the size that it will have when it is finished."""
        set_size(self.encoder, self.final_size)
        return self.encoder


class MultiTaskStage(HeadStage):
    """Tower, head, neck and mask decoder learn from both teachers (stage II); prompt encoder and texts stay.

    Of a step's two graphs only one is alive at a time (see ``streams``).
    """

    def __init__(
        self,
        name: str,
        *,
        stream: MaskStream,
        second: TrainLoader | None,
        mask_teacher: MaskTeacher | None,
        masks_given: bool,
        kept_masks: Kept | None = None,
        tower_lr: float = 0.1,
        decoder_lr: float = 0.1,
        device: torch.device | str = "cpu",
        **head: Any,
    ) -> None:
        """``second`` None: no mask stream (weight 0), then neck and decoder stay as they are."""
        self.stream, self.second = stream, second
        super().__init__(name, **head)
        self.masks_given, self.kept_masks, self.device = masks_given, kept_masks, device
        self.mask_teacher = None if mask_teacher is None else self.freeze(mask_teacher)
        self.tower_lr, self.decoder_lr = tower_lr, decoder_lr
        self._batches: Iterator[Batch] | None = None
        self._step, self._batch, self._taken = -1, None, 0  # type: int, Batch | None, int

    def held(self) -> list[nn.Module]:
        """Texts and prompts; without the mask stream the neck and the decoder, too."""
        promptable = self.student.promptable
        if self.second is None:
            return [promptable, self.student.sam.encoder.neck]
        return [promptable.prompt_encoder]

    def param_groups(self) -> list[dict[str, Any]]:
        """The head at the full rate, SAM's parts at a share of it."""
        neck = self.student.sam.encoder.neck
        decoder = [*neck.parameters(), *self.student.promptable.parameters()]
        slow = {id(p) for p in decoder}
        tower = [p for p in self.student.sam.parameters() if id(p) not in slow]
        groups = (("head", self.student.head.parameters(), 1.0), ("tower", tower, self.tower_lr))
        groups += (("decoder", decoder, self.decoder_lr),)
        return [
            {"name": name, "params": [p for p in ps if p.requires_grad], "lr_scale": scale}
            for name, ps, scale in groups
        ]

    def begin(self, step: int) -> None:
        """Also fetch the mask stream's batch of step ``step``; its loader is a pure function of that number."""
        super().begin(step)
        if self.second is None:
            return
        if self._batches is None or step != self._step + 1:
            self._batches = self.second.iterate(step)
        self._step, self._taken = step, 0
        self._batch = next(self._batches).to(self.device, non_blocking=True)

    def forward(self, batch: Batch) -> StepOutput:
        """One chunk of CLIP's images and the same share of SAM's -> both losses, the first with its backward done."""
        if self.second is None:
            return super().forward(batch)
        clip = taken(self.clip_loss(batch), [p for p in self.parameters() if p.requires_grad])
        total, terms = self.mask_terms(self._share())
        return StepOutput(clip + self.stream.weight * total, {"clip": clip, "masks": total, **terms}, len(batch))

    def _share(self) -> Batch:
        """The next chunk of this step's mask batch."""
        assert self._batch is not None, "begin(step) comes first"
        size = len(self._batch) // self.train_config.accumulate
        rows = slice(self._taken, self._taken + size)
        self._taken += size
        return self._batch[rows]

    def mask_terms(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Pixels (B, 3, S, S) in [0, 1] at SAM's size -> the mask loss and its parts."""
        assert self.mask_teacher is not None
        teacher, stream, size = self.mask_teacher, self.stream, (batch.pixels.shape[-2], batch.pixels.shape[-1])
        with torch.no_grad():
            kept = self.kept_masks
            theirs = teacher(batch.pixels) if kept is None else kept(batch.ids).to(batch.pixels)
            if self.masks_given:
                masks = batch.extra[INSTANCES]
            else:
                masks = teacher.automatic(theirs, side=stream.grid, keep=stream.masks)
            prompts = sample_prompts(masks, size=size, points=stream.points, boxes=stream.boxes, noise=stream.noise)
            wanted = teacher.answers(theirs, prompts)
        ours = self.student.sam(self.encoder.preprocess.normalize(batch.pixels))
        found = answers(self.student.promptable, ours, prompts)
        total, terms, count = ours.new_zeros(()), dict[str, Tensor](), stream.points + stream.boxes
        for mine, goal, prompts_of in zip(found, wanted, (stream.points, stream.boxes), strict=True):
            if mine is None or goal is None:
                continue
            part = mask_loss(
                mine.logits.flatten(0, 1),
                mine.iou.flatten(0, 1),
                teacher_logits=goal.logits.flatten(0, 1),
                teacher_iou=goal.iou.flatten(0, 1),
                kind=stream.loss,
                match=stream.match,
                iou_target=stream.iou,
                focal=stream.focal,
                dice=stream.dice,
                iou_weight=stream.iou_weight,
            )
            share = prompts_of / count
            total = total + share * part.total
            for name in ("focal", "dice", "iou"):
                terms[name] = terms.get(name, 0.0) + share * getattr(part, name)
        return total, terms
