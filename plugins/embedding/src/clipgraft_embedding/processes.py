"""The processes that a launcher started, and the device of each."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import distributed as dist

from clipgraft.distributed import rank
from clipgraft.encoders import load
from clipgraft.encoders.base import Encoder
from clipgraft.registry import Registry


@contextmanager
def process_group() -> Iterator[bool]:
    """A gloo group of the processes of torchrun, none without it; yields whether this is the main process.

    Only a few objects are exchanged, never tensors, so gloo serves machines with GPUs as well. Ranks may wait long for
    each other: for the slowest share, and for the one that joins.
    """
    asked = int(os.environ.get("WORLD_SIZE", "1"))
    if asked == 1 or dist.is_initialized():
        yield rank() == 0
        return
    dist.init_process_group("gloo", timeout=datetime.timedelta(days=7))
    try:
        yield rank() == 0
    finally:
        dist.destroy_process_group()


def on_device(model: str, *, registry: Registry) -> Encoder:
    """The model in eval mode: on this process's GPU where there is one, else on the CPU."""
    encoder = load(model, registry=registry).eval()
    if torch.cuda.is_available():
        return encoder.to(torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()))
    return encoder
