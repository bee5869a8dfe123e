"""The training loop. It knows stages, not methods; a method that needs a branch here is missing a hook or a stage.

One step, top to bottom: batch -> forward and backward through the wrapper (in chunks when asked) -> finite? -> clip ->
optimizer -> averages -> log -> evaluate -> save. Every random draw comes from a state that resume restores.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from clipgraft import distributed, files, performance
from clipgraft.config.schema import TrainConfig
from clipgraft.errors import ClipgraftError, InputError, Interrupted, NonFiniteLossError
from clipgraft.log import MetricsFile
from clipgraft.optim import Average, build_optimizer, learning_rate, set_learning_rate
from clipgraft.sharding import Shards, clip_norm
from clipgraft.stage import ContrastiveStage, StageResult, TrainStage
from clipgraft.state import TrainState, rng_state, set_rng_state
from clipgraft.types import Batch, StepOutput, widened

if TYPE_CHECKING:
    from accelerate.optimizer import AcceleratedOptimizer

    from clipgraft.runner import Run


class Step(nn.Module):
    """The module that DDP wraps: a whole step, or the second pass of one chunk with known feature gradients."""

    def __init__(self, stage: TrainStage) -> None:
        super().__init__()
        self.stage = stage

    def forward(
        self,
        batch: Batch,
        feature_grads: tuple[Tensor, ...] | None = None,
        scalar_grads: tuple[tuple[nn.Parameter, Tensor], ...] = (),
        *,
        encode: bool = False,
    ) -> StepOutput | tuple[Tensor, ...]:
        """The stage's output; or the surrogate sum(feature * gradient) whose gradient is this chunk's share.

        ``encode``: the chunk's features alone, through the wrapper, without which sharded weights aren't there.
        """
        if encode:
            assert isinstance(self.stage, ContrastiveStage)
            return self.stage.encode(batch)
        if feature_grads is None:
            return self.stage(batch)  # type: ignore[no-any-return]
        assert isinstance(self.stage, ContrastiveStage)
        features = self.stage.encode(batch)
        loss = torch.stack([(widened(f) * g).sum() for f, g in zip(features, feature_grads, strict=True)]).sum()
        for p, g in scalar_grads:
            loss = loss + (p * g).sum()
        return StepOutput(loss, {}, len(batch))


class Trainer:
    """Trains one stage by its ``TrainConfig``."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config

    def fit(self, run: Run, stage: TrainStage) -> StageResult:
        """Train ``stage`` to its last step, resuming from the newest state on disk; returns what the stage leaves."""
        with performance.prepared(stage, run.config.performance):
            return self._fit(run, stage)

    def _fit(self, run: Run, stage: TrainStage) -> StageResult:
        cfg, accelerator, folder = self.config, run.accelerator, run.stage_folder(stage.name)
        self._check(stage)
        loader = run.train_loader(stage)
        stage.to(run.device)
        optimizer = build_optimizer(stage, cfg)
        wrapped, prepared, shards = self._wrapped(run, Step(stage), optimizer)
        run.shards = shards
        average = Average(stage, cfg.ema) if cfg.ema else None
        state = TrainState(folder / "state", stage, optimizer, average, accelerator.scaler, shards is not None)
        found = state.load_newest()
        start = found["step"] if found else 0
        for path in state.damaged:
            run.log.info(f"{stage.name}: {path} is damaged and passed over; going on after step {start}")
        loader.load_state_dict(dict(enumerate(found["loaders"])).get(distributed.rank(), {}) if found else {})
        run.load_hooks(stage, found["hooks"] if found else {})
        metrics = MetricsFile(folder / "metrics.jsonl", is_main=run.is_main, after_step=start)
        MetricsFile(folder / "evaluations.jsonl", is_main=run.is_main, after_step=start)
        batches = loader.iterate(start)
        run.seed_stage(stage.name, per_rank=True)
        if found:
            self._restore_rng(run, stage, state, found)

        def save(step: int) -> None:
            extra = {"loaders": distributed.to_main(loader.state_dict()), "hooks": run.save_hooks(stage)}
            state.save(step, keep=cfg.keep, extra=extra)

        stage.train()
        began, saved = time.monotonic(), start
        with run.log.progress(stage.name, cfg.steps, done=start) as bar:
            for step, batch in enumerate(self._moved(batches, run.device, cfg.steps - start), start):
                set_learning_rate(optimizer, learning_rate(cfg, step))
                held = rng_state()
                run.hooks.call("before_step", run=run, stage=stage, step=step, batch=batch)
                output = self._forward_backward(run, wrapped, stage, batch)
                shards.reduce_single() if shards else None
                if step == start:
                    self._refuse_dead_parameters(stage)
                accelerator.unscale_gradients(prepared) if accelerator.scaler else None
                run.hooks.call("before_optimizer", run=run, stage=stage, step=step)
                norm = self._clip(run, stage)
                if distributed.any_rank(not bool(torch.isfinite(output.loss))):
                    set_rng_state(held)
                    save(step) if saved != step else None
                    raise self._non_finite(run, stage, step, batch, output)
                prepared.step()
                if not accelerator.optimizer_step_was_skipped:
                    stage.after_update(step)
                    average.update() if average else None
                prepared.zero_grad(set_to_none=True)
                run.hooks.call("after_step", run=run, stage=stage, step=step, output=output)
                done, stop = step + 1, distributed.any_rank(run.stop_requested)
                if done % cfg.log_every == 0 or done == cfg.steps:
                    row = self._row(cfg, step, output, norm, time.monotonic() - began)
                    metrics.write(row)
                    run.track(stage.name, done, row)
                    bar.advance(0, note=f"loss {row['loss']:.4f}")
                bar.advance()
                if cfg.evaluate_every and done % cfg.evaluate_every == 0 and done < cfg.steps:
                    self._evaluate(run, stage, average, done)
                if (cfg.save_every and done % cfg.save_every == 0) or stop:
                    save(done)
                    saved = done
                if stop:
                    raise Interrupted(f"stopped in {stage.name} after step {done}; continue with --resume {run.path}")
        accelerator.free_memory()
        if loader.bad.count:
            run.log.info(f"{stage.name}: {loader.bad}")
        average.swap() if average else None
        shards.end() if shards else None
        run.shards = None
        stage.eval()
        return StageResult(stage.current_encoder(), stage.components(), stage.final_metrics())

    @staticmethod
    def _wrapped(
        run: Run, step: Step, optimizer: torch.optim.Optimizer
    ) -> tuple[nn.Module, AcceleratedOptimizer, Shards | None]:
        """The step behind DDP with the optimizer behind Accelerate's; or both on shards of the weights."""
        if not run.layout.shard or distributed.world_size() == 1:
            return (*run.accelerator.prepare(step, optimizer), None)
        shards = Shards(step, device=run.device, reshard=run.layout.reshard)
        shards.adopt(optimizer)
        wrapped = run.accelerator.prepare_model(step, device_placement=False, evaluation_mode=True)  # autocast alone
        return wrapped, run.accelerator.prepare_optimizer(optimizer, device_placement=False), shards

    @staticmethod
    def _restore_rng(run: Run, stage: TrainStage, state: TrainState, found: dict[str, Any]) -> None:
        """This rank's random state; a new one when another number of processes saved it."""
        start, saved, world = found["step"], state.restore_rng(Path(found["path"])), distributed.world_size()
        if saved != world and run.config.distributed.processes != world:
            raise InputError(
                f"{found['path']} was saved by {saved} process{'es' * (saved > 1)} and {world} came up; resume with "
                f"torchrun --nproc_per_node {saved}, since each has a random state of its own; or write processes: "
                f"{world} below distributed in {run.path / 'config.yaml'}, to go on with other dropout and noise"
            )
        run.log.info(f"{stage.name}: resumed after step {start}")
        if saved != world:
            run.seed_stage(f"{stage.name}/{start}", per_rank=True)
            run.log.info(
                f"{stage.name}: of {saved} processes, now {world}: the same batches, but other dropout and noise"
            )

    def _check(self, stage: TrainStage) -> None:
        cfg, world = self.config, distributed.world_size()
        if cfg.batch_size % (world * cfg.accumulate):
            raise InputError(
                f"{stage.name}: batch_size {cfg.batch_size} must be divisible by {world} processes x accumulate "
                f"{cfg.accumulate}; set batch_size to a multiple of {world * cfg.accumulate}"
            )
        if cfg.accumulate > 1 and stage.batch_coupled and not isinstance(stage, ContrastiveStage):
            raise InputError(
                f"{stage.name}: accumulate {cfg.accumulate} would contrast only inside chunks, another objective; set "
                "accumulate to 1 (this stage offers no feature cache)"
            )

    @staticmethod
    def _moved(batches: Iterator[Batch], device: torch.device, count: int) -> Iterator[Batch]:
        for batch in islice(batches, count):
            yield batch.to(device, non_blocking=True)

    def _forward_backward(self, run: Run, wrapped: nn.Module, stage: TrainStage, batch: Batch) -> StepOutput:
        """Gradients of the mean loss over the batch of all ranks; returns the output with detached terms."""
        chunks = self.config.accumulate
        if chunks == 1:
            output: StepOutput = wrapped(batch)
            run.accelerator.backward(output.loss)
            return _detached(output)
        size = len(batch) // chunks
        parts = [batch[slice(k * size, (k + 1) * size)] for k in range(chunks)]
        if isinstance(stage, ContrastiveStage):
            return self._cached(run, wrapped, stage, batch, parts)
        outputs = []
        for k, part in enumerate(parts):
            with _no_sync(run, wrapped) if k + 1 < chunks else nullcontext():
                output = wrapped(part)
                run.accelerator.backward(output.loss / chunks)
            outputs.append(_detached(output))
        mean = {k: torch.stack([o.terms[k] for o in outputs]).mean() for k in outputs[0].terms}
        return StepOutput(torch.stack([o.loss for o in outputs]).mean(), mean, len(batch))

    def _cached(
        self, run: Run, wrapped: nn.Module, stage: ContrastiveStage, batch: Batch, parts: list[Batch]
    ) -> StepOutput:
        """Two passes: features without a graph, the loss on them, then each chunk again with its feature gradients.

        The random state is replayed per chunk, so dropout agrees in both passes. Gradients of scalars that the loss
        reads directly (logit_scale) travel with the last surrogate, so that DDP averages them exactly once.
        """
        states, cached = [], []
        with torch.no_grad(), run.accelerator.autocast():
            for part in parts:
                states.append(rng_state())
                features = wrapped(part, encode=True) if run.layout.shard else stage.encode(part)
                cached.append(tuple(widened(f) for f in features))
        after = rng_state()
        leaves = tuple(torch.cat(column).requires_grad_() for column in zip(*cached, strict=True))
        scalars = [p for p in stage.parameters() if p.requires_grad and p.numel() == 1]
        output = stage.loss_from(leaves, batch)
        scale = 1.0 if run.accelerator.scaler is None else run.accelerator.scaler.get_scale()
        grads = torch.autograd.grad(output.loss, [*leaves, *scalars], allow_unused=True)
        feature_grads = [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=False)]
        pairs = zip(scalars, grads[len(leaves) :], strict=True)
        scalar_grads = tuple((p, g) for p, g in pairs if g is not None)
        size = len(parts[0])
        for k, part in enumerate(parts):
            last = k + 1 == len(parts)
            rows = tuple(g[k * size : (k + 1) * size] for g in feature_grads)
            set_rng_state(states[k])
            with nullcontext() if last else _no_sync(run, wrapped):
                surrogate = wrapped(part, rows, scalar_grads if last else ())
                (surrogate.loss * scale).backward()
        set_rng_state(after)
        return _detached(output)

    def _clip(self, run: Run, stage: TrainStage) -> Tensor | None:
        params = [p for p in stage.parameters() if p.requires_grad]
        if self.config.clip_norm is None:
            return None
        if any(hasattr(p, "to_local") for p in params):
            return clip_norm([p.grad for p in params if p.grad is not None], limit=self.config.clip_norm)
        norm: Tensor = run.accelerator.clip_grad_norm_(params, self.config.clip_norm)
        return norm

    @staticmethod
    def _refuse_dead_parameters(stage: TrainStage) -> None:
        dead = [name for name, p in stage.must_receive_gradient() if p.grad is None]
        if dead:
            more = f" and {len(dead) - 3} more" if len(dead) > 3 else ""
            raise ClipgraftError(
                f"{stage.name}: no gradient reached {', '.join(dead[:3])}{more}; freeze what the loss doesn't use"
            )

    @staticmethod
    def _row(cfg: TrainConfig, step: int, output: StepOutput, norm: Tensor | None, seconds: float) -> dict[str, Any]:
        scalars = {"loss": output.loss, **{f"terms.{k}": v for k, v in output.terms.items()}}
        values = distributed.mean_over_ranks(scalars)
        return {
            "step": step + 1,
            "loss": values.pop("loss"),
            "terms": {k.removeprefix("terms."): v for k, v in values.items()},
            "lr": learning_rate(cfg, step),
            "grad_norm": None if norm is None else float(norm),
            "samples": (step + 1) * cfg.batch_size,
            "seconds": round(seconds, 3),
        }

    @staticmethod
    def _evaluate(run: Run, stage: TrainStage, average: Average | None, step: int) -> None:
        held = rng_state()
        average.swap() if average else None
        stage.eval()
        with run.whole():
            run.evaluate_during(stage, step)
        stage.train()
        average.swap() if average else None
        set_rng_state(held)

    @staticmethod
    def _non_finite(run: Run, stage: TrainStage, step: int, batch: Batch, output: StepOutput) -> NonFiniteLossError:
        terms = {k: float(v) for k, v in output.terms.items()}
        found = {"step": step + 1, "loss": str(float(output.loss)), "terms": {k: str(v) for k, v in terms.items()}}
        path = run.stage_folder(stage.name) / f"nonfinite-{distributed.rank()}.json"
        files.write_json(path, {**found, "ids": batch.ids})
        bad = [k for k, v in terms.items() if v != v or v in (float("inf"), float("-inf"))]
        return NonFiniteLossError(
            f"{stage.name}: the loss is {float(output.loss)} at step {step + 1}"
            f"{' in ' + ', '.join(bad) if bad else ''}; nothing was updated, the state before the step is saved, the "
            f"batch's sample ids are in {path.name}. Lower the learning rate or look at these samples"
        )


def _no_sync(run: Run, wrapped: nn.Module) -> Any:
    return run.accelerator.no_sync(wrapped)


def _detached(output: StepOutput) -> StepOutput:
    return StepOutput(output.loss.detach(), {k: v.detach() for k, v in output.terms.items()}, output.size)
