"""Facts of EZ-CLIP."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from clipgraft.distributed import rank, world_size
from clipgraft.encoders.base import Encoder
from clipgraft.errors import InputError
from clipgraft.testing.ranks import run_ranks
from clipgraft.testing.tiny import tiny_clip
from clipgraft_video.blocks import new_parameters
from clipgraft_video.clock import Clock
from clipgraft_video.ezclip.graft import AdaptedTextBlock, EzClipGraft, TemporalPromptBlock
from clipgraft_video.ezclip.motion import motion_loss
from clipgraft_video.model import VideoModel


def grafted() -> Encoder:
    torch.manual_seed(0)
    return EzClipGraft(frames=4).apply(tiny_clip()).eval()


def clips(n: int = 2, frames: int = 4) -> Tensor:
    return torch.rand(n, frames, 3, 32, 32, generator=torch.Generator().manual_seed(5))


def test_what_the_paper_trains_of_vit_b_16() -> None:
    import open_clip

    with torch.device("meta"):
        clip = open_clip.model.CLIP(**open_clip.get_model_config("ViT-B-16"))
        seen = TemporalPromptBlock(clip.visual.transformer.resblocks[0], Clock(), frames=8, dropout=0.0)
        told = AdaptedTextBlock(clip.transformer.resblocks[0], Clock())
    prompts = 12 * seen.temporal_prompt.numel()
    adapters = [12 * sum(p.numel() for p in block.adapter.parameters()) for block in (seen, told)]
    assert (prompts, adapters) == (73_728, [3_550_464, 1_580_544]) and prompts + sum(adapters) == 5_204_736


def test_prompts_start_within_their_bound() -> None:
    from open_clip.transformer import ResidualAttentionBlock

    block = TemporalPromptBlock(ResidualAttentionBlock(768, 12), Clock(), frames=8, dropout=0.0)
    assert 0.05 < float(block.temporal_prompt.detach().abs().max()) <= 0.0625


def test_motion_loss_of_a_still_clip_and_of_a_ramp() -> None:
    assert float(motion_loss(torch.ones(2, 8, 5))) == 1.0
    ramp = torch.arange(8.0)[None, :, None].expand(1, 8, 3)
    assert float(motion_loss(ramp)) == pytest.approx(0.1269841, abs=1e-6)  # C = .875, V = 6


def test_adapters_are_the_identity_at_first_so_texts_stay_and_pictures_do_not() -> None:
    encoder, plain = grafted(), tiny_clip().eval()
    ids = plain.tokenizer(["a cat", "a red dog"])
    with torch.no_grad():
        assert torch.allclose(encoder.text(ids).pooled, plain.text(ids).pooled, atol=1e-5)  # type: ignore[misc]
        x = torch.rand(2, 3, 32, 32)
        assert not torch.allclose(encoder.image(x).pooled, plain.image(x).pooled, atol=1e-4)  # one more token


def test_without_prompts_the_order_of_frames_does_not_matter_with_them_it_does() -> None:
    encoder = grafted()
    model, turned = VideoModel(encoder), clips()[:, [2, 0, 3, 1]]
    with torch.no_grad():
        assert not torch.allclose(model(clips()).pooled, model(turned).pooled, atol=1e-6)
        for block in encoder.image.tower.transformer.resblocks:
            block.temporal_prompt.zero_()
        assert torch.allclose(model(clips()).pooled, model(turned).pooled, atol=1e-5)


def test_a_frame_reaches_its_video_and_no_other() -> None:
    model, changed = VideoModel(grafted()), clips()
    changed[0, 1] = 1 - changed[0, 1]
    with torch.no_grad():
        one, other = model(clips()).frames, model(changed).frames
    assert not torch.allclose(one[0, 0], other[0, 0], atol=1e-6) and torch.allclose(one[1], other[1], atol=1e-6)


def test_blocks_keep_their_length_and_only_what_is_new_learns() -> None:
    encoder = grafted().requires_grad_(False)
    new = [*new_parameters(encoder, TemporalPromptBlock), *new_parameters(encoder, AdaptedTextBlock)]
    assert len(new) == 2 * 5 + 2 * 4
    for p in new:
        p.requires_grad_(True)
    before = {name: p.clone() for name, p in encoder.named_parameters()}
    model, block = VideoModel(encoder), encoder.image.tower.transformer.resblocks[0]
    with encoder.image.clock.showing(4):
        assert block(torch.randn(8, 17, 32)).shape == (8, 17, 32)
    optimizer = torch.optim.SGD(new, lr=1.0)
    (model(clips()).pooled.square().sum() + model.texts(["a cat"], raw=True).square().sum()).backward()
    optimizer.step()
    moved = {name for name, p in encoder.named_parameters() if not torch.equal(p, before[name])}
    assert moved and all("adapter" in name or "temporal_prompt" in name for name in moved)


def test_more_frames_than_prompts_are_refused() -> None:
    with pytest.raises(InputError, match="prompts for 4 frames, got 6"):
        VideoModel(grafted())(clips(1, 6))
    with pytest.raises(InputError, match="open_clip ViT"):
        EzClipGraft().apply(tiny_clip(kind="siglip-timm"))


def _motion_gradient() -> torch.Tensor:
    """Of this rank's part of four videos."""
    frames = torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    motion_loss(frames.chunk(world_size())[rank()]).backward()
    assert frames.grad is not None
    return frames.grad


def test_two_processes_share_the_denominator_of_the_motion_loss() -> None:
    whole, parts = _motion_gradient(), run_ranks(_motion_gradient, 2)
    torch.testing.assert_close(sum(parts) / 2, whole)
