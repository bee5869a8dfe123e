"""Run a function in several gloo processes on this machine, for tests."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any


def _worker(pipe: Connection, fn: Callable[..., Any], rank: int, world: int, port: int, args: tuple[Any, ...]) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    import datetime

    import torch
    from torch import distributed as dist

    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
        assert dist.get_world_size() == world, f"{dist.get_world_size()} processes came up instead of {world}"
        pipe.send((True, fn(*args)))
    except BaseException:
        pipe.send((False, traceback.format_exc()))
    finally:
        pipe.poll(60)  # tensors travel as shared memory: live on until the parent has them
        if dist.is_initialized():
            dist.destroy_process_group()


def run_ranks(fn: Callable[..., Any], world: int, *args: Any, timeout: float = 120) -> list[Any]:
    """``fn(*args)`` in ``world`` processes with a process group; their results in rank order.

    ``fn`` must be importable (a module-level function) and return something picklable. Raises ``RuntimeError`` with
    the traceback of the first rank that fails, or when a rank is silent for ``timeout`` seconds.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "open_clip", "accelerate"])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pipes, processes = [], []
    for rank in range(world):
        ours, theirs = context.Pipe()
        process = context.Process(target=_worker, args=(theirs, fn, rank, world, port, args), daemon=False)
        process.start()
        pipes.append(ours)
        processes.append(process)
    try:
        results = []
        for rank, pipe in enumerate(pipes):
            if not pipe.poll(timeout):
                raise RuntimeError(f"rank {rank} of {world} said nothing for {timeout} s")
            good, value = pipe.recv()
            pipe.send(None)
            if not good:
                raise RuntimeError(f"rank {rank} of {world} failed:\n{value}")
            results.append(value)
        return results
    finally:
        for process in processes:
            process.join(5)
            process.kill() if process.is_alive() else None
