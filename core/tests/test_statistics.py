"""Intervals and paired tests against closed forms and brute force."""

from __future__ import annotations

import math
import random
from fractions import Fraction

import pytest
import torch

from clipgraft.errors import ClipgraftError, InputError
from clipgraft.evaluation import records
from clipgraft.evaluation.base import Evaluation
from clipgraft.evaluation.statistics import (
    Share,
    _draws,
    bootstrap_p_value,
    difference,
    holm,
    intervals,
    mcnemar,
    value,
)


def rows(right: list[int], **columns: list[object]) -> tuple[dict[str, object], ...]:
    return tuple(
        {"id": f"s{k}", "correct": bool(r), **{name: given[k] for name, given in columns.items()}}
        for k, r in enumerate(right)
    )


def test_a_share_is_the_metric_in_all_its_forms() -> None:
    samples = rows([1, 0, 1, 1, 0], kind=["a", "a", "b", "b", "b"], of=[1, 3, 2, 2, 2])
    assert value(Share("correct"), samples) == 3 / 5
    assert value(Share("correct", where=("kind", "b")), samples) == pytest.approx(2 / 3)
    assert value(Share("correct", groups="kind"), samples) == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert value(Share("correct", of="of"), samples) == pytest.approx(3 / 10)
    missing = (*samples, {"id": "s5", "kind": "a"})
    assert value(Share("correct"), missing) == 3 / 5, "a sample without the column is left out"


def test_drawing_repeats_samples_by_their_weight() -> None:
    samples = rows([1, 0, 1], kind=["a", "a", "b"])
    weights = torch.tensor([[0, 2, 1], [0, 3, 0]], dtype=torch.float64)
    assert Share("correct").bind(samples)(weights).tolist() == pytest.approx([1 / 3, 0])
    by_kind = Share("correct", groups="kind").bind(samples)(weights)
    assert by_kind.tolist() == pytest.approx([1 / 2, 0]), "a group that isn't drawn is left out"
    for drawn in _draws(7, 5, 0):
        assert (drawn.sum(1) == 7).all() and drawn.shape[1] == 7


def test_the_interval_is_that_of_the_binomial() -> None:
    right = [1] * 60 + [0] * 140
    low, high = intervals({"x": Share("correct")}, rows(right), draws=4000)["x"]
    spread = 1.96 * math.sqrt(0.3 * 0.7 / 200)
    assert low == pytest.approx(0.3 - spread, abs=0.012) and high == pytest.approx(0.3 + spread, abs=0.012)
    assert intervals({"x": Share("correct")}, rows([1, 1, 1]))["x"] == (1.0, 1.0)


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    rng, covered = random.Random(0), 0
    for _ in range(200):
        right = [int(rng.random() < 0.4) for _ in range(80)]
        low, high = intervals({"x": Share("correct")}, rows(right), draws=300)["x"]
        covered += low <= 0.4 <= high
    assert 0.90 <= covered / 200 <= 0.99


@pytest.mark.parametrize(("lost", "won"), [(0, 0), (0, 1), (3, 9), (9, 3), (20, 20), (400, 500)])
def test_mcnemar_is_the_exact_binomial_tail(lost: int, won: int) -> None:
    n, k = lost + won, min(lost, won)
    exact = min(Fraction(1), 2 * Fraction(sum(math.comb(n, i) for i in range(k + 1)), 2**n))
    assert mcnemar(lost, won) == pytest.approx(float(exact), rel=1e-9)


def test_the_difference_is_paired_by_id() -> None:
    rng = random.Random(1)
    first = [int(rng.random() < 0.5) for _ in range(300)]
    second = [1 if f == 0 and k % 10 == 0 else f for k, f in enumerate(first)]
    a, b = rows(first), rows(second)
    shuffled = list(b)
    rng.shuffle(shuffled)
    found = difference((Share("correct"), a), (Share("correct"), shuffled))
    won = sum(second) - sum(first)
    assert found.test == "McNemar" and found.p_value == mcnemar(0, won) < 0.01
    assert found.value == pytest.approx(won / 300) and 0 < found.low < found.value < found.high
    back = difference((Share("correct"), b), (Share("correct"), a))
    assert back.value == pytest.approx(-found.value) and back.p_value == found.p_value
    same = difference((Share("correct"), a), (Share("correct"), a))
    assert (same.value, same.low, same.high, same.p_value) == (0, 0, 0, 1)


def test_only_shared_samples_are_compared() -> None:
    a, b = rows([1, 1, 0, 0]), rows([1, 1, 0, 1])[1:]
    assert difference((Share("correct"), a), (Share("correct"), b)).value == pytest.approx(1 / 3)
    with pytest.raises(ClipgraftError, match="share no sample"):
        difference((Share("correct"), a[:1]), (Share("correct"), b))


def test_means_that_are_no_counts_take_the_bootstrap() -> None:
    rng = random.Random(2)
    noise = [rng.gauss(0, 1) for _ in range(200)]
    a = tuple({"id": str(k), "x": v} for k, v in enumerate(noise))
    b = tuple({"id": str(k), "x": v + 0.1 + rng.gauss(0, 0.05)} for k, v in enumerate(noise))
    found = difference((Share("x"), a), (Share("x"), b))
    assert found.test == "paired bootstrap" and found.p_value < 0.01 and found.low < 0.1 < found.high + 0.02
    assert found.high - found.low < 0.03, "pairing removes what both have in common"


def test_bootstrap_p_values_and_holm() -> None:
    assert bootstrap_p_value(torch.zeros(99)) == 1.0
    assert bootstrap_p_value(torch.ones(99)) == pytest.approx(0.02)
    assert bootstrap_p_value(torch.tensor([math.nan, 1.0, -1.0])) == 1.0
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []


def test_an_evaluation_with_a_long_name_is_a_file_of_its_own(tmp_path):
    long = [f"core/zero-shot[{'setting=1,' * 40}last={k}]@x:y" for k in range(2)]
    records.save(tmp_path / "out", {name: Evaluation({"m": 1.0}, samples=rows([k])) for k, name in enumerate(long)})
    back = records.read(tmp_path / "out")
    assert [back[name].samples[0]["correct"] for name in long] == [False, True]
    assert all(len(file.name.encode()) < 200 for file in (tmp_path / "out").iterdir())


def test_saved_evaluations_come_back(tmp_path) -> None:
    samples = rows([1, 0, 1], kind=["a", "a", "b"])
    statistics = {"total": Share("correct"), "a": Share("correct", where=("kind", "a"))}
    given = Evaluation({"total": 2 / 3, "a": 0.5}, {"total": (2, 3)}, samples, statistics, {"total": (0.1, 0.9)})
    records.save(tmp_path / "out", {"core/pairs@x:y?z=1": given, "core/empty": Evaluation({"m": 1.0})})
    back = records.read(tmp_path / "out")
    assert back["core/pairs@x:y?z=1"] == given and back["core/empty"].metrics == {"m": 1.0}
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names == {"evaluation.json", "core-pairs--x-y-z=1.parquet"}
    with pytest.raises(InputError, match=r"evaluation\.json"):
        records.read(tmp_path)
    (tmp_path / "out" / "core-pairs--x-y-z=1.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(InputError, match="Parquet"):
        records.read(tmp_path / "out")
