"""The fit of benchmarks/growth.py: exponents of exact power laws, and the error of disturbed ones."""

import importlib
import math
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

SIZES = (2, 4, 8, 16, 32)


@pytest.fixture(scope="module")
def growth() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")  # where a script finds its neighbours
        yield importlib.import_module("growth")


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0, 2.0, -1.0])
def test_a_power_law_has_its_exponent(growth, exponent):
    found = growth.fit(SIZES, [3 * size**exponent for size in SIZES])
    assert found.exponent == pytest.approx(exponent, abs=1e-12)
    assert found.error == pytest.approx(0, abs=1e-7)
    assert found.scale == pytest.approx(3) and found.at(5) == pytest.approx(3 * 5**exponent)


def test_the_error_is_that_of_a_slope(growth):
    """Worked by hand: x = ln 2 (1, 2, 3), y = (0, 1, 0): slope 0, residuals -1/3, 2/3, -1/3, so s^2 = 2/3."""
    found = growth.fit((2, 4, 8), (1, math.e, 1))
    assert found.exponent == pytest.approx(0, abs=1e-12)
    assert found.error == pytest.approx(math.sqrt((2 / 3) / (2 * math.log(2) ** 2)))


def test_the_unit_of_cost_and_size_changes_no_exponent(growth):
    costs = (1.0, 2.3, 3.9, 8.4, 15.0)
    one, other = growth.fit(SIZES, costs), growth.fit([1000 * s for s in SIZES], [7 * c for c in costs])
    assert (one.exponent, one.error) == pytest.approx((other.exponent, other.error))


@pytest.mark.parametrize(
    ("sizes", "costs", "said"),
    [((1, 2), (1, 2), "three"), ((1, 1, 2), (1, 2, 3), "three"), ((1, 2, 3), (1, 0, 3), "positive")],
)
def test_what_has_no_exponent_is_refused(growth, sizes, costs, said):
    with pytest.raises(ValueError, match=said):
        growth.fit(sizes, costs)


def test_every_case_has_five_sizes_and_a_bound_with_its_reason(growth):
    assert len({case.name for case in growth.CASES}) == len(growth.CASES)
    for case in growth.CASES:
        assert len(case.sizes) >= 5 and "time" in case.bounds
        assert all(expected <= bound and reason for expected, bound, reason in case.bounds.values())
