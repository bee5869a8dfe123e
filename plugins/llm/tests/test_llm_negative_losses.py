"""NegCLIP's columns and the counting loss: values that the equations imply, on fixed inputs."""

import math

import pytest
import torch
from torch.nn import functional as F

from clipgraft.errors import ClipgraftError
from clipgraft.losses.base import LossInputs
from clipgraft.losses.contrastive import ClipLoss
from clipgraft.testing.ranks import run_ranks
from clipgraft_llm.counting.objective import CountLoss, count_loss
from clipgraft_llm.named_losses import TextInputs, weighted
from clipgraft_llm.negatives.objective import NegClipLoss, negclip_loss

torch.set_num_threads(1)


def U(n, d, p):
    i, j = torch.arange(1, n + 1, dtype=torch.float64)[:, None], torch.arange(1, d + 1, dtype=torch.float64)[None]
    return F.normalize(torch.sin(0.61 * i + 1.37 * j + 0.053 * i * j + p), dim=-1)


X, Y5, Y, Z = U(8, 16, 0), U(8, 16, 0.5), U(8, 16, 1.2), U(8, 16, 1.9)
SCALE = torch.tensor(20.0, dtype=torch.float64)


def inputs(image=X, text=Y, negatives=Z[:, None], present=None, scale=SCALE):
    present = torch.ones(negatives.shape[:2], dtype=torch.bool) if present is None else present
    return TextInputs(image=image, text=text, negatives=negatives, present=present, logit_scale=scale)


def test_the_anchors_of_the_golden_inputs():
    assert X[0, :3].tolist() == pytest.approx([0.30992413, -0.10708071, -0.34146130], abs=1e-8)
    assert float(Y5[7, 15]) == pytest.approx(0.16323208, abs=1e-8)


def test_negatives_as_further_columns():
    assert float(NegClipLoss()(inputs())["loss"]) == pytest.approx(11.01254372, abs=1e-8)
    plain = ClipLoss()(LossInputs(image=X, text=Y, logit_scale=SCALE))["loss"]
    assert float(plain) == pytest.approx(10.74942595, abs=1e-8)


def test_negatives_hear_the_image_to_text_half_alone():
    z = Z.clone().requires_grad_()
    found = negclip_loss(X, Y, z, scale=20.0)
    (whole,) = torch.autograd.grad(found["loss"], z, retain_graph=True)
    (half,) = torch.autograd.grad(found["image_to_text"], z)
    assert torch.allclose(whole, half / 2, atol=1e-15)
    assert not found["text_to_image"].requires_grad


def test_absent_negatives_leave_clips_loss():
    plain = ClipLoss()(LossInputs(image=X, text=Y, logit_scale=SCALE))
    absent = NegClipLoss()(inputs(present=torch.zeros(8, 1, dtype=torch.bool)))
    none = NegClipLoss()(inputs(negatives=Z[:, None][:, :0]))
    for name in ("loss", "image_to_text", "text_to_image"):
        assert float(absent[name]) == pytest.approx(float(plain[name]), abs=1e-12)
        assert float(none[name]) == pytest.approx(float(plain[name]), abs=1e-12)


def test_negatives_never_lower_the_loss():
    plain = float(ClipLoss()(LossInputs(image=X, text=Y, logit_scale=SCALE))["loss"])
    for p in (0.1, 0.9, 2.5, 3.3):
        assert float(NegClipLoss()(inputs(negatives=U(16, 16, p).view(8, 2, 16)))["loss"]) >= plain


def test_a_batch_has_as_many_columns_as_captions_right_and_wrong(monkeypatch):
    seen = []
    cross_entropy = F.cross_entropy
    monkeypatch.setattr(F, "cross_entropy", lambda x, y: seen.append(tuple(x.shape)) or cross_entropy(x, y))
    NegClipLoss()(inputs())  # B = 4 pictures and 4 hard ones: 2B rows, 4B columns
    assert seen == [(8, 16), (8, 8)]
    with pytest.raises(ClipgraftError, match="got 8 and 7"):
        negclip_loss(X, Y[:7], Z, scale=20.0)


def test_a_stage_without_negatives_is_told_which_recipe_has_them():
    with pytest.raises(ClipgraftError, match="llm/negclip"):
        NegClipLoss()(LossInputs(image=X, text=Y, logit_scale=SCALE))


# -- counting ---------------------------------------------------------------------------------------------------------


def test_the_counting_loss_on_fixed_inputs():
    assert float(CountLoss()(inputs())["loss"]) == pytest.approx(0.40851764, abs=1e-8)
    own, other = (X * Y).sum(1), (X * Z).sum(1)
    official = -(own.exp() / (own.exp() + other.exp())).log()
    assert torch.allclose(count_loss(own, other), official, atol=1e-12)


def test_an_unchanged_caption_costs_ln_2_and_a_shift_changes_nothing():
    assert float(CountLoss()(inputs(negatives=Y[:, None]))["loss"]) == pytest.approx(math.log(2), abs=1e-12)
    own, other = torch.tensor([0.2, 0.5]), torch.tensor([0.1, 0.7])
    assert torch.allclose(count_loss(own + 3, other + 3), count_loss(own, other), atol=1e-6)


def test_both_captions_are_pulled_with_opposite_force():
    own, other = (torch.tensor([0.2, 0.5], requires_grad=True) for _ in range(2))
    count_loss(own, other, scale=2.0).sum().backward()
    assert torch.equal(own.grad, -other.grad) and (own.grad < 0).all()


def test_only_counting_captions_count_and_a_batch_without_any_costs_nothing():
    present = torch.tensor([[True]] * 3 + [[False]] * 5)
    some = CountLoss()(inputs(present=present))
    three = CountLoss()(inputs(X[:3], Y[:3], Z[:3, None]))
    assert float(some["loss"]) == pytest.approx(float(three["loss"]), abs=1e-12)
    assert float(some["right"]) == pytest.approx(float(((X * Y).sum(1) > (X * Z).sum(1))[:3].double().mean()))
    text = Y.clone().requires_grad_()
    none = CountLoss()(inputs(text=text, present=torch.zeros(8, 1, dtype=torch.bool)))["loss"]
    none.backward()
    assert float(none) == 0 and torch.equal(text.grad, torch.zeros_like(text))


def test_losses_add_up_with_their_weights():
    losses = [NegClipLoss(), CountLoss(scale=None)]
    total, terms = weighted(losses, (1.0, 0.5), inputs())
    alone = [float(loss(inputs())["loss"]) for loss in losses]
    assert float(total) == pytest.approx(alone[0] + 0.5 * alone[1])
    assert {"NegClipLoss.0.image_to_text", "CountLoss.1.right"} < set(terms) and losses[1].needs_scale


# -- several processes ------------------------------------------------------------------------------------------------

PRESENT = torch.tensor([[1, 0], [1, 1], [0, 0], [1, 1], [0, 0], [0, 0], [1, 0], [0, 0]]).bool()


def _gradients(rows):
    found = []
    for loss in (NegClipLoss(), CountLoss(), CountLoss(scale=None)):
        leaves = [x[rows].clone().requires_grad_() for x in (X, Y, U(16, 16, 0.7).view(8, 2, 16))]
        scale = SCALE.clone().requires_grad_()
        value = loss(inputs(*leaves, present=PRESENT[rows], scale=scale))["loss"]
        value.backward()
        found.append([value.detach(), *(x.grad for x in leaves)])
    return found


def _on_a_rank():
    from torch import distributed as dist

    return _gradients(slice(4 * dist.get_rank(), 4 * dist.get_rank() + 4))


def test_two_processes_agree_with_one():
    whole, ranks = _gradients(slice(0, 8)), run_ranks(_on_a_rank, 2)
    for k, (value, *grads) in enumerate(whole):
        shares = [rank[k] for rank in ranks]
        assert all(float(share[0]) == pytest.approx(float(value), abs=1e-12) for share in shares)
        for place, grad in enumerate(grads, 1):
            assert torch.allclose(torch.cat([share[place] for share in shares]) / 2, grad, atol=1e-12)
