"""The resume state of a training stage: exact, for the same versions; safetensors and JSON only."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from clipgraft import distributed, files
from clipgraft.errors import ClipgraftError, InputError
from clipgraft.optim import Average
from clipgraft.stage import TrainStage


def rng_state() -> dict[str, Tensor]:
    """State of torch's and Python's global generators (and this rank's accelerator) as tensors."""
    _, python, gauss = random.getstate()
    state = {"torch": torch.get_rng_state(), "python": torch.tensor(python, dtype=torch.int64)}
    if gauss is not None:
        state["gauss"] = torch.tensor(gauss, dtype=torch.float64)
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, Tensor]) -> None:
    """Undo what happened to the generators since ``rng_state``."""
    torch.set_rng_state(state["torch"])
    gauss = state["gauss"].item() if "gauss" in state else None
    random.setstate((3, tuple(state["python"].tolist()), gauss))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


@dataclass(slots=True)
class TrainState:
    """Everything that the next step depends on. ``scaler`` is Accelerate's, for fp16."""

    folder: Path
    stage: TrainStage
    optimizer: torch.optim.Optimizer
    average: Average | None
    scaler: Any = None

    def save(self, step: int, *, keep: int, extra: dict[str, Any]) -> Path:
        """Write ``step-<n>``; all ranks take part, each with its own random state. Older states beyond ``keep`` go."""
        path = self.folder / f"step-{step:08d}"
        generators = distributed.to_main(rng_state())
        if distributed.rank() == 0:
            with files.whole_folder(path) as new:
                for rank, generator in enumerate(generators):
                    files.write_tensors(new / f"rng-{rank}.safetensors", generator)
                files.write_tensors(new / "stage.safetensors", _untied(self.stage.trained_state()))
                self._write_optimizer(new)
                if self.average is not None:
                    files.write_tensors(new / "average.safetensors", self.average.shadow)
                scaler = self.scaler.state_dict() if self.scaler is not None else None
                files.write_json(new / "meta.json", {"step": step, "scaler": scaler, **extra})
            for old in self.saved()[:-keep]:
                shutil.rmtree(old, ignore_errors=True)
        distributed.barrier()
        return path

    def saved(self) -> list[Path]:
        """States on disk, oldest first."""
        return sorted(p for p in self.folder.glob("step-*") if p.is_dir())

    def load_newest(self) -> dict[str, Any] | None:
        """Restore the newest state that is whole; returns its ``meta.json`` or None when there is none.

        The random state comes back last and separately (``restore_rng``), after the data iterator was created.
        """
        for path in reversed(self.saved()):
            if files.is_whole(path):
                self._read(path)
                return {**json.loads((path / "meta.json").read_text("utf-8")), "path": str(path)}
        return None

    def restore_rng(self, path: Path) -> None:
        """This rank's generators as they were when ``path`` was saved."""
        count, world = len(list(path.glob("rng-*.safetensors"))), distributed.world_size()
        if count != world:
            raise InputError(
                f"{path} was saved by {count} process{'es' * (count > 1)} and {world} came up; resume with torchrun "
                f"--nproc_per_node {count}, since each has a random state of its own"
            )
        set_rng_state(load_file(path / f"rng-{distributed.rank()}.safetensors"))

    def _write_optimizer(self, folder: Path) -> None:
        state = self.optimizer.state_dict()
        tensors, plain = {}, {}
        for index, entry in state["state"].items():
            for key, value in entry.items():
                if isinstance(value, Tensor):
                    tensors[f"{index}.{key}"] = value
                else:
                    plain[f"{index}.{key}"] = value
        files.write_tensors(folder / "optimizer.safetensors", tensors)
        files.write_json(folder / "optimizer.json", {"plain": plain, "param_groups": state["param_groups"]})

    def _read(self, path: Path) -> None:
        own = self.stage.trained_state()
        stored = load_file(path / "stage.safetensors")
        if set(stored) != set(_untied(own)):
            odd = sorted(set(stored) ^ set(own))[:3]
            raise ClipgraftError(f"{path} belongs to another configuration (differs in {', '.join(odd)})")
        with torch.no_grad():
            for key, value in stored.items():
                own[key].copy_(value)
        described = json.loads((path / "optimizer.json").read_text("utf-8"))
        state: dict[int, dict[str, Any]] = {}
        for key, value in {**load_file(path / "optimizer.safetensors"), **described["plain"]}.items():
            index, _, name = key.partition(".")
            state.setdefault(int(index), {})[name] = value
        self.optimizer.load_state_dict({"state": state, "param_groups": described["param_groups"]})
        if self.average is not None:
            for key, value in load_file(path / "average.safetensors").items():
                self.average.shadow[key].copy_(value)
        meta = json.loads((path / "meta.json").read_text("utf-8"))
        if self.scaler is not None and meta["scaler"] is not None:
            self.scaler.load_state_dict(meta["scaler"])


def _untied(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without second names of the same tensor (safetensors refuses shared memory)."""
    seen: set[int] = set()
    return {k: v for k, v in state.items() if not (id(v) in seen or seen.add(id(v)))}  # type: ignore[func-returns-value]
