"""k-means that finds the same clusters on every rank and in every run. n rows, D width, k clusters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor

from clipgraft.errors import InputError
from clipgraft.log import RunLog

Engine = Literal["torch", "scikit-learn"]
BLOCK = 2**16
"""Rows whose distances are held at a time."""


@dataclass(frozen=True, slots=True)
class Clusters:
    """``labels`` (n,) int64, ``centers`` (k, D) fp64, ``inertia``: the sum of squared distances to them."""

    labels: Tensor
    centers: Tensor
    inertia: float


def kmeans(
    x: Tensor,
    *,
    k: int,
    seed: int = 0,
    max_iter: int = 500,
    tol: float = 1e-5,
    engine: Engine = "torch",
    log: RunLog | None = None,
) -> Clusters:
    """(n, D) -> clusters. ``torch``: Lloyd's iterations from k-means++ seeds, all rows in each. ``scikit-learn``:

    its MiniBatchKMeans, which the paper used, for millions of rows. ``tol``: largest squared shift of the centres at
    which it stops, in mean variances of a column. A cluster that loses all rows gets the row farthest from its centre.
    """
    if len(x) < k:
        raise InputError(f"{k} clusters were asked of {len(x)} rows; ask for {max(1, len(x))} or fewer")
    if engine == "scikit-learn":
        return _minibatch(x, k=k, seed=seed, max_iter=max_iter, tol=tol)
    centers = _seeds(x, k, Generator().manual_seed(seed))
    limit = tol * float(x.double().var(0, correction=0).mean())
    with (log or RunLog(is_main=False)).progress("k-means", max_iter) as bar:
        for _ in range(max_iter):
            labels, distances = assign(x, centers)
            moved = _means(x, labels, distances, k)
            shift, centers = float((moved - centers).square().sum()), moved
            bar.advance(note=f"shift {shift:.2g}")
            if shift <= limit:
                break
    labels, distances = assign(x, centers)
    return Clusters(labels, centers, float(distances.sum()))


def assign(x: Tensor, centers: Tensor) -> tuple[Tensor, Tensor]:
    """(n, D), (k, D) -> nearest centre (n,), the first of equals, and the squared distance to it (n,)."""
    labels, distances = [], []
    for rows in x.split(BLOCK):
        r = rows.double()
        squared = r.square().sum(1, keepdim=True) - 2 * r @ centers.T + centers.square().sum(1)
        best, which = squared.clamp(min=0).min(1)
        labels.append(which)
        distances.append(best)
    return torch.cat(labels), torch.cat(distances)


def _seeds(x: Tensor, k: int, rng: Generator) -> Tensor:
    """k-means++ (Arthur and Vassilvitskii 2007): rows far from the centres so far are likelier to be the next."""
    centers = x[torch.randint(len(x), (1,), generator=rng)].double()
    while len(centers) < k:
        _, distances = assign(x, centers)
        total = distances.cumsum(0)
        at = torch.searchsorted(total, torch.rand(1, generator=rng, dtype=torch.float64) * total[-1], right=True)
        centers = torch.cat([centers, x[at.clamp(max=len(x) - 1)].double()])
    return centers


def _means(x: Tensor, labels: Tensor, distances: Tensor, k: int) -> Tensor:
    """(k, D) mean rows; an empty cluster takes the worst served row."""
    sums, counts = torch.zeros(k, x.shape[1], dtype=torch.float64), labels.bincount(minlength=k)
    for rows, which in zip(x.split(BLOCK), labels.split(BLOCK), strict=True):
        sums.index_add_(0, which, rows.double())
    means = sums / counts.clamp(min=1)[:, None]
    empty = (counts == 0).nonzero().flatten()
    if len(empty):
        means[empty] = x[distances.topk(len(empty)).indices].double()
    return means


def _minibatch(x: Tensor, *, k: int, seed: int, max_iter: int, tol: float) -> Clusters:
    try:
        from sklearn.cluster import MiniBatchKMeans
    except ImportError:
        raise InputError("engine scikit-learn is not installed; pip install scikit-learn, or set it to torch") from None
    size = min(len(x), 1_000_000)
    found = MiniBatchKMeans(k, batch_size=size, max_iter=max_iter, tol=tol, n_init=3, random_state=seed).fit(x.numpy())
    centers = torch.from_numpy(found.cluster_centers_).double()
    labels, distances = assign(x, centers)
    return Clusters(labels, centers, float(distances.sum()))
