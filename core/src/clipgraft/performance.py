"""How the arithmetic of a run is done: precision, compiled blocks, memory order, attention kernels.

``auto`` is settled once, from the hardware, before a run writes its config: a run that is resumed or repeated does what
it did before, wherever that is. On processors ``auto`` takes what was found to pay (docs/benchmarks.md), on GPUs what
is usual there.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from typing import Literal, TypeVar

import torch
from torch import nn

from clipgraft.config.schema import PerformanceConfig, RunConfig
from clipgraft.errors import ClipgraftError, InputError
from clipgraft.sharding import BLOCK

C = TypeVar("C", bound=RunConfig)

BACKENDS = {"flash": "FLASH_ATTENTION", "efficient": "EFFICIENT_ATTENTION", "cudnn": "CUDNN_ATTENTION", "math": "MATH"}


def device_type() -> str:
    """Of the device that a run gets here: cuda, mps or cpu."""
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def fast_precision(device: str) -> Literal["fp32", "bf16"]:
    """bf16 where the hardware multiplies it at more than the speed of fp32, else fp32.

    Never fp16, which scales losses and which some recipes refuse: ask for it by name on GPUs that have nothing else.
    """
    if device == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if device == "cpu":
        found = _processor()
        return "bf16" if found.get("avx512_bf16") or found.get("amx_bf16") else "fp32"
    return "fp32"


def _processor() -> Mapping[str, object]:
    """What torch knows of the processor, nothing where it can't tell."""
    return torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}


def settled(config: C) -> tuple[C, list[str]]:
    """``config`` with every ``auto`` replaced by what it means on this machine, and a line that says so.

    Raises ``InputError`` when something was asked for by name that can't be done here.
    """
    device, asked, shard = device_type(), config.performance, config.distributed.shard
    values, chosen = asked.model_dump(), list[str]()
    if asked.compile == "auto":
        values["compile"] = device == "cuda" and find_spec("triton") is not None and not shard
        chosen.append(f"compile {str(values['compile']).lower()}")
    if asked.channels_last == "auto":
        values["channels_last"] = device in ("cuda", "cpu") and not shard
        chosen.append(f"channels_last {str(values['channels_last']).lower()}")
    if wanted := [key for key in ("compile", "channels_last") if values[key] and shard]:
        raise InputError(f"performance.{wanted[0]} is not offered with distributed.shard; set one of them to false")
    if values["compile"]:
        _check_compiler(device)
    changes: dict[str, object] = {"performance": PerformanceConfig(**values)}
    if config.precision == "auto":
        changes["precision"] = fast_precision(device)
        chosen.append(f"precision {changes['precision']}")
    if config.evaluate.precision == "auto":
        changes["evaluate"] = config.evaluate.model_copy(update={"precision": fast_precision(device)})
        chosen.append(f"evaluate.precision {fast_precision(device)}")
    return config.model_copy(update=changes), [f"auto on this {device}: {', '.join(chosen)}"] if chosen else []


def _check_compiler(device: str) -> None:
    """Compiled code for a CPU is C++."""
    if device == "cpu" and not any(map(shutil.which, (os.environ.get("CXX") or "g++", "clang++"))):
        raise InputError(
            "performance.compile needs a C++ compiler on a CPU and found none; install g++ or set it to false"
        )
    if device == "cuda" and find_spec("triton") is None:
        raise InputError("performance.compile needs triton on a GPU; pip install triton, or set it to false")


@contextmanager
def kernels(config: PerformanceConfig) -> Iterator[None]:
    """Attention runs with the kernel that was asked for; ``auto`` leaves the choice to torch, call by call."""
    if config.attention == "auto":
        yield
        return
    from torch.nn.attention import SDPBackend, sdpa_kernel

    try:
        with sdpa_kernel(getattr(SDPBackend, BACKENDS[config.attention])):
            yield
    except RuntimeError as error:
        if not any(said in str(error) for said in ("No available kernel", "No viable backend")):
            raise
        raise ClipgraftError(
            f"performance.attention: {config.attention} has no kernel for these inputs on this device; set it to auto"
        ) from error


@contextmanager
def quick_products(device: torch.device) -> Iterator[None]:
    """fp32 matrix products by oneDNN instead of MKL where that is faster and as exact: processors of AMD without AMX.

    For forward passes alone; training gains nothing. torch calls this its "medium" precision, because other processors
    round the factors to bf16 then, so that a product is tried first.
    """
    before = torch.get_float32_matmul_precision()
    if device.type != "cpu" or before != "highest" or not _exact_onednn():
        yield
        return
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@cache
def _exact_onednn() -> bool:
    """Whether this is a processor on which oneDNN is faster, and rounds no factor."""
    found = _processor()
    if "AMD" not in str(found.get("cpu_name")) or any(found.get(f"amx_{kind}") for kind in ("tile", "bf16", "fp16")):
        return False
    before, g = torch.get_float32_matmul_precision(), torch.Generator().manual_seed(0)
    a, b = torch.randn(256, 512, generator=g), torch.randn(512, 256, generator=g)
    try:
        torch.set_float32_matmul_precision("medium")
        error = float((a @ b - a.double() @ b.double()).abs().max())
    finally:
        torch.set_float32_matmul_precision(before)
    return error < 1e-3  # fp32 errs by 5e-5 here, factors rounded to bf16 by 0.2


@contextmanager
def prepared(module: nn.Module, config: PerformanceConfig) -> Iterator[None]:
    """``module`` (a stage) with its blocks compiled and its convolutions in the memory order asked for, in place.

    Weights keep their names, and all is as before afterwards. Blocks are compiled one by one: equal ones share their
    code, so that a deep tower costs little more than one block.
    """
    blocks = [m for name, m in module.named_modules() if BLOCK.search(name)] if config.compile else []
    for block in blocks:
        block.compile()
    order = torch.channels_last if config.channels_last else torch.contiguous_format
    _reorder(module, order)
    try:
        yield
    finally:
        for block in blocks:
            block._compiled_call_impl = None
        _reorder(module, torch.contiguous_format)


def _reorder(module: nn.Module, order: torch.memory_format) -> None:
    """Put the weights of convolutions in ``order``; the same tensors with the same values."""
    for inner in module.modules():
        if isinstance(inner, nn.Conv2d):
            inner.weight.data = inner.weight.data.contiguous(memory_format=order)
