"""A text model by reference: a local directory, a registered head, or a page of the hub; safetensors only.

Its fingerprint covers every file that decides what it says: weights, configuration, tokenizer, pooling, prompts.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipgraft.errors import ClipgraftError, InputError
from clipgraft.files import sha256_of
from clipgraft.log import RunLog

if TYPE_CHECKING:
    from clipgraft.registry import Registry

SCHEME, ELSEWHERE, OWN = "llm:", "CLIPGRAFT_LLM_PATH", "text_model.json"
"""``llm:DIR`` opens a text model as an encoder; the variable lists folders in which moved models are looked for; the
file says how a model of ours wants to be asked."""
TUNED = "text-model"
"""Where in its directory a run of caption-contrast leaves the model."""
ARCHITECTURE = "text_architecture.json"
"""transformers' configuration of a text model whose weights an export holds."""
TOKENIZER = ("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "*.model", "vocab.*", "merges.txt")
FILES = ("config.json", "*.safetensors", "*.safetensors.index.json", "modules.json", "*/config.json",
         "config_sentence_transformers.json", "sentence_*_config.json", OWN, *TOKENIZER)  # fmt: skip
SHOWN_FROM = 2**30
"""Bytes from which hashing shows progress."""


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """``reference`` as it was given; ``path`` holds config.json, tokenizer and weights, ``root`` what is around them

    (they differ in sentence-transformers' older layout, which has the model in 0_Transformer).
    """

    reference: str
    root: Path
    path: Path

    def read(self, name: str) -> Mapping[str, Any]:
        """A JSON object of ``root``, empty where there is no such file."""
        file = self.root / name
        if not file.is_file():
            return {}
        return dict(_json(file))

    @property
    def weights(self) -> list[Path]:
        """The safetensors files; ``InputError`` without any."""
        found = sorted(self.path.glob("*.safetensors"))
        if not found:
            other = next(iter(sorted([*self.path.glob("*.bin"), *self.path.glob("*.pt*")])), None)
            why = "no weights; fetch its .safetensors files"
            why = f"only {other.name}, a pickle, which is not read; convert it to safetensors" if other else why
            raise InputError(f"text model {self.reference}: {self.path} holds {why}")
        return found

    def fingerprint(self) -> str:
        """Hex sha256 of names and contents of all files that decide what the model says."""
        return self._digest(FILES, self.weights)

    def tokenizer_fingerprint(self) -> str:
        """The same of the tokenizer's files."""
        return self._digest(TOKENIZER, [])

    def _digest(self, patterns: tuple[str, ...], weights: list[Path]) -> str:
        found = {f for p in patterns for base in {self.root, self.path} for f in base.glob(p) if f.is_file()}
        total, digest = sum(f.stat().st_size for f in weights), hashlib.sha256()
        if total > SHOWN_FROM:
            RunLog().info(f"hashing {total / 2**30:.1f} GiB of {self.reference}")
        for file in sorted(found, key=lambda f: f.relative_to(self.root).as_posix()):
            digest.update(f"{file.relative_to(self.root).as_posix()} {_sha256(file)}\n".encode())
        return digest.hexdigest()


def find_model(reference: str, *, registry: Registry | None = None) -> ModelFolder:
    """The folder of a text model: ``DIR``, ``llm:DIR``, a registered head such as toyworld/text-teacher, ``ORG/NAME``.

    A directory that was moved is looked for in the folders that the variable CLIPGRAFT_LLM_PATH lists.
    """
    name = reference.removeprefix(SCHEME)
    if not name:
        raise InputError(
            "a text model is needed: a directory of transformers, ORG/NAME of the hub, or a registered head"
        )
    path = Path(name).expanduser()
    if path.is_dir():
        return _described(reference, path.resolve())
    for place in map(Path, filter(None, os.environ.get(ELSEWHERE, "").split(os.pathsep))):
        for moved in (place / path.name, place):
            if moved.name == path.name and moved.is_dir():
                return _described(reference, moved.resolve())
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise InputError(
            f"text model {reference}: there is no such directory; if it was moved, set {ELSEWHERE} to the folder "
            "that holds it now"
        )
    return _of_head(reference, name, registry) or _described(reference, _from_hub(name))


def _of_head(reference: str, name: str, registry: Registry | None) -> ModelFolder | None:
    """A registered head that is a transformers model read from a folder; None when no head has that name."""
    from clipgraft.registry import current

    registry = registry or current()
    if name not in {r.name for r in registry.list("head")} | {r.component.name for r in registry.list("head")}:
        return None
    with quiet():
        head = registry.build("head", name, {})
    folder = Path(str(getattr(head, "name_or_path", "")))
    if not (folder / "config.json").is_file():
        raise InputError(f"text model {reference}: this head is no transformers model that was read from a directory")
    return _described(reference, folder.resolve())


@contextmanager
def quiet() -> Iterator[None]:
    """transformers' report about other heads and its bar are no news here; what is missing is checked by us."""
    from transformers.utils import logging

    held, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(held)
        logging.enable_progress_bar() if bar else None


def _from_hub(name: str) -> Path:
    """The small files, then the safetensors; nothing else is fetched."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=[*FILES, "*_Pooling/*", "*_Normalize/*", "*_Dense/*"]))
    except Exception as error:  # network, name and permission errors alike
        reason = " ".join(str(error).split())[:160]
        raise InputError(
            f"text model {name} is no directory, no registered head, and could not be fetched: {reason}"
        ) from None


def _described(reference: str, root: Path) -> ModelFolder:
    if not (root / "config.json").is_file() and (root / TUNED / "config.json").is_file():
        root = root / TUNED
    path = root
    if not (root / "config.json").is_file():
        inner = [m.get("path", "") for m in modules_of(root) if str(m.get("type", "")).endswith("Transformer")]
        path = root / inner[0] if inner and (root / inner[0]).resolve().is_relative_to(root) else root
    if not (path / "config.json").is_file():
        raise InputError(f"text model {reference}: {path} has no config.json; give a directory that transformers wrote")
    return ModelFolder(reference, root, path)


def modules_of(root: Path) -> list[Mapping[str, Any]]:
    """The list in sentence-transformers' modules.json; empty without that file."""
    file = root / "modules.json"
    return [dict(m) for m in _json(file)] if file.is_file() else []


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ClipgraftError(f"{file} can't be read as JSON ({str(error).splitlines()[0]}); fetch it again") from None


def _sha256(file: Path) -> str:
    """Of a file's contents, once per process unless it changes."""
    stat = file.stat()
    return _hashed(file.resolve(), stat.st_size, stat.st_mtime_ns)


@cache
def _hashed(file: Path, _size: int, _modified: int) -> str:
    return sha256_of(file)
