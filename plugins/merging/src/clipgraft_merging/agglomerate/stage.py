"""One training stage: the student and its adaptors follow every teacher at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from clipgraft import distributed
from clipgraft.config.schema import TrainConfig
from clipgraft.data.base import Source
from clipgraft.encoders.base import Encoder
from clipgraft.spec import runhook
from clipgraft.stage import TrainStage
from clipgraft.types import Batch, StepOutput
from clipgraft_merging.agglomerate.adaptors import Adaptors
from clipgraft_merging.agglomerate.config import Balance
from clipgraft_merging.agglomerate.groups import Group, Part, alternated, of_rank, split
from clipgraft_merging.agglomerate.losses import on_one_grid, spatial_loss, summary_loss, zero_times
from clipgraft_merging.agglomerate.student import Student, StudentFeatures
from clipgraft_merging.agglomerate.teachers import Teacher
from clipgraft_merging.samclip.image import SamImage
from clipgraft_merging.samclip.teachers import resized

Weights = Mapping[str, float]


class Counts:
    """Lifecycle hook: the stage learns the number of the step that comes, so that a resumed run goes on as it would."""

    @runhook
    def before_step(self, stage: Any, step: int) -> None:
        """Tell the stage."""
        if isinstance(stage, AgglomerateStage):
            stage.step = step


class AgglomerateStage(TrainStage):
    """``weights`` {adaptor's name: weight}; teachers are frozen, the text tower and the scale stay as they are.

    Sum over teachers of lambda (1 - cosine) of summaries and gamma (0.9 (1 - cosine) + 0.1 smooth L1) of spatial
    features, both on the larger of the two grids (AM-RADIO, section 3.3). A group is a set of teachers at one size of
    the student.
    """

    def __init__(
        self,
        name: str,
        *,
        train: TrainConfig,
        source: Source,
        encoder: Encoder,
        student: Student,
        adaptors: Adaptors,
        teachers: Mapping[str, Teacher],
        weights: Weights,
        groups: Sequence[Group],
        balance: Balance,
        crop: tuple[float, float] | None,
        tower_lr: float,
        keep_adaptors: bool = True,
    ) -> None:
        super().__init__(name, train=train, source=source)
        self.encoder, self.student, self.adaptors = encoder, student, adaptors
        self.teachers = nn.ModuleDict(dict(teachers))
        self.weights, self.groups, self.balance = dict(weights), list(groups), balance
        self.training_crop, self.tower_lr, self.step = crop, tower_lr, 0  # type: ignore[misc]
        self.keep_adaptors = keep_adaptors
        self.own = encoder.data.preprocess
        encoder.requires_grad_(False)
        if tower_lr:
            encoder.image.requires_grad_(True)
        frozen: list[nn.Module | None] = [self.teachers, self.adaptors.normalisers, encoder.text]
        if isinstance(encoder.image, SamImage):  # SAM's neck and decoder go on reading what the tower says
            frozen += [encoder.image.promptable, encoder.image.sam.encoder.neck]
        for module in frozen:
            if module is not None:
                self.freeze(module)
        if not tower_lr:
            self.freeze(encoder.image)
        largest = max((group.size for group in self.groups), key=lambda size: size[0] * size[1])
        encoder.data.preprocess = replace(self.own, size=largest)  # the loader reads pictures for the largest group

    def forward(self, batch: Batch) -> StepOutput:
        """Pixels (B, 3, H, W') in [0, 1] -> the weighted sum over the groups of this step."""
        loss, terms = batch.pixels.new_zeros(()), dict[str, Tensor]()
        for part in self.parts(len(batch)):
            found = self.group_loss(part.group, batch.pixels[part.rows])
            loss = loss + part.weight * sum(self.weights[name] * value for name, value in found.items())
            terms |= {name: value.detach() for name, value in found.items()}
        absent = {name: loss.new_zeros(()) for name in self.weights if name not in terms}
        idle = [p for name in absent for p in self.adaptors.heads[name].parameters()]
        idle += self._unread({self.adaptors.shapes[name].reads for name in terms})
        return StepOutput(loss + zero_times([p for p in idle if p.requires_grad]), terms | absent, len(batch))

    def parts(self, size: int) -> list[Part]:
        """What this process does with its pictures in this step."""
        if self.balance == "split":
            return split(self.groups, size)
        if self.balance == "ranks":
            group = of_rank(self.groups, distributed.rank(), distributed.world_size())
        else:
            group = alternated(self.groups, self.step)
        return [Part(group, slice(0, size), 1.0)]

    def group_loss(self, group: Group, pixels: Tensor) -> dict[str, Tensor]:
        """Pixels (B, 3, H, W') in [0, 1] -> {adaptor's name: loss} of the group's teachers."""
        student = self.student(self.encoder.preprocess.normalize(resized(pixels, group.size)))
        found: dict[str, Tensor] = {}
        for name in group.teachers:
            said = self.teachers[name](pixels)
            for kind in ("summary", "spatial"):
                key = f"{name}-{kind}"
                if key in self.weights:
                    found[key] = self._compared(key, student, getattr(said, kind), said.grid)
        return found

    def _compared(self, key: str, student: StudentFeatures, wanted: Tensor, grid: tuple[int, int]) -> Tensor:
        guess, target = self.adaptors.predicted(key, student), self.adaptors.target(key, wanted)
        if key.endswith("-summary"):
            return summary_loss(guess, target)
        return spatial_loss(*on_one_grid(guess, student.grid, target, grid))

    def _unread(self, reads: set[str]) -> list[nn.Parameter]:
        """Parameters behind what no adaptor of this step reads, such as the projection into the joint space."""
        image: Any = self.encoder.image
        if isinstance(image, SamImage):
            return list(image.head.parameters()) if reads <= {"tower"} else []
        found = [image.tower.proj] if "pooled" not in reads and image.tower.proj is not None else []
        return found + (list(image.tower.ln_post.parameters()) if reads <= {"tower"} else [])

    def current_encoder(self) -> Encoder:
        """At its own size again; the loader has its copy of the other one."""
        self.encoder.data.preprocess = self.own
        return self.encoder

    def components(self) -> dict[str, nn.Module]:
        """The adaptors, by which the student speaks for each teacher."""
        return {"adaptors": self.adaptors} if self.keep_adaptors else {}

    def param_groups(self) -> list[dict[str, Any]]:
        """The tower with its own rate, the adaptors."""
        tower = [p for p in self.encoder.image.parameters() if p.requires_grad]
        heads = [p for p in self.adaptors.parameters() if p.requires_grad]
        groups: list[dict[str, Any]] = []
        groups += [{"name": "tower", "params": tower, "lr_scale": self.tower_lr}] if tower else []
        return groups + ([{"name": "adaptors", "params": heads}] if heads else [])
