"""Parts of a diffusers directory or Hugging Face repository: what is missing, said before anything is downloaded."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from clipgraft.errors import InputError


def local_part(name: str, subfolder: str | None, *, usual: str = "vae") -> Path | None:
    """The folder of a part when ``name`` is a path: ``subfolder`` (or its usual name) inside it, or itself."""
    path = Path(name).expanduser()
    if not path.exists() and not name.startswith((".", "/", "~")):
        return None
    inside = path / (subfolder or usual)
    return inside if inside.is_dir() else path


def part_problem(
    name: str, subfolder: str | None, *, setting: str, what: str, otherwise: str, file: str = "config.json"
) -> str | None:
    """Why a part can't be opened, as far as can be seen without the network; None when nothing speaks against it.

    ``setting`` is the key that named it, ``what`` the part, ``otherwise`` what else the user may do.
    """
    if (folder := local_part(name, subfolder)) is not None:
        if (folder / file).is_file():
            return None
        return f"{setting}: {name} holds no diffusers {what} (no {file}); give one that does, or {otherwise}"
    import huggingface_hub

    path = f"{subfolder}/{file}" if subfolder else file
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}
    if offline and not isinstance(huggingface_hub.try_to_load_from_cache(name, path), str):
        return (
            f"{setting}: {name} isn't in the local Hugging Face cache and HF_HUB_OFFLINE is set; unset it, give a "
            f"local directory, or {otherwise}"
        )
    return None


def open_part(opener: Any, name: str, subfolder: str | None, *, setting: str, otherwise: str, **more: Any) -> Any:
    """``opener.from_pretrained`` of a local directory or a Hugging Face id; ``more`` goes to it."""
    local = local_part(name, subfolder)
    where, inside = (name, subfolder) if local is None else (str(local), None)
    try:
        return opener.from_pretrained(where, **({"subfolder": inside} if inside else {}), **more)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{setting}: {name} can't be opened ({str(error).splitlines()[0]}); accept its licence and log in, give a "
            f"local directory, or {otherwise}"
        ) from error


def local_settings(name: str, subfolder: str, file: str) -> dict[str, Any] | None:
    """A part's settings when they can be read without the network; None otherwise."""
    folder = local_part(name, subfolder)
    if folder is None:
        import huggingface_hub

        found = huggingface_hub.try_to_load_from_cache(name, f"{subfolder}/{file}")
        path = Path(found) if isinstance(found, str) else None
    else:
        path = folder / file
    if path is None or not path.is_file():
        return None
    settings: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return settings
