"""Measure an encoder: several evaluators, each source read once."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from clipgraft.config.schema import EvaluatorNode, evaluator_named
from clipgraft.errors import InputError
from clipgraft.evaluation.base import Evaluation

if TYPE_CHECKING:
    from torch import Tensor

    from clipgraft.encoders.base import Encoder
    from clipgraft.log import RunLog
    from clipgraft.registry import Registry


def evaluate(
    encoder: Encoder,
    nodes: Sequence[EvaluatorNode | str],
    *,
    registry: Registry | None = None,
    default_data: str | None = None,
    batch_size: int = 256,
    log: RunLog | None = None,
    classifiers: MutableMapping[str, Tensor] | None = None,
    workers: int | None = None,
    cache: Path | str | None = None,
    spread: bool = True,
    precision: Literal["fp32", "bf16"] = "fp32",
) -> dict[str, Evaluation]:
    """Run the evaluators ("NAME[?KEY=VALUE&...][@SRC]") by full name; those listed more than once as "NAME@SRC".

    Samples that can't be read are left out and counted by the metric ``skipped``. ``classifiers`` keeps class
    embeddings between calls, for encoders whose text tower doesn't change. ``workers`` decode images; None starts as
    many as there are cores, when reading would take seconds. ``cache``: a folder that keeps features between calls,
    under hashes of weights and data. ``spread`` False leaves out the intervals, which take time. ``precision`` bf16
    computes the towers under autocast; embeddings are fp32 all the same.
    With a process group all ranks call this, share the work, and have all results.
    """
    from clipgraft.data import open_source
    from clipgraft.evaluation.feature_cache import FeatureCache
    from clipgraft.evaluation.features import EncoderFeatures
    from clipgraft.evaluation.statistics import intervals
    from clipgraft.registry import current, use

    registry = registry or current()
    parsed = [node if isinstance(node, EvaluatorNode) else evaluator_named(node) for node in nodes]
    names = [registry.get("evaluator", node.use).name for node in parsed]
    evaluators = [registry.build("evaluator", n, node.settings) for n, node in zip(names, parsed, strict=True)]
    refs = [node.data or default_data for node in parsed]
    if None in refs:
        raise InputError(f"{names[refs.index(None)]} has no data to measure on; give --data SRC or NAME@SRC")
    opened = {ref: open_source(str(ref), registry=registry) for ref in dict.fromkeys(refs)}
    jobs = [(key, e, opened[ref]) for key, e, ref in zip(_keys(names, refs, parsed), evaluators, refs, strict=True)]
    tokens = frozenset(source.fingerprint for _, e, source in jobs if getattr(e, "needs_tokens", False))
    features = EncoderFeatures(
        encoder,
        batch_size=batch_size,
        tokens=tokens,
        classifiers=classifiers,
        log=log,
        workers=workers,
        cache=None if cache is None else FeatureCache(Path(cache)),
        precision=precision,
    )
    found = {}
    with use(registry):  # for evaluators that open further data
        for key, evaluator, source in jobs:
            evaluation: Evaluation = evaluator(features, source)
            if skipped := features.skipped(source):
                evaluation = replace(evaluation, metrics={**evaluation.metrics, "skipped": float(skipped)})
            drawn = intervals(evaluation.statistics, evaluation.samples) if spread and evaluation.samples else {}
            lower = (evaluation.lower | getattr(evaluator, "lower_is_better", frozenset())) & evaluation.metrics.keys()
            found[key] = replace(evaluation, intervals=drawn, lower=lower)
    return found


def _keys(names: Sequence[str], refs: Sequence[str | None], nodes: Sequence[EvaluatorNode]) -> list[str]:
    """Full names, with their data where a name repeats, with their settings too where that repeats."""
    settings = [",".join(f"{k}={v}" for k, v in node.settings.items()) for node in nodes]
    with_data = [f"{name}@{ref}" for name, ref in zip(names, refs, strict=True)]
    in_full = [f"{name}[{s}]@{ref}" for name, s, ref in zip(names, settings, refs, strict=True)]
    keys = [
        name if names.count(name) == 1 else data if with_data.count(data) == 1 else full
        for name, data, full in zip(names, with_data, in_full, strict=True)
    ]
    if twice := [key for key in keys if keys.count(key) > 1]:
        raise InputError(f"{twice[0]} is listed twice with the same data and settings; list it once")
    return keys
