"""Frozen diffusers models of one class: which config names them, and what is said when one can't be had."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from clipgraft.errors import InputError
from clipgraft.log import RunLog
from clipgraft_diffusion.opening import local_settings, open_part, part_problem
from clipgraft_diffusion.weights import Weights


@dataclass(frozen=True, slots=True)
class Pretrained:
    """A model class of diffusers. ``setting`` names the config value, ``noun`` the thing, ``instead`` a way around."""

    cls: str
    setting: str
    noun: str
    instead: str

    def problem(
        self,
        name: str,
        subfolder: str | None,
        *,
        revision: str | None = None,
        weights: Weights | None = None,
        log: RunLog | None = None,
    ) -> str | None:
        """Why ``name`` can't be opened, as far as can be seen without the network; None when nothing speaks so."""
        otherwise = f"{self.instead}, which needs none"
        if problem := part_problem(
            name,
            subfolder,
            setting=self.setting,
            what=self.noun,
            otherwise=otherwise,
            revision=revision,
            weights=weights,
            log=log,
        ):
            return problem
        found = (self.settings(name, subfolder, revision=revision) or {}).get("_class_name", self.cls)
        if found != self.cls:
            return f"{self.setting}: {name} holds a diffusers {found}, not a {self.cls}; give one, or {self.instead}"
        return None

    def settings(self, name: str, subfolder: str | None, *, revision: str | None = None) -> dict[str, Any] | None:
        """The model's config.json where it is at hand, in a directory or in the Hugging Face cache."""
        return local_settings(name, subfolder, "config.json", revision=revision)

    def open(
        self,
        name: str,
        subfolder: str | None,
        *,
        revision: str | None = None,
        weights: Weights | None = None,
        log: RunLog | None = None,
    ) -> Any:
        """The model from a local directory or a Hugging Face id, safetensors only, in fp32."""
        import diffusers

        if problem := self.problem(name, subfolder, revision=revision, weights=weights):
            raise InputError(problem)
        return open_part(
            getattr(diffusers, self.cls),
            name,
            subfolder,
            setting=self.setting,
            otherwise=self.instead,
            revision=revision,
            weights=weights,
            log=log,
            use_safetensors=True,
        )
