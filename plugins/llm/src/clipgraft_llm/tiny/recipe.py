"""TinyCLIP's recipe: ``inherit`` a smaller CLIP from the base, then train it on the affinities of a frozen teacher.

Wu et al., TinyCLIP: CLIP Distillation via Affinity Mimicking and Weight Inheritance, ICCV 2023, arXiv 2309.12314.
"""

from __future__ import annotations

from clipgraft import files
from clipgraft.errors import InputError
from clipgraft.finetune import Finetune
from clipgraft.recipe import StagePlan
from clipgraft.runner import Run
from clipgraft.stage import JobStage, StageResult
from clipgraft_llm.named_recipe import built, named, teacher_of
from clipgraft_llm.named_stage import NamedStage
from clipgraft_llm.tiny.config import TinyClipConfig
from clipgraft_llm.tiny.inheritance import inherit, shapes_of
from clipgraft_llm.tiny.plan import TowerSize, plan_tower


class TinyClip:
    """Two stages, ``inherit`` and ``train``. What is measured before the run is the model it starts from."""

    def __init__(self, config: TinyClipConfig) -> None:
        self.config = config

    def plan(self) -> list[StagePlan]:
        """The stages."""
        return [StagePlan("inherit", lambda run: JobStage("inherit", self._inherit)), StagePlan("train", self._train)]

    def check(self, run: Run) -> list[str]:
        """Sizes that fit the base, losses that fit the stage, and a teacher where a loss needs one."""
        problems = Finetune(self.config).check(run)
        try:
            shapes, chosen = shapes_of(run.encoder), self.config.student
            if chosen.image == chosen.text == TowerSize():
                problems.append("student says no size; set student.image.layers, student.image.width or the text's")
            for tower, size in (("image", chosen.image), ("text", chosen.text)):
                plan_tower({}, shapes[tower], size, depth=chosen.depth, what=f"student.{tower}")
        except InputError as error:
            problems.append(str(error))
        needs = named(n.use for n in self.config.losses) & {"affinity", "distill", "hycd"}
        if needs and self.config.teacher is None:
            problems.append(f"{min(needs)} learns from a teacher; set teacher to base or to a model reference")
        return problems

    def _train(self, run: Run) -> NamedStage:
        c = self.config
        losses, weights = built(run, c)
        return NamedStage(
            "train",
            train=c.train,
            source=run.train_source(),
            encoder=run.encoder,
            losses=losses,
            weights=weights,
            teacher=teacher_of(run, c.teacher),
            max_logit_scale=c.max_logit_scale,
        )

    def _inherit(self, run: Run) -> StageResult:
        small, found = inherit(run.encoder, self.config.student)
        run.log.info(f"inherit: {found}")
        if run.is_main:
            files.write_json(run.stage_folder("inherit") / "inheritance.json", found.as_dict())
        counts = {"parameters": float(sum(found.after.values())), "share_of_teacher": found.share}
        return StageResult(small, metrics=counts)
