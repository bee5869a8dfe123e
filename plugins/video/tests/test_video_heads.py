"""What the mean over frames can and can't tell, and what the objectives are."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from clipgraft.data.base import Sample
from clipgraft.distributed import rank
from clipgraft.errors import InputError
from clipgraft.testing.ranks import run_ranks
from clipgraft.types import ImageFeatures
from clipgraft_video.clock import Clock
from clipgraft_video.evaluate import Seen as Looked
from clipgraft_video.evaluate import _in_all
from clipgraft_video.heads import POOLS, Mean, Pool
from clipgraft_video.mixing import Mixing, soft_cross_entropy, targets_of
from clipgraft_video.objectives import caption_contrast, label_contrast


def features(seed: int = 0) -> ImageFeatures:
    return ImageFeatures(torch.randn(6, 5, generator=torch.Generator().manual_seed(seed)) * torch.arange(1, 7)[:, None])


def texts() -> torch.Tensor:
    return F.normalize(torch.randn(4, 5, generator=torch.Generator().manual_seed(9)), dim=-1)


def test_the_three_poolings_are_three_functions() -> None:
    scores = {p: Mean(p).logits(Mean(p)(features(), 3), texts(), torch.tensor(10.0)) for p in POOLS}
    raw = features().pooled.unflatten(0, (2, 3))
    assert torch.allclose(scores["mean_raw"], 10 * F.normalize(raw.mean(1), dim=-1) @ texts().T)
    unit = F.normalize(raw, dim=-1)
    assert torch.allclose(scores["mean_norm"], 10 * F.normalize(unit.mean(1), dim=-1) @ texts().T)
    each = 10 * unit @ texts().T  # (2, 3, 4): the mean of scores of frames
    assert torch.allclose(scores["mean_logits"], each.mean(1), atol=1e-6)
    assert not any(torch.allclose(scores[a], scores[b]) for a in POOLS for b in POOLS if a != b)


@pytest.mark.parametrize("pool", POOLS)
def test_a_mean_is_blind_to_the_order_of_frames_and_to_other_videos(pool: Pool) -> None:
    head, image = Mean(pool), features()
    turned = ImageFeatures(image.pooled[[2, 0, 1, 5, 3, 4]])
    assert torch.allclose(head(image, 3).pooled, head(turned, 3).pooled, atol=1e-6)
    assert torch.equal(head(image, 3).pooled[:1], head(ImageFeatures(image.pooled[:3]), 3).pooled)


@pytest.mark.parametrize("pool", POOLS)
def test_equal_frames_give_the_scores_of_one_picture(pool: Pool) -> None:
    picture = ImageFeatures(features().pooled[:1])
    still = ImageFeatures(picture.pooled.expand(4, -1))
    one, many = (Mean(pool).logits(Mean(pool)(x, t), texts(), torch.tensor(7.0)) for x, t in ((picture, 1), (still, 4)))
    assert torch.allclose(one, many, atol=1e-6) and float(many.abs().max()) <= 7.0


def test_views_are_averaged_after_the_softmax() -> None:
    a, b = torch.tensor([[4.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    one = [Sample("v", torch.empty(0))]
    seen = [Looked(one, a.softmax(-1)), Looked(one, b.softmax(-1))]  # rows of a look are probabilities
    samples, rows = _in_all(seen)
    assert samples == one and torch.allclose(rows, (a.softmax(-1) + b.softmax(-1)) / 2)


def test_the_clock_counts_videos_and_forgets() -> None:
    clock = Clock()
    with clock.showing(3):
        assert clock.videos(torch.zeros(6, 2)).shape == (2, 3, 2)
        with pytest.raises(InputError, match="7 pictures are no whole number of videos of 3"):
            clock.videos(torch.zeros(7, 2))
    assert clock.frames == 1


def test_targets_and_mixing_keep_their_sums() -> None:
    target = targets_of(torch.tensor([0, 2]), 4, smoothing=0.1)
    assert torch.allclose(target.sum(-1), torch.ones(2)) and torch.allclose(target[0, 0], torch.tensor(0.925))
    torch.manual_seed(0)
    clips = torch.stack([torch.zeros(3, 3, 8, 8), torch.ones(3, 3, 8, 8)])
    for mixing in (Mixing(mixup=0.8), Mixing(cutmix=1.0)):
        mixed, soft = mixing(clips, targets_of(torch.tensor([0, 1]), 2))
        assert torch.allclose(soft.sum(-1), torch.ones(2))
        assert torch.allclose(mixed[0].mean(), soft[0, 1], atol=1e-6)  # the share of the other is what is seen of it
        assert all(torch.equal(mixed[0, 0], mixed[0, t]) for t in range(3))  # the same in every frame
    same, unchanged = Mixing()(clips, target)
    assert same is clips and unchanged is target


def test_soft_cross_entropy_is_the_hard_one_on_hard_targets() -> None:
    logits, labels = torch.randn(5, 4), torch.tensor([0, 3, 2, 1, 1])
    assert torch.allclose(soft_cross_entropy(logits, targets_of(labels, 4)), F.cross_entropy(logits, labels))


def test_the_target_row_of_labels_a_b_a() -> None:
    target = (10 * torch.tensor([1.0, 0.0, 1.0])).softmax(-1)
    assert torch.allclose(target, torch.tensor([0.49999, 2.27e-5, 0.49999]), atol=1e-5)
    classes, videos = torch.eye(2), torch.eye(2)[[0, 1, 0]]
    good = label_contrast(videos, classes, torch.tensor([0, 1, 0]), scale=torch.tensor(10.0))
    bad = label_contrast(videos, classes, torch.tensor([1, 0, 1]), scale=torch.tensor(10.0))
    assert float(good) == pytest.approx(0, abs=1e-6) and float(bad) > 1  # logits equal to 10 [same] are the target


def contrasts(world: int) -> list[torch.Tensor]:
    """Loss and gradient of this rank's videos; ``world`` ranks share four."""
    rng = torch.Generator().manual_seed(3)
    videos, captions = (F.normalize(torch.randn(4, 6, generator=rng), dim=-1) for _ in "ab")
    classes, labels = F.normalize(torch.randn(3, 6, generator=rng), dim=-1), torch.tensor([0, 1, 0, 2])
    mine = slice(rank() * 4 // world, (rank() + 1) * 4 // world)
    leaf, scale = videos[mine].clone().requires_grad_(), torch.tensor(5.0)
    loss = caption_contrast(leaf, captions[mine], scale) + label_contrast(leaf, classes, labels[mine], scale=scale)
    (grad,) = torch.autograd.grad(loss, leaf)
    return [loss.detach(), grad / world]  # as DDP averages


def test_contrasts_of_two_processes_equal_one() -> None:
    (whole, grad), parts = contrasts(1), run_ranks(contrasts, 2, 2)
    assert all(torch.allclose(part[0], whole, atol=1e-5) for part in parts)
    assert torch.allclose(torch.cat([part[1] for part in parts]), grad, atol=1e-5)
