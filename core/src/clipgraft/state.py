"""The resume state of a training stage: exact, for the same versions; safetensors and JSON only."""

from __future__ import annotations

import json
import random
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from clipgraft import distributed, files
from clipgraft.errors import ClipgraftError, InputError
from clipgraft.optim import Average
from clipgraft.sharding import FOLDER, read_shards, stored_shapes, write_shards
from clipgraft.stage import TrainStage

PARTS = ("stage", "optimizer", "average")


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
    """Everything that the next step depends on. ``scaler`` is Accelerate's, for fp16.

    ``sharded``: tensors are split over the ranks, each of which writes its own; as many as come up read them.
    """

    folder: Path
    stage: TrainStage
    optimizer: torch.optim.Optimizer
    average: Average | None
    scaler: Any = None
    sharded: bool = False
    damaged: list[Path] = field(default_factory=list)
    """States that ``load_newest`` passed over."""

    def save(self, step: int, *, keep: int, extra: dict[str, Any]) -> Path:
        """Write ``step-<n>``; all ranks take part, each with its own random state. Older states beyond ``keep`` go."""
        path, main = self.folder / f"step-{step:08d}", distributed.rank() == 0
        generators, tensors = distributed.to_main(rng_state()), self._tensors()
        with files.whole_folder(path) if main else nullcontext(path) as draft:
            if self.sharded:
                shared = distributed.to_all(draft)[0]
                write_shards(shared, {f"{part}.{k}": x for part, found in tensors.items() for k, x in found.items()})
            if main:
                for rank, generator in enumerate(generators):
                    files.write_tensors(draft / f"rng-{rank}.safetensors", generator)
                for part, found in {} if self.sharded else tensors.items():
                    files.write_tensors(draft / f"{part}.safetensors", found)
                files.write_json(draft / "optimizer.json", self._plain())
                scaler = self.scaler.state_dict() if self.scaler is not None else None
                files.write_json(draft / "meta.json", {"step": step, "scaler": scaler, **extra})
        if main:
            saved = self.saved()
            done = saved.index(path) + 1  # a later one is damaged, or this step would not be done again
            for old in [*saved[: max(done - keep, 0)], *saved[done:]]:
                files.remove_folder(old)
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
            self.damaged.append(path)
        return None

    def restore_rng(self, path: Path) -> int:
        """This rank's generators as they were when ``path`` was saved by as many ranks; by how many it was."""
        count = len(list(path.glob("rng-*.safetensors")))
        if count == distributed.world_size():
            set_rng_state(load_file(path / f"rng-{distributed.rank()}.safetensors"))
        return count

    def _tensors(self) -> dict[str, dict[str, Tensor]]:
        """By part: the stage's, the optimizer's as <parameter's place>.<name>, the averaged ones."""
        entries = self.optimizer.state_dict()["state"].items()
        moments = {f"{i}.{k}": x for i, entry in entries for k, x in entry.items() if isinstance(x, Tensor)}
        found = {"stage": _untied(self.stage.trained_state()), "optimizer": moments}
        return found if self.average is None else found | {"average": self.average.shadow}

    def _plain(self) -> dict[str, Any]:
        """What the optimizer knows beside tensors."""
        state = self.optimizer.state_dict()
        entries = [(f"{i}.{k}", x) for i, entry in state["state"].items() for k, x in entry.items()]
        plain = {name: x for name, x in entries if not isinstance(x, Tensor)}
        return {"plain": plain, "param_groups": state["param_groups"]}

    def _stored(self, path: Path) -> dict[str, dict[str, Tensor]]:
        """As ``_tensors``, from ``path``; sharded ones split as they are now."""
        if self.sharded != (path / FOLDER).exists():
            was = "whole" if self.sharded else "split"
            raise InputError(f"{path} holds {was} weights; set distributed.shard as it was, or start more processes")
        if not self.sharded:
            return {part: load_file(file) for part in PARTS if (file := path / f"{part}.safetensors").exists()}
        params = [p for group in self.optimizer.param_groups for p in group["params"]]
        own = self._tensors()
        found: dict[str, dict[str, Tensor]] = {part: {} for part in own}
        for key, (size, dtype) in stored_shapes(path).items():
            part, _, name = key.partition(".")
            like = params[int(name.partition(".")[0])] if part == "optimizer" else own[part].get(name)
            if like is not None and like.shape == size:
                found[part][name] = torch.empty_like(like, dtype=dtype)
            else:
                found[part][name] = torch.empty(size, dtype=dtype)
        read_shards(path, {f"{part}.{name}": x for part, tensors in found.items() for name, x in tensors.items()})
        return found

    def _read(self, path: Path) -> None:
        own, stored = self.stage.trained_state(), self._stored(path)
        if set(stored["stage"]) != set(_untied(own)):
            odd = sorted(set(stored["stage"]) ^ set(own))[:3]
            raise ClipgraftError(f"{path} belongs to another configuration (differs in {', '.join(odd)})")
        with torch.no_grad():
            for key, value in stored["stage"].items():
                own[key].copy_(value)
        described = json.loads((path / "optimizer.json").read_text("utf-8"))
        state: dict[int, dict[str, Any]] = {}
        for key, value in {**stored["optimizer"], **described["plain"]}.items():
            index, _, name = key.partition(".")
            state.setdefault(int(index), {})[name] = value
        self.optimizer.load_state_dict({"state": state, "param_groups": described["param_groups"]})
        for p, moments in self.optimizer.state.items():  # fused kernels pair elements by their place in memory
            found = {k: x for k, x in moments.items() if torch.is_tensor(x) and x.shape == p.shape}
            moments.update({k: torch.empty_like(p).copy_(x) for k, x in found.items() if x.stride() != p.stride()})
        if self.average is not None:
            for key, value in stored["average"].items():
                self.average.shadow[key].copy_(value)
        meta = json.loads((path / "meta.json").read_text("utf-8"))
        if self.scaler is not None and meta["scaler"] is not None:
            self.scaler.load_state_dict(meta["scaler"])


def _untied(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without second names of the same tensor (safetensors refuses shared memory)."""
    seen: set[int] = set()
    return {k: v for k, v in state.items() if not (id(v) in seen or seen.add(id(v)))}  # type: ignore[func-returns-value]
