"""The greedy soup: models by their held-out score, best first; each stays if the soup's score doesn't suffer.

The soup so far is a sum on disk in fp64 and a count, so its mean doesn't depend on what was accepted when, and a
candidate costs two reads whatever is in the soup already.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from clipgraft.errors import ClipgraftError, InputError
from clipgraft.log import RunLog
from clipgraft_merging.soup.judge import Judge
from clipgraft_merging.soup.ledger import Ledger, Step, open_ledger
from clipgraft_merging.weights.inputs import Inputs
from clipgraft_merging.weights.linear import mean, total
from clipgraft_merging.weights.stores import FileStore
from clipgraft_merging.weights.writer import SafetensorsWriter


@dataclass(frozen=True, kw_only=True)
class GreedyRule:
    """A candidate is accepted when its score is above (gt), or not below (ge), the soup's plus ``min_delta``.

    ``patience`` ends the search after that many rejections in a row; None tries every model.
    """

    accept: Literal["gt", "ge"] = "gt"
    min_delta: float = 0.0
    patience: int | None = None

    def __post_init__(self) -> None:
        if self.accept not in ("gt", "ge") or self.min_delta < 0 or (self.patience is not None and self.patience < 1):
            raise InputError(f"{self}: expected accept gt or ge, min_delta of 0 or more, patience of 1 or more")

    def accepts(self, score: float, *, best: float) -> bool:
        """Whether a soup of ``score`` replaces one of ``best``."""
        return score > best + self.min_delta if self.accept == "gt" else score >= best + self.min_delta


@dataclass(frozen=True, kw_only=True)
class GreedySoup:
    """The mean of the models that a search chose; give it to the engine with the inputs that were searched."""

    ingredients: Sequence[int]
    search: dict[str, Any] = field(default_factory=dict)
    name: str = field(default="merging/greedy-soup", init=False)

    def settings(self) -> dict[str, Any]:
        """Indices of the models in the soup, and what the search tried."""
        return {"ingredients": sorted(self.ingredients), **self.search}

    def prepare(self, inputs: Inputs, log: RunLog) -> None:
        """One pass is enough."""

    def merge(self, key: str, inputs: Inputs) -> Tensor:
        """The mean of the ingredients in the order in which the models were named."""
        return mean(key, inputs, sorted(self.ingredients))


def search(
    inputs: Inputs, judge: Judge, *, rule: GreedyRule, ledger: Path, log: RunLog, leave_one_out: bool = False
) -> GreedySoup:
    """Judge, order, accept; everything that was judged is in ``ledger`` at once, and is not judged again after a stop.

    A file ``ledger`` + ".sum.safetensors" holds the running sum and is removed at the end.
    """
    models = [{"uri": c.ref, "sha256": c.sha256} for c in inputs.models]
    rules = {"accept": rule.accept, "min_delta": rule.min_delta, "patience": rule.patience}
    book = open_ledger(ledger, {"models": models, "rule": rules, "judge": judge.identity()})
    inputs.scan(log)
    done = len(book.alone) + max(len(book.steps) - 1, 0)
    with log.progress("greedy soup", total=2 * len(models) - 1, done=min(done, 2 * len(models) - 1)) as bar:
        for index in range(len(models)):
            if index not in book.alone:
                book.alone[index] = _score(judge, _alone(inputs, index), inputs.models[index].ref)
                book.save()
                bar.advance(note=f"alone {book.alone[index]:.4f}")
        if not book.steps:
            best = book.order[0]
            book.steps.append(Step(best, book.alone[best], accepted=True))
            book.save()
        running = RunningSum(ledger.with_name(f"{ledger.name}.sum.safetensors"), inputs)
        running.become(book.ingredients)
        for model in book.order[len(book.steps) :]:
            if book.stopped_early or _rejected_in_a_row(book) == (rule.patience or -1):
                book.stopped_early = True
                break
            score = _score(judge, running.mean_with(model), f"the soup with {inputs.models[model].ref}")
            assert book.score is not None
            step = Step(model, score, accepted=rule.accepts(score, best=book.score))
            if step.accepted:
                running.add(model)
            book.steps.append(step)
            book.save()
            bar.advance(note=f"{'with' if step.accepted else 'without'} {inputs.models[model].ref} {book.score:.4f}")
    if leave_one_out and len(book.ingredients) > 1:
        with log.progress("leave one out", total=len(book.ingredients)) as bar:
            for model in book.ingredients:
                if model not in book.without:
                    book.without[model] = _score(judge, running.mean_without(model), "the soup without one")
                    book.save()
                bar.advance()
    book.save()
    running.remove()
    told = {"rule": rules, "judge": book.identity["judge"], **book.told()}  # the engine records the models
    return GreedySoup(ingredients=book.ingredients, search=told)


def _score(judge: Judge, state: Iterator[tuple[str, Tensor]], what: str) -> float:
    score = judge(state)
    if not math.isfinite(score):
        raise ClipgraftError(f"the score of {what} is {score}; take a metric that is defined on this data")
    return score


def _rejected_in_a_row(book: Ledger) -> int:
    accepted = [number for number, step in enumerate(book.steps) if step.accepted]
    return len(book.steps) - 1 - accepted[-1]


def _alone(inputs: Inputs, index: int) -> Iterator[tuple[str, Tensor]]:
    for key in inputs.keys:
        yield from inputs.under_each_name(key, inputs.tensor(index, key))


class RunningSum:
    """The sum of the ingredients in fp64, in one safetensors file that says which they are."""

    def __init__(self, path: Path, inputs: Inputs) -> None:
        self.path, self.inputs = path, inputs
        self.ingredients: list[int] = []
        self._store: FileStore | None = None

    def become(self, ingredients: Sequence[int]) -> None:
        """The sum of exactly these: the file's if it says so, else added up again."""
        self.ingredients = sorted(ingredients)
        if len(ingredients) < 2 or self._on_disk() == self.ingredients:
            self._store = FileStore([self.path]) if len(ingredients) > 1 else None
            return
        self._write(lambda key: total(key, self.inputs, self.ingredients))

    def add(self, model: int) -> None:
        """One more ingredient; the file is replaced when the new sum is whole."""
        self.ingredients = sorted([*self.ingredients, model])
        previous = self._sum_of
        self._write(lambda key: previous(key, skip=model).add_(self.inputs.tensor(model, key)))

    def mean_with(self, model: int) -> Iterator[tuple[str, Tensor]]:
        """The soup that ``add`` would make, in the dtype that it would be written in."""
        return self._means(
            lambda key: self._sum_of(key).add_(self.inputs.tensor(model, key)), len(self.ingredients) + 1
        )

    def mean_without(self, model: int) -> Iterator[tuple[str, Tensor]]:
        """The soup without one of its ingredients."""
        return self._means(
            lambda key: self._sum_of(key).sub_(self.inputs.tensor(model, key)), len(self.ingredients) - 1
        )

    def remove(self) -> None:
        """Delete the file."""
        self._store = None
        self.path.unlink(missing_ok=True)

    def _means(self, summed: Any, count: int) -> Iterator[tuple[str, Tensor]]:
        inputs = self.inputs
        for key in inputs.keys:
            if inputs.dtype(key).is_floating_point:
                merged = summed(key).div_(count).to(inputs.dtype(key))
            else:
                merged = inputs.reference.tensor(key)
            yield from inputs.under_each_name(key, merged)

    def _sum_of(self, key: str, *, skip: int | None = None) -> Tensor:
        """A fresh fp64 tensor."""
        if self._store is not None:
            return self._store.read(key)
        return total(key, self.inputs, [i for i in self.ingredients if i != skip])

    def _on_disk(self) -> list[int] | None:
        from safetensors import safe_open

        try:
            with safe_open(self.path, framework="pt") as file:
                found: list[int] = json.loads((file.metadata() or {})["ingredients"])
                return found
        except Exception:  # absent, cut short or another program's: it is written again
            return None

    def _write(self, summed: Any) -> None:
        entries = {key: (self.inputs.shape(key), torch.float64) for key in self.inputs.float_keys}
        with SafetensorsWriter(self.path, entries, {"ingredients": json.dumps(self.ingredients)}) as writer:
            for key in self.inputs.float_keys:
                writer.write(key, summed(key))
        self._store = FileStore([self.path])
