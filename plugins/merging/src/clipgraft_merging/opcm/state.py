"""What a continual merge keeps on disk, so that one more model can be added later without those before.

``continual/`` in the export: ``sum.safetensors``, the sum S per tensor in fp32, and ``state.json``: settings, the base,
each model with its hash and |tau|, and |S|. Its size is that of one model, however many were merged.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipgraft.errors import InputError
from clipgraft.files import sha256_of, write_json
from clipgraft_merging.opcm.settings import ContinualSettings
from clipgraft_merging.weights.checkpoints import Checkpoint
from clipgraft_merging.weights.stores import FileStore

FOLDER, SUM, STATE = "continual", "sum.safetensors", "state.json"
SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Merged:
    """A model that is in the sum: its reference, hash and |tau|."""

    uri: str
    sha256: str
    norm: float


@dataclass(frozen=True, slots=True)
class ContinualState:
    """The sum after some models. ``store`` None: nothing was merged yet. ``norm`` is |S|."""

    settings: ContinualSettings
    base: str
    base_sha256: str
    models: tuple[Merged, ...] = ()
    norm: float = 0.0
    store: FileStore | None = None

    @property
    def mean_norm(self) -> float:
        """Of the task vectors."""
        return math.fsum(m.norm for m in self.models) / max(len(self.models), 1)

    @property
    def scale(self) -> float:
        """What S is multiplied by in the merged model."""
        if self.settings.method in ("opcm", "rescaled"):
            return self.mean_norm / self.norm if self.norm else 1.0
        if self.settings.method == "average":
            return 1 / max(len(self.models), 1)
        return self.settings.scale if self.settings.method == "task-arithmetic" else 1.0

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        models = [{"uri": m.uri, "sha256": m.sha256, "norm": m.norm} for m in self.models]
        base = {"uri": self.base, "sha256": self.base_sha256}
        return {"settings": self.settings.as_dict(), "base": base, "models": models, "norm": self.norm}


def write_state(folder: Path, state: ContinualState) -> None:
    """``state.json`` beside the ``sum.safetensors`` that is already in ``folder``."""
    write_json(folder / STATE, {"schema": SCHEMA, **state.as_dict(), "sum_sha256": sha256_of(folder / SUM)})


def read_state(export: Path) -> ContinualState:
    """The state in an export; ``InputError`` when there is none, or a damaged one."""
    folder = export / FOLDER
    if not (folder / STATE).is_file():
        raise InputError(
            f"{export} holds no continual merge; make one with clipgraft merging opcm MODEL... --out {export}"
        )
    again = "merge its models again with --out"
    try:
        told = json.loads((folder / STATE).read_text("utf-8"))
        schema, models = told["schema"], tuple(Merged(**m) for m in told["models"])
        settings = ContinualSettings(**told["settings"])
        base, norm, digest = told["base"], float(told["norm"]), told["sum_sha256"]
        uri, sha256 = str(base["uri"]), str(base["sha256"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder / STATE} is damaged ({type(error).__name__}: {error}); {again}") from None
    if schema != SCHEMA:
        raise InputError(f"{folder / STATE} has schema {schema}, this version reads {SCHEMA}; {again}")
    if not (folder / SUM).is_file() or sha256_of(folder / SUM) != digest:
        raise InputError(f"{folder / SUM} is missing or not the one that {STATE} was written with; {again}")
    return ContinualState(settings, uri, sha256, models, norm, FileStore([folder / SUM]))


def check_fits(state: ContinualState, base: Checkpoint, model: Checkpoint) -> None:
    """Raise unless the sum is that of ``base`` and has the tensors of ``model``, which isn't in it yet."""
    if base.sha256 != state.base_sha256:
        raise InputError(
            f"{base.ref} has other weights than the base of this merge ({state.base}); give the same with --base"
        )
    for number, merged in enumerate(state.models, 1):
        if merged.sha256 == model.sha256:
            raise InputError(f"{model.ref} is in this merge already, as number {number} ({merged.uri}); leave it out")
