"""Which group of teachers a step, a picture or a process belongs to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from clipgraft.errors import InputError


@dataclass(frozen=True, slots=True)
class Group:
    """Teachers by name, the student's size (h, w) [pixels], and this group's share."""

    teachers: tuple[str, ...]
    size: tuple[int, int]
    share: int


@dataclass(frozen=True, slots=True)
class Part:
    """Rows of a batch that a group sees; ``weight`` of its mean loss."""

    group: Group
    rows: slice
    weight: float


def alternated(groups: Sequence[Group], step: int) -> Group:
    """The group of a step: in turn, each as often as its share, spread evenly over a cycle.

    In every cycle of as many steps as shares a group has its share of them; all processes agree.
    """
    total = sum(group.share for group in groups)
    turns = sorted(((turn + 0.5) / group.share, k) for k, group in enumerate(groups) for turn in range(group.share))
    return groups[turns[step % total][1]]


def split(groups: Sequence[Group], size: int) -> list[Part]:
    """A batch of ``size`` cut by share; a group's mean loss weighs as much as its part of the batch."""
    if size < len(groups):
        raise InputError(
            f"{size} pictures per process can't be split over {len(groups)} groups; raise train.batch_size"
        )
    total, parts, start = sum(group.share for group in groups), list[Part](), 0
    for k, group in enumerate(groups):
        left = len(groups) - k - 1
        end = size if not left else max(start + 1, min(size - left, round(size * _up_to(groups, k) / total)))
        parts.append(Part(group, slice(start, end), (end - start) / size))
        start = end
    return parts


def of_rank(groups: Sequence[Group], rank: int, world: int) -> Group:
    """The group of a process: runs of processes by share; averaging gradients over processes weighs them so."""
    if world < len(groups):
        raise InputError(f"{len(groups)} groups need as many processes or more, here are {world}; set balance to split")
    return next(part.group for part in split(groups, world) if part.rows.start <= rank < part.rows.stop)


def _up_to(groups: Sequence[Group], k: int) -> int:
    return sum(group.share for group in groups[: k + 1])
