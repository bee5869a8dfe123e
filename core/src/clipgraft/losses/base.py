"""What a loss is: tensors in, named scalars out. B rows on this rank, D joint space, N patch tokens, W width."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipgraft.distributed import gather_with_grad
from clipgraft.errors import ClipgraftError
from clipgraft.types import widened


@dataclass(frozen=True, slots=True, kw_only=True)
class LossInputs:
    """What a stage knows about one batch: ``image`` and ``text`` (B, D) pooled, not normalised; ``logit_scale`` ()

    exponentiated, ``logit_bias`` (); ``tokens`` (B, N, W); the same of a frozen teacher, whose D, N and W may differ.
    """

    image: Tensor | None = None
    text: Tensor | None = None
    logit_scale: Tensor | None = None
    logit_bias: Tensor | None = None
    tokens: Tensor | None = None
    teacher_image: Tensor | None = None
    teacher_text: Tensor | None = None
    teacher_tokens: Tensor | None = None

    def need(self, name: str) -> Tensor:
        """The field ``name``, a teacher's without its graph; 16-bit floats as fp32."""
        value: Tensor | None = getattr(self, name)
        if value is None:
            given = ", ".join(f.name for f in fields(self) if getattr(self, f.name) is not None)
            hint = "name a teacher in the recipe" if name.startswith("teacher") else "use a stage that computes it"
            raise ClipgraftError(f"the loss needs {name}, the stage gives {given or 'nothing'}; {hint}")
        return widened(value.detach() if name.startswith("teacher") else value)


class Loss(nn.Module, ABC):
    """A pure objective; subclasses give ``terms``. ``needs_*``: what gets a gradient beside the embeddings.

    ``batch_coupled``: rows are contrasted with each other. ``reduction``: local is a mean over this rank's rows, whose
    mean over ranks is the whole; global is computed alike on every rank from rows gathered with gradient; ring is a
    share per rank, exchanged around.
    """

    batch_coupled: ClassVar[bool] = False
    reduction: ClassVar[Literal["local", "global", "ring"]] = "local"
    needs_tokens: bool = False
    needs_scale: bool = False
    needs_bias: bool = False

    def forward(self, inputs: LossInputs) -> dict[str, Tensor]:
        """Scalars by name, "loss" among them. Autocast is off: 16 bits are too few for logits."""
        device = next((v.device.type for f in fields(inputs) if (v := getattr(inputs, f.name)) is not None), "cpu")
        with torch.autocast(device, enabled=False):
            return self.terms(inputs)

    @abstractmethod
    def terms(self, inputs: LossInputs) -> dict[str, Tensor]:
        """The objective itself."""


def gathered_unit(x: Tensor) -> Tensor:
    """(B, D) -> (W*B, D) of length one from all W ranks, with gradient."""
    return gather_with_grad(F.normalize(x, dim=-1))
