"""How text features lie on disk, and when they may be used.

A cache is a folder of ``features-00000.safetensors``, ... and ``cache.json``. A shard holds, for n samples with C
captions at most and V features:

    emb           (n, C, V)  bf16 or fp32    features, not projected; zeros where a sample has fewer captions
    key_hash      (n,)       int64           of the sample's id
    caption_hash  (n, C)     int64           of the captions' text, 0 for none

Samples are found by key, never by their place: a filtered or reordered data source still meets its own features.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipgraft.errors import InputError
from clipgraft_llm.tower.model_folder import ModelFolder
from clipgraft_llm.tower.settings import TextSettings, features_hash

FORMAT, DESCRIPTION = 1, "cache.json"
STORED = {"bf16": torch.bfloat16, "fp32": torch.float32}


def hash_of(text: str) -> int:
    """A signed 64-bit number, never 0."""
    digest = hashlib.blake2b(text.encode("utf-8", "backslashreplace"), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True) or 1


def hashes(texts: Sequence[str]) -> Tensor:
    """(n,) int64."""
    return torch.tensor([hash_of(text) for text in texts], dtype=torch.int64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """What a cache's features follow from. ``features`` is a hash of all of that; ``width`` V, ``captions`` C."""

    model: str
    fingerprint: str
    tokenizer: str
    settings: Mapping[str, Any]
    features: str
    stored: str
    width: int
    captions: int
    rows: int
    source: str
    source_fingerprint: str
    samples: int

    @classmethod
    def of(
        cls,
        folder: ModelFolder,
        settings: TextSettings,
        *,
        stored: str,
        captions: int,
        rows: int,
        source: str,
        source_fingerprint: str,
        samples: int,
    ) -> Description:
        """Of a model that is asked as ``settings`` say, about the samples of a source."""
        model, tokenizer = folder.fingerprint(), folder.tokenizer_fingerprint()
        return cls(
            model=folder.reference,
            fingerprint=model,
            tokenizer=tokenizer,
            settings=settings.as_dict(),
            features=features_hash(settings, model=model, tokenizer=tokenizer),
            stored=stored,
            width=settings.width,
            captions=captions,
            rows=rows,
            source=source,
            source_fingerprint=source_fingerprint,
            samples=samples,
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {"format": FORMAT, **asdict(self)}

    def metadata(self) -> dict[str, str]:
        """The same as safetensors metadata holds it: strings."""
        return {k: v if isinstance(v, str) else json.dumps(v, sort_keys=True) for k, v in self.as_dict().items()}


def read_description(folder: Path) -> tuple[Description, dict[str, Any]]:
    """``cache.json`` and what else it says (counts, whether it is complete); ``InputError`` without one."""
    file = folder / DESCRIPTION
    try:
        found = dict(json.loads(file.read_text("utf-8")))
        number = found.pop("format")
        names = Description.__dataclass_fields__
        described = Description(**{k: found.pop(k) for k in names})
    except FileNotFoundError:
        raise InputError(
            f"{folder} holds no {DESCRIPTION}; make a cache with: clipgraft llm cache MODEL --data SRC --out DIR"
        ) from None
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{file} is damaged or of another kind; build the cache again into an empty folder") from None
    if number != FORMAT:
        raise InputError(f"{file} has format {number}, this version reads {FORMAT}; build the cache again")
    return described, found


def why_other(found: Description, *, folder: ModelFolder, settings: TextSettings) -> str:
    """Why a cache's features aren't those that ``settings`` ask of the model in ``folder``; empty when they are."""
    wanted, model, tokenizer = settings.as_dict(), folder.fingerprint(), folder.tokenizer_fingerprint()
    if found.features == features_hash(settings, model=model, tokenizer=tokenizer):
        return ""
    for name, value in wanted.items():
        if (had := found.settings.get(name)) != value:
            return f"its {name} is {had!r}, this run's is {value!r}"
    if found.tokenizer != tokenizer:
        return f"its tokenizer was another one than {folder.reference}'s"
    return f"its features came from {found.model} with other weights or files than {folder.reference} has now"


def shard_file(folder: Path, number: int) -> Path:
    """Where shard ``number`` is."""
    return folder / f"features-{number:05d}.safetensors"
