"""The checkpoints of one merge, checked against each other before a tensor is read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from clipgraft.errors import InputError
from clipgraft.log import RunLog
from clipgraft_merging.weights.checkpoints import Checkpoint

BASE = -1
"""The base's index among the models."""
SHOWN = 4
"""Names that a message lists."""


@dataclass(frozen=True)
class Inputs:
    """A base, or none, and the models. They hold the same tensors of the same shapes and types, and see pictures alike.

    Every tensor is checked for NaN and infinity when it is read.
    """

    base: Checkpoint | None
    models: tuple[Checkpoint, ...]
    _held: dict[tuple[int, str], Tensor] | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "models", tuple(self.models))
        if not self.models:
            raise InputError("nothing to merge; name at least one model")
        for other in self.all[1:]:
            _same_tensors(self.reference, other)
            _same_preparation(self.described, other)

    @property
    def all(self) -> tuple[Checkpoint, ...]:
        """The base, if any, then the models."""
        return self.models if self.base is None else (self.base, *self.models)

    @property
    def reference(self) -> Checkpoint:
        """The base, else the first model: its types, its non-float tensors and its configuration go on."""
        return self.models[0] if self.base is None else self.base

    @property
    def described(self) -> Checkpoint:
        """The reference, or the first with a configuration when the reference is a weights file alone."""
        return next((c for c in (self.reference, *self.all) if c.facts is not None), self.reference)

    @cached_property
    def aliases(self) -> dict[str, str]:
        """{second name: first} of tensors that every checkpoint holds once; they are merged once."""
        return {a: b for a, b in self.reference.aliases.items() if all(c.aliases.get(a) == b for c in self.all)}

    def under_each_name(self, key: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """``tensor`` under ``key`` and under every second name of it."""
        yield key, tensor
        for second, first in self.aliases.items():
            if first == key:
                yield second, tensor

    @cached_property
    def keys(self) -> list[str]:
        """Canonical names of every tensor, sorted, tied ones once."""
        return [key for key in sorted(self.reference.places) if key not in self.aliases]

    @cached_property
    def float_keys(self) -> list[str]:
        """The names that a method merges; what is left are counters and positions, which are copied."""
        return [key for key in self.keys if self.dtype(key).is_floating_point]

    def shape(self, key: str) -> tuple[int, ...]:
        """Of the tensor in every checkpoint."""
        return self.reference.shape(key)

    def dtype(self, key: str) -> torch.dtype:
        """Of the tensor in every checkpoint, and in the result."""
        return self.reference.dtype(key)

    def base_tensor(self, key: str) -> Tensor:
        """The base's tensor in its own dtype, not to be changed; ``InputError`` without a base."""
        if self.base is None:
            raise InputError("this method needs the model that the others were fine-tuned from; give --base MODEL")
        return self._read(BASE, self.base, key)

    def tensor(self, index: int, key: str) -> Tensor:
        """Model ``index``'s tensor in its own dtype, not to be changed."""
        return self._read(index, self.models[index], key)

    def tensors(self, key: str) -> Iterator[Tensor]:
        """Every model's tensor in order, one in memory at a time."""
        return (self.tensor(index, key) for index in range(len(self.models)))

    def piece(self, index: int, key: str, start: int, stop: int) -> Tensor:
        """Numbers of model ``index``'s tensor, of the base's with ``BASE``: flat, row-major, not to be changed."""
        if index == BASE and self.base is None:
            return self.base_tensor(key)  # says what is missing
        checkpoint = self.models[index] if self.base is None or index != BASE else self.base
        if self._held is not None:
            return self._read(index, checkpoint, key).flatten()[start:stop]
        return _finite(checkpoint.piece(key, start, stop), key, checkpoint)

    def holding(self) -> Inputs:
        """The same, keeping what was read until ``release``: for several methods over few models."""
        return Inputs(self.base, self.models, {})

    def release(self) -> None:
        """Forget what ``holding`` kept."""
        if self._held is not None:
            self._held.clear()

    def scan(self, log: RunLog | None = None) -> None:
        """Read everything once, so that a damaged number is found before any long work."""
        with (log or RunLog(is_main=False)).progress("checking weights", total=len(self.all)) as bar:
            for index, checkpoint in enumerate(self.all):
                for key in self.float_keys:
                    _finite(checkpoint.tensor(key), key, checkpoint)
                bar.advance(note=f"model {index + 1}")

    def _read(self, index: int, checkpoint: Checkpoint, key: str) -> Tensor:
        if self._held is not None and (kept := self._held.get((index, key))) is not None:
            return kept
        tensor = _finite(checkpoint.tensor(key), key, checkpoint)
        if self._held is not None:
            self._held[(index, key)] = tensor
        return tensor


def finite(tensor: Tensor) -> bool:
    """Whether no number is NaN or infinite. A sum tells it in one pass, and only a sum that overflows needs another."""
    if not tensor.is_floating_point():
        return True
    total = tensor.sum(dtype=torch.float32 if tensor.dtype.itemsize < 4 else None)
    return bool(torch.isfinite(total)) or bool(torch.isfinite(tensor).all())


def _finite(tensor: Tensor, key: str, checkpoint: Checkpoint) -> Tensor:
    if not finite(tensor):
        count = int((~torch.isfinite(checkpoint.tensor(key))).sum())
        raise InputError(
            f"{checkpoint.file(key)}: the tensor {key} holds {count} numbers that are NaN or infinite; "
            "leave this model out, or take an earlier checkpoint of it"
        )
    return tensor


def _same_tensors(first: Checkpoint, other: Checkpoint) -> None:
    """Names, shapes and types, or one line that says where they part."""
    here, there = set(first.keys()), set(other.keys())
    if here != there:
        sides = ((first, here - there), (other, there - here))
        told = [f"only {c.ref} has {_some(sorted(names))}" for c, names in sides if names]
        raise InputError(f"{first.ref} and {other.ref} are no two versions of one model: {'; '.join(told)}")
    shapes = [f"{k} is {first.shape(k)} and {other.shape(k)}" for k in sorted(here) if first.shape(k) != other.shape(k)]
    if shapes:
        raise InputError(
            f"{first.ref} and {other.ref} differ in shape: {_some(shapes)}; merge models of one architecture"
        )
    types = [f"{k} is {first.dtype(k)} and {other.dtype(k)}" for k in sorted(here) if first.dtype(k) != other.dtype(k)]
    if types:
        raise InputError(
            f"{first.ref} and {other.ref} differ in type: {_some(types)}; "
            "write the half-precision one as fp32 first, with clipgraft export MODEL --out DIR"
        )


def _some(texts: list[str]) -> str:
    more = f" and {len(texts) - SHOWN} more" if len(texts) > SHOWN else ""
    return ", ".join(texts[:SHOWN]) + more


def _same_preparation(first: Checkpoint, other: Checkpoint) -> None:
    """What the weights were trained to be fed with and computed by; a weights file alone says nothing of it."""
    if first.facts is None or other.facts is None:
        return
    here, there = _behaviour(first), _behaviour(other)
    for name, value in here.items():
        if not _close(value, there[name]):
            raise InputError(
                f"{first.ref} and {other.ref} differ in {name}: {value} and {there[name]}; "
                "weights in between would fit neither, so merge models that agree on it"
            )


def _behaviour(checkpoint: Checkpoint) -> dict[str, Any]:
    """What shapes don't tell: open_clip's settings with its defaults filled in, and the preprocessing."""
    facts = checkpoint.facts
    assert facts is not None
    pre, config = facts.preprocess, facts.model_config
    vision, text = config.get("vision_cfg", {}), config.get("text_cfg", {})
    found: dict[str, Any] = {"image size": tuple(pre.size), "mean": tuple(pre.mean), "std": tuple(pre.std)}
    found["quick_gelu"] = bool(config.get("quick_gelu", False))
    found["width of a vision head"] = vision.get("head_width", 64) if "timm_model_name" not in vision else None
    found["text heads"] = text.get("heads", 8) if "hf_model_name" not in text else None
    found["causal text mask"] = not text.get("no_causal_mask", False)
    for name, tower in (("vision", vision), ("text", text)):
        found[f"{name} GELU"] = (tower.get("act_kwargs") or {}).get("approximate", "none")
    return found


def _close(a: Any, b: Any) -> bool:
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(abs(x - y) < 1e-4 for x, y in zip(a, b, strict=True))
    return bool(a == b)
