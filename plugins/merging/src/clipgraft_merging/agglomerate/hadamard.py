"""Hadamard matrices: entries of plus and minus one, rows at right angles (Sylvester 1867, Paley 1933)."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from clipgraft.errors import InputError


def hadamard(order: int) -> Tensor:
    """(order, order) float64 of +-1 with H H^T = order * I; ``InputError`` where no construction here reaches it.

    Built from doubling (Sylvester), quadratic residues of primes (Paley I and II) and products of such matrices.
    """
    found = _built(order)
    if found is None:
        near = next((n for n in range(order + 1, 4 * order + 8) if reachable(n)), 0)
        raise InputError(
            f"no Hadamard matrix of order {order} can be constructed here (the next order that can is {near}); set "
            "normalise to standardise for this teacher"
        )
    return found.clone()


@cache
def reachable(order: int) -> bool:
    """Whether ``hadamard(order)`` exists here, without building it."""
    if order in (1, 2):
        return True
    if order < 1 or order % 4:
        return False
    if _prime(order - 1) or (_prime(order // 2 - 1) and order // 2 % 4 == 2):
        return True
    return any(reachable(part) and reachable(order // part) for part in _parts(order))


@cache
def _built(order: int) -> Tensor | None:
    if not reachable(order):
        return None
    if order == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if order == 2:
        return torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    if _prime(order - 1):  # order is a multiple of 4, so the prime is 3 mod 4
        return _paley_one(order - 1)
    if _prime(order // 2 - 1) and order // 2 % 4 == 2:
        return _paley_two(order // 2 - 1)
    part = next(p for p in _parts(order) if reachable(p) and reachable(order // p))
    first, second = _built(part), _built(order // part)
    assert first is not None and second is not None
    return torch.kron(first, second)


def _paley_one(q: int) -> Tensor:
    """Order q + 1 for a prime q of 3 mod 4: I plus a skew-symmetric conference matrix."""
    skew = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    skew[0, 1:], skew[1:, 0], skew[1:, 1:] = 1, -1, _residues(q)
    return torch.eye(q + 1, dtype=torch.float64) + skew


def _paley_two(q: int) -> Tensor:
    """Order 2 (q + 1) for a prime q of 1 mod 4: a symmetric conference matrix in blocks of two."""
    symmetric = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    symmetric[0, 1:], symmetric[1:, 0], symmetric[1:, 1:] = 1, 1, _residues(q)
    off = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    diagonal = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    return torch.kron(symmetric, off) + torch.kron(torch.eye(q + 1, dtype=torch.float64), diagonal)


def _residues(q: int) -> Tensor:
    """(q, q): at i, j whether i - j is a square modulo q (1), none (-1), or zero (0)."""
    sign = torch.full((q,), -1.0, dtype=torch.float64)
    sign[[x * x % q for x in range(1, q)]] = 1
    sign[0] = 0
    at = torch.arange(q)
    return sign[(at[:, None] - at[None]) % q]


def _parts(order: int) -> list[int]:
    """Proper divisors up to the square root, smallest first."""
    return [part for part in range(2, int(order**0.5) + 1) if order % part == 0]


@cache
def _prime(n: int) -> bool:
    return n > 1 and all(n % k for k in range(2, int(n**0.5) + 1))
