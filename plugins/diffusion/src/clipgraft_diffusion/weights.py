"""Where a part's weights come from: files that a sha256 may pin, or chance.

The sha256 of a part is that of its one ``.safetensors`` file, as ``sha256sum FILE`` prints it and the Hub shows it.
Of shards it is what ``sha256sum SHARDS... | sha256sum`` prints in the part's folder, ordered by their names.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator

from clipgraft.errors import ClipgraftError, InputError
from clipgraft.log import RunLog

STEMS = ("diffusion_pytorch_model", "model")
"""File names before ``.safetensors``: diffusers' and transformers'."""
BLOCK = 2**24
_hashed: dict[tuple[str, int, int], str] = {}


def _hexadecimal(text: str) -> str:
    if not re.fullmatch("[0-9a-f]{64}", text.lower()):
        raise ValueError(f"{text!r} is no sha256; expected 64 hexadecimal digits")
    return text.lower()


Sha256 = Annotated[str, AfterValidator(_hexadecimal)]
"""64 hexadecimal digits."""
Origin = Literal["pretrained", "random"]


@dataclass(frozen=True, slots=True)
class Weights:
    """``sha256`` pins the files; ``seed`` draws random weights for the sizes in config.json instead of reading any."""

    sha256: str | None = None
    seed: int | None = None


def chosen(origin: Origin, sha256: str | None, *, seed: int) -> Weights:
    """The setting of one part; ``seed`` draws random weights."""
    return Weights(seed=seed) if origin == "random" else Weights(sha256=sha256)


def refuse_both(origin: Origin, sha256: object) -> None:
    """Raise ``ValueError`` when random weights are pinned."""
    if origin == "random" and sha256:
        raise ValueError("weights random reads no file that sha256 could pin; remove one of the two")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors that diffusers and transformers read in a part's folder: the one file, or an index's shards."""
    for stem in STEMS:
        index, whole = folder / f"{stem}.safetensors.index.json", folder / f"{stem}.safetensors"
        if index.is_file() and whole.is_file():
            raise InputError(f"{folder} holds both {whole.name} and shards; remove one, it isn't clear which is meant")
        if whole.is_file():
            return [whole]
        if index.is_file():
            return [folder / name for name in shard_names(index)]
    return []


def shard_names(index: Path) -> list[str]:
    """The files that an index of shards names, in order."""
    try:
        names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{index} is no index of shards; expected a weight_map from tensors to files") from None
    if odd := [name for name in names if Path(str(name)).name != name or not name.endswith(".safetensors")]:
        raise InputError(f"{index} names {odd[0]!r}; shards must be .safetensors files beside it")
    return names


def part_sha256(files: Sequence[Path], *, log: RunLog | None = None) -> str:
    """The sha256 of a part, as the module's docstring defines it. Files of an unchanged size and time are read once."""
    digests = [_sha256_of(file, log=log) for file in files]
    if len(files) == 1:
        return digests[0]
    lines = "".join(f"{digest}  {file.name}\n" for digest, file in zip(digests, files, strict=True))
    return hashlib.sha256(lines.encode()).hexdigest()


def _sha256_of(file: Path, *, log: RunLog | None) -> str:
    try:
        state = file.stat()
        key = str(file.resolve()), state.st_size, state.st_mtime_ns
        if key not in _hashed:
            digest = hashlib.sha256()
            with (
                file.open("rb") as data,
                log.progress(f"sha256 of {file.name}", -(-state.st_size // BLOCK))
                if log and state.st_size > 16 * BLOCK
                else nullcontext() as bar,
            ):
                while block := data.read(BLOCK):
                    digest.update(block)
                    if bar is not None:
                        bar.advance()
            _hashed[key] = digest.hexdigest()
    except OSError as error:
        raise ClipgraftError(f"{file} can't be read ({error.strerror}); download or copy the model again") from None
    return _hashed[key]


def mismatch(files: Sequence[Path], wanted: str | None, *, what: str, log: RunLog | None = None) -> str | None:
    """Why the files of ``what`` aren't the pinned ones; None when they are or nothing is pinned."""
    if wanted is None:
        return None
    if not files:
        return f"{what} has a sha256 in the settings but no safetensors file; remove the sha256 or add the file"
    found = part_sha256(files, log=log)
    if found == wanted:
        return None
    return f"{what} has the sha256 {found}, the settings say {wanted}; get the right files or correct the sha256"
