from __future__ import annotations

import random
import re

import pytest

from clipgraft.evaluation import records as saved
from clipgraft.evaluation.base import Evaluation
from clipgraft.registry import Registry
from clipgraft.rundir import read_run
from clipgraft_evaluation.pairs import cards, change
from clipgraft_evaluation.report import write_report


def answers(right: set[int], total: int, *, start: int = 0) -> list[dict[str, object]]:
    return [{"id": f"p{i}", "correct": i in right} for i in range(start, total)]


def test_gained_and_lost_are_joined_by_id_not_by_row() -> None:
    seen = change(answers({0, 1, 2}, 6), list(reversed(answers({2, 3, 9}, 10, start=1))))
    assert seen is not None
    assert (seen.total, seen.before, seen.after) == (5, 2, 2), "p0 was not measured after, p6-p9 not before"
    assert (seen.gained, seen.lost) == (("p3",), ("p1",))
    assert seen.p_value == 1.0


def test_records_that_do_not_say_correct_are_no_comparison() -> None:
    assert change([{"id": "a", "rank": 3}], [{"id": "a", "rank": 1}]) is None
    assert change([], answers({1}, 3)) is None


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (1, 0), (8, 2), (2, 8), (30, 12)])
def test_the_sign_test_is_scipys(gained: int, lost: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    total = gained + lost + 5
    order = random.Random(0).sample(range(total), total)
    won, fallen, kept = order[:gained], order[gained : gained + lost], order[gained + lost : -1]
    seen = change(answers({*fallen, *kept}, total), answers({*won, *kept}, total))
    assert seen is not None and (len(seen.gained), len(seen.lost)) == (gained, lost)
    expected = stats.binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    assert seen.p_value == pytest.approx(expected)


def test_cards_take_the_patterns_in_turn_and_survive_shifted_rows(run_dir, squares: Registry) -> None:  # type: ignore[no-untyped-def]
    run = read_run(run_dir)
    names = ["p0", "p3", "p6", "p9", "p1", "p2"]
    assert [c.id for c in cards(run, "core/pairs", names, at_most=5)] == ["p0", "p1", "p2", "p3", "p6"]
    for when in ("before", "after"):  # the first pair was unreadable: records start at p1
        folder = run_dir / "evaluation" / when
        kept = saved.read(folder)["core/pairs"].samples[1:]
        saved.save(folder, {"core/pairs": Evaluation({}, samples=kept)})
    found = cards(run, "core/pairs", ["p29", "p1"], at_most=5)
    assert [c.id for c in found] == ["p29", "p1"] and found[0].texts[1] == "square 29 on the right"


def test_a_card_says_what_each_text_picked(run_dir, squares: Registry) -> None:  # type: ignore[no-untyped-def]
    margins = {"before": [[0.2, -0.1], [0.0, 0.3]], "after": [[0.4, 0.1], [0.1, -0.2]]}
    for when, given in margins.items():
        rows = [
            {"id": f"p{i}", "pattern": "colour", "correct": min(given[i % 2]) > 0, "margins": given[i % 2]}
            for i in range(4)
        ]
        saved.save(run_dir / "evaluation" / when, {"core/pairs": Evaluation({}, samples=tuple(rows))})
    gained, lost = cards(read_run(run_dir), "core/pairs", ["p0", "p1"], at_most=2)
    assert gained.picked == (("this", "this"), ("other", "this"))
    assert lost.picked == (("neither", "this"), ("this", "other"))
    page = " ".join(re.sub(r"<[^>]+>", " ", write_report(run_dir).read_text("utf-8")).split())
    assert "square 0 on the right before: other after: this orientation p0" in page
    assert "what it picked before and after" in page


def test_records_without_margins_make_cards_without_picks(run_dir, squares: Registry) -> None:  # type: ignore[no-untyped-def]
    assert [card.picked for card in cards(read_run(run_dir), "core/pairs", ["p0"], at_most=1)] == [()]
    assert "what it picked" not in write_report(run_dir).read_text("utf-8")


def test_nothing_changed_opens_no_data(run_dir) -> None:  # type: ignore[no-untyped-def]
    assert cards(read_run(run_dir), "core/pairs", [], at_most=5) == []
