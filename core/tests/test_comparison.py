"""Two evaluations compared: joins, verdicts, adjustment, and what can't be tested."""

from __future__ import annotations

import io
import json
import math
import random
import statistics
from dataclasses import replace
from fractions import Fraction
from math import comb

import pytest
from rich.console import Console

from clipgraft.errors import InputError
from clipgraft.evaluation import records
from clipgraft.evaluation.base import Evaluation
from clipgraft.evaluation.comparison import Row, Tally, as_table, compare, tallies
from clipgraft.evaluation.statistics import Share, value


class Spread:
    """A statistic that no share expresses: the variance of a column."""

    def bind(self, samples):
        import torch

        x = torch.tensor([row["x"] for row in samples], dtype=torch.float64)
        return lambda w: (w @ x**2) / w.sum(1) - ((w @ x) / w.sum(1)) ** 2


def answers(right: list[int], *, first: int = 0, lower: tuple[str, ...] = ()) -> Evaluation:
    samples = tuple({"id": f"s{first + k}", "right": bool(r), "x": float(k % 7) * (1 + r)} for k, r in enumerate(right))
    statistics = {"top1": Share("right"), "spread": Spread()}
    metrics = {name: value(statistic, samples) for name, statistic in statistics.items()}
    return Evaluation(metrics, {}, samples, statistics, lower=frozenset(lower))


def only(rows: list[Row], metric: str) -> Row:
    (row,) = [row for row in rows if row.metric == metric]
    return row


def test_p_is_the_sign_test_and_holm_adjusts_over_the_whole_table() -> None:
    rng = random.Random(0)
    before = [rng.random() < 0.5 for _ in range(200)]
    after = [r or rng.random() < 0.3 for r in before]
    a = {"x": answers(before), "y": answers(before)}
    b = {"x": answers(after), "y": answers(before)}
    rows = compare(a, b)
    row = only([r for r in rows if r.evaluator == "x"], "top1")
    won = sum(now and not then for then, now in zip(before, after, strict=True))
    exact = min(1, 2 * sum(Fraction(comb(won, k), 2**won) for k in range(1)))  # none was lost
    assert row.test == "McNemar" and row.p == pytest.approx(float(exact)) and row.n == 200
    assert row.difference == pytest.approx(won / 200) and row.low < row.difference < row.high
    assert row.a == sum(before) / 200 and row.b == sum(after) / 200 and row.verdict == "better"
    assert row.p_adjusted == pytest.approx(4 * row.p), "the smallest of four"
    assert {r.verdict for r in rows if r.evaluator == "y"} == {"cannot tell"}
    assert only([r for r in rows if r.evaluator == "x"], "spread").test == "paired bootstrap"


def test_tallies_are_counts_with_standard_errors_and_their_own_p(tmp_path) -> None:
    rng = random.Random(1)
    before = [int(rng.random() < 0.4) for _ in range(90)]
    after = [int(rng.random() < 0.6) for _ in range(90)]
    found = {side: {"x": answers(right)} for side, right in (("a", before), ("b", after))}
    for side, right in (("a", before), ("b", after)):
        found[side]["x"] = replace(found[side]["x"], counts={"top1": (sum(right), 90), "spread": (1, 2)})
        records.save(tmp_path / side, found[side])
    lost = sum(then > now for then, now in zip(before, after, strict=True))
    won = sum(now > then for then, now in zip(before, after, strict=True))
    p = min(1, 2 * sum(Fraction(comb(lost + won, k), 2 ** (lost + won)) for k in range(min(lost, won) + 1)))
    back = [records.read(tmp_path / side) for side in ("a", "b")]
    for one, two in ((found["a"], found["b"]), back):
        (tally,) = tallies(one, two)
        assert tally == Tally("x", "top1", sum(before), sum(after), 90, pytest.approx(float(p)))
    shares = [sum(side) / 90 for side in (before, after)]
    errors = [statistics.stdev(side) * (89 / 90) ** 0.5 / 90**0.5 for side in (before, after)]
    assert (
        f"x.top1 {sum(before)} -> {sum(after)} of 90, {shares[0]:.4f} ± {errors[0]:.4f} -> {shares[1]:.4f} ± "
        f"{errors[1]:.4f} (standard error), McNemar p = {float(p):.2g}"
    ) == str(tally)
    assert found["a"]["x"].standard_errors["top1"] == pytest.approx(errors[0])
    assert back[0]["x"].standard_errors == found["a"]["x"].standard_errors
    assert tallies({"x": found["a"]["x"]}, {"y": found["b"]["x"]}) == []
    (some,) = tallies(found["a"], {"x": replace(answers(after[:50]), counts={"top1": (0, 50)})})
    assert (some.a, some.n) == (sum(before[:50]), 50), "of the samples that both measured"


def test_a_model_against_itself_is_never_told_apart() -> None:
    model = {"x": answers([1, 0, 1, 1, 0, 1])}
    rows = compare(model, model)
    assert [(r.p, r.p_adjusted, r.difference, r.verdict) for r in rows] == [(1.0, 1.0, 0.0, "cannot tell")] * 2


def test_where_less_is_better_the_verdict_turns() -> None:
    few, many = [0] * 60 + [1] * 40, [1] * 100
    assert only(compare({"x": answers(few)}, {"x": answers(many)}), "top1").verdict == "better"
    worse = compare({"x": answers(few, lower=("top1",))}, {"x": answers(many, lower=("top1",))})
    assert only(worse, "top1").verdict == "worse"
    back = compare({"x": answers(many, lower=("top1",))}, {"x": answers(few)})
    assert only(back, "top1").verdict == "better", "one side is enough: folders written earlier don't say it"


def test_samples_are_joined_by_id_and_values_are_of_the_shared_ones() -> None:
    rows = compare({"x": answers([1, 1, 0, 0])}, {"x": answers([0, 1, 1, 1], first=2)})
    row = only(rows, "top1")
    assert (row.n, row.a, row.b, row.difference) == (2, 0.0, 0.5, 0.5), "s2 and s3 were measured on both"
    with pytest.raises(InputError, match="x: the two results share no sample"):
        compare({"x": answers([1])}, {"x": answers([1], first=9)})


def test_without_a_statistic_there_is_a_difference_but_no_test() -> None:
    a, b = answers([1, 0, 1]), answers([1, 1, 1])
    bare = Evaluation({"top1": 0.25, "other": 1.0}), Evaluation({"top1": 0.75, "new": 1.0})
    (row,) = compare({"x": bare[0]}, {"x": bare[1]})
    assert row == Row("x", "top1", 0.25, 0.75, 0.5) and row.verdict == "not testable" and row.p is None
    assert compare({"x": a}, {"y": b}) == []
    tested = compare({"x": a, "z": bare[0]}, {"x": b, "z": bare[1]})
    assert only([r for r in tested if r.evaluator == "x"], "top1").p_adjusted is not None
    with pytest.raises(InputError, match="alpha is 1"):
        compare({"x": a}, {"x": b}, alpha=1)


def test_folders_compare_like_what_was_saved_and_borrow_statistics(tmp_path) -> None:
    a, b = {"x": answers([1, 0] * 30, lower=("spread",))}, {"x": answers([1] * 60, lower=("spread",))}
    for name, found in (("a", a), ("b", b)):
        records.save(tmp_path / name, found)
    live, read = compare(a, b), [records.read(tmp_path / name) for name in ("a", "b")]
    assert read[0]["x"].lower == {"spread"}
    assert compare(read[0], b) == compare(a, read[1]) == live, "the other side's statistic"
    both = compare(*read)
    assert only(both, "top1").verdict == "better" and only(both, "spread").verdict == "not testable"


class Own:
    """A statistic of numbers that records don't hold."""

    def __init__(self, numbers: dict[str, float]) -> None:
        self.numbers = numbers

    def bind(self, samples):
        import torch

        x = torch.tensor([self.numbers[row["id"]] for row in samples], dtype=torch.float64)
        return lambda w: (w @ x) / w.sum(1)


def test_a_statistic_that_holds_more_than_records_is_its_sides_alone(tmp_path) -> None:
    sides = []
    for scale in (1.0, 3.0):
        numbers = {f"s{k}": scale * (1 + k % 3) for k in range(30)}
        samples = tuple({"id": name} for name in numbers)
        own = Own(numbers)
        sides.append({"x": Evaluation({"mean": value(own, samples)}, {}, samples, {"mean": own})})
    (row,) = compare(*sides)
    assert (row.a, row.b, row.difference, row.verdict) == (2.0, 6.0, 4.0, "better")
    assert row.low == pytest.approx(2 * (3 - 1), abs=0.7) and row.low < 4 < row.high
    records.save(tmp_path, sides[1])
    (row,) = compare(sides[0], records.read(tmp_path))
    assert row.verdict == "not testable" and row.difference == 4.0, "not A's numbers for both"
    short = {"x": Evaluation({"mean": 1.0}, {}, ({"id": "elsewhere"},))}
    assert compare(sides[0], short)[0].verdict == "not testable"


def test_a_long_table_draws_often_enough_for_its_adjustment() -> None:
    one, two = [{"id": i, "x": float(i % 5)} for i in range(40)], [{"id": i, "x": 9.0 + i % 5} for i in range(40)]
    names = [f"m{k}" for k in range(60)]

    def found(rows):
        statistics = {name: Share("x") for name in names}
        return {"e": Evaluation(dict.fromkeys(names, value(Share("x"), rows)), {}, tuple(rows), statistics)}

    rows = compare(found(one), found(two))
    assert {r.test for r in rows} == {"paired bootstrap"} and {r.verdict for r in rows} == {"better"}


def test_rows_survive_json_and_the_table_fits_its_width() -> None:
    rows = [*compare({"x": answers([1, 0] * 9)}, {"x": answers([1] * 18)}), Row("y", "a" * 50, math.nan, 1.0, math.nan)]
    again = [Row.from_dict(json.loads(json.dumps(row.as_dict(), allow_nan=False))) for row in rows]
    assert again[:2] == rows[:2] and math.isnan(again[2].a) and again[2].b == 1.0
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(as_table(rows, names=("A", "B"), width=80))
    text = console.export_text()
    assert "better" in text and "not testable" in text and "x (18 samples)" in text
    assert text.count("a") >= 50 and max(map(len, text.splitlines())) <= 80, "long names are folded, nothing is cut"
