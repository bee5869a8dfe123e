"""Frozen diffusers models by directory or Hugging Face id: what can be said before opening, and opening them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipgraft.errors import InputError


@dataclass(frozen=True, slots=True)
class Pretrained:
    """A model class of diffusers and how messages speak of it.

    ``setting`` names the config value, ``noun`` the thing, ``instead`` what to do without it; ``folder`` is where the
    model lies inside a pipeline's directory when the config names no subfolder.
    """

    cls: str
    setting: str
    noun: str
    instead: str
    folder: str

    def problem(self, name: str, subfolder: str | None) -> str | None:
        """Why ``name`` can't be opened, as far as can be seen without the network; None when nothing speaks so."""
        if (folder := self._local(name, subfolder)) is not None:
            if (folder / "config.json").is_file():
                return None
            return (
                f"{self.setting}: {name} holds no diffusers {self.noun} (no config.json); give one that does, or "
                f"{self.instead}, which needs none"
            )
        import huggingface_hub

        path = f"{subfolder}/config.json" if subfolder else "config.json"
        offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}
        if offline and not isinstance(huggingface_hub.try_to_load_from_cache(name, path), str):
            return (
                f"{self.setting}: {name} isn't in the local Hugging Face cache and HF_HUB_OFFLINE is set; unset it, "
                f"give a local directory, or {self.instead}"
            )
        return None

    def open(self, name: str, subfolder: str | None) -> Any:
        """The model from a local directory or a Hugging Face id, safetensors only."""
        import diffusers

        opener: Any = getattr(diffusers, self.cls)
        if problem := self.problem(name, subfolder):
            raise InputError(problem)
        local = self._local(name, subfolder)
        where, inside = (name, subfolder) if local is None else (str(local), None)
        try:
            return opener.from_pretrained(where, subfolder=inside, use_safetensors=True)
        except OSError as error:
            raise InputError(
                f"{self.setting}: {name} can't be opened ({str(error).splitlines()[0]}); accept its licence and log "
                f"in, give a local directory, or {self.instead}"
            ) from error

    def _local(self, name: str, subfolder: str | None) -> Path | None:
        path = Path(name).expanduser()
        if not path.exists() and not name.startswith((".", "/", "~")):
            return None
        inside = path / (subfolder or self.folder)
        return inside if inside.is_dir() else path
