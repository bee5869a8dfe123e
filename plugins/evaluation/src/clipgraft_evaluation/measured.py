"""What a run measured before and after, metric by metric: values, intervals, paired tests, samples that changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from clipgraft.evaluation.base import Evaluation
from clipgraft.evaluation.comparison import Row as Test
from clipgraft.evaluation.comparison import compare
from clipgraft.rundir import RunRecord
from clipgraft_evaluation.pairs import Change, change

Span = tuple[float, float]
Both = tuple[Mapping[str, Evaluation], Mapping[str, Evaluation]]
"""What was found before and after."""


@dataclass(frozen=True, slots=True)
class Row:
    """One metric; None where it was not measured. ``lower``: less of it is better. ``test`` compares the two."""

    metric: str
    before: float | None
    after: float | None
    before_span: Span | None = None
    after_span: Span | None = None
    lower: bool = False
    test: Test | None = None

    @property
    def difference(self) -> float | None:
        """After minus before."""
        return None if self.before is None or self.after is None else self.after - self.before

    @property
    def span(self) -> Span | None:
        """95 % interval of the difference."""
        if self.test is None or self.test.low is None or self.test.high is None:
            return None
        return self.test.low, self.test.high

    @property
    def tone(self) -> str:
        """How the page colours it: by the verdict, by the sign where nothing was tested."""
        if self.test is not None and self.test.p is not None:
            return {"better": "up", "worse": "down"}.get(self.test.verdict, "same")
        gain = (self.difference or 0.0) * (-1 if self.lower else 1)
        return "up" if gain > 0.0005 else "down" if gain < -0.0005 else "same"

    @property
    def tested(self) -> bool:
        """Whether the page can say a verdict."""
        return self.test is not None and self.test.p_adjusted is not None

    @property
    def is_share(self) -> bool:
        """Whether both lie in [0, 1], so that they can be drawn on one scale."""
        return all(v is not None and 0 <= v <= 1 for v in (self.before, self.after))


@dataclass(frozen=True, slots=True)
class Group:
    """An evaluator's metrics, the data it measured on, and how single samples changed when it kept them."""

    evaluator: str
    data: str | None
    rows: tuple[Row, ...]
    change: Change | None = None


def tests(both: Both) -> dict[str, Test]:
    """Paired tests of all metrics whose statistics were stored, by "evaluator.metric"."""
    return {test.name: test for test in compare(*both) if test.p is not None}


def groups(
    run: RunRecord, both: Both, tested: Mapping[str, Test], *, data_of: Callable[[str], str | None] | None = None
) -> list[Group]:
    """Evaluators in the order of the run, with their metrics in the order that they reported.

    ``data_of`` names an evaluator's data, by default as the run's config does.
    """
    (before, after), made = both, []
    data_of = data_of or run.data_of
    for name in dict.fromkeys([*before, *after]):
        then, now = before.get(name, Evaluation({})), after.get(name, Evaluation({}))
        rows = tuple(
            _row(metric, then, now, tested.get(f"{name}.{metric}"))
            for metric in dict.fromkeys([*then.metrics, *now.metrics])
        )
        made.append(Group(name, data_of(name), rows, change(then.samples, now.samples)))
    return made


def _row(metric: str, then: Evaluation, now: Evaluation, test: Test | None) -> Row:
    """Values are of the shared samples where a test says so; an interval is of all samples and goes with these only."""
    found: list[tuple[float | None, Span | None]] = []
    for side, shared in ((then, test and test.a), (now, test and test.b)):
        value, interval = side.metrics.get(metric), side.intervals.get(metric)
        found.append((value, interval) if shared is None or shared == value else (shared, None))
    (before, before_span), (after, after_span) = found
    return Row(metric, before, after, before_span, after_span, metric in then.lower | now.lower, test)


def kept(run: RunRecord) -> list[Group]:
    """The same of what the training should not cost, as it was compared when the run ended."""
    intervals = {when: run.results(f"retention-{when}") for when in ("before", "after")}

    def row(test: Test) -> Row:
        then, now = (intervals[when].get(test.evaluator, Evaluation({})) for when in ("before", "after"))
        spans = then.intervals.get(test.metric), now.intervals.get(test.metric)
        return Row(test.metric, test.a, test.b, *spans, test.metric in then.lower | now.lower, test)

    names = dict.fromkeys(test.evaluator for test in run.kept)
    return [Group(name, run.kept_data(name), tuple(row(t) for t in run.kept if t.evaluator == name)) for name in names]


def verdicts(found: Sequence[Group]) -> dict[str, list[str]]:
    """Metrics by verdict, "better" and "worse" first."""
    sorted_by: dict[str, list[str]] = {"better": [], "worse": [], "cannot tell": [], "not testable": []}
    for group in found:
        for row in group.rows:
            verdict = "not testable" if row.test is None else row.test.verdict
            sorted_by[verdict].append(f"{group.evaluator} {row.metric}")
    return sorted_by
