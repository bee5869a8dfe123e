"""Facts of DiST."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from clipgraft.encoders.base import Encoder
from clipgraft.errors import InputError
from clipgraft.testing.tiny import tiny_clip
from clipgraft.types import FeatureRequest
from clipgraft_video.distnet.graft import DistFeatures, DistGraft, DistVit
from clipgraft_video.distnet.network import IntegrationBlock, Network, TemporalBlock, ToIntegration, ToTemporal
from clipgraft_video.distnet.pooling import Gather
from clipgraft_video.heads import Mean
from clipgraft_video.model import VideoModel
from clipgraft_video.xclip.graft import XClipGraft

SMALL = {"frames": 4, "width": 32, "temporal_width": 8, "rounds": 2}


def clips(n: int = 2, frames: int = 4) -> Tensor:
    return torch.rand(n, frames, 3, 32, 32, generator=torch.Generator().manual_seed(5))


def grafted(depth: int = 3, **settings: Any) -> Encoder:
    torch.manual_seed(0)
    return DistGraft(**(SMALL | settings)).apply(tiny_clip(depth=depth)).eval()


def tower(encoder: Encoder) -> DistVit:
    assert isinstance(encoder.image, DistVit)
    return encoder.image


def b_16() -> Network:
    return Network(768, 512, layers=12, patch=(16, 16), frames=16)


def test_what_is_trained_of_b_16_with_8_and_16_frames() -> None:
    with torch.device("meta"):
        found, unread = b_16(), ToTemporal(384, 96, alpha=2)
    count = sum(p.numel() for p in found.parameters())
    # the official number counts the last exchange into the temporal network, which nothing reads
    assert (count, sum(p.numel() for p in unread.parameters())) == (26_068_224, 36_960)
    assert count + 36_960 == 26_105_184


def test_the_stem_of_b_16_gives_16_frames_and_alpha_halves_them() -> None:
    with torch.device("meta"):
        network = b_16()
        stem = network.stem(torch.empty(2, 3, 16, 224, 224))
        assert stem.shape == (2, 96, 16, 14, 14)
        assert network.to_integration[0](stem).shape == (2, 8, 197, 384)


def test_an_embedding_per_video_does_not_depend_on_the_classes() -> None:
    model = VideoModel(grafted())
    with torch.no_grad():
        video = model(clips())
    assert video.pooled.shape == (2, 16) and video.frames.shape == (2, 2, 16)
    assert model.logits(video, torch.randn(5, 16)).shape == (2, 5)


def test_the_frozen_tower_sees_every_second_frame_and_stays_clip() -> None:
    encoder, plain = grafted(), tiny_clip(depth=3).eval()
    with torch.no_grad():
        found = VideoModel(encoder)(clips())
        alone = VideoModel(plain, Mean())(clips()[:, ::2])
    assert torch.equal(found.frames, alone.frames)


def test_no_gradient_reaches_clip() -> None:
    encoder = grafted().requires_grad_(True).train()
    VideoModel(encoder)(clips()).pooled.square().sum().backward()
    towers = [p for name, p in encoder.image.named_parameters() if name.startswith("tower.")]
    assert towers and all(p.grad is None for p in towers)
    assert all(p.grad is not None for p in tower(encoder).network.parameters())


def test_reversed_pixels_beside_the_same_frozen_features_give_another_video() -> None:
    network = tower(grafted()).network
    tokens = [torch.randn(2, 2, 17, 32) for _ in range(3)]
    with torch.no_grad():
        one, other = network(clips(), tokens), network(clips().flip(1), tokens)
        assert not torch.allclose(one, other, atol=1e-4)


def test_both_exchanges_read_what_was_there_before_either() -> None:
    network, tokens = tower(grafted(depth=2)).network, [torch.randn(1, 2, 17, 32) for _ in range(2)]
    with torch.no_grad():
        t = network.temporal[0](network.stem(clips(1).transpose(1, 2)))
        m = network.inputs[0](tokens[0])
        mixed = m + network.to_integration[0](t)
        t = network.temporal[1](t + network.to_temporal[0](m, (4, 4)))
        m = network.inputs[1](tokens[1]) + network.integration[0](mixed)
        mixed = m + network.to_integration[1](t)
        pooled = network.pooling(network.integration[1](mixed) + mixed)
        wanted = network.norm(pooled + network.skip(tokens[1][:, :, 0].mean(1))) @ network.proj
        assert torch.allclose(network(clips(1), tokens), wanted, atol=1e-6)


def test_exchanges_keep_time_and_place() -> None:
    down, up = ToIntegration(8, 16, alpha=2, slots=2), ToTemporal(16, 8, alpha=2)
    x = torch.randn(1, 8, 4, 3, 3)
    changed = x.clone()
    changed[:, :, 3, 2, 1] += 1  # frame 3, row 2, column 1
    with torch.no_grad():
        moved = (down(changed) - down(x)).abs().sum(-1)[0]
        assert (moved > 0).nonzero().tolist() == [[1, 1 + 2 * 3 + 1]]
        m = torch.randn(1, 2, 10, 16)
        other = m.clone()
        other[:, 1, 1 + 5] += 1  # second frame, row 1, column 2
        moved = (up(other, (3, 3)) - up(m, (3, 3))).abs().sum(1)[0]
        assert (moved > 0).nonzero().tolist() == [[2, 1, 2], [3, 1, 2]]
        other[:, :, 0] += 1  # the class token goes nowhere
        assert torch.equal(up(m, (3, 3))[:, :, :2], up(other, (3, 3))[:, :, :2])


def test_blocks_mix_time_by_three_frames() -> None:
    block, x = IntegrationBlock(16), torch.randn(1, 5, 4, 16)
    changed = x.clone()
    changed[:, 2, 1] += torch.randn(16)
    with torch.no_grad():
        moved = (block(changed) - block(x)).abs().sum(-1)[0] > 1e-6
        assert moved.nonzero().tolist() == [[1, 1], [2, 1], [3, 1]]  # a token sees itself at other times
        temporal, maps = TemporalBlock(4), torch.randn(1, 4, 5, 5, 5)
        other = maps.clone()
        other[:, :, 2, 2, 2] += torch.arange(4.0)
        reached = ((temporal(other) - temporal(maps)).abs().sum(1)[0] > 1e-6).nonzero()
    assert reached.min(0).values.tolist() == [1, 1, 1] and reached.max(0).values.tolist() == [3, 3, 3]


def test_a_query_gathers_by_one_norm() -> None:
    gather, x = Gather(64), torch.randn(3, 5, 64)
    query = torch.randn(3, 1, 64)
    with torch.no_grad():
        keys = gather.norm(x)
        seen = query + gather.attn(gather.norm(query), keys, keys)[0]
        assert torch.allclose(gather(query, x), seen + gather.mlp(gather.norm_mlp(seen)), atol=1e-6)


def test_videos_do_not_depend_on_each_other() -> None:
    model = VideoModel(grafted())
    with torch.no_grad():
        assert torch.allclose(model(clips()).pooled[:1], model(clips()[:1]).pooled, atol=1e-5)


def test_a_picture_is_a_video_that_stands_still() -> None:
    encoder, picture = grafted(), clips()[:, :1]
    still = picture.expand(-1, 4, -1, -1, -1)
    with torch.no_grad():
        found = encoder.image(encoder.preprocess.normalize(picture[:, 0]))
        assert isinstance(found, DistFeatures)
        assert torch.allclose(found.pooled, VideoModel(encoder)(still).pooled, atol=1e-5)


def test_other_numbers_of_frames_take_interpolated_positions() -> None:
    model = VideoModel(grafted())
    with torch.no_grad():
        assert model(clips(1, 6)).pooled.shape == (1, 16)
    with pytest.raises(InputError, match="5 frames are no multiple"):
        model(clips(1, 5))


def test_clips_share_of_the_scores_is_of_tests_alone() -> None:
    model, texts = VideoModel(grafted(clip_share=0.5)), torch.nn.functional.normalize(torch.randn(3, 16), dim=-1)
    scale = model.encoder.logit_scale.exp()
    with torch.no_grad():
        video = model(clips())
        own = scale * torch.nn.functional.normalize(video.frames, dim=-1).mean(1) @ texts.T
        alone = scale * video.unit() @ texts.T
        assert torch.allclose(model.logits(video, texts), (own + alone) / 2, atol=1e-5)
        assert torch.allclose(model.train().logits(video, texts), alone)


def test_chosen_layers_are_those_of_the_tower() -> None:
    encoder = grafted(depth=4, layers=(1, 3))
    assert len(tower(encoder).network.inputs) == 2
    x = torch.rand(2, 3, 32, 32)
    taken, _ = tower(encoder)._seen(x)
    with torch.no_grad():
        inner = encoder.image.tower
        state = inner._embeds(x)
        for index, block in enumerate(inner.transformer.resblocks):
            state = block(state)
            if index in (1, 3):
                assert torch.equal(taken[(index - 1) // 2], state)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(InputError, match="no multiple of alpha 3"):
        grafted(alpha=3)
    with pytest.raises(InputError, match="must rise from 0 to 2"):
        grafted(layers=(0, 3))
    with pytest.raises(InputError, match="multiple of 64; got 100"):
        grafted(width=100)
    with pytest.raises(InputError, match="open_clip ViT"):
        DistGraft().apply(tiny_clip(kind="siglip-timm"))
    with pytest.raises(InputError, match="mixes frames already"):
        DistGraft(**SMALL).apply(XClipGraft(frames=4).apply(tiny_clip(width=64, embed=64)))
    with pytest.raises(InputError, match="no patch tokens"):
        grafted().image(torch.rand(1, 3, 32, 32), FeatureRequest(tokens=True))
