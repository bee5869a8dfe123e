"""Parts of a diffusers directory or Hugging Face repository: what is missing, said before anything is downloaded."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from clipgraft.errors import InputError
from clipgraft.log import RunLog
from clipgraft_diffusion.weights import STEMS, Weights, mismatch, part_sha256, shard_names, weight_files


def local_part(name: str, subfolder: str | None, *, usual: str = "vae") -> Path | None:
    """The folder of a part when ``name`` is a path: ``subfolder`` (or its usual name) inside it, or itself."""
    path = Path(name).expanduser()
    if not path.exists() and not name.startswith((".", "/", "~")):
        return None
    inside = path / (subfolder or usual)
    return inside if inside.is_dir() else path


def part_problem(
    name: str,
    subfolder: str | None,
    *,
    setting: str,
    what: str,
    otherwise: str,
    file: str = "config.json",
    revision: str | None = None,
    weights: Weights | None = None,
    log: RunLog | None = None,
) -> str | None:
    """Why a part can't be opened, as far as can be seen without the network; None when nothing speaks against it.

    ``setting`` is the key that named it, ``what`` the part, ``otherwise`` what else the user may do. With ``weights``
    the safetensors are looked for, too, and compared with their pinned sha256.
    """
    if (folder := local_part(name, subfolder)) is not None:
        if revision is not None:
            return f"{setting}: {name} is a directory, which has no revision {revision}; set the revision to null"
        if not (folder / file).is_file():
            return f"{setting}: {name} holds no diffusers {what} (no {file}); give one that does, or {otherwise}"
        return None if weights is None else _weights_problem(folder, f"{setting}: the {what} of {name}", weights, log)
    if not (cached := _cached(name, subfolder, file, revision)) and _offline():
        return (
            f"{setting}: {name} isn't in the local Hugging Face cache and HF_HUB_OFFLINE is set; unset it, give a "
            f"local directory, or {otherwise}"
        )
    if cached and weights is not None and weights.sha256 and (files := weight_files(cached.parent)):
        return mismatch(files, weights.sha256, what=f"{setting}: the {what} of {name}", log=log)
    return None


def _weights_problem(folder: Path, what: str, weights: Weights, log: RunLog | None) -> str | None:
    if weights.seed is not None:
        return None
    try:
        files = weight_files(folder)
    except InputError as error:
        return str(error)
    if absent := [f.name for f in files if not f.is_file()] or ([] if files else [f"{STEMS[0]}.safetensors"]):
        return (
            f"{what} has no {absent[0]}; add its safetensors (no other weights are read), or set weights to random for "
            "a trial"
        )
    return mismatch(files, weights.sha256, what=what, log=log)


def open_part(
    opener: Any,
    name: str,
    subfolder: str | None,
    *,
    setting: str,
    otherwise: str,
    revision: str | None = None,
    weights: Weights | None = None,
    log: RunLog | None = None,
    **more: Any,
) -> Any:
    """``opener.from_pretrained`` of a local directory or a Hugging Face id; ``more`` goes to it.

    With ``weights`` the sha256 of its safetensors is told to ``log`` and compared with the pinned one before they are
    read, or random ones are drawn for the sizes in its config.json, the same in every process and stage.
    """
    local, what = local_part(name, subfolder), f"{setting}: the {(subfolder or 'model').replace('_', ' ')} of {name}"
    try:
        if weights is not None and weights.seed is not None:
            if log is not None:
                log.info(f"{what} has random weights (seed {weights.seed}), for the sizes in its config.json")
            return _random(opener, _downloaded(name, subfolder, revision) if local is None else local, weights.seed)
        if weights is not None:
            local = _downloaded(name, subfolder, revision, weights=True) if local is None else local
            _check_files(local, what, weights, log)
        if local is not None:
            return opener.from_pretrained(str(local), **more)
        more |= {"subfolder": subfolder} if subfolder else {}
        return opener.from_pretrained(name, **more, **({"revision": revision} if revision else {}))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{setting}: {name} can't be opened ({str(error).splitlines()[0]}); accept its licence and log in, give a "
            f"local directory, or {otherwise}"
        ) from error


def _check_files(folder: Path, what: str, weights: Weights, log: RunLog | None) -> None:
    files = weight_files(folder)
    if problem := mismatch(files, weights.sha256, what=what, log=log):
        raise InputError(problem)
    if log is not None and log.is_main and files:
        log.info(f"{what} has the sha256 {part_sha256(files, log=log)}{', as pinned' if weights.sha256 else ''}")


def _random(opener: Any, folder: Path, seed: int) -> Any:
    """A model of the sizes in ``folder``/config.json; the global random state stays as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if hasattr(opener, "from_config") and hasattr(opener, "load_config"):  # diffusers
            return opener.from_config(opener.load_config(str(folder)))
        return opener(opener.config_class.from_pretrained(str(folder)))  # transformers


def _downloaded(name: str, subfolder: str | None, revision: str | None, *, weights: bool = False) -> Path:
    """A part's config.json, and its safetensors if asked for, in the Hugging Face cache; their folder."""
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    def get(file: str) -> Path:
        path = f"{subfolder}/{file}" if subfolder else file
        return Path(huggingface_hub.hf_hub_download(name, path, revision=revision))

    folder = get("config.json").parent
    for stem in STEMS if weights else ():
        for file in (f"{stem}.safetensors", f"{stem}.safetensors.index.json"):
            try:
                found = get(file)
            except EntryNotFoundError:  # also what a cache without it says offline
                continue
            for shard in shard_names(found) if file.endswith(".json") else ():
                get(shard)
            return folder
    if weights:
        raise InputError(f"{name} has no safetensors in {subfolder or 'its root'}; no other weights are read")
    return folder


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}


def _cached(name: str, subfolder: str | None, file: str, revision: str | None) -> Path | None:
    import huggingface_hub

    path = f"{subfolder}/{file}" if subfolder else file
    found = huggingface_hub.try_to_load_from_cache(name, path, revision=revision)
    return Path(found) if isinstance(found, str) else None


def local_settings(
    name: str, subfolder: str | None, file: str, *, revision: str | None = None
) -> dict[str, Any] | None:
    """A part's settings when they can be read without the network; None otherwise."""
    folder = local_part(name, subfolder)
    path = _cached(name, subfolder, file, revision) if folder is None else folder / file
    if path is None or not path.is_file():
        return None
    try:
        settings = json.loads(path.read_text("utf-8"))
    except ValueError:
        settings = None
    if not isinstance(settings, dict):
        raise InputError(f"{path} is no JSON object; download or copy the model again")
    return settings
