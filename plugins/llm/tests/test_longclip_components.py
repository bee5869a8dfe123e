"""Primary component matching: golden values, a gradient that stays finite, processes, and where it does nothing."""

import pytest
import torch
from torch.nn import functional as F

from clipgraft import distributed
from clipgraft.errors import InputError
from clipgraft.losses.base import LossInputs
from clipgraft.losses.contrastive import ClipLoss
from clipgraft.registry import Registry
from clipgraft.testing.ranks import run_ranks
from clipgraft_llm.longclip.components import Pcm, grouped_components, inactive, matching, primary_components

torch.set_num_threads(1)


def U(n, d, p):
    i, j = torch.arange(1, n + 1, dtype=torch.float64)[:, None], torch.arange(1, d + 1, dtype=torch.float64)[None]
    return F.normalize(torch.sin(0.61 * i + 1.37 * j + 0.053 * i * j + p), dim=-1)


X, Y5 = U(8, 16, 0), U(8, 16, 0.5)


def test_the_anchors_of_the_golden_inputs():
    assert X[0, :3].tolist() == pytest.approx([0.30992413, -0.10708071, -0.34146130], abs=1e-8)
    assert float(Y5[7, 15]) == pytest.approx(0.16323208, abs=1e-8)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 5e-6), (torch.float32, 2e-5)])
def test_fact_6_reduced_images(dtype, tolerance):
    images = U(64, 48, 0).to(dtype)
    reduced = primary_components(images, count=8)
    assert reduced.dtype == dtype
    assert float((reduced - images).norm()) == pytest.approx(6.5593769, rel=tolerance)
    assert float(reduced.norm(dim=1).mean()) == pytest.approx(0.48736544, abs=tolerance)
    assert float(reduced[0, 0]) == pytest.approx(-0.01013896, abs=tolerance)
    for count, gap in ((2, 1.31352197), (4, 0.18213602)):
        assert float((primary_components(X, count=count) - X).norm()) == pytest.approx(gap, abs=2e-8)


def test_fact_7_all_components_are_the_images_and_reducing_twice_is_reducing_once():
    assert primary_components(X, count=7) is X and primary_components(X, count=32) is X
    assert float((primary_components(X, count=6) - X).abs().max()) == pytest.approx(7.78e-4, abs=5e-6)
    once = primary_components(X, count=3)
    assert torch.allclose(primary_components(once, count=3), once, atol=1e-9)
    assert torch.allclose(once.mean(0), X.mean(0), atol=1e-12)


def test_fact_8_losses():
    def loss(images):
        return float(matching(images, Y5, scale=100.0, smoothing=0.1))

    assert loss(X) == pytest.approx(8.5039346978, abs=1e-9)
    assert loss(primary_components(X, count=2)) == pytest.approx(10.7357826, abs=3e-6)  # the golden ones are of 32 bits
    assert loss(primary_components(X, count=4)) == pytest.approx(8.4771109, abs=3e-6)
    assert primary_components(X, count=4).norm(dim=1).mean() < 1
    assert float(matching(X, Y5, scale=50.0)) == pytest.approx(0.0656376729, abs=1e-9)


def test_the_gradient_is_that_of_the_decomposition():
    for n, d, count in ((9, 12, 3), (20, 6, 2), (8, 16, 6)):
        x = U(n, d, 0.3).requires_grad_()
        assert torch.autograd.gradcheck(lambda t, k=count: primary_components(t, count=k), (x,))
    x = U(12, 5, 0.3).requires_grad_()
    weights = torch.linspace(-1, 1, 60, dtype=torch.float64).view(12, 5)
    (primary_components(x, count=2) * weights).sum().backward()
    y = U(12, 5, 0.3).requires_grad_()
    mean = y.mean(0)
    _, _, v = torch.linalg.svd(y - mean, full_matrices=False)
    ((((y - mean) @ v[:2].T @ v[:2]) + mean) * weights).sum().backward()
    assert torch.allclose(x.grad, y.grad, atol=1e-9)


def test_where_the_gradient_of_the_decomposition_is_no_number_ours_is():
    images = F.normalize(torch.cat([torch.eye(6), -torch.eye(6)]), dim=-1).repeat(2, 2)  # all variances are equal
    theirs, ours = images.clone().requires_grad_(), images.clone().requires_grad_()
    _, _, v = torch.linalg.svd(theirs - theirs.mean(0), full_matrices=False)
    ((theirs - theirs.mean(0)) @ v[:3].T @ v[:3]).pow(3).sum().backward()
    primary_components(ours, count=3).pow(3).sum().backward()
    assert not theirs.grad.isfinite().all() and ours.grad.isfinite().all()
    alike = torch.ones(10, 16).requires_grad_()
    primary_components(alike, count=3).square().sum().backward()
    assert alike.grad.isfinite().all()


def test_no_number_in_an_image_reaches_the_loss_instead_of_stopping_the_decomposition():
    broken = torch.rand(12, 16)
    broken[3, 4] = torch.nan
    assert primary_components(broken, count=3).isnan().any()


def test_groups_are_reduced_by_themselves():
    found = grouped_components(U(24, 16, 0), count=3, group=8)
    assert torch.equal(found[8:16], primary_components(U(24, 16, 0)[8:16], count=3))
    assert not torch.allclose(found, grouped_components(U(24, 16, 0), count=3, group=None), atol=1e-3)


def test_components_that_change_nothing_are_said_to():
    assert "fewer than the 32" in inactive(images=33, width=512, count=32)
    assert inactive(images=34, width=512, count=32) == ""
    assert "lower components" in inactive(images=128, width=32, count=32)
    inputs = LossInputs(image=torch.rand(8, 16), text=torch.rand(8, 16), logit_scale=torch.tensor(10.0))
    with pytest.raises(InputError, match=r"llm/pcm: 8 images have 7 components"):
        Pcm(components=7)(inputs)
    with pytest.raises(InputError, match="4 images"):
        Pcm(components=3, group=4)(inputs)


def test_the_registered_loss_is_the_clip_loss_of_reduced_images():
    loss = Registry.discover().build("loss", "llm/pcm", {"components": 4, "smoothing": 0.1})
    inputs = LossInputs(image=3 * X, text=Y5, logit_scale=torch.tensor(100.0))
    assert float(loss(inputs)["loss"]) == pytest.approx(8.4771109, abs=3e-6)
    assert loss.needs_scale and loss.batch_coupled
    plain = float(ClipLoss()(inputs)["loss"])
    assert plain == pytest.approx(float(matching(X, Y5, scale=100.0)), abs=1e-9)


def share(group):
    """Loss and gradient of this rank's half of the batch."""
    rank = distributed.rank()
    x = U(16, 12, 0)[rank * 8 : rank * 8 + 8].clone().requires_grad_()
    inputs = LossInputs(image=x, text=U(16, 12, 0.5)[rank * 8 : rank * 8 + 8], logit_scale=torch.tensor(20.0))
    loss = Pcm(components=3, group=group)(inputs)["loss"]
    loss.backward()
    return float(loss), x.grad / 2  # every rank has the whole loss; gathering sums over ranks


@pytest.mark.slow
@pytest.mark.parametrize("group", [None, 8])
def test_two_processes_reduce_and_compare_what_one_does(group):
    x = U(16, 12, 0).requires_grad_()
    inputs = LossInputs(image=x, text=U(16, 12, 0.5), logit_scale=torch.tensor(20.0))
    whole = Pcm(components=3, group=group)(inputs)["loss"]
    whole.backward()
    found = run_ranks(share, 2, group)
    for rank, (value, gradient) in enumerate(found):
        assert value == pytest.approx(whole.item(), abs=1e-9)
        assert torch.allclose(gradient, x.grad[rank * 8 : rank * 8 + 8], atol=1e-9)
