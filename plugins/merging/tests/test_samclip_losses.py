"""The two objectives: what the paper's equations imply."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from clipgraft_merging.samclip.losses import cosine_distance, mask_loss, measured_iou, pixel_terms


def test_fact_7_cosine_distance():
    a, b = torch.randn(6, 8), torch.randn(6, 8)
    assert 0 <= float(cosine_distance(a, b)) <= 2
    torch.testing.assert_close(cosine_distance(a, 3 * a), torch.tensor(0.0), atol=1e-6, rtol=0)
    torch.testing.assert_close(cosine_distance(a, -a), torch.tensor(2.0))
    torch.testing.assert_close(cosine_distance(7 * a, 0.1 * b), cosine_distance(a, b))
    assert float(cosine_distance(a, b)) > 1e-3


def test_the_teacher_gets_no_gradient():
    a, b = torch.randn(2, 4, requires_grad=True), torch.randn(2, 4, requires_grad=True)
    cosine_distance(a, b).backward()
    assert a.grad is not None and b.grad is None


def gradient(logits, teacher, **settings):
    logits = logits.clone().requires_grad_()
    iou = torch.full(logits.shape[:2], 0.8)
    terms = mask_loss(logits, iou, teacher_logits=teacher, teacher_iou=iou, **settings)
    terms.total.backward()
    return logits.grad, terms


@pytest.mark.parametrize("kind", ["soft", "quality-focal"])
@pytest.mark.parametrize("match", ["min", "each"])
def test_fact_12_a_perfect_student_stays_where_it_is(kind, match):
    teacher = 3 * torch.randn(4, 3, 8, 8)
    grad, terms = gradient(teacher, teacher, kind=kind, match=match)
    assert float(grad.abs().max()) < 1e-7
    torch.testing.assert_close(terms.total, torch.tensor(0.0), atol=1e-6, rtol=0)
    moved, _ = gradient(teacher + 0.5, teacher, kind=kind, match=match)
    assert float(moved.abs().max()) > 1e-5


def test_trap_e_focal_and_plain_dice_on_soft_targets_would_push_it_away():
    s = (3 * torch.randn(4, 8, 8, dtype=torch.float64)).requires_grad_()
    t = s.detach().sigmoid()
    p = s.sigmoid()
    entropy = F.binary_cross_entropy_with_logits(s, t, reduction="none")
    focal = ((1 - (p * t + (1 - p) * (1 - t))) ** 2 * entropy).mean()
    dice = 1 - (2 * (p * t).sum() + 1) / ((p + t).sum() + 1)
    assert all(float(torch.autograd.grad(x, s, retain_graph=True)[0].abs().max()) > 1e-5 for x in (focal, dice))


def test_hard_targets_push_towards_certainty():
    teacher = torch.full((1, 1, 4, 4), 0.5)
    grad, _ = gradient(teacher, teacher, kind="hard")
    assert bool((grad < 0).all())  # a pixel that is barely inside shall be more inside


def test_hard_is_sams_focal_and_dice():
    s, z = torch.randn(5, 6, 6, dtype=torch.float64), torch.randn(5, 6, 6, dtype=torch.float64)
    focal, dice = pixel_terms(s, z, kind="hard")
    t, p = (z > 0).double(), s.sigmoid()
    pt = torch.where(t > 0, p, 1 - p)
    alpha = torch.where(t > 0, 0.25, 0.75).double()
    torch.testing.assert_close(focal, (-alpha * (1 - pt) ** 2 * pt.log()).mean((1, 2)))
    torch.testing.assert_close(dice, 1 - (2 * (p * t).sum((1, 2)) + 1) / (p.sum((1, 2)) + t.sum((1, 2)) + 1))


def test_soft_is_the_divergence_from_the_teacher():
    s, z = torch.randn(3, 4, 4, dtype=torch.float64), torch.randn(3, 4, 4, dtype=torch.float64)
    p, t = s.sigmoid(), z.sigmoid()
    kl = (t * (t / p).log() + (1 - t) * ((1 - t) / (1 - p)).log()).mean((1, 2))
    torch.testing.assert_close(pixel_terms(s, z, kind="soft")[0], kl)
    quality = ((t - p) ** 2 * (t * (t / p).log() + (1 - t) * ((1 - t) / (1 - p)).log())).mean((1, 2))
    torch.testing.assert_close(pixel_terms(s, z, kind="quality-focal")[0], quality)


def test_only_the_nearest_of_three_masks_learns_and_the_teachers_best_is_the_target():
    teacher = torch.stack([torch.full((4, 4), -5.0), torch.full((4, 4), 5.0), torch.zeros(4, 4)])[None]
    student = torch.stack([torch.full((4, 4), -4.0), torch.full((4, 4), -1.0), torch.full((4, 4), 2.0)])[None]
    student.requires_grad_()
    iou = torch.tensor([[0.1, 0.9, 0.2]])
    mask_loss(student, iou, teacher_logits=teacher, teacher_iou=iou, match="min").total.backward()
    assert [bool(g.any()) for g in student.grad[0]] == [False, False, True]
    student.grad = None
    mask_loss(student, iou, teacher_logits=teacher, teacher_iou=iou, match="each").total.backward()
    assert [bool(g.any()) for g in student.grad[0]] == [True, True, True]


def test_weights_are_twenty_to_one_to_one():
    s, z = torch.randn(2, 3, 5, 5), torch.randn(2, 3, 5, 5)
    terms = mask_loss(s, torch.rand(2, 3), teacher_logits=z, teacher_iou=torch.rand(2, 3))
    torch.testing.assert_close(terms.total, 20 * terms.focal + terms.dice + terms.iou)


def test_guessed_ious_follow_the_teacher_or_the_measured_overlap():
    z = torch.tensor([[[5.0, 5.0], [-5.0, -5.0]]])[None]
    s = torch.tensor([[[5.0, -5.0], [-5.0, -5.0]]])[None]
    guess, told = torch.tensor([[0.25]]), torch.tensor([[0.75]])

    def found(target):
        return float(mask_loss(s, guess, teacher_logits=z, teacher_iou=told, iou_target=target).iou)

    assert found("teacher") == pytest.approx(0.25) and found("measured") == pytest.approx(0.0625)
    assert float(measured_iou(torch.full((2, 2), -1.0), torch.full((2, 2), -1.0))) == 1


def test_half_precision_is_widened():
    s = torch.randn(1, 1, 4, 4).to(torch.bfloat16)
    assert mask_loss(s, torch.rand(1, 1), teacher_logits=s, teacher_iou=torch.rand(1, 1)).total.dtype == torch.float32
