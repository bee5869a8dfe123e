"""OPCM's facts about one weight: 1, 2, 5, 6, 8, 9, 11, 12, and zero layers."""

import math
from itertools import pairwise

import pytest
import torch

from clipgraft.errors import InputError
from clipgraft_merging.opcm.projection import directions, project, split_rank

torch.set_num_threads(1)
ALPHAS = (0.0, 0.3, 0.5, 0.9)
SHAPES = ((24, 24), (32, 12), (12, 32))


def random(shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def full(task, merged, *, alpha, mode="code"):
    """The definition with completed bases."""
    left, values, right = torch.linalg.svd(merged, full_matrices=True)
    r = next(i for i in range(len(values)) if values[: i + 1].sum() / values.sum() > alpha)
    inner = left.T @ task @ right.T
    inner.diagonal().fill_(0)
    inner[:r, :r] = 0
    if mode == "paper":
        inner[:r], inner[:, :r] = 0, 0
    return left @ inner @ right


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("mode", ["code", "paper"])
def test_facts_1_2_and_5(shape, alpha, mode):
    merged, task = random(shape, 0), random(shape, 1)
    part = project(task, merged, alpha=alpha, mode=mode)
    assert abs((merged * part).sum()) < 1e-12 * merged.norm() * part.norm()  # 1: orthogonal to what is there
    assert torch.allclose(project(part, merged, alpha=alpha, mode=mode), part, atol=1e-12)  # 2: idempotent
    rest = task - part
    assert torch.isclose(part.square().sum() + rest.square().sum(), task.square().sum())  # 2: Pythagoras
    assert torch.allclose(part, full(task, merged, alpha=alpha, mode=mode), atol=1e-12)  # 5: thin equals full


def test_fact_6_the_scale_of_the_merged_vector_does_not_matter():
    merged, task = random((20, 30), 2), random((20, 30), 3)
    assert torch.allclose(project(task, merged), project(task, 37.5 * merged), atol=1e-12)


def test_fact_8_the_scale_grows_about_as_the_root_of_the_number_of_tasks():
    tasks = [random((64, 64), 10 + t) for t in range(8)]
    total, norms, scales = tasks[0], [tasks[0].norm()], []
    for task in tasks[1:]:
        total = total + project(task, total)
        norms.append(task.norm())
        scales.append(float(total.norm() / torch.stack(norms).mean()))
    assert all(0.9 * math.sqrt(t) < scale < math.sqrt(t) for t, scale in enumerate(scales, 2))


def test_fact_9_alpha_0_removes_the_diagonal_only():
    merged, task = random((16, 10), 4), random((16, 10), 5)
    assert split_rank(torch.linalg.svdvals(merged), alpha=0) == 0
    left, _, right = torch.linalg.svd(merged, full_matrices=False)
    inner = left.T @ project(task, merged, alpha=0) @ right.T
    wanted = left.T @ task @ right.T
    wanted.diagonal().fill_(0)
    assert torch.allclose(inner, wanted, atol=1e-12)


def test_fact_11_a_link_of_strong_directions_goes_and_one_to_a_weak_direction_stays_in_code_mode():
    merged = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64))  # shares .4 .7 .9 1
    strong, link = torch.zeros_like(merged), torch.zeros_like(merged)
    strong[0, 1], link[0, 3] = 1, 1
    assert directions(merged, alpha=0.8).rank == 2
    assert not project(strong, merged, alpha=0.8).any()
    assert torch.equal(project(link, merged, alpha=0.8), link)
    assert not project(link, merged, alpha=0.8, mode="paper").any()


def test_fact_12_removed_energy_does_not_fall_with_alpha():
    merged, task = random((24, 16), 6), random((24, 16), 7)
    for mode in ("code", "paper"):
        energy = [(task - project(task, merged, alpha=a / 20, mode=mode)).square().sum() for a in range(20)]
        assert all(b >= a - 1e-9 for a, b in pairwise(energy)) and energy[-1] > energy[0]


def test_alpha_1_is_refused_even_where_nothing_is_merged_yet():
    for merged in (random((4, 4), 0), torch.zeros(4, 4)):
        for alpha in (1.0, -0.1):
            with pytest.raises(InputError, match="0 <= alpha < 1"):
                project(random((4, 4), 1).to(merged.dtype), merged, alpha=alpha)


def test_a_layer_that_no_model_changed_yet_takes_the_new_one_whole():
    task = random((6, 6), 8)
    assert torch.equal(project(task, torch.zeros_like(task)), task)
    assert not torch.equal(project(task, torch.zeros_like(task), compat="fusionbench"), task)


def test_directions_without_energy_are_not_protected():
    merged = random((20, 2), 0) @ random((2, 20), 1)
    assert len(directions(merged, alpha=0.5).values) == 2
    assert len(directions(merged, alpha=0.5, compat="fusionbench").values) == 20
