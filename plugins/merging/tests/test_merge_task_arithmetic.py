"""Task arithmetic: the checkable facts of section 5."""

import pytest
import torch

from clipgraft.errors import InputError
from clipgraft_merging.soup.uniform import UniformSoup
from clipgraft_merging.task_arithmetic.arithmetic import TaskArithmetic
from clipgraft_merging.weights.checkpoints import Checkpoint
from clipgraft_merging.weights.engine import merge_state
from clipgraft_merging.weights.inputs import Inputs
from clipgraft_merging.weights.stores import MemoryStore

torch.set_num_threads(1)


def checkpoint(state, ref="model"):
    return Checkpoint(ref, MemoryStore(state), "own", None, None, ref)


def states(count, *, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [{"visual.a.weight": torch.randn(9, 7, generator=generator).to(dtype)} for _ in range(count)]


def added(base, rows, *scales):
    inputs = Inputs(checkpoint(base), tuple(checkpoint(r) for r in rows))
    return dict(merge_state(inputs, TaskArithmetic(scales=scales)))["visual.a.weight"]


def w(state):
    return state["visual.a.weight"]


def test_1_a_scale_of_one_nth_is_the_mean():
    base, *rows = states(5)
    mean = dict(merge_state(Inputs(None, tuple(checkpoint(r) for r in rows)), UniformSoup()))
    torch.testing.assert_close(added(base, rows, 0.25), w(mean), rtol=0, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_2_a_scale_of_zero_is_the_base_bit_for_bit(dtype):
    base, *rows = states(4, dtype=dtype)
    assert torch.equal(added(base, rows, 0.0), w(base))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_3_one_model_at_scale_one_is_that_model_bit_for_bit(dtype):
    base, row = states(2, dtype=dtype)
    assert torch.equal(added(base, [row], 1.0), w(row))


def test_3_also_where_the_difference_would_lose_the_model():
    base, row = {"visual.a.weight": torch.tensor([1e30])}, {"visual.a.weight": torch.tensor([1e-30])}
    assert torch.equal(added(base, [row], 1.0), w(row))


def test_4_a_task_vector_and_its_negative_cancel():
    base, row = states(2)
    assert torch.equal(added(base, [row, row], 0.7, -0.7), w(base))


def test_negation_goes_the_other_way():
    base, row = states(2)
    torch.testing.assert_close(added(base, [row], -0.5), w(base) - 0.5 * (w(row) - w(base)))


def test_an_analogy_is_three_scales():
    base, a, b, c = states(4)
    expected = w(c) + (w(b) - w(a))
    torch.testing.assert_close(added(base, [c, b, a], 1, 1, -1), expected, rtol=1e-5, atol=1e-6)


def test_one_scale_each_is_the_sum_of_task_vectors():
    base, *rows = states(4)
    scales = (0.3, -0.2, 0.9)
    expected = w(base) + sum(s * (w(r) - w(base)) for s, r in zip(scales, rows, strict=True))
    torch.testing.assert_close(added(base, rows, *scales), expected, rtol=1e-5, atol=1e-6)


def test_what_it_needs():
    base, *rows = states(4)
    with pytest.raises(InputError, match="2 scales for 3 models"):
        added(base, rows, 0.1, 0.2)
    with pytest.raises(InputError, match="give --base MODEL"):
        dict(merge_state(Inputs(None, (checkpoint(base),)), TaskArithmetic()))
    for scales in ((), (float("nan"),)):
        with pytest.raises(InputError, match="one number, or one per model"):
            TaskArithmetic(scales=scales)
