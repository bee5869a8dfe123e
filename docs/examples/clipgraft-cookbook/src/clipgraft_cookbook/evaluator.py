"""By how much the right class is ahead of the best wrong one: right answers that hang by a thread show up here."""

from pydantic import Field

from clipgraft.config.schema import Config
from clipgraft.evaluation.base import Evaluation
from clipgraft.evaluation.statistics import Share


class Sure(Config):
    """An evaluator is its own config, called with features and data."""

    ahead: float = Field(0.02, ge=0, description="what counts as sure [cosine]")

    def __call__(self, features, source) -> Evaluation:
        """Metrics: lead (mean, in cosines) and sure (share). Records, a row per picture: id, lead, sure."""
        labels = features.labels(source)
        scores = features.images(source) @ features.classifier(source.classes, source.templates).T  # (n, K)
        own = scores.gather(1, labels[:, None])[:, 0]
        lead = own - scores.scatter(1, labels[:, None], float("-inf")).amax(1)
        sure = lead > self.ahead
        rows = zip(features.samples(source), lead.tolist(), sure.tolist(), strict=True)
        return Evaluation(
            metrics={"lead": float(lead.mean()), "sure": float(sure.double().mean())},
            counts={"sure": (int(sure.sum()), len(sure))},
            samples=tuple({"id": s.id, "lead": x, "sure": y} for s, x, y in rows),
            statistics={
                "lead": Share("lead"),
                "sure": Share("sure"),
            },  # give intervals, and tests in `clipgraft compare`
        )
