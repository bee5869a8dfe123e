"""How a student's features are compared with a teacher's (AM-RADIO, section 3.3)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from clipgraft.types import widened

COSINE, SMOOTH_L1 = 0.9, 0.1
"""The two parts of the spatial loss; they sum to one."""


def summary_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """(B, D) twice -> mean of 1 - cosine."""
    return (1 - F.cosine_similarity(widened(student), widened(teacher.detach()), dim=-1)).mean()


def spatial_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """(B, N, D) twice on one grid -> 0.9 (1 - cosine) + 0.1 smooth L1, zero only where they are equal."""
    s, t = widened(student), widened(teacher.detach())
    cosine = (1 - F.cosine_similarity(s, t, dim=-1)).mean()
    return COSINE * cosine + SMOOTH_L1 * F.smooth_l1_loss(s, t)


def on_one_grid(
    student: Tensor, student_grid: tuple[int, int], teacher: Tensor, teacher_grid: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """(B, N, D) and (B, M, D) -> both on the larger grid, the other one enlarged bilinearly."""
    if student_grid == teacher_grid:
        return student, teacher
    larger = student_grid if student_grid[0] * student_grid[1] > teacher_grid[0] * teacher_grid[1] else teacher_grid
    return enlarged(student, student_grid, larger), enlarged(teacher, teacher_grid, larger)


def enlarged(tokens: Tensor, grid: tuple[int, int], to: tuple[int, int]) -> Tensor:
    """(B, h*w, D) -> (B, h'*w', D)."""
    if grid == to:
        return tokens
    maps = tokens.transpose(1, 2).unflatten(2, grid)
    return F.interpolate(maps, size=to, mode="bilinear", align_corners=False).flatten(2).transpose(1, 2)


def zero_times(parameters: list[torch.nn.Parameter]) -> Tensor | float:
    """Zero, with a gradient of zeros: parameters that a step doesn't use, so that processes agree which have one."""
    return sum((p.flatten()[0] * 0 for p in parameters), 0.0)
