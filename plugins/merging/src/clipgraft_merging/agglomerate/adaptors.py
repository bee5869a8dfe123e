"""From the student's features to each teacher's: one small MLP for its summary, one for its spatial features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from clipgraft.config.schema import Config
from clipgraft.errors import InputError
from clipgraft_merging.agglomerate.phi_s import Normalise, Normaliser
from clipgraft_merging.agglomerate.student import StudentFeatures

SummaryFrom = Literal["pooled", "cls"]
SpatialFrom = Literal["tokens", "tower"]


class Adaptor(nn.Module):
    """(..., inputs) -> (..., outputs): fc, then ``blocks`` of (LN, GELU, fc) with residuals, then LN, GELU, fc.

    The order is that of RADIO's published adaptors. ``hidden`` 0 passes features on, which needs equal widths.
    """

    def __init__(self, inputs: int, outputs: int, *, hidden: int, blocks: int) -> None:
        super().__init__()
        self.inputs, self.outputs, self.hidden = inputs, outputs, hidden
        if hidden == 0:
            if inputs != outputs:
                raise InputError(f"features of {inputs} dimensions can't stand for {outputs} without an adaptor")
            return
        self.first = nn.Linear(inputs, hidden)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(hidden), nn.GELU(), nn.Linear(hidden, hidden)) for _ in range(blocks)
        )
        self.last = nn.Sequential(nn.LayerNorm(hidden), nn.GELU(), nn.Linear(hidden, outputs))

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) -> (..., outputs)."""
        if self.hidden == 0:
            return x
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        return self.last(x)  # type: ignore[no-any-return]


class AdaptorShape(Config):
    """One adaptor: what it reads and what it says."""

    teacher: str = Field(description="name of the teacher")
    kind: Literal["summary", "spatial"] = Field(description="which of its features")
    reads: Literal["pooled", "cls", "tokens", "tower"] = Field(description="features of the student")
    inputs: int = Field(gt=0, description="width of what it reads")
    outputs: int = Field(gt=0, description="width of the teacher's features")
    hidden: int = Field(0, ge=0, description="inner width; 0 passes features on")
    blocks: int = Field(0, ge=0, description="inner layers with a residual")
    normalise: Normalise = Field("none", description="of the teacher's features")

    @property
    def name(self) -> str:
        """Unique."""
        return f"{self.teacher}-{self.kind}"


class AdaptorsConfig(Config):
    """``merging/adaptors``."""

    shapes: tuple[AdaptorShape, ...] = Field((), description="of each adaptor")


@dataclass(frozen=True, slots=True)
class Said:
    """What the student says of one teacher: ``summary`` (B, D') and ``spatial`` (B, N, D''), None where unlearnt."""

    summary: Tensor | None
    spatial: Tensor | None
    grid: tuple[int, int] | None


class Adaptors(nn.Module):
    """Every teacher's adaptors and normalisers; the component that an export carries."""

    def __init__(self, *, shapes: Sequence[AdaptorShape] = ()) -> None:
        super().__init__()
        self.shapes = {shape.name: shape for shape in shapes}
        self.registered = ("merging/adaptors", {"shapes": [shape.model_dump(mode="json") for shape in shapes]})
        self.heads, self.normalisers = nn.ModuleDict(), nn.ModuleDict()
        for shape in shapes:
            self.heads[shape.name] = Adaptor(shape.inputs, shape.outputs, hidden=shape.hidden, blocks=shape.blocks)
            if shape.normalise != "none":
                self.normalisers[shape.name] = Normaliser(shape.outputs)

    def predicted(self, name: str, student: StudentFeatures) -> Tensor:
        """What one adaptor says, on the scale of the targets.

        Features without an adaptor are in the teacher's own space and stay there: they are normalised as the target is.
        """
        said = self.heads[name](student.of(self.shapes[name].reads))
        return self.target(name, said) if self.shapes[name].hidden == 0 else said

    def target(self, name: str, features: Tensor) -> Tensor:
        """A teacher's features on that scale."""
        return self.normalisers[name](features) if name in self.normalisers else features  # type: ignore[no-any-return]

    @torch.no_grad()
    def said(self, teacher: str, student: StudentFeatures) -> Said:
        """The student's features as that teacher's own, normalisation undone."""
        names = [name for name, shape in self.shapes.items() if shape.teacher == teacher]
        if not names:
            known = ", ".join(sorted({shape.teacher for shape in self.shapes.values()}))
            raise InputError(f"there is no adaptor of a teacher {teacher!r}; there are: {known}")
        found: dict[str, Tensor] = {}
        for name in names:
            value = self.predicted(name, student)
            if name in self.normalisers:
                value = self.normalisers[name].restored(value)  # type: ignore[operator]
            found[self.shapes[name].kind] = value
        return Said(found.get("summary"), found.get("spatial"), student.grid)
