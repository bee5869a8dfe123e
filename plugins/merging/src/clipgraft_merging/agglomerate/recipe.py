"""AM-RADIO's recipe: many teachers, one student (Ranzinger et al., CVPR 2024, arXiv 2312.06709)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from clipgraft import distributed
from clipgraft.config.schema import GraftNode
from clipgraft.data.loader import BadSamples, evaluation_batches
from clipgraft.data.reading import stack_images
from clipgraft.encoders.base import Encoder, Preprocess
from clipgraft.errors import ClipgraftError, InputError
from clipgraft.recipe import StagePlan
from clipgraft.runner import Run
from clipgraft.stage import JobStage, StageResult
from clipgraft_merging.agglomerate.adaptors import Adaptors, AdaptorShape
from clipgraft_merging.agglomerate.config import AgglomerateConfig, TeacherConfig
from clipgraft_merging.agglomerate.groups import Group
from clipgraft_merging.agglomerate.phi_s import Normaliser
from clipgraft_merging.agglomerate.stage import AgglomerateStage, Counts
from clipgraft_merging.agglomerate.statistics import Moments, joined
from clipgraft_merging.agglomerate.student import Student, why_no_student
from clipgraft_merging.agglomerate.teachers import Teacher, TeacherFeatures, kind_of, open_teacher
from clipgraft_merging.sam.opening import open_sam, sam_problem
from clipgraft_merging.sam.settings import SamSettings
from clipgraft_merging.samclip.image import SamImage

STATISTICS = "statistics"
HOOK = "agglomerate's steps"


class AgglomerateRecipe:
    """Stage ``statistics`` measures the teachers' features where they are to be normalised; ``distil`` trains."""

    def __init__(self, config: AgglomerateConfig) -> None:
        self.config = config

    def plan(self) -> list[StagePlan]:
        """The stages in order."""
        distil = StagePlan("distil", self._distil)
        return (
            [StagePlan(STATISTICS, lambda run: JobStage(STATISTICS, self._measure)), distil]
            if self._kinds()
            else [distil]
        )

    def check(self, run: Run) -> list[str]:
        """References that lead nowhere and sizes that don't divide, seen before any work."""
        c, problems = self.config, []
        if HOOK not in run.hooks.names("before_step"):
            run.hooks.register(Counts(), HOOK)
        for name, teacher in c.teachers.items():
            try:
                found = kind_of(teacher.from_, teacher.kind, registry=run.registry, setting=f"teachers.{name}")
            except ClipgraftError as error:
                problems.append(str(error))
                continue
            if found == "sam" and teacher.summary:
                problems.append(f"teachers.{name}.summary: a SAM has no summary; set it to 0")
        if (sam := c.student.sam) is not None:
            if problem := sam_problem(sam.from_, sha256=None, setting="student.sam.from", registry=run.registry):
                problems.append(problem)
            if c.grafts:
                problems.append("grafts: student.sam replaces the image tower, so they would be lost; leave them out")
        elif problem := why_no_student(run.encoder.image, positions=c.student.positions):
            problems.append(problem)
        else:
            problems += self._sizes(Student(run.encoder.image).step)
        if c.balance == "ranks" and run.accelerator.num_processes < len(c.groups):
            problems.append(
                f"balance: {len(c.groups)} groups need as many processes or more, here are "
                f"{run.accelerator.num_processes}; set it to split or alternate"
            )
        return problems

    def _sizes(self, step: int) -> list[str]:
        return [
            f"groups: size {group.size} is no multiple of the student's patch of {step} pixels; take "
            f"{max(1, round(group.size / step)) * step}"
            for group in self.config.groups
            if group.size is not None and group.size % step
        ]

    def _kinds(self) -> dict[str, str]:
        """{adaptor's name: kind of normalisation} of what is to be normalised."""
        found = {}
        for name, teacher in self.config.teachers.items():
            for kind in ("summary", "spatial"):
                how = getattr(teacher, f"{kind}_normalise")
                if getattr(teacher, kind) and how != "none":
                    found[f"{name}-{kind}"] = how
        return found

    # -- stages --------------------------------------------------------------------------------------------------

    def _measure(self, run: Run) -> StageResult:
        """Moments of every feature that is to be normalised; each process reads its part."""
        kinds, c = self._kinds(), self.config.statistics
        source = run.train_source()
        names = list(dict.fromkeys(key.rpartition("-")[0] for key in kinds))
        teachers = {name: self._teacher(run, name) for name in names}
        side = max(teacher.preprocess.size[0] for teacher in teachers.values())
        preprocess = Preprocess((side, side), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), resize_mode="squash")
        part, moments, seen = _First(source, c.samples), dict[str, Moments](), 0
        batches = evaluation_batches(
            part,
            preprocess=preprocess,
            batch_size=c.batch_size,
            bad=BadSamples(len(part)),
            workers=run.config.data.workers,
            rank=distributed.rank(),
            world=distributed.world_size(),
        )
        with run.log.progress("measuring teachers", len(part)) as bar:
            for batch in batches:
                pixels = stack_images(batch).to(run.device)
                for name, teacher in teachers.items():
                    _take(moments, name, teacher(pixels), kinds)
                seen += len(batch)
                bar.advance(len(batch) * distributed.world_size())
        everywhere = distributed.to_all(moments)
        fitted = nn.ModuleDict()
        for key, how in kinds.items():
            parts = [found[key] for found in everywhere if key in found]
            if not parts:
                raise InputError(f"{source.name}: no picture could be read, so teachers can't be measured")
            total = joined(parts)
            normaliser = Normaliser(len(total.mean))
            normaliser.fit(total, how, teacher=f"teacher {key}")  # type: ignore[arg-type]
            fitted[key] = normaliser
            spread = total.covariance().diagonal().mean().sqrt()
            run.log.info(f"{key}: {len(total.mean)} dimensions, mean spread {float(spread):.4g}, now by {how}")
        return StageResult(components={"normalisers": fitted})

    def _distil(self, run: Run) -> AgglomerateStage:
        c = self.config
        encoder = self._student_encoder(run)
        student = Student(encoder.image, positions=c.student.positions)
        if problems := self._sizes(student.step):
            raise InputError(problems[0])
        teachers = {name: self._teacher(run, name) for name in c.teachers}
        widths = {name: _widths(teacher, run.device) for name, teacher in teachers.items()}
        shapes = [
            shape
            for name, teacher in c.teachers.items()
            for shape in _shapes(name, teacher, widths[name], student.widths)
        ]
        adaptors = Adaptors(shapes=shapes).to(run.device)
        if adaptors.normalisers:
            adaptors.normalisers.load_state_dict(run.component(STATISTICS, "normalisers"))
        own = encoder.preprocess.size
        groups = [
            Group(g.teachers or tuple(c.teachers), own if g.size is None else (g.size, g.size), g.share)
            for g in c.groups
        ]
        return AgglomerateStage(
            "distil",
            train=c.train,
            source=run.train_source(),
            encoder=encoder,
            student=student,
            adaptors=adaptors,
            teachers=teachers,
            weights={shape.name: getattr(c.teachers[shape.teacher], shape.kind) for shape in shapes},
            groups=groups,
            balance=c.balance,
            crop=c.crop,
            tower_lr=c.student.tower_lr,
            keep_adaptors=c.keep_adaptors,
        )

    # -- parts ---------------------------------------------------------------------------------------------------

    def _teacher(self, run: Run, name: str) -> Teacher:
        t = self.config.teachers[name]
        found = open_teacher(
            t.from_, kind=t.kind, size=t.size, setting=f"teachers.{name}", registry=run.registry, log=run.log
        )
        return found.to(run.device).requires_grad_(False)

    def _student_encoder(self, run: Run) -> Encoder:
        """The run's encoder; with ``student.sam`` it has that SAM's tower with a CLIP head."""
        from clipgraft.encoders import apply_grafts
        from clipgraft_merging.samclip.recipe import start_from

        encoder, sam = run.encoder, self.config.student.sam
        if sam is None or isinstance(encoder.image, SamImage):
            return encoder
        parts = open_sam(sam.from_, setting="student.sam.from", registry=run.registry, log=run.log)
        node = GraftNode(
            use="merging/sam-image",
            sam=SamSettings.of(parts.config).model_dump(mode="json"),
            size=sam.size,
            blocks=sam.blocks,
            hidden=list(sam.hidden),
            mean=list(parts.preprocess.mean),
            std=list(parts.preprocess.std),
            origin=parts.reference,
            origin_sha256=parts.sha256,
        )
        encoder = apply_grafts(encoder, [node], run.registry).to(run.device)
        image: Any = encoder.image
        start_from(image, parts)
        run.encoder = encoder
        return encoder


class _First:
    """The first n samples of a source, as a source."""

    def __init__(self, source: Any, n: int) -> None:
        self.source, self.n = source, min(n, len(source))
        self.name, self.fingerprint = source.name, source.fingerprint
        self.classes, self.templates, self.attributes = source.classes, source.templates, source.attributes

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> Any:
        return self.source[index]


def _take(moments: dict[str, Moments], name: str, said: TeacherFeatures, kinds: dict[str, str]) -> None:
    for kind in ("summary", "spatial"):
        value: Tensor | None = getattr(said, kind)
        if (key := f"{name}-{kind}") in kinds and value is not None:
            moments.setdefault(key, Moments.of(value.shape[-1])).update(value)


@torch.no_grad()
def _widths(teacher: Teacher, device: torch.device) -> dict[str, int]:
    """What a teacher says, asked with one grey picture."""
    said = teacher(torch.full((1, 3, *teacher.preprocess.size), 0.5, device=device))
    return {"spatial": said.spatial.shape[-1]} | ({} if said.summary is None else {"summary": said.summary.shape[-1]})


def _shapes(name: str, teacher: TeacherConfig, says: dict[str, int], reads: dict[str, int]) -> list[AdaptorShape]:
    found = []
    for kind in ("summary", "spatial"):
        if not getattr(teacher, kind):
            continue
        source = getattr(teacher, f"{kind}_from")
        if kind not in says:
            raise InputError(f"teachers.{name}.{kind}: this teacher has none; set it to 0")
        if source not in reads:
            raise InputError(
                f"teachers.{name}.{kind}_from: this student has no {source}; take one of {', '.join(reads)}"
            )
        adaptor = getattr(teacher, f"{kind}_adaptor")
        if adaptor.hidden == 0 and reads[source] != says[kind]:
            raise InputError(
                f"teachers.{name}.{kind}_adaptor: the student's {source} has {reads[source]} dimensions, the teacher's "
                f"features {says[kind]}; give the adaptor a hidden width"
            )
        found.append(
            AdaptorShape(
                teacher=name,
                kind=kind,
                reads=source,
                inputs=reads[source],
                outputs=says[kind],
                hidden=adaptor.hidden,
                blocks=adaptor.blocks,
                normalise=getattr(teacher, f"{kind}_normalise"),
            )
        )
    return found
