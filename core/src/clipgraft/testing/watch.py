"""Lifecycle hooks of the conformance suite: what a training stage does to its tensors, and a stop after two steps.

A stage declares: ``param_groups()`` is what it trains, ``freeze(module)`` is what never changes,
``must_receive_gradient()`` is what the loss has to reach.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from clipgraft.errors import InputError
from clipgraft.spec import runhook
from clipgraft.testing.subject import Violation

if TYPE_CHECKING:
    from clipgraft.encoders.base import Encoder
    from clipgraft.runner import Run
    from clipgraft.stage import Stage, StageResult, TrainStage
    from clipgraft.types import Batch, StepOutput


@dataclass
class Seen:
    """A training stage while it runs; None once it is over."""

    stage: TrainStage | None
    frozen: dict[str, Tensor]
    """Copies of what ``freeze`` took, parameters and buffers, from before the first step."""
    start: dict[str, Tensor]
    """Copies of what is trained, from before the first step."""
    held: dict[str, Tensor] = field(default_factory=dict)
    """Copies of what else has no gradient, from before this step; only ``after_update`` may change it."""
    reached: set[str] = field(default_factory=set)
    """Parameters whose gradient was not zero in some step."""
    required: list[str] = field(default_factory=list)
    """Parameters that the loss has to reach."""
    moved: bool = False
    steps: int = 0


class Watch:
    """Raises ``Violation`` as soon as a stage does what it doesn't declare."""

    def __init__(self) -> None:
        self.seen: list[Seen] = []
        self.features: dict[str, Tensor] = {}
        """Probe features of the last encoder that a stage left, before it was written."""

    @property
    def steps(self) -> int:
        """Optimizer steps of all stages."""
        return sum(seen.steps for seen in self.seen)

    @runhook
    def before_step(self, run: Run, stage: TrainStage, step: int, batch: Batch) -> None:
        """Take copies; frozen modules are in eval mode."""
        if not self.seen or self.seen[-1].stage is not stage:
            trained = {n: p.detach().clone() for n, p in _trained(stage).items()}
            frozen = {n: t.detach().clone() for n, t in _frozen(stage).items()}
            self.seen.append(Seen(stage, frozen, trained))
        seen = self.seen[-1]
        seen.held = {n: t.detach().clone() for n, t in _held(stage).items()}
        for module in stage._frozen:
            if moved := [name for name, m in module.named_modules() if m.training]:
                raise Violation(f"{stage.name}: frozen module {moved[0] or type(module).__name__} is in train mode")

    @runhook
    def before_optimizer(self, run: Run, stage: TrainStage, step: int) -> None:
        """Gradients are where they were declared, finite, and nowhere else."""
        seen, trained = self.seen[-1], _trained(stage)
        declared = {id(p): name for name, p in trained.items()}
        for name, p in stage.named_parameters():
            if id(p) in declared:
                if p.grad is not None and not bool(torch.isfinite(p.grad).all()):
                    raise Violation(f"{stage.name}: the gradient of {name} is not finite in step {step + 1}")
                if p.grad is not None and bool(p.grad.any()):
                    seen.reached.add(name)
            elif p.grad is not None:
                raise Violation(f"{stage.name}: {name} has a gradient but no optimizer group; freeze it or train it")
        required = dict(stage.must_receive_gradient())
        seen.required = [*required]
        if dead := [name for name, p in required.items() if p.grad is None]:
            raise Violation(f"{stage.name}: no gradient reached {dead[0]}; freeze what the loss doesn't use")
        _unchanged(stage.name, seen.held, _held(stage), "has no gradient; change it in after_update, or not at all")

    @runhook
    def after_step(self, run: Run, stage: TrainStage, step: int, output: StepOutput) -> None:
        """Loss and terms are finite scalars; frozen tensors are what they were, bit for bit."""
        seen = self.seen[-1]
        seen.steps += 1
        for name, value in {"loss": output.loss, **output.terms}.items():
            if value.numel() != 1 or not bool(torch.isfinite(value)):
                raise Violation(f"{stage.name}: {name} is {value.tolist()} in step {step + 1}, not a finite number")
        _unchanged(stage.name, seen.frozen, _frozen(stage), "is frozen; a teacher that moves must not be frozen")
        seen.moved = seen.moved or any(not torch.equal(p, seen.start[n]) for n, p in _trained(stage).items())
        if wide := [n for n, p in _trained(stage).items() if p.dtype != seen.start[n].dtype]:
            raise Violation(f"{stage.name}: {wide[0]} changed its type; weights stay what they are under autocast")

    @runhook
    def on_stage_end(self, run: Run, stage: Stage, result: StageResult) -> None:
        """What is declared as trained was reached and moved; then the features of the encoder that was left."""
        for seen in self.seen:
            if seen.stage is None:
                continue
            name = seen.stage.name
            parts: dict[str, list[str]] = {}
            for n in seen.required:
                parts.setdefault(".".join(n.split(".")[:2]), []).append(n)
            if silent := [part for part, names in parts.items() if not seen.reached.intersection(names)]:
                raise Violation(
                    f"{name}: the gradient of {silent[0]} was zero in each of {seen.steps} steps; freeze it, or leave "
                    "it out of must_receive_gradient() where the loss can miss it"
                )
            if not seen.moved:
                raise Violation(f"{name}: nothing that it trains changed in {seen.steps} steps")
            seen.stage, seen.frozen, seen.start, seen.held = None, {}, {}, {}
        if result.encoder is not None:
            self.features = probe(result.encoder)

    @runhook
    def on_run_end(self, run: Run) -> None:
        """Where no stage left an encoder, that of the run is exported."""
        if not self.features and run._encoder is not None:
            with suppress(Exception):  # the run may have failed, and says so itself
                self.features = probe(run._encoder)


class StopAfter:
    """Asks every stage once to stop after ``steps``; ``stopped`` outlives the run that it ends."""

    def __init__(self, steps: int, stopped: set[str]) -> None:
        self.steps, self.stopped, self.made = steps, stopped, 0

    @runhook
    def after_step(self, run: Run, stage: TrainStage, step: int) -> None:
        """Set the flag that a signal would set."""
        self.made += 1
        if step + 1 == self.steps and stage.name not in self.stopped:
            self.stopped.add(stage.name)
            run.stop_requested = True


PROBE_TEXTS = ["a photo of one", "two"]


def probe_pixels(size: tuple[int, int]) -> Tensor:
    """Two pictures of noise, (2, 3, H, W') in [0, 1]."""
    return torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))


def probe(encoder: Encoder) -> dict[str, Tensor]:
    """Unit embeddings (2, D) of two pictures of noise and two texts, in eval mode; without what it has no tower for.

    A text model alone refuses pictures with an ``InputError``.
    """
    pixels = probe_pixels(encoder.preprocess.size)
    device, mode, found = encoder.logit_scale.device, encoder.training, dict[str, Tensor]()
    encoder.eval()
    with torch.no_grad():
        with suppress(InputError):
            image, _ = encoder(encoder.preprocess.normalize(pixels).to(device))
            found["image"] = image.unit().float().cpu()
        if encoder.text is not None:
            _, text = encoder(text=encoder.tokenizer(PROBE_TEXTS).to(device))
            found["text"] = text.unit().float().cpu()
    encoder.train(mode)
    return found


def _trained(stage: TrainStage) -> dict[str, nn.Parameter]:
    """What the optimizer gets, by name."""
    names = {id(p): name for name, p in stage.named_parameters()}
    return {names[id(p)]: p for group in stage.param_groups() for p in group["params"]}


def _frozen(stage: TrainStage) -> dict[str, Tensor]:
    """Parameters and buffers of the modules that ``freeze`` took."""
    return {
        f"{type(module).__name__}.{name}": tensor
        for index, module in enumerate(stage._frozen)
        for name, tensor in [*module.named_parameters(f"{index}"), *module.named_buffers(f"{index}")]
    }


def _held(stage: TrainStage) -> dict[str, Tensor]:
    """Parameters without gradient that ``freeze`` didn't take, and the buffers of modules that have no other."""
    taken = {id(t) for t in _frozen(stage).values()}
    found: dict[str, Tensor] = {}
    for prefix, module in stage.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if own and not any(p.requires_grad for p in own.values()):
            found |= {f"{prefix}.{n}": t for n, t in [*own.items(), *module.named_buffers(recurse=False)]}
        else:
            found |= {f"{prefix}.{n}": p for n, p in own.items() if not p.requires_grad}
    return {name: tensor for name, tensor in found.items() if id(tensor) not in taken}


def _unchanged(stage: str, before: dict[str, Tensor], now: dict[str, Tensor], why: str) -> None:
    for name, tensor in before.items():
        if name in now and not torch.equal(tensor, now[name]):
            raise Violation(f"{stage}: {name} changed, and it {why}")
