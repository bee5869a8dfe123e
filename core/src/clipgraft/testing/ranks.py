"""Run functions in several gloo processes on this machine, for tests."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from typing import Any


def _ours(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that are clipgraft's."""
    return {name: value for name, value in environ.items() if name.startswith("CLIPGRAFT_")}


def _worker(pipe: Connection, rank: int, world: int, port: int, settings: Mapping[str, str]) -> None:
    for name in _ours(os.environ):  # the fork server has those of the test that started it
        del os.environ[name]
    os.environ |= settings
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
        while (task := pipe.recv()) is not None:
            fn, args = task
            pipe.send((True, fn(*args)))  # tensors travel as shared memory: they live until the next task comes
    except EOFError:
        pass
    except BaseException:
        pipe.send((False, traceback.format_exc()))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


class Ranks:
    """``world`` processes with a process group, for many functions in a row; a context manager.

    They start with the first ``call``. After a failure they are gone, since one that waits for another can't be used
    any more, and the next call starts new ones.
    """

    def __init__(self, world: int) -> None:
        self.world = world
        self._pipes: list[Connection] = []
        self._processes: list[ForkServerProcess] = []

    def call(self, fn: Callable[..., Any], *args: Any, timeout: float = 120) -> list[Any]:
        """``fn(*args)`` in every process; their results in rank order.

        ``fn`` must be importable (a module-level function) and return something picklable. Raises ``RuntimeError`` with
        the traceback of the first rank that fails, or when a rank is silent for ``timeout`` seconds.
        """
        if not self._processes:
            self._start()
        results: dict[int, Any] = {}
        try:
            for pipe in self._pipes:
                pipe.send((fn, args))
            until = time.monotonic() + timeout
            while waiting := {pipe: rank for rank, pipe in enumerate(self._pipes) if rank not in results}:
                ready: list[Any] = wait([*waiting], until - time.monotonic())
                if not ready:
                    raise RuntimeError(f"rank {min(waiting.values())} of {self.world} said nothing for {timeout} s")
                for pipe in ready:
                    good, value = pipe.recv()
                    if not good:
                        raise RuntimeError(f"rank {waiting[pipe]} of {self.world} failed:\n{value}")
                    results[waiting[pipe]] = value
        except BaseException:
            self.stop(patience=0)
            raise
        return [results[rank] for rank in range(self.world)]

    def stop(self, *, patience: float = 5) -> None:
        """End the processes; those that don't within ``patience`` seconds are killed."""
        for pipe in self._pipes:
            with suppress(OSError):  # it is gone already
                pipe.send(None)
        for process in self._processes:
            process.join(patience)
            if process.is_alive():
                process.kill()
                process.join()
        self._pipes, self._processes = [], []

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "open_clip", "accelerate"])
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        for rank in range(self.world):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_worker, args=(theirs, rank, self.world, port, _ours(os.environ)), daemon=False
            )
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def run_ranks(fn: Callable[..., Any], world: int, *args: Any, timeout: float = 120) -> list[Any]:
    """``fn(*args)`` in ``world`` processes that are started for it alone; as ``Ranks.call``."""
    with Ranks(world) as ranks:
        return ranks.call(fn, *args, timeout=timeout)
