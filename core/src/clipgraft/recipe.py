"""What a recipe is: a plan of stages known up front, each built when its turn comes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from clipgraft.runner import Run
    from clipgraft.stage import Stage


@dataclass(frozen=True, slots=True)
class StagePlan:
    """A stage by name and how to build it; ``build`` runs after the earlier stages ended and freed their memory.

    ``about``: what a dry run says beside the name.
    """

    name: str
    build: Callable[[Run], Stage]
    about: str = ""


class Recipe(Protocol):
    """A method as a list of stages. The registered target is called with the recipe's config object."""

    def plan(self) -> list[StagePlan]:
        """The stages in order, without building any."""

    def check(self, run: Run) -> list[str]:
        """One line per problem that can be seen before any work is done (``--dry-run`` prints them)."""
