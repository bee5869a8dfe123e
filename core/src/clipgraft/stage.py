"""What a recipe is made of: stages. ``TrainStage`` is one module called on a batch; ``JobStage`` is anything else."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from torch import Tensor, nn

from clipgraft.types import Batch, StepOutput

if TYPE_CHECKING:
    from clipgraft.config.schema import TrainConfig
    from clipgraft.data.base import Source
    from clipgraft.encoders.base import Encoder
    from clipgraft.runner import Run


@dataclass(frozen=True, slots=True)
class StageResult:
    """What a finished stage leaves: the encoder as it is now (None: unchanged), modules by name, last metrics."""

    encoder: Encoder | None = None
    components: Mapping[str, nn.Module] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)


class Stage(Protocol):
    """Anything with a name that runs."""

    @property
    def name(self) -> str: ...

    def run(self, run: Run) -> StageResult:
        """Do the work and return what it leaves."""


@dataclass(frozen=True, slots=True)
class JobStage:
    """Work that is not a training loop: merging, mining, caching features."""

    name: str
    job: Callable[[Run], StageResult]

    def run(self, run: Run) -> StageResult:
        """Call the job."""
        return self.job(run)


class TrainStage(nn.Module, ABC):
    """Model, teachers, heads and losses as one module: ``forward(batch)`` is the whole step of a method.

    Frozen parts: call ``freeze(module)``; they stay in eval mode, out of the optimizer and out of the resume state.
    ``batch_coupled`` is true when the loss contrasts samples with each other: such a stage refuses plain gradient
    accumulation; a ``ContrastiveStage`` accumulates exactly.
    """

    batch_coupled: ClassVar[bool] = False
    training_crop: tuple[float, float] | None = (0.9, 1.0)
    """Area range of the random resized crop of training images; None takes the evaluation transform."""
    wants_text: bool = False

    def __init__(self, name: str, *, train: TrainConfig, source: Source) -> None:
        super().__init__()
        self.name, self.train_config, self.source = name, train, source
        self._frozen: list[nn.Module] = []

    @abstractmethod
    def forward(self, batch: Batch) -> StepOutput:
        """One batch -> scalar loss and named terms."""

    def current_encoder(self) -> Encoder | None:
        """The encoder being trained, as evaluation and export should see it; None when this stage trains none."""
        return None

    def components(self) -> dict[str, nn.Module]:
        """Modules that a later stage or the export needs; saved when the stage ends."""
        return {}

    def param_groups(self) -> list[dict[str, Any]]:
        """Optimizer groups: ``params`` plus optional ``lr_scale`` (x train.lr), ``weight_decay``, ``name``."""
        return [{"params": [p for p in self.parameters() if p.requires_grad], "name": "all"}]

    def must_receive_gradient(self) -> Iterable[tuple[str, Tensor]]:
        """Parameters that must have a gradient after the first backward; a dead adapter is an error, not a shrug."""
        return [(name, p) for name, p in self.named_parameters() if p.requires_grad]

    def after_update(self, step: int) -> None:
        """Called after every optimizer step: clamp a scale, update a teacher."""

    def final_metrics(self) -> dict[str, float]:
        """What the method measures once, after its last step."""
        return {}

    def freeze(self, module: nn.Module) -> nn.Module:
        """No gradient, eval mode for good, absent from optimizer and checkpoint."""
        module.requires_grad_(False).eval()
        self._frozen.append(module)
        return module

    def train(self, mode: bool = True) -> TrainStage:
        """As ``nn.Module.train``, frozen parts stay in eval mode."""
        super().train(mode)
        for module in self._frozen:
            module.eval()
        return self

    def trained_state(self) -> dict[str, Tensor]:
        """State dict without the frozen modules' tensors."""
        hidden = {id(t) for m in self._frozen for t in [*m.parameters(), *m.buffers()]}
        return {k: v for k, v in self.state_dict(keep_vars=True).items() if id(v) not in hidden}

    def run(self, run: Run) -> StageResult:
        """Train on the stage's source and return what it leaves."""
        from clipgraft.trainer import Trainer

        return Trainer(self.train_config).fit(run, self)


class ContrastiveStage(TrainStage):
    """A stage whose loss couples the samples of a batch, split so that the trainer can cache features.

    ``encode`` maps a chunk of the batch to features with the batch in front, ``loss_from`` maps the features of the
    whole batch to the loss; both read the same parameters. The trainer then accumulates exactly (Gao et al. 2021,
    "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", arXiv 2101.06983).
    """

    batch_coupled: ClassVar[bool] = True

    @abstractmethod
    def encode(self, batch: Batch) -> tuple[Tensor, ...]:
        """A chunk of b samples -> features, each (b, ...)."""

    @abstractmethod
    def loss_from(self, features: tuple[Tensor, ...], batch: Batch) -> StepOutput:
        """Features of the whole batch -> loss; the only other parameters read here are scalars."""

    def forward(self, batch: Batch) -> StepOutput:
        """The step without a cache."""
        return self.loss_from(self.encode(batch), batch)
