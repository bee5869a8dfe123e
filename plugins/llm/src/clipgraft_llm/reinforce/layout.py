"""How a reinforced data set lies on disk: a folder of ``reinforced-00000.safetensors``, ... and ``reinforced.json``.

A shard holds, for n samples with A augmentations, R captions and C written ones at most, and teachers of S dimensions
together (side by side, each of length one):

    image_emb     (n, A, S)    bf16 or fp32  of the picture under each augmentation
    text_emb      (n, R+C, S)  bf16 or fp32  the sample's captions first, then the written ones; zeros for none
    caption_hash  (n, R+C)     int64         of the texts, 0 for none
    key_hash      (n,)         int64         of the sample's id
    size          (n, 2)       int32         height and width of the picture [pixels]
    box           (n, A, 4)    int32         top, left, height, width of the crop [pixels]
    op            (n, A, P)    uint8         operations by their place in ``augment.OPERATIONS``
    strength      (n, A, P)    fp32          of the operations
    written_json  (bytes,)     uint8         UTF-8 JSON: a list of each sample's written captions

Samples are found by key and captions by text, as in this plugin's text features (``cache.layout``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from clipgraft.errors import InputError

FORMAT, DESCRIPTION = 1, "reinforced.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTeacher:
    """A model reference, a digest of its weights, its embedding ``dim``, and the ``scale`` of its cosines."""

    model: str
    sha256: str
    dim: int
    scale: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Reinforcement:
    """What a store follows from. ``captions`` R, ``written`` C, ``augmentations`` A; ``rows`` samples per shard."""

    teachers: tuple[StoredTeacher, ...]
    source: str
    source_fingerprint: str
    samples: int
    captions: int
    written: int
    written_sha256: str
    augmentations: int
    area: tuple[float, float]
    operations: int
    magnitude: float
    seed: int
    stored: str
    rows: int

    @property
    def dims(self) -> tuple[int, ...]:
        """S_t of each teacher."""
        return tuple(teacher.dim for teacher in self.teachers)

    @property
    def scales(self) -> tuple[float, ...]:
        """Of each teacher's cosines."""
        return tuple(teacher.scale for teacher in self.teachers)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {"format": FORMAT, **json.loads(json.dumps(asdict(self)))}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Reinforcement:
        """What ``as_dict`` gave."""
        found = {name: values[name] for name in cls.__dataclass_fields__}
        found["teachers"] = tuple(StoredTeacher(**teacher) for teacher in found["teachers"])
        return cls(**found | {"area": tuple(found["area"])})


def read_description(folder: Path) -> tuple[Reinforcement, bool]:
    """``reinforced.json`` and whether the store is complete; ``InputError`` without one."""
    file = folder / DESCRIPTION
    try:
        values = json.loads(file.read_text("utf-8"))
        number, complete, found = values["format"], bool(values["complete"]), Reinforcement.from_dict(values)
    except FileNotFoundError:
        raise InputError(
            f"{folder} holds no {DESCRIPTION}; make a store with: clipgraft llm reinforce-data SRC --teacher MODEL "
            "--out DIR"
        ) from None
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{file} is damaged or of another kind; write the store again into an empty folder") from None
    if number != FORMAT:
        raise InputError(f"{file} has format {number}, this version reads {FORMAT}; write the store again")
    return found, complete


def shard_file(folder: Path, number: int) -> Path:
    """Where shard ``number`` is."""
    return folder / f"reinforced-{number:05d}.safetensors"
