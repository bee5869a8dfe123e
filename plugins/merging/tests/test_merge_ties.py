"""TIES: the checkable facts of section 5, and the stream against the whole matrix of task vectors."""

import math

import pytest
import torch

from clipgraft.errors import InputError
from clipgraft.log import RunLog
from clipgraft_merging.ties.merger import Ties, kept
from clipgraft_merging.ties.threshold import OrderStatistic
from clipgraft_merging.weights.checkpoints import Checkpoint
from clipgraft_merging.weights.engine import merge_state
from clipgraft_merging.weights.inputs import Inputs
from clipgraft_merging.weights.stores import MemoryStore

torch.set_num_threads(1)
SHAPES = {"logit_scale": (), "text.a.weight": (30, 20), "visual.b.bias": (50,), "visual.c.weight": (4, 5, 17)}
TOTAL = sum(math.prod(s) for s in SHAPES.values())


def checkpoint(state, ref="model"):
    return Checkpoint(ref, MemoryStore(state), "own", None, None, ref)


def unflat(vector):
    sizes = [math.prod(s) for s in SHAPES.values()]
    return {k: part.view(SHAPES[k]).clone() for k, part in zip(SHAPES, vector.split(sizes), strict=True)}


def flat(state):
    return torch.cat([state[key].flatten() for key in SHAPES])


def inputs_of(taus, base):
    return Inputs(checkpoint(unflat(base)), tuple(checkpoint(unflat(base + tau)) for tau in taus))


def streamed(taus, base=None, **how):
    """The merged model minus the base, of task vectors (N, d)."""
    base = torch.zeros(TOTAL) if base is None else base
    merger = Ties(**how)
    return flat(dict(merge_state(inputs_of(taus, base), merger))) - base, merger


def whole(taus, *, density, merge_by, keep, scale=1.0):
    """The method on the matrix of all task vectors (N, d), written from the paper's three steps."""
    trimmed = taus.clone()
    for row in trimmed:
        count = kept(row.numel(), density, keep=keep)
        row[row.abs() < row.abs().sort().values[row.numel() - count]] = 0
    sign = trimmed.sum(0).sign()
    sign[sign == 0] = sign.sum().sign()
    agree = (trimmed.sign() == sign) & (trimmed != 0)
    merged = (trimmed * agree).sum(0)
    return scale * (merged / agree.sum(0).clamp_min(1) if merge_by == "mean" else merged)


def random(count, seed=0):
    return torch.randn(count, TOTAL, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("keep", ["strict", "compat"])
@pytest.mark.parametrize("merge_by", ["mean", "sum"])
@pytest.mark.parametrize("density", [0.05, 0.2, 0.7, 1.0])
def test_12_the_stream_equals_the_stacked_version(density, merge_by, keep):
    taus = random(8)
    found, _ = streamed(taus, density=density, merge_by=merge_by, keep=keep)
    torch.testing.assert_close(found, whole(taus, density=density, merge_by=merge_by, keep=keep), rtol=1e-6, atol=1e-6)


def test_12_also_with_a_base_and_a_scale():
    taus, base = random(4), random(1, seed=1)[0]
    merger = {"density": 0.3, "merge_by": "sum", "scale": 0.3}
    differences = torch.stack([(base + tau) - base for tau in taus])
    found, _ = streamed(taus, base, **merger)
    torch.testing.assert_close(found, whole(differences, keep="strict", **merger), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("count", [10, 100, 1000, 123_457])
@pytest.mark.parametrize("kind", ["normal", "zeros", "equal", "tiny"])
def test_the_threshold_is_the_kth_smallest_magnitude_exactly(count, kind):
    x = torch.randn(count, generator=torch.Generator().manual_seed(count))
    if kind == "zeros":
        x[: count // 2] = 0
    if kind == "equal":
        x = torch.full((count,), -0.25)
    if kind == "tiny":
        x *= 1e-42  # denormal
    pieces = x.split(max(count // 3, 1))
    for k in {1, 2, count // 5 or 1, count // 2, count - 1, count}:
        statistic = OrderStatistic()
        for piece in pieces:
            statistic.look(piece)
        statistic.aim(k)
        for piece in pieces:
            statistic.look_closer(piece)
        assert statistic.value == float(x.abs().kthvalue(k).values)
    with pytest.raises(ValueError, match="no 0-th smallest"):
        statistic.aim(0)


def test_5_the_count_that_stays():
    for total, density in ((1000, 0.2), (999, 0.2), (101, 0.5), (100, 0.07), (100, 0.29), (10, 0.01)):
        strict = math.ceil(round(total * density, 6))
        assert kept(total, density, keep="strict") == strict
        assert kept(total, density, keep="compat") == int(total * density) + 1
    assert kept(1000, 0.2, keep="compat") == 201 and kept(1000, 0.2, keep="strict") == 200
    assert kept(1000, 1.0, keep="compat") == kept(1000, 1.0, keep="strict") == 1000


@pytest.mark.parametrize("keep", ["strict", "compat"])
def test_5_exactly_that_many_numbers_of_the_whole_model_stay(keep):
    (tau,) = taus = random(1)
    found, merger = streamed(taus, density=0.1, keep=keep)
    count = kept(TOTAL, 0.1, keep=keep)
    assert int((found != 0).sum()) == count
    assert merger.thresholds == (float(tau.abs().topk(count).values[-1]),)


def test_6_the_order_of_models_does_not_matter():
    taus = random(6)
    first, second = streamed(taus)[0], streamed(taus[[3, 5, 0, 1, 4, 2]])[0]
    torch.testing.assert_close(first, second, rtol=0, atol=1e-6)


def test_7_no_merged_number_has_the_sign_that_lost():
    taus = random(5)
    found, merger = streamed(taus, density=0.5)
    trimmed = torch.where(taus.abs() >= torch.tensor(merger.thresholds)[:, None], taus, 0.0)
    elected = trimmed.sum(0).sign()
    assert bool((found.sign() * elected >= 0).all())


def test_8_the_mean_of_agreeing_numbers_lies_among_them():
    taus = random(5)
    found, merger = streamed(taus, density=0.5)
    trimmed = torch.where(taus.abs() >= torch.tensor(merger.thresholds)[:, None], taus, 0.0)
    agree = (trimmed.sign() == found.sign()) & (trimmed != 0)
    low = torch.where(agree, trimmed, math.inf).min(0).values
    high = torch.where(agree, trimmed, -math.inf).max(0).values
    some = found != 0
    assert bool(((found >= low - 1e-6) & (found <= high + 1e-6))[some].all()) and int(some.sum()) > 100


def test_9_the_sum_is_the_mean_times_how_many_agree():
    taus = random(5)
    mean, merger = streamed(taus, density=0.5)
    total, _ = streamed(taus, density=0.5, merge_by="sum")
    trimmed = torch.where(taus.abs() >= torch.tensor(merger.thresholds)[:, None], taus, 0.0)
    agree = ((trimmed.sign() == mean.sign()) & (trimmed != 0)).sum(0)
    torch.testing.assert_close(total, mean * agree, rtol=1e-5, atol=1e-6)


def test_10_scaling_every_task_vector_scales_the_result():
    taus = random(4)
    torch.testing.assert_close(streamed(4 * taus)[0], 4 * streamed(taus)[0], rtol=1e-6, atol=1e-6)


def test_11_all_of_identical_models_is_the_scaled_task_vector_or_n_times_that():
    tau = random(1)
    taus = tau.repeat(3, 1)
    torch.testing.assert_close(streamed(taus, density=1.0, scale=0.5)[0], 0.5 * tau[0], rtol=1e-6, atol=1e-6)
    found, _ = streamed(taus, density=1.0, scale=0.5, merge_by="sum")
    torch.testing.assert_close(found, 1.5 * tau[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("majority", [1, -1])
@pytest.mark.parametrize("merge_by", ["mean", "sum"])
def test_a_tie_of_signs_goes_to_the_sign_of_most_elected_ones(merge_by, majority):
    """Two numbers that cancel elect nothing: the model's usual sign decides, known only when all was read."""
    taus = random(2).abs() * majority
    taus[0, 3], taus[1, 3] = 2.0, -2.0
    taus[0, -1], taus[1, -1] = -0.75, 0.75
    found, _ = streamed(taus, density=1.0, merge_by=merge_by)
    assert found[3] == 2.0 * majority and found[-1] == 0.75 * majority
    torch.testing.assert_close(found, whole(taus, density=1.0, merge_by=merge_by, keep="strict"), rtol=1e-6, atol=1e-6)


def test_a_tie_without_any_majority_changes_nothing():
    taus = torch.stack([random(1)[0], -random(1)[0]])
    assert torch.equal(streamed(taus, density=1.0)[0], torch.zeros(TOTAL))


def test_where_most_numbers_are_zero_zeros_do_not_count_as_kept():
    taus = torch.zeros(2, TOTAL)
    taus[:, :5] = torch.tensor([[1.0, -2.0, 3.0, 0.5, 0.0], [3.0, 4.0, 1.0, 0.0, 0.0]])
    found, merger = streamed(taus, density=0.5)
    assert merger.thresholds == (0.0, 0.0)
    torch.testing.assert_close(found[:5], torch.tensor([2.0, 4.0, 2.0, 0.5, 0.0]))


def test_a_scale_of_zero_is_the_base_bit_for_bit():
    taus, base = random(3), random(1, seed=7)[0]
    merger = Ties(scale=0.0)
    assert torch.equal(flat(dict(merge_state(inputs_of(taus, base), merger))), base)


def test_a_merger_can_be_used_twice():
    taus = random(3)
    merger = Ties()
    first, second = (flat(dict(merge_state(inputs_of(taus, torch.zeros(TOTAL)), merger))) for _ in range(2))
    assert torch.equal(first, second)


def test_what_it_needs():
    for density in (0, -0.1, 20, 1.5):
        with pytest.raises(InputError, match=r"20 percent is written 0\.2"):
            Ties(density=density)
    with pytest.raises(InputError, match="expected strict or compat"):
        Ties(keep="both")
    with pytest.raises(InputError, match="no number that a model can be scaled by"):
        Ties(scale=float("inf"))
    with pytest.raises(InputError, match="give --base MODEL"):
        Ties().prepare(Inputs(None, (checkpoint(unflat(torch.zeros(TOTAL))),)), RunLog(is_main=False))
