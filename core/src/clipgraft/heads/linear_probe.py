"""A linear classifier fitted to features: what they know, whatever the text tower says."""

from __future__ import annotations

from typing import Literal, Self

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from clipgraft.config.schema import Config
from clipgraft.errors import InputError

Solver = Literal["lbfgs", "ridge"]
DECAYS = (1.0, 0.1, 0.01, 1e-3, 1e-4)
"""Weight decays to choose from, strongest first: half the squared weights, against the mean loss of a sample."""


class LinearProbeConfig(Config):
    """Settings of the head ``core/linear-probe``."""

    dim: int = Field(gt=0, description="width D of the features")
    classes: int = Field(gt=1, description="number of classes K")
    solver: Solver = Field("lbfgs", description="multinomial logistic regression, or least squares in closed form")


class LinearProbe(nn.Module):
    """Standardised features, one linear map."""

    mean: Tensor
    std: Tensor
    weight: Tensor
    bias: Tensor

    def __init__(self, *, dim: int, classes: int, solver: Solver = "lbfgs") -> None:
        super().__init__()
        self.solver, self.classes = solver, classes
        for name, shape in {"mean": (dim,), "std": (dim,), "weight": (classes, dim), "bias": (classes,)}.items():
            self.register_buffer(name, torch.zeros(shape))

    def forward(self, x: Tensor) -> Tensor:
        """(n, D) -> (n, K) logits."""
        return F.linear((x - self.mean) / self.std, self.weight, self.bias)

    def fit(self, x: Tensor, labels: Tensor, *, decay: float | None = None) -> Self:
        """(n, D) features, (n,) labels, on the CPU; draws nothing.

        ``decay`` None takes the one of ``DECAYS`` that is best on every fifth row when fitted to the others, the
        stronger one of equals, and fits to all rows with it.
        """
        if len(labels) < 10 or bool((labels == labels[0]).all()):
            raise InputError(f"a linear probe needs 10 samples and two classes, got {len(labels)}; give it more data")
        std = x.double().std(0, correction=0)
        self.mean, self.std = x.mean(0), torch.where(std > 1e-8, std, 1).to(x.dtype)
        z = ((x - self.mean) / self.std).double()
        solve = self._lbfgs if self.solver == "lbfgs" else self._ridge
        weight, bias = solve(z, labels, self._chosen(z, labels) if decay is None else decay)
        self.weight, self.bias = weight.to(x.dtype), bias.to(x.dtype)
        return self

    def _chosen(self, z: Tensor, labels: Tensor) -> float:
        """The decay with the highest accuracy on rows that were not fitted to."""
        held, best = torch.arange(len(z)) % 5 == 0, (-1.0, DECAYS[0])
        solve = self._lbfgs if self.solver == "lbfgs" else self._ridge
        for decay in DECAYS:
            weight, bias = solve(z[~held], labels[~held], decay)
            score = float((F.linear(z[held], weight, bias).argmax(1) == labels[held]).double().mean())
            best = max(best, (score, decay))
        return best[1]

    def _lbfgs(self, z: Tensor, labels: Tensor, decay: float) -> tuple[Tensor, Tensor]:
        weight, bias = (torch.zeros(s, dtype=z.dtype, requires_grad=True) for s in (self.weight.shape, (self.classes,)))
        optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, tolerance_grad=1e-5, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            value = F.cross_entropy(F.linear(z, weight, bias), labels) + decay / 2 * weight.square().sum()
            value.backward()  # type: ignore[no-untyped-call]
            return value

        with torch.enable_grad():
            optimizer.step(loss)  # type: ignore[no-untyped-call]
        return weight.detach(), bias.detach()

    def _ridge(self, z: Tensor, labels: Tensor, decay: float) -> tuple[Tensor, Tensor]:
        target = F.one_hot(labels, self.classes).to(z.dtype)
        bias, center = target.mean(0), z.mean(0)
        z, target = z - center, target - bias
        primal = z.shape[0] >= z.shape[1]
        gram = z.T @ z if primal else z @ z.T
        gram.diagonal().add_(decay * len(z))
        found = torch.linalg.solve(gram, z.T @ target) if primal else z.T @ torch.linalg.solve(gram, target)
        return found.T, bias - found.T @ center
