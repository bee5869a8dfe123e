"""Frozen diffusers models of one class: which config names them, and what is said when one can't be had."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from clipgraft.errors import InputError
from clipgraft_diffusion.opening import local_settings, open_part, part_problem


@dataclass(frozen=True, slots=True)
class Pretrained:
    """A model class of diffusers. ``setting`` names the config value, ``noun`` the thing, ``instead`` a way around."""

    cls: str
    setting: str
    noun: str
    instead: str

    def problem(self, name: str, subfolder: str | None) -> str | None:
        """Why ``name`` can't be opened, as far as can be seen without the network; None when nothing speaks so."""
        otherwise = f"{self.instead}, which needs none"
        if problem := part_problem(name, subfolder, setting=self.setting, what=self.noun, otherwise=otherwise):
            return problem
        found = (self.settings(name, subfolder) or {}).get("_class_name", self.cls)
        if found != self.cls:
            return f"{self.setting}: {name} holds a diffusers {found}, not a {self.cls}; give one, or {self.instead}"
        return None

    def settings(self, name: str, subfolder: str | None) -> dict[str, Any] | None:
        """The model's config.json where it is at hand, in a directory or in the Hugging Face cache."""
        return local_settings(name, subfolder or "", "config.json")

    def open(self, name: str, subfolder: str | None) -> Any:
        """The model from a local directory or a Hugging Face id, safetensors only."""
        import diffusers

        if problem := self.problem(name, subfolder):
            raise InputError(problem)
        opener: Any = getattr(diffusers, self.cls)
        return open_part(opener, name, subfolder, setting=self.setting, otherwise=self.instead, use_safetensors=True)
