"""Affinity mimicking, reinforced distillation, CLIP-Refine: values that the papers' equations imply, on fixed inputs.

U(n, d, p) are unit rows of a sine table, no random numbers: the first test anchors it.
"""

import math

import pytest
import torch
from torch.nn import functional as F

from clipgraft.errors import ClipgraftError
from clipgraft.losses.base import LossInputs
from clipgraft.losses.contrastive import ClipLoss
from clipgraft.testing.ranks import run_ranks
from clipgraft_llm.named_losses import TextInputs
from clipgraft_llm.refine.objective import HycdLoss, RafaLoss, hycd, rafa, softened
from clipgraft_llm.reinforce.objective import ReinforcedLoss, distillation, ensemble_target, parts
from clipgraft_llm.tiny.affinity import AffinityLoss, affinity_loss

torch.set_num_threads(1)


def S(n, d, p):
    i, j = torch.arange(1, n + 1, dtype=torch.float64)[:, None], torch.arange(1, d + 1, dtype=torch.float64)[None]
    return torch.sin(0.61 * i + 1.37 * j + 0.053 * i * j + p)


def U(n, d, p):
    return F.normalize(S(n, d, p), dim=-1)


X, Y5, Y, Z = U(8, 16, 0), U(8, 16, 0.5), U(8, 16, 1.2), U(8, 16, 1.9)
TX, TY = U(8, 24, 0), U(8, 24, 1.2)
ENTROPY = 0.08188532


def near(value, wanted, tolerance=2e-8):
    assert float(value) == pytest.approx(wanted, abs=tolerance)


def test_the_anchors_of_the_golden_inputs():
    assert X[0, :3].tolist() == pytest.approx([0.30992413, -0.10708071, -0.34146130], abs=1e-8)
    near(Y5[7, 15], 0.16323208)
    near((X * Y).sum(1).mean(), 0.35701882)
    for text, scale, wanted in ((Y5, 50.0, 0.0656376729), (Y5, 1.0, 1.3870866012), (Y, 20.0, 10.74942595)):
        found = ClipLoss()(LossInputs(image=X, text=text, logit_scale=torch.tensor(scale, dtype=torch.float64)))
        near(found["loss"], wanted)


# -- TinyCLIP --------------------------------------------------------------------------------------------------------


def affinity(x=X, y=Y, tx=TX, ty=TY, s=50.0, st=50.0):
    return affinity_loss(x, y, tx, ty, scale=s, teacher_scale=st)


def test_affinity_of_a_wider_teacher():
    found = affinity()
    near(found["loss"], 0.35371189)
    near(found["image_to_text"], 0.38309750)
    near(found["text_to_image"], 0.32432627)
    low = affinity(*(x.float() for x in (X, Y, TX, TY)))
    assert float(low["loss"]) == pytest.approx(0.35371189, rel=2e-5)


def test_a_student_equal_to_its_teacher_reaches_the_entropy_with_no_gradient():
    x, y = X.clone().requires_grad_(), Y.clone().requires_grad_()
    found = affinity(x, y, X, Y)["loss"]
    found.backward()
    near(found.detach(), ENTROPY)
    assert x.grad.abs().max() < 1e-12 and y.grad.abs().max() < 1e-12
    nudged = [F.normalize(t + 0.05 * S(8, 16, 2.0), dim=-1) for t in (X, Y)]
    assert affinity(nudged[0], Y, X, Y)["loss"] > found and affinity(X, nudged[1], X, Y)["loss"] > found  # Gibbs


def test_affinity_ignores_the_order_of_rows_and_trains_no_fixed_scale():
    order = torch.tensor([3, 1, 7, 0, 2, 6, 5, 4])
    near(affinity(*(t[order] for t in (X, Y, TX, TY)))["loss"], float(affinity()["loss"]), 1e-12)
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    x = X.clone().requires_grad_()
    inputs = LossInputs(image=x, text=Y, logit_scale=scale, teacher_image=TX, teacher_text=TY)
    fixed, learnt = AffinityLoss(), AffinityLoss(scale=None)
    assert not fixed.needs_scale and learnt.needs_scale
    fixed(inputs)["loss"].backward()
    assert scale.grad is None and x.grad.abs().sum() > 0
    learnt(inputs)["loss"].backward()
    assert scale.grad.abs() > 0


# -- reinforced distillation ------------------------------------------------------------------------------------------

TEACHERS = (
    torch.cat([U(8, 24, 0), U(8, 12, 0.3)], 1),
    torch.cat([U(8, 24, 1.2), U(8, 12, 1.0)], 1),
    torch.cat([U(8, 24, 1.9), U(8, 12, 2.2)], 1),
)


def reinforced(scales, *, synthetic=True, contrast=0.25, distill=0.75):
    loss = ReinforcedLoss(dims=(24, 12), scales=scales, contrast=contrast, distill=distill)
    more = {"synthetic": Z, "teacher_synthetic": TEACHERS[2]} if synthetic else {}
    return loss(
        TextInputs(
            image=X,
            text=Y,
            logit_scale=torch.tensor(50.0, dtype=torch.float64),
            teacher_image=TEACHERS[0],
            teacher_text=TEACHERS[1],
            **more,
        )
    )


def test_two_teachers_and_a_written_caption():
    found = reinforced((100.0, 100.0))
    near(found["contrastive"], 20.74593626, 1e-8)
    near(found["distill"], 4.32712483)
    near(found["loss"], 20.74593626 + 4.32712483)
    real = reinforced((100.0, 100.0), synthetic=False)
    near(real["contrastive"], 6.67698426)
    near(real["distill"], 0.26541288)


@pytest.mark.parametrize(
    ("scales", "both", "real"), [((70.0, 60.0), 4.34680735, 0.26554124), ((1.0, 1.0), 43.92173216, 23.31384650)]
)
def test_every_teacher_has_its_own_temperature(scales, both, real):
    near(reinforced(scales)["distill"], both)
    near(reinforced(scales, synthetic=False)["distill"], real)


def test_teachers_are_averaged_after_their_softmax():
    images, texts = parts(TEACHERS[0], (24, 12)), parts(TEACHERS[1], (24, 12))
    target = ensemble_target(images, texts, (100.0, 100.0))
    assert torch.allclose(target.sum(1), torch.ones(8, dtype=torch.float64), atol=1e-12)
    ours = distillation(X, Y, *TEACHERS[:2], scale=50.0, dims=(24, 12), scales=(100.0, 100.0))
    near(ours, 0.3538838389, 1e-10)
    mean = torch.stack([100 * x @ y.T for x, y in zip(images, texts, strict=True)]).mean(0)
    logits = 50 * X @ Y.T
    other = -(mean.softmax(1) * logits.log_softmax(1)).sum(1).mean() / 2
    other = other - (mean.T.softmax(1) * logits.T.log_softmax(1)).sum(1).mean() / 2
    near(other, 0.3538868689, 1e-10)


def test_a_single_teacher_equal_to_the_student_gives_its_entropy():
    near(distillation(X, Y, X, Y, scale=50.0, dims=(16,), scales=(50.0,)), ENTROPY)


def test_storing_teachers_in_bf16_hardly_moves_the_target():
    def value(text, teacher_text, store):
        teachers = [store(t) for t in (TEACHERS[0], teacher_text)]
        return distillation(X, text, *teachers, scale=50.0, dims=(24, 12), scales=(100.0, 100.0))

    for text, teacher_text in ((Y, TEACHERS[1]), (Z, TEACHERS[2])):
        exact = value(text, teacher_text, lambda t: t)
        assert float(value(text, teacher_text, lambda t: t.bfloat16().double()) / exact) == pytest.approx(1, abs=5e-3)


def test_without_contrast_the_scale_hears_the_teachers_alone():
    def gradient(contrast):
        s = torch.tensor(50.0, dtype=torch.float64, requires_grad=True)
        loss = ReinforcedLoss(dims=(24, 12), scales=(70.0, 60.0), contrast=contrast, distill=1.0)
        inputs = TextInputs(image=X, text=Y, logit_scale=s, teacher_image=TEACHERS[0], teacher_text=TEACHERS[1])
        loss(inputs)["loss"].backward()
        return s.grad

    s = torch.tensor(50.0, dtype=torch.float64, requires_grad=True)
    distillation(X, Y, *TEACHERS[:2], scale=s, dims=(24, 12), scales=(70.0, 60.0)).backward()
    assert torch.allclose(gradient(0.0), s.grad, rtol=1e-12) and not torch.allclose(gradient(0.5), s.grad)


def test_a_store_of_other_widths_is_refused():
    with pytest.raises(ClipgraftError, match=r"36 teacher dimensions, the loss is told \[24, 8\]"):
        parts(TEACHERS[0], (24, 8))
    with pytest.raises(ClipgraftError, match="run llm/reinforce"):
        ReinforcedLoss()(TextInputs(image=X, text=Y, logit_scale=torch.tensor(1.0)))


# -- CLIP-Refine ------------------------------------------------------------------------------------------------------

A, B, A0, B0 = 5 * X, 5 * Y5, 5 * U(8, 16, 0.05), 5 * U(8, 16, 0.55)


@pytest.mark.parametrize(("alpha", "wanted"), [(0.0, 0.0000562819), (0.5, 0.0363239645), (1.0, 0.2143753921)])
def test_hycd_from_images_to_texts(alpha, wanted):
    near(hycd(A, B, A0, B0, alpha=alpha)["image_to_text"], wanted, 1e-9)


def test_hycd_both_ways_and_with_the_right_pairs_alone():
    near(hycd(A, B, A0, B0, alpha=0.5)["loss"], 0.0347228251, 1e-9)
    hard = F.cross_entropy(A @ B.T, torch.arange(8))
    near(hycd(A, B, A0, B0, alpha=1.0)["image_to_text"], float(hard), 1e-12)


def test_hycd_of_the_teacher_itself_is_zero_only_without_hard_labels():
    near(hycd(A, B, A, B, alpha=0.0)["loss"], 0.0, 1e-12)
    half = hycd(A, B, A, B, alpha=0.5)
    near(half["image_to_text"], 0.0357482183, 1e-9)
    near(half["loss"], 0.0343108560, 1e-9)


def test_hycd_gradient_is_softmax_minus_target():
    a = A.clone().requires_grad_()
    hycd(a, B, A0, B0, alpha=0.5)["image_to_text"].backward()
    target = softened((A0 @ B0.T).softmax(1), alpha=0.5)
    assert torch.allclose(target.sum(1), torch.ones(8, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(a.grad, ((A @ B.T).softmax(1) - target) / 8 @ B, atol=1e-10)


def test_a_temperature_divides_similarities_and_multiplies_by_its_square():
    for t in (0.5, 4.0):
        near(hycd(A, B, A0, B0, T=t)["loss"], t**2 * float(hycd(A / t, B, A0 / t, B0)["loss"]), 1e-12)


def test_unit_features_at_temperature_one_say_nothing():
    def entropy(scale):
        q = (scale * X @ Y5.T).softmax(1)
        return float(-(q * q.log()).sum(1).mean())

    near(entropy(1.0), 1.92655, 1e-5)
    near(entropy(25.0), 0.44579, 1e-5)
    near(entropy(100.0), 0.04703, 1e-5)
    assert math.log(8) == pytest.approx(2.07944, abs=1e-5)


def test_rafa_in_both_reductions():
    reference = S(8, 16, 2.0)
    near(rafa(A, B, reference), 4.7512329174, 1e-9)
    near(rafa(A, B, reference, reduction="paper"), 38.0098633391, 1e-9)
    assert float(rafa(A, B, reference, reduction="paper") / rafa(A, B, reference)) == pytest.approx(16 / 2, abs=1e-12)


def test_rafa_in_the_mean_is_shrinkage():
    noise = torch.randn(20_000, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = (5 * X)[torch.arange(20_000) % 8]
    near(rafa(rows, rows, noise), 2 * (25 / 16 + 1), 0.03)


def test_rafa_pulls_image_and_text_apart_from_each_other():
    a, b = A.clone().requires_grad_(), B.clone().requires_grad_()
    reference = S(8, 16, 2.0)
    rafa(a, b, reference).backward()
    assert torch.allclose(a.grad, 2 * (A - reference) / (8 * 16), atol=1e-15)  # nothing of the text in it
    assert torch.allclose(b.grad, 2 * (B - reference) / (8 * 16), atol=1e-15)
    near(rafa(reference, reference, reference), 0.0, 0)


def test_a_batch_of_one_runs():
    row = [x[:1] for x in (A, B, A0, B0)]
    near(hycd(*row)["loss"], 0.0, 1e-12)
    assert torch.isfinite(rafa(row[0], row[1], S(1, 16, 2.0)))


def test_named_losses_read_raw_features_unless_told_otherwise():
    s = torch.tensor(2.0, dtype=torch.float64)
    inputs = TextInputs(image=A, text=B, teacher_image=A0, teacher_text=B0, logit_scale=s, reference=S(8, 16, 2.0))
    near(HycdLoss()(inputs)["loss"], 0.0347228251, 1e-9)
    near(RafaLoss()(inputs)["loss"], 4.7512329174, 1e-9)
    unit = HycdLoss(unit=True)
    near(unit(inputs)["loss"], float(hycd(2 * X, Y5, 2 * A0 / 5, B0 / 5)["loss"]), 1e-12)
    assert unit.needs_scale and not HycdLoss().needs_scale
    with pytest.raises(ClipgraftError, match="llm/clip-refine"):
        RafaLoss()(LossInputs(image=A, text=B))


# -- several processes ------------------------------------------------------------------------------------------------


def _on_a_rank():
    from torch import distributed as dist

    rows = slice(4 * dist.get_rank(), 4 * dist.get_rank() + 4)
    return _gradients(rows)


def _gradients(rows):
    found = []
    for loss in (
        AffinityLoss(),
        HycdLoss(),
        RafaLoss(),
        ReinforcedLoss(dims=(24, 12), scales=(70.0, 60.0), contrast=0.5),
    ):
        image, text = A[rows].clone().requires_grad_(), B[rows].clone().requires_grad_()
        teachers = TEACHERS if isinstance(loss, ReinforcedLoss) else (A0, B0, Z)
        inputs = TextInputs(
            image=image,
            text=text,
            synthetic=Z[rows],
            logit_scale=torch.tensor(30.0, dtype=torch.float64),
            teacher_image=teachers[0][rows],
            teacher_text=teachers[1][rows],
            teacher_synthetic=teachers[2][rows],
            reference=S(8, 16, 2.0)[rows],
        )
        value = loss(inputs)["loss"]
        value.backward()
        found.append((value.detach(), image.grad, text.grad))
    return found


def test_two_processes_agree_with_one():
    whole, ranks = _gradients(slice(0, 8)), run_ranks(_on_a_rank, 2)
    for k, (value, image, text) in enumerate(whole):
        shares = [rank[k] for rank in ranks]
        assert float(sum(s[0] for s in shares) / 2) == pytest.approx(float(value), abs=1e-12)
        # DDP averages over ranks what each of them sends back
        assert torch.allclose(torch.cat([s[1] for s in shares]) / 2, image, atol=1e-12)
        assert torch.allclose(torch.cat([s[2] for s in shares]) / 2, text, atol=1e-12)


# -- across methods ---------------------------------------------------------------------------------------------------


def test_a_teacher_that_is_certain_leaves_clips_loss():
    """Soft-target cross-entropy with one-hot targets is CLIP's: TinyCLIP, reinforced training and HyCD alike."""
    sure = torch.eye(8, dtype=torch.float64)
    near(affinity_loss(X, Y5, sure, sure, scale=50.0, teacher_scale=1e4)["loss"], 0.0656376729, 1e-9)
    near(distillation(X, Y5, sure, sure, scale=50.0, dims=(8,), scales=(1e4,)), 0.0656376729, 1e-9)
    near(hycd(50 * X, Y5, sure, sure, alpha=1.0)["loss"], 0.0656376729, 1e-9)
    near(hycd(50 * X, Y5, 1e4 * sure, sure, alpha=0.0)["loss"], 0.0656376729, 1e-9)
