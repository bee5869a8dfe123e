"""Losses equal their references and have the properties that their equations imply."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from clipgraft.errors import ClipgraftError, InputError
from clipgraft.losses.base import Loss, LossInputs
from clipgraft.losses.contrastive import ClipLoss
from clipgraft.losses.distill import (
    CosineDistill,
    DistillConfig,
    FeatureDistill,
    SoftContrastiveDistill,
    distill,
)
from clipgraft.losses.sigmoid import SigLipLoss

B, D, N, W = 6, 5, 4, 3
ALL = [ClipLoss(), SigLipLoss(), CosineDistill(), FeatureDistill()]
ALL += [FeatureDistill(tokens=True), SoftContrastiveDistill(temperature=0.1)]


def draw(seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    sizes = {"image": (B, D), "text": (B, D), "tokens": (B, N, W)}
    sizes |= {f"teacher_{name}": size for name, size in sizes.items()}
    values = {name: torch.randn(size, generator=rng, dtype=dtype) for name, size in sizes.items()}
    return {**values, "logit_scale": torch.tensor(7.0, dtype=dtype), "logit_bias": torch.tensor(-3.0, dtype=dtype)}


def value(loss: Loss, **inputs: Tensor | None) -> float:
    return float(loss(LossInputs(**inputs))["loss"])


@pytest.mark.parametrize("loss", ALL, ids=lambda loss: type(loss).__name__)
def test_named_scalars_and_a_loss(loss: Loss) -> None:
    found = loss(LossInputs(**draw()))
    assert "loss" in found and all(v.shape == () and v.isfinite() for v in found.values())


@pytest.mark.parametrize("loss", ALL, ids=lambda loss: type(loss).__name__)
def test_the_order_of_the_batch_does_not_matter(loss: Loss) -> None:
    inputs = draw()
    order = torch.randperm(B, generator=torch.Generator().manual_seed(1))
    shuffled = {name: v[order] if v.ndim else v for name, v in inputs.items()}
    assert value(loss, **shuffled) == pytest.approx(value(loss, **inputs), abs=1e-12)


@pytest.mark.parametrize("loss", ALL, ids=lambda loss: type(loss).__name__)
def test_gradients_are_those_of_the_function(loss: Loss) -> None:
    inputs = draw()
    names = ["image", "text", "tokens", "logit_scale", "logit_bias"]
    leaves = tuple(inputs[name].clone().requires_grad_() for name in names)

    def scalar(*values: Tensor) -> Tensor:
        return loss(LossInputs(**{**inputs, **dict(zip(names, values, strict=True))}))["loss"]

    assert torch.autograd.gradcheck(scalar, leaves, atol=1e-6)
    grads = dict(zip(names, torch.autograd.grad(scalar(*leaves), leaves, allow_unused=True), strict=True))
    got = {name for name in names[2:] if grads[name] is not None}
    said = {"tokens": loss.needs_tokens, "logit_scale": loss.needs_scale, "logit_bias": loss.needs_bias}
    assert got == {name for name, needed in said.items() if needed}


@pytest.mark.parametrize("loss", ALL, ids=lambda loss: type(loss).__name__)
def test_teachers_get_no_gradient(loss: Loss) -> None:
    inputs = {name: v.clone().requires_grad_() for name, v in draw().items()}
    loss(LossInputs(**inputs))["loss"].backward()
    assert all(v.grad is None for name, v in inputs.items() if name.startswith("teacher"))


@pytest.mark.parametrize("loss", ALL, ids=lambda loss: type(loss).__name__)
def test_only_coupled_losses_mix_rows(loss: Loss) -> None:
    """Mean over halves equals the whole exactly when rows are independent."""
    inputs = draw()
    halves = [{k: v[rows] if v.ndim else v for k, v in inputs.items()} for rows in (slice(0, 3), slice(3, 6))]
    mean = sum(value(loss, **half) for half in halves) / 2
    assert (mean == pytest.approx(value(loss, **inputs), abs=1e-9)) != loss.batch_coupled
    assert (loss.reduction == "local") != loss.batch_coupled


def test_contrastive_losses_ignore_the_length_of_embeddings() -> None:
    inputs = draw()
    longer = {**inputs, "image": inputs["image"] * 3, "text": inputs["text"] * torch.rand(B, 1, dtype=torch.float64)}
    for loss in (ClipLoss(), SigLipLoss(), CosineDistill(), SoftContrastiveDistill()):
        assert value(loss, **longer) == pytest.approx(value(loss, **inputs), abs=1e-9)


@pytest.mark.parametrize("bias", [None, -3.0])
def test_equal_to_open_clip(bias: float | None) -> None:
    from open_clip import loss as theirs

    inputs = draw()
    image, text = F.normalize(inputs["image"], dim=-1), F.normalize(inputs["text"], dim=-1)
    given = {**inputs, "logit_bias": None if bias is None else torch.tensor(bias, dtype=torch.float64)}
    scale = inputs["logit_scale"]
    assert value(ClipLoss(), **given) == pytest.approx(float(theirs.ClipLoss()(image, text, scale, bias)), abs=1e-12)
    expected = float(theirs.SigLipLoss()(image, text, scale, bias))
    assert value(SigLipLoss(), **given) == pytest.approx(expected, abs=1e-12)


def test_perfect_alignment_and_indifference() -> None:
    eye = torch.eye(D, dtype=torch.float64)
    scale, bias = torch.tensor(200.0, dtype=torch.float64), torch.tensor(-100.0, dtype=torch.float64)
    assert value(ClipLoss(), image=eye, text=eye, logit_scale=scale) == pytest.approx(0, abs=1e-12)
    assert value(SigLipLoss(), image=eye, text=eye, logit_scale=scale, logit_bias=bias) == pytest.approx(0, abs=1e-12)
    same = torch.ones(B, D, dtype=torch.float64)
    assert value(ClipLoss(), image=same, text=same, logit_scale=scale) == pytest.approx(math.log(B))
    wrong = value(ClipLoss(), image=eye, text=eye.roll(1, 0), logit_scale=scale)
    assert wrong == pytest.approx(200)


def test_the_parts_of_the_sigmoid_loss_by_hand() -> None:
    inputs = draw()
    logits = 7 * F.normalize(inputs["image"], dim=-1) @ F.normalize(inputs["text"], dim=-1).T - 3
    matching = sum(math.log1p(math.exp(-float(logits[i, i]))) for i in range(B)) / B
    others = sum(math.log1p(math.exp(float(logits[i, j]))) for i in range(B) for j in range(B) if i != j) / B
    found = SigLipLoss()(LossInputs(**inputs))
    assert float(found["matching"]) == pytest.approx(matching)
    assert float(found["others"]) == pytest.approx(others)
    assert float(found["loss"]) == pytest.approx(matching + others)


@pytest.mark.parametrize("config", [{"mode": "cosine"}, {"mode": "feature"}, {"mode": "feature", "on": "tokens"}])
def test_distilling_from_oneself_is_zero(config: dict[str, str]) -> None:
    inputs = draw()
    own = {f"teacher_{name}": inputs[name] for name in ("image", "text", "tokens")}
    assert value(distill(**config), **{**inputs, **own}) == pytest.approx(0, abs=1e-12)
    assert value(distill(**config), **inputs) > 0.1


def test_soft_contrastive_distillation_is_a_divergence() -> None:
    inputs, loss = draw(), SoftContrastiveDistill(temperature=0.1)
    own = {"teacher_image": inputs["image"], "teacher_text": inputs["text"]}
    assert value(loss, **{**inputs, **own}) == pytest.approx(0, abs=1e-12)
    assert value(loss, **inputs) > 0.1
    turn = torch.linalg.qr(torch.randn(D + 2, D + 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)).Q
    turned = {k: F.pad(v, (0, 2)) @ turn for k, v in own.items()}  # another width, the same similarities
    assert value(loss, **{**inputs, **turned}) == pytest.approx(0, abs=1e-12)


def test_soft_contrastive_distillation_by_hand() -> None:
    inputs = draw()
    unit = {k: F.normalize(v, dim=-1) for k, v in inputs.items() if v.ndim}
    s = (unit["image"] @ unit["text"].T / 0.5).tolist()
    t = (unit["teacher_image"] @ unit["teacher_text"].T / 0.5).tolist()

    def softmax(row: list[float]) -> list[float]:
        total = sum(map(math.exp, row))
        return [math.exp(v) / total for v in row]

    def divergence(teacher: list[list[float]], student: list[list[float]]) -> float:
        rows = [zip(softmax(p), softmax(q), strict=True) for p, q in zip(teacher, student, strict=True)]
        return sum(p * math.log(p / q) for row in rows for p, q in row) / B

    found = SoftContrastiveDistill(temperature=0.5)(LossInputs(**inputs))
    assert float(found["image_to_text"]) == pytest.approx(divergence(t, s))
    columns = [list(c) for c in zip(*t, strict=True)], [list(c) for c in zip(*s, strict=True)]
    assert float(found["text_to_image"]) == pytest.approx(divergence(*columns))


def test_cosine_without_a_teacher_of_texts_compares_images_only() -> None:
    inputs = draw()
    expected = 1 - float(F.cosine_similarity(inputs["image"], inputs["teacher_image"]).mean())
    given = {"image": inputs["image"], "teacher_image": inputs["teacher_image"]}
    assert value(CosineDistill(), **given) == pytest.approx(expected)
    assert "text" in CosineDistill()(LossInputs(**inputs))


def test_16_bit_inputs_are_computed_in_32_bit_also_under_autocast() -> None:
    exact = draw(dtype=torch.float32)
    half = {k: v.bfloat16() for k, v in exact.items()}
    for loss in (ClipLoss(), SigLipLoss(), SoftContrastiveDistill(temperature=0.1)):
        expected = value(loss, **{k: v.float() for k, v in half.items()})
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = loss(LossInputs(**half))["loss"]
        assert found.dtype == torch.float32 and float(found) == expected


def test_what_is_missing_is_named() -> None:
    inputs = draw()
    with pytest.raises(ClipgraftError, match="needs teacher_image, the stage gives image; name a teacher"):
        CosineDistill()(LossInputs(image=inputs["image"]))
    with pytest.raises(ClipgraftError, match="needs text, the stage gives image, logit_scale"):
        ClipLoss()(LossInputs(image=inputs["image"], logit_scale=inputs["logit_scale"]))
    with pytest.raises(InputError, match=r"shape \(6, 5\), the teacher's \(6, 4\); .*contrastive-soft"):
        FeatureDistill()(LossInputs(image=inputs["image"], teacher_image=inputs["teacher_image"][:, :4]))


def test_the_modes_of_distill() -> None:
    kinds = {mode: type(distill(mode=mode)) for mode in ("cosine", "feature", "contrastive-soft")}
    assert kinds == {"cosine": CosineDistill, "feature": FeatureDistill, "contrastive-soft": SoftContrastiveDistill}
    assert distill(mode="feature", on="tokens").needs_tokens and not distill(mode="feature").needs_tokens
    assert distill(mode="contrastive-soft").batch_coupled and not distill().batch_coupled
    with pytest.raises(ValueError, match="mode"):
        DistillConfig(mode="mse")
