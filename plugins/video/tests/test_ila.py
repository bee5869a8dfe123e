"""Facts of ILA."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from clipgraft.checkpoint import write_export
from clipgraft.encoders.base import Encoder
from clipgraft.errors import InputError
from clipgraft.execution import run_recipe
from clipgraft.registry import current
from clipgraft.testing.tiny import tiny_clip
from clipgraft_video.ila.alignment import Alignment, apart, masks, per_frame
from clipgraft_video.ila.graft import AlignedBlock, IlaGraft, IlaHead
from clipgraft_video.ila.recipe import IlaRates, groups, offset_at
from clipgraft_video.model import HEAD, VideoModel, open_video_model


def plain() -> Encoder:
    return tiny_clip(width=64, embed=64).eval()


def grafted(**settings: Any) -> Encoder:
    torch.manual_seed(0)
    return IlaGraft(**{"frames": 4, "channels": 16, **settings}).apply(plain()).eval()


def awake(encoder: Encoder) -> Encoder:
    """As after training: points and added layers are no longer zero."""
    with torch.no_grad():
        for module in encoder.modules():
            if isinstance(module, AlignedBlock):
                for linear in (module.temporal_skip_align_fc, module.temporal_skip_fc):
                    linear.weight.normal_(std=0.1)
                module.message_attn.prediction[-2].weight.normal_()
    return encoder


def clips(n: int = 2, frames: int = 4) -> Tensor:
    return torch.rand(n, frames, 3, 32, 32, generator=torch.Generator().manual_seed(5))


def test_what_a_block_of_vit_b_16_adds(vit_b_16: Encoder) -> None:
    before = sum(p.numel() for p in vit_b_16.image.parameters())
    with torch.device("meta"):
        encoder = IlaGraft().apply(copy.deepcopy(vit_b_16))
    parts = {group["name"]: group for group in groups(encoder.image, IlaRates(), official=False)}
    count = {name: sum(p.numel() for p in group["params"]) for name, group in parts.items()}
    assert count["message"] + count["temporal"] == 12 * 3_372_100 and count["tower"] == before == 86_192_640
    assert count["temporal"] == 12 * 2 * (768 * 768 + 768)
    assert count["integration"] + count["positions"] == 3_156_480 and count["prompts"] == 6_697_984  # as X-CLIP's
    every = [id(p) for group in parts.values() for p in group["params"]]
    assert len(every) == len(set(every)) == len(list(encoder.image.parameters()))
    rates = {name: 8e-6 * group.get("lr_scale", 1) for name, group in parts.items()}
    assert rates == pytest.approx(
        {"message": 5e-4, "temporal": 8e-5, "positions": 4e-4, "integration": 4e-4, "prompts": 4e-4, "tower": 8e-6}
    )
    left = {group["name"] for group in groups(encoder.image, IlaRates(), official=True)}
    assert left == {"message", "temporal", "positions", "integration"}


def test_at_first_a_block_is_the_plain_block() -> None:
    encoder, bare = grafted(), plain()
    x = clips().flatten(0, 1)
    with torch.no_grad(), encoder.image.clock.showing(4):
        assert torch.allclose(encoder.image(x).pooled, bare.image(x).pooled, atol=1e-5)
    awake(encoder)
    with torch.no_grad():
        with encoder.image.clock.showing(4):
            assert not torch.allclose(encoder.image(x).pooled, bare.image(x).pooled, atol=1e-3)
        assert torch.allclose(encoder.image(x).pooled, bare.image(x).pooled, atol=1e-5)  # a picture has no neighbours


def test_the_mask_in_the_middle_and_in_a_corner() -> None:
    middle = masks(torch.zeros(2), (14, 14))
    row = [0, 0.106, 0.337, 0.567, 0.798, 1, 1, 1, 1, 0.798, 0.567, 0.337, 0.106, 0]
    assert torch.allclose(middle[7], torch.tensor(row), atol=1e-3) and torch.allclose(middle, middle.T)
    corner = masks(torch.tensor([0.75, 0.75]), (14, 14))
    assert int((corner > 0).sum()) == 64 and int((corner == 1).sum()) == 16
    right = masks(torch.tensor([0.75, -0.75]), (14, 14))  # x to the right, y to the top
    assert float(right[0, 13]) > 0.9 and float(right[13, 0]) == 0


def test_frames_inside_a_clip_take_the_mean_of_their_two_pairs() -> None:
    earlier, later = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[10.0, 20.0, 30.0]])
    assert per_frame(earlier, later).tolist() == [[1, 6, 11.5, 30]]


def test_pairs_points_and_shapes() -> None:
    torch.manual_seed(0)
    alignment = Alignment(64, grid=(4, 4), channels=16).eval()
    found = alignment(torch.randn(2, 5, 17, 64))
    assert found.points.shape == (2, 4, 2, 2) and found.pooled.shape == (2, 4, 2, 64)
    assert found.frames.shape == found.pairs.shape == (2, 5, 17, 64)
    assert float(found.points.detach().abs().max()) == 0  # all in the middle at first
    torch.nn.init.normal_(alignment.prediction[-2].weight, std=50)  # type: ignore[arg-type]
    points = alignment(torch.randn(2, 5, 17, 64)).points.detach()
    assert 0.5 < float(points.abs().max()) <= 0.75


def test_tokens_are_weighed_and_the_class_token_is_kept() -> None:
    torch.manual_seed(0)
    alignment, x = Alignment(64, grid=(4, 4), channels=16).eval(), torch.randn(1, 3, 17, 64)
    found = alignment(x)
    weights = masks(torch.zeros(2), (4, 4)).flatten()
    assert torch.allclose(found.frames[:, :, 1:], weights[:, None] * x[:, :, 1:], atol=1e-6)
    assert torch.equal(found.frames[:, :, 0], x[:, :, 0]) and torch.equal(found.pairs[:, :, 0], x[:, :, 0])
    assert torch.allclose(found.pooled[0, 1, 0], (weights[:, None] * x[0, 1, 1:]).sum(0), atol=1e-5)
    assert torch.allclose(found.pooled[0, 1, 1], (weights[:, None] * x[0, 2, 1:]).sum(0), atol=1e-5)


def test_training_takes_the_mean_of_nine_masks_and_a_test_one() -> None:
    torch.manual_seed(0)
    alignment, x = Alignment(64, grid=(4, 4), channels=16), torch.randn(2, 3, 17, 64)
    with torch.no_grad():
        test, trained = alignment.eval()(x).pooled, alignment.train()(x).pooled
        around = [masks(0.2 * torch.tensor([float(i), float(j)]), (4, 4)) for i in (-1, 0, 1) for j in (-1, 0, 1)]
        nine = torch.stack(around).mean(0).flatten()
        assert torch.allclose(trained[0, 0, 0], (nine[:, None] * x[0, 0, 1:]).sum(0), atol=1e-5)
        assert not torch.allclose(trained, test, atol=1e-3)
        alignment.offset.fill_(0)
        assert torch.allclose(alignment(x).pooled, test, atol=1e-5)
    assert "offset" in alignment.state_dict()  # a resumed run goes on where it was


def test_equal_places_are_not_apart() -> None:
    same = torch.randn(2, 3, 1, 8).expand(-1, -1, 2, -1)
    assert float(apart(same)) == pytest.approx(0, abs=1e-6)
    assert float(apart(torch.stack([same[:, :, 0], -same[:, :, 0]], 2))) == pytest.approx(2, abs=1e-6)


def test_blocks_leave_what_the_head_sums_and_nothing_stays() -> None:
    encoder = awake(grafted())
    head, model = getattr(encoder.image, HEAD), VideoModel(encoder)
    assert isinstance(head, IlaHead) and head.raw_texts
    with torch.no_grad():
        video: Any = model(clips())
        assert float(video.apart) > 0 and not encoder.image.clock.left
        still = clips()[:, :1].expand(-1, 4, -1, -1, -1)
        other: Any = model(still)
        alone: Any = model(clips()[:, :1])
    assert float(other.apart) < float(video.apart) and float(alone.apart) == 0


def test_a_frame_reaches_its_neighbours_only_in_one_block_and_no_other_video() -> None:
    encoder = awake(grafted())
    block, clock = encoder.image.tower.transformer.resblocks[0], encoder.image.clock
    x = torch.randn(8, 17, 64)
    changed = x.clone()
    changed[0, 3] += 1
    with torch.no_grad(), clock.showing(4):
        moved = (block(changed) - block(x)).abs().amax((1, 2)) > 1e-6
    # alignment reaches the neighbour, the convolution over frames one more
    assert moved.tolist() == [True, True, True, False, False, False, False, False]
    assert block(x).shape == x.shape


def test_the_offset_halves_from_its_start_on() -> None:
    def at(done: float) -> float:
        return offset_at(done, 0.2, start=0.6, halvings=20)

    assert at(0.5) == 0.2 and at(0.6) == 0.1 and at(0.62) == pytest.approx(0.05)  # epochs 30 and 31 of 50
    assert at(0.98) == at(1.0) == pytest.approx(0.2 * 0.5**20)
    assert offset_at(1.0, 0.2, start=1.0, halvings=20) == 0.2


def test_only_an_open_clip_vit_with_enough_patches() -> None:
    with pytest.raises(InputError, match="open_clip ViT"):
        IlaGraft().apply(tiny_clip(kind="siglip-timm"))
    with pytest.raises(InputError, match="aligns 4 x 4 patches or more"):
        IlaGraft().apply(tiny_clip(image_size=16))
    with pytest.raises(InputError, match="patch dropout"):
        Alignment(64, grid=(4, 4))(torch.zeros(1, 2, 9, 64))


def test_a_run_from_files_to_an_export(tmp_path: Path, write_video: Callable[..., Path]) -> None:
    write_export(plain(), tmp_path / "clip")
    for word in ("cat", "dog"):
        (tmp_path / "videos" / word).mkdir(parents=True)
        write_video(tmp_path / "videos" / word / "0.mp4", 8)
    given: dict[str, object] = {
        "model.from": str(tmp_path / "clip"),
        "data.from": f"video:{tmp_path}/videos?frames=4&size=32",
        "method": {"frames": 4, "channels": 16},
        "train": {"steps": 2, "batch_size": 2, "lr": 1e-3, "warmup": 0},
        "evaluate.retention": "none",
    }
    before = plain().state_dict()
    for compat in ("paper", "official"):
        run_recipe("video/ila", overrides=given | {"compat": compat}, out=tmp_path / compat)
        encoder = open_video_model(str(tmp_path / compat), registry=current()).encoder
        after = encoder.state_dict()
        moved = {name for name, value in before.items() if not torch.equal(after[name], value)}
        assert bool(moved) == (compat == "paper") and not any(name.startswith("text") for name in moved)
        offset = encoder.image.tower.transformer.resblocks[0].message_attn.offset
        assert float(offset) == pytest.approx(0.2 * 0.5**20)
    for change, message in (
        ({"data.from": f"video:{tmp_path}/videos?frames=1&size=32", "method.frames": 1}, "write frames=8"),
        ({"method.frames": 8}, "the method has frames=8, data.from gives 4"),
        ({"objective": "labels"}, "set objective to classes"),
    ):
        with pytest.raises(InputError, match=message):
            run_recipe("video/ila", overrides=given | change, out=tmp_path / "no", dry_run=True)
