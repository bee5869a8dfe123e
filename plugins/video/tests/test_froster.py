"""Facts of FROSTER."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from clipgraft.testing.tiny import tiny_clip
from clipgraft.types import Batch
from clipgraft_video.froster.distillation import ResidualDistillation, ResidualProjection
from clipgraft_video.froster.view import FrosterView
from clipgraft_video.heads import Mean
from clipgraft_video.model import VideoModel
from clipgraft_video.stage import Seen


def clips(n: int = 2, frames: int = 4) -> Tensor:
    return torch.rand(n, frames, 3, 32, 32, generator=torch.Generator().manual_seed(5))


def pair() -> tuple[VideoModel, VideoModel]:
    """Student with the temporal view and vanilla teacher of equal weights."""
    student = FrosterView().apply(tiny_clip())
    return VideoModel(student, Mean("mean_logits")).eval(), VideoModel(tiny_clip(), Mean("mean_logits")).eval()


def test_the_view_is_attention_over_three_frames_with_zeros_beyond_the_ends() -> None:
    student, _ = pair()
    block, clock = student.encoder.image.tower.transformer.resblocks[0], student.clock
    x = torch.randn(3, 5, 32)
    with torch.no_grad(), clock.showing(3):
        found = block(x)
        q, k, v = block.project(block.ln_1(x))
        zero = torch.zeros_like(k[0])
        for t in range(3):
            near = [t, t + 1, t - 1]
            keys, values = (torch.cat([s[i] if 0 <= i < 3 else zero for i in near]) for s in (k, v))
            split = [y.unflatten(-1, (2, -1)).transpose(0, 1) for y in (q[t], keys, values)]
            weights = (split[0] @ split[1].transpose(1, 2) / 4).softmax(-1)  # 16 per head
            out = block.attn.out_proj((weights @ split[2]).transpose(0, 1).flatten(1))
            wanted = x[t] + out
            assert torch.allclose(found[t], wanted + block.mlp(block.ln_2(wanted)), atol=1e-5)


def test_in_a_still_clip_inner_frames_are_vanilla_and_the_ends_are_not() -> None:
    student, teacher = pair()
    block, plain = (m.encoder.image.tower.transformer.resblocks[0] for m in (student, teacher))
    x = torch.randn(1, 5, 32).expand(4, -1, -1)
    with torch.no_grad(), student.clock.showing(4):
        found, wanted = block(x), plain(x)
    assert torch.allclose(found[1:3], wanted[1:3], atol=1e-5)
    assert not torch.allclose(found[0], wanted[0], atol=1e-4) and not torch.allclose(found[3], wanted[3], atol=1e-4)


def test_one_frame_differs_from_vanilla_by_its_zero_neighbours() -> None:
    student, teacher = pair()
    with torch.no_grad():
        assert not torch.allclose(student(clips(1, 1)).pooled, teacher(clips(1, 1)).pooled, atol=1e-4)


def test_the_projection_is_the_identity_at_first() -> None:
    projection, x = ResidualProjection(6), torch.randn(3, 6)
    assert torch.equal(projection(x), x)
    assert sum(p.numel() for p in ResidualProjection(512).parameters()) == 524_288


def seen(model: VideoModel, texts: tuple[str, ...] = ("a cat", "a dog")) -> Seen:
    x = clips()
    return Seen(model(x), model.texts(list(texts)), texts, x, Batch(x[:, 0], ["a", "b"]))


def test_without_the_view_the_distillation_starts_at_zero_with_it_it_does_not() -> None:
    student, teacher = pair()
    term = ResidualDistillation(teacher, 16)
    with torch.no_grad():
        assert float(term(seen(VideoModel(tiny_clip(), Mean("mean_logits"))))["loss"]) < 1e-5
        found = term(seen(student))
    assert float(found["image"]) > 1e-3 and float(found["text"]) < 1e-5  # the same text tower


def test_the_teacher_gets_no_gradient_and_the_student_does() -> None:
    student, teacher = pair()
    teacher.requires_grad_(False)
    term = ResidualDistillation(teacher, 16)
    term(seen(student))["loss"].backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert student.encoder.image.tower.conv1.weight.grad is not None and term.image.w2.weight.grad is not None


def test_the_mean_of_scores_is_the_scale_times_the_mean_cosine() -> None:
    student, _ = pair()
    with torch.no_grad():
        video, texts = student(clips()), student.texts(["a cat", "a dog"])
        cosines = F.normalize(video.frames, dim=-1) @ texts.T
    scale = student.encoder.logit_scale.exp()
    assert torch.allclose(student.logits(video, texts), scale * cosines.mean(1), atol=1e-5)
