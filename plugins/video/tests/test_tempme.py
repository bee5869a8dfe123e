"""Facts of TempMe."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from clipgraft.encoders.base import Encoder
from clipgraft.errors import InputError
from clipgraft.testing.tiny import tiny_clip
from clipgraft.types import FeatureRequest
from clipgraft_video.heads import Mean
from clipgraft_video.model import VideoModel
from clipgraft_video.tempme.graft import TempMeGraft
from clipgraft_video.tempme.merging import Plan, Settings, join, match, merge, schedule


def clips(n: int = 2, frames: int = 4) -> Tensor:
    return torch.rand(n, frames, 3, 32, 32, generator=torch.Generator().manual_seed(5))


def grafted(**settings: object) -> Encoder:
    torch.manual_seed(0)
    given = {"frames": 4, "joins": (2, 2), "per_layer": 2, "after": 1} | settings
    return TempMeGraft(**given).apply(tiny_clip(depth=5)).eval()  # type: ignore[arg-type]


def test_the_schedule_of_b_32_with_12_frames() -> None:
    found = schedule(50, 12, 12, Settings())
    assert found == [(n, 12) for n in (48, 46, 44, 42, 40, 38, 36, 34)] + [(44, 6), (56, 3), (107, 1), (97, 1)]
    assert schedule(197, 12, 12, Settings(per_layer=10))[-1] == (321, 1)
    assert schedule(197, 12, 12, Settings(per_layer=2))[-1] == (493, 1)


def test_the_tower_does_what_the_schedule_says() -> None:
    encoder = grafted()
    VideoModel(encoder)(clips())
    planned = schedule(17, 4, 5, Settings(2, (2, 2)))
    assert encoder.image.flow.counts == [(n, 2 * k) for n, k in planned]  # two videos
    assert encoder.image.flow.classes == 4  # every frame's class token is there at the end


def test_a_merge_keeps_mass_and_the_weighted_sum() -> None:
    x, sizes = torch.randn(2, 13, 6), torch.rand(2, 13) + 1
    y, size = merge(x, sizes, match(x[:, 2:], 3), 2)
    assert y.shape == (2, 10, 6) and torch.allclose(size.sum(1), sizes.sum(1), atol=1e-5)
    assert torch.allclose((y * size[..., None]).sum(1), (x * sizes[..., None]).sum(1), atol=1e-5)
    assert torch.equal(y[:, :2], x[:, :2] * sizes[:, :2, None] / sizes[:, :2, None])  # class tokens never merge


def test_sizes_sum_to_what_came_in() -> None:
    encoder = grafted()
    VideoModel(encoder)(clips())
    assert torch.allclose(encoder.image.flow.sizes.sum(1), torch.full((2,), 4 * 17.0))


def test_the_closest_pairs_merge_and_order_is_kept() -> None:
    patches = torch.tensor([[[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.6, 0.8], [-1.0, 0.0]]])  # A: 0 2 4, B: 1 3
    plan = match(patches, 1)
    assert plan.gone.tolist() == [[0]] and plan.into.tolist() == [[0]] and plan.kept.tolist() == [[1, 2]]
    y, size = merge(patches, torch.ones(1, 5), plan, 0)
    assert size.tolist() == [[1, 1, 2, 1]]
    assert torch.allclose(y[0], torch.tensor([[0.0, 1.0], [-1.0, 0.0], [1.0, 0.05], [0.6, 0.8]]))


def test_joined_clips_have_their_class_tokens_in_front() -> None:
    x = torch.arange(12.0).reshape(4, 3, 1)
    assert join(x, 2, 1)[0, :, 0].tolist() == [0, 3, 1, 2, 4, 5]


def test_without_merging_it_is_vanilla_with_the_mean_of_unit_frames() -> None:
    encoder = grafted(joins=(), per_layer=0, within=0.0, between=0.0)
    plain = VideoModel(tiny_clip(depth=5), Mean("mean_norm")).eval()
    with torch.no_grad():
        found = VideoModel(encoder, Mean("mean_norm"))(clips()).pooled
        assert torch.allclose(found, plain(clips()).pooled, atol=1e-5)
        assert float(found.norm(dim=-1).max()) <= 1 + 1e-6


def test_attention_to_a_token_of_size_two_is_attention_to_two_tokens() -> None:
    block = grafted().image.tower.transformer.resblocks[0]
    x = torch.randn(1, 4, 32)
    twice = torch.cat([x, x[:, 3:]], 1)
    sizes = torch.tensor([[1.0, 1.0, 1.0, 2.0]])
    with torch.no_grad():
        one = block.scores(*block.project(x), bias=sizes.log()[:, None, None])
        q, k, v = block.project(twice)
        other = block.scores(q[:, :4], k, v)
    assert torch.allclose(one, other, atol=1e-6)


def test_what_is_trained_of_b_32_with_12_frames() -> None:
    per_block = {"image": 8 * 768 + 3 * 768 * 8, "text": 8 * 512 + 3 * 512 * 8}
    positions = (12 + 6 + 3) * 768
    assert 12 * (per_block["image"] + per_block["text"]) + positions == 507_648
    encoder = grafted()
    new = {n: p.numel() for n, p in encoder.named_parameters() if "lora_" in n or n.endswith("frame_pos")}
    assert sum(new.values()) == 2 * 5 * (8 * 32 + 3 * 32 * 8) + (4 + 2) * 32


def test_clips_do_not_depend_on_each_other_and_pictures_pass() -> None:
    encoder = grafted()
    model = VideoModel(encoder)
    with torch.no_grad():
        assert torch.allclose(model(clips()).pooled[:1], model(clips()[:1]).pooled, atol=1e-5)
        assert encoder.image(torch.rand(3, 3, 32, 32)).pooled.shape == (3, 16)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(InputError, match="joins 2 x 2 = 4 frames, got frames 6"):
        TempMeGraft(frames=6, joins=(2, 2)).apply(tiny_clip(depth=5))
    with pytest.raises(InputError, match="don't fit into a tower of 2 blocks"):
        TempMeGraft(frames=12).apply(tiny_clip())
    with pytest.raises(InputError, match="clips of 4 frames, got 3"):
        VideoModel(grafted())(clips(1, 3))
    with pytest.raises(InputError, match="no patch tokens"):
        grafted().image(torch.rand(1, 3, 32, 32), FeatureRequest(tokens=True))


def test_plans_are_of_whole_numbers() -> None:
    plan = match(torch.randn(3, 9, 4), 4)
    assert isinstance(plan, Plan) and plan.kept.shape == (3, 1) and F.one_hot(plan.into, 4).sum() == 12
