"""Processes: the accelerator, gathering with gradient, agreeing. Only this file and the trainer meet Accelerate."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor
from torch import distributed as dist

from clipgraft.errors import InputError


def make_accelerator(precision: str, *, trackers: tuple[str, ...] = (), folder: Path | None = None) -> Accelerator:
    """An ``Accelerator`` for this process. Refuses to run as fewer processes than the launcher asked for."""
    from clipgraft import launching

    if trackers:
        from accelerate.utils import is_mlflow_available, is_tensorboard_available, is_wandb_available

        present = {"tensorboard": is_tensorboard_available, "wandb": is_wandb_available, "mlflow": is_mlflow_available}
        for name in trackers:
            if not present[name]():
                raise InputError(f"trackers: {name} is not installed; pip install {name}, or remove it from trackers")
    AcceleratorState._reset_state()  # another run of this process may have another precision; the process group stays
    with launching.hidden_from_accelerate():
        accelerator = Accelerator(
            mixed_precision={"fp32": "no"}.get(precision, precision),
            cpu=not torch.cuda.is_available() and not torch.backends.mps.is_available(),
            log_with=list(trackers) or None,
            project_dir=folder,
        )
    asked = launching.asked_of_launcher()
    if accelerator.num_processes != asked:
        raise InputError(
            f"the launcher asked for {asked} processes but {accelerator.num_processes} came up; use torchrun "
            f"--nproc_per_node {asked} -m clipgraft run ... (accelerate launch --cpu runs one process)"
        )
    return accelerator


def rank() -> int:
    """This process's index, 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes, 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def barrier() -> None:
    """Wait for every process."""
    if world_size() > 1:
        dist.barrier()


class _Gather(torch.autograd.Function):
    """All-gather whose backward sums what every rank sends to this rank's rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].contiguous()
        dist.all_reduce(total)
        return total.chunk(world_size())[rank()]


def gather_with_grad(x: Tensor) -> Tensor:
    """(B, ...) on each of W ranks -> (W*B, ...) in rank order, with gradient to every rank.

    When every rank computes the same loss from the gathered rows and DDP averages parameter gradients, the result is
    the gradient of one process on the whole batch. B must be equal on all ranks. Identity without a process group.
    """
    if world_size() == 1:
        return x
    return _Gather.apply(x)  # type: ignore[no-any-return]


def to_all(value: Any) -> list[Any]:
    """Every rank's ``value`` in rank order, everywhere."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def to_main(value: Any) -> list[Any]:
    """Every rank's ``value`` in rank order on rank 0, an empty list elsewhere."""
    if world_size() == 1:
        return [value]
    values: list[Any] | None = [None] * world_size() if rank() == 0 else None
    dist.gather_object(value, values, dst=0)
    return values or []


def any_rank(flag: bool) -> bool:
    """True everywhere if it is true on any rank."""
    if world_size() == 1:
        return flag
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    value = torch.tensor(float(flag), device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value)


def share_of_rows(rows: Tensor) -> Tensor:
    """Weight () of a mean over ``rows`` () of this rank's samples, of which each rank has another number.

    With it the mean over ranks, which DDP takes, is the mean over the samples of all ranks. 1 without a process group.
    """
    own = rows.detach().float()
    if world_size() == 1:
        return torch.ones_like(own)
    total = own.clone()
    dist.all_reduce(total)
    return own * world_size() / total.clamp(min=1)


def mean_over_ranks(values: Mapping[str, Tensor]) -> dict[str, float]:
    """Named scalars averaged over ranks, in one reduction and one synchronisation."""
    if not values:
        return {}
    stacked = torch.stack([v.detach().float().reshape(()) for v in values.values()])
    if world_size() > 1:
        dist.all_reduce(stacked)
        stacked /= world_size()
    return dict(zip(values, stacked.tolist(), strict=True))
