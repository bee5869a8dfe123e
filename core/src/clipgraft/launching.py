"""What a run is launched as: how many processes, and whether its weights are split over them.

Said by ``distributed:`` in the config, by Accelerate's configuration file that it names, or by what ``accelerate
launch`` leaves in the environment. Processes themselves come from torchrun or ``accelerate launch``.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from clipgraft import distributed
from clipgraft.config.load import read_yaml
from clipgraft.config.schema import RunConfig
from clipgraft.errors import InputError

COUNTS = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")
"""Where launchers say how many processes they started."""
PLAIN = ("NO", "MULTI_CPU", "MULTI_GPU", "MULTI_NPU", "MULTI_XPU", "MULTI_MLU", "MULTI_HPU")
"""Accelerate's names of what is DistributedDataParallel here."""


@dataclass(frozen=True, slots=True)
class Layout:
    """``processes`` that must come up (None: any), ``shard`` by FSDP2, ``reshard`` a block's weights after its forward.

    ``origin`` names who asked.
    """

    processes: int | None = None
    shard: bool = False
    reshard: bool = True
    origin: str = "distributed.processes"

    def __str__(self) -> str:
        how = "weights split over them (FSDP2)" if self.shard else "weights whole in each of them"
        return f"{self.processes or 'any number of'} processes, {how}"


def layout(config: RunConfig) -> Layout:
    """Of a run: its settings, over the file that they name, over the environment."""
    c = config.distributed
    found = _of_environment(os.environ)
    if c.file is not None:
        found = _of_file(Path(c.file).expanduser(), precision=config.precision)
    if c.processes is not None:
        if found.processes not in (None, c.processes):
            raise InputError(
                f"distributed.processes is {c.processes}, but {found.origin} says {found.processes}; make them equal"
            )
        found = replace(found, processes=c.processes, origin="distributed.processes")
    found = replace(found, shard=found.shard or c.shard)
    if found.shard and config.precision == "fp16":
        raise InputError("distributed.shard with precision fp16 is not offered; set precision to bf16")
    return found


def refuse_fewer(found: Layout) -> None:
    """Raise unless as many processes came up as were asked for."""
    world, asked = distributed.world_size(), found.processes
    if asked is not None and asked != world:
        raise InputError(
            f"{found.origin} asks for {asked} process{'es' * (asked > 1)} but {world} came up; start with torchrun "
            f"--nproc_per_node {asked} -m clipgraft run ... (accelerate launch runs one process on a CPU)"
        )


def asked_of_launcher() -> int:
    """How many processes the launcher says that it started; 1 without a launcher."""
    return max((int(os.environ[name]) for name in COUNTS if os.environ.get(name, "").isdigit()), default=1)


@contextmanager
def hidden_from_accelerate() -> Iterator[None]:
    """Accelerate doesn't see that it should split weights, because this package does."""
    held = os.environ.pop("ACCELERATE_USE_FSDP", None)
    try:
        yield
    finally:
        if held is not None:
            os.environ["ACCELERATE_USE_FSDP"] = held


def _of_environment(names: Mapping[str, str]) -> Layout:
    """What ``accelerate launch`` set."""

    def on(name: str, default: str = "false") -> bool:
        return names.get(name, default).lower() in ("true", "1", "yes")

    if on("ACCELERATE_USE_DEEPSPEED"):
        raise _no_deepspeed("accelerate launch", names.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "?"))
    if not on("ACCELERATE_USE_FSDP"):
        return Layout()
    options = {
        "fsdp_version": names.get("FSDP_VERSION", "1"),
        "fsdp_offload_params": on("FSDP_OFFLOAD_PARAMS"),
        "fsdp_reshard_after_forward": on("FSDP_RESHARD_AFTER_FORWARD", "true"),
    }
    return _sharded(options, "accelerate launch")


def _of_file(path: Path, *, precision: str) -> Layout:
    """What Accelerate's configuration file says."""
    from accelerate.commands.config.config_args import ClusterConfig

    values = read_yaml(path)
    if unknown := sorted(values.keys() - {f.name for f in fields(ClusterConfig)}):
        raise InputError(f"{path.name}: Accelerate knows no {unknown[0]!r}; write the file with: accelerate config")
    kind, said = str(values.get("distributed_type", "NO")), str(values.get("mixed_precision", "no"))
    count = values.get("num_processes", 1)
    if not isinstance(count, int) or count < 1:
        raise InputError(f"{path.name}: num_processes is {count!r}; give the number of processes on all machines")
    if {"no": "fp32"}.get(said, said) != precision:
        raise InputError(
            f"{path.name}: mixed_precision is {said}, but the run's precision is {precision}; make them equal"
        )
    if kind == "DEEPSPEED":
        stage = (values.get("deepspeed_config") or {}).get("zero_stage", "?")
        raise _no_deepspeed(path.name, stage, count=count)
    if kind == "FSDP":
        return replace(_sharded(values.get("fsdp_config") or {}, path.name), processes=count)
    if kind not in PLAIN:
        raise InputError(f"{path.name}: distributed_type {kind} is not offered; choose MULTI_GPU, MULTI_CPU or FSDP")
    return Layout(processes=count, origin=path.name)


def _sharded(options: Mapping[str, Any], origin: str) -> Layout:
    if str(options.get("fsdp_version", 1)) != "2":
        raise InputError(f"{origin}: FSDP version 1 is not offered; set fsdp_version: 2 in fsdp_config")
    if options.get("fsdp_offload_params"):
        raise InputError(f"{origin}: shards stay on their device; set fsdp_offload_params: false")
    return Layout(shard=True, reshard=bool(options.get("fsdp_reshard_after_forward", True)), origin=origin)


def _no_deepspeed(origin: str, stage: Any, *, count: int | None = None) -> InputError:
    """It steps inside its backward pass, before a loss that is not finite could stop it, and pickles its states."""
    missing = importlib.util.find_spec("deepspeed") is None
    where = f"{origin} (ZeRO stage {stage}{'' if count is None else f', {count} processes'})"
    how = f"DeepSpeed is not {'installed, nor ' if missing else ''}offered, since it steps inside its backward pass"
    return InputError(f"{where}: {how}; split weights with distributed.shard=true (FSDP2) instead")
