"""Evaluators of the merging recipes: the ingredients beside the soup, and a sequence of tasks beside its last model."""

from __future__ import annotations

from pydantic import Field

from clipgraft.config.schema import Config
from clipgraft.data.base import Source
from clipgraft.evaluation.base import Evaluation
from clipgraft.evaluation.features import EncoderFeatures
from clipgraft.evaluation.zero_shot import ZeroShot
from clipgraft_merging.recipes_merge.left_behind import measured


class Ingredients(Config):
    """Zero-shot top1 of the model, and how far it is above the models that it was made of.

    In a run of ``merging/soup``: ``mean``, ``worst`` and ``best`` of the ingredients on the same data, ``chosen``, the
    one that held-out data pick, and the distances ``over_mean``, ``over_best`` and ``over_chosen``. Elsewhere, and
    before the run, the model is its own only ingredient.
    """

    def __call__(self, features: EncoderFeatures, source: Source) -> Evaluation:
        """Opens each ingredient, one at a time."""
        from clipgraft.encoders import load
        from clipgraft.registry import current

        own = ZeroShot()(features, source).metrics["top1"]
        told = measured() or {}
        device = next(features.encoder.parameters()).device
        scores = []
        for reference in told.get("ingredients", ()):
            encoder = load(reference, registry=current()).eval().to(device)
            aside = EncoderFeatures(encoder, batch_size=features.batch_size, log=features.log)
            scores.append(ZeroShot()(aside, source).metrics["top1"])
        scores = scores or [own]
        pick = 0 if len(scores) == 1 else told.get("chosen")  # of one there is no choice
        found = {"top1": own, "mean": sum(scores) / len(scores), "worst": min(scores), "best": max(scores)}
        found |= {"over_mean": own - found["mean"], "over_best": own - found["best"]}
        if pick is not None:
            found |= {"chosen": scores[pick], "over_chosen": own - scores[pick]}
        return Evaluation(found)


class Continual(Config):
    """What a run of ``merging/opcm`` measured on its tasks, as means over its orders.

    ``average``: accuracy of the last model over tasks. ``backward``: mean change of a task's accuracy from when it was
    merged to the end (backward transfer; below 0 is forgetting), without the last task. ``learnt``: mean accuracy of
    each task when it was merged. For each compared method NAME: ``average/NAME``, ``backward/NAME``, ``learnt/NAME``
    and the distances ``over/NAME`` and ``backward_over/NAME``. Before the run all are 0. The evaluator's
    own data aren't read.
    """

    compare: tuple[str, ...] = Field((), description="methods that the run compares, so that 0 stands for them before")

    def __call__(self, features: EncoderFeatures, source: Source) -> Evaluation:
        """Nothing is encoded."""
        told = measured() or {}
        methods, own = told.get("methods", {}), told.get("method")
        zero = {"average": 0.0, "backward": 0.0, "learnt": 0.0}
        mine = methods.get(own, zero)
        found = {name: float(mine[name]) for name in zero}
        for name in dict.fromkeys((*self.compare, *methods)):
            if name == own:
                continue
            theirs = methods.get(name, zero)
            found |= {f"{key}/{name}": float(theirs[key]) for key in zero}
            found[f"over/{name}"] = found["average"] - float(theirs["average"])
            found[f"backward_over/{name}"] = found["backward"] - float(theirs["backward"])
        return Evaluation(found)
