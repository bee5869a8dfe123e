"""Facts of Prompt Switch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from clipgraft.encoders.base import Encoder
from clipgraft.errors import InputError
from clipgraft.testing.tiny import tiny_clip
from clipgraft.types import Batch, FeatureRequest
from clipgraft_video.heads import Mean, VideoFeatures
from clipgraft_video.model import VideoModel
from clipgraft_video.promptswitch.captioner import FREQUENT, Captioner
from clipgraft_video.promptswitch.graft import Aggregation, PromptSwitchGraft, SwitchVit, switched
from clipgraft_video.stage import Seen


def clips(n: int = 2, frames: int = 3) -> Tensor:
    return torch.rand(n, frames, 3, 32, 32, generator=torch.Generator().manual_seed(5))


def grafted(depth: int = 3, *, scale: float = 50.0, aggregate: bool = True, **settings: Any) -> Encoder:
    """Three frames with three prompts; a cube that is large enough to see, an aggregation that does something."""
    torch.manual_seed(0)
    encoder = PromptSwitchGraft(**({"prompts": 3, "frames": 3} | settings)).apply(tiny_clip(depth=depth)).eval()
    with torch.no_grad():
        tower(encoder).cube.mul_(scale)
        if aggregate:
            tower(encoder).aggregation.attn.out_proj.weight.normal_(std=0.1)
    return encoder


def tower(encoder: Encoder) -> SwitchVit:
    assert isinstance(encoder.image, SwitchVit)
    return encoder.image


def frames_of(encoder: Encoder, x: Tensor) -> Tensor:
    with torch.no_grad():
        return VideoModel(encoder, Mean("mean_norm"))(x).frames


def test_the_switch_is_an_involution_and_a_transpose_inside_the_chunk() -> None:
    x = torch.randn(6, 5 + 3, 4)  # two chunks of three frames
    y = switched(x, 3)
    assert torch.equal(switched(y, 3), x) and torch.equal(y[:, :5], x[:, :5])
    for chunk in (0, 3):
        for f in range(3):
            for j in range(3):
                assert torch.equal(y[chunk + f, 5 + j], x[chunk + j, 5 + f])


def test_a_block_attends_to_switched_tokens_and_keeps_its_own_residual() -> None:
    block = grafted().image.tower.transformer.resblocks[0]
    x = torch.randn(3, 17 + 3, 32)
    with torch.no_grad():
        seen = switched(block.ln_1(x), 3)
        wanted = x + block.attn(seen, seen, seen)[0]
        wanted = wanted + block.mlp(block.ln_2(wanted))
        assert torch.allclose(block(x), wanted, atol=1e-6)


def test_an_aggregation_adds_nothing_at_first() -> None:
    encoder = grafted(aggregate=False)
    before = frames_of(encoder, clips())
    tower(encoder).aggregation.forward = lambda classes, prompts: classes  # type: ignore[method-assign]
    assert torch.equal(frames_of(encoder, clips()), before)


def test_what_it_adds_to_b_32() -> None:
    with torch.device("meta"):
        aggregation = Aggregation(768, 12)
    assert 6 * 6 * 768 == 27_648
    assert sum(p.numel() for p in aggregation.parameters()) == 2_362_368
    small = tower(grafted())
    assert small.cube.shape == (3, 3, 32) and sum(p.numel() for p in small.new_parameters()) == 9 * 32 + 4 * 32 * 33


def test_what_the_captioner_of_b_32_adds() -> None:
    layer = 2 * (4 * 512 * 512 + 4 * 512) + 2 * 4 * 512 * 512 + 5 * 512 + 3 * 2 * 512
    assert 512 * 2 + 2 * layer + 512 * 2 + 512 * 49_408 + 49_408 == 33_756_416
    small = Captioner(tiny_clip(width=32, embed=32))
    layer = 2 * (4 * 32 * 32 + 4 * 32) + 2 * 4 * 32 * 32 + 5 * 32 + 3 * 2 * 32
    assert sum(p.numel() for p in small.parameters()) == 32 * 2 + 2 * layer + 32 * 2 + 32 * 128 + 128


def test_groups_do_not_influence_each_other() -> None:
    encoder = grafted()
    both = frames_of(encoder, clips(1, 6))
    other = clips(1, 6)
    other[:, 4] = 1 - other[:, 4]
    assert torch.allclose(both[:, :3], frames_of(encoder, clips(1, 6)[:, :3]), atol=1e-6)
    changed = frames_of(encoder, other)
    assert torch.equal(changed[:, :3], both[:, :3]) and not torch.allclose(changed[:, 3:], both[:, 3:], atol=1e-4)


def test_a_still_chunk_with_equal_prompts_gives_equal_frames() -> None:
    encoder, still = grafted(), clips(1, 1).expand(-1, 3, -1, -1, -1)
    frames = frames_of(encoder, still)
    assert not torch.allclose(frames[:, 0], frames[:, 1], atol=1e-4)
    with torch.no_grad():
        tower(encoder).cube.copy_(tower(encoder).cube[0, 0].expand(3, 3, -1))
    frames = frames_of(encoder, still)
    assert torch.allclose(frames, frames[:, :1].expand_as(frames), atol=1e-5)


@pytest.mark.parametrize(("depth", "reaches"), [(1, False), (2, True)])
def test_pixels_reach_other_frames_from_the_second_block_on(depth: int, reaches: bool) -> None:
    encoder, other = grafted(depth, aggregate=False), clips(1)
    other[:, 2] = 1 - other[:, 2]
    moved = (frames_of(encoder, other) - frames_of(encoder, clips(1))).abs().amax(-1)[0] > 1e-6
    assert moved.tolist() == [reaches, reaches, True]


def test_a_group_of_several_chunks_is_aggregated_as_one() -> None:
    encoder, other = grafted(frames=6), clips(1, 6)
    other[:, 5] = 1 - other[:, 5]  # the second chunk
    with torch.no_grad():
        blocks = torch.cat([p.flatten() for p in tower(encoder).aggregation.parameters()])
    moved = (frames_of(encoder, other) - frames_of(encoder, clips(1, 6))).abs().amax(-1)[0] > 1e-6
    assert blocks.any() and moved.all()


def test_a_picture_is_a_video_that_stands_still() -> None:
    encoder, still = grafted(), clips()[:, :1].expand(-1, 3, -1, -1, -1)
    with torch.no_grad():
        found = encoder.image(encoder.preprocess.normalize(clips()[:, 0])).pooled
        assert torch.allclose(found, VideoModel(encoder, Mean("mean_norm"))(still).pooled, atol=1e-6)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(InputError, match="frames 8 are no multiple of prompts 6"):
        PromptSwitchGraft(frames=8).apply(tiny_clip())
    with pytest.raises(InputError, match="groups of 3 frames, got 4"):
        frames_of(grafted(), clips(1, 4))
    with pytest.raises(InputError, match="no patch tokens"):
        grafted().image(torch.rand(1, 3, 32, 32), FeatureRequest(tokens=True))
    with pytest.raises(InputError, match="set caption=0"):
        Captioner(tiny_clip(kind="siglip-timm"))


def captioner(**settings: Any) -> tuple[Captioner, Encoder]:
    torch.manual_seed(1)
    encoder = tiny_clip(width=32, embed=32)
    return Captioner(encoder, **settings).eval(), encoder


def test_captions_are_told_up_to_their_end_and_no_word_sees_the_next() -> None:
    captions, encoder = captioner()
    ids = encoder.tokenizer(["a red star", "cat"])
    with torch.no_grad():
        _, following = captions.logits(torch.randn(2, 4, 32), ids)
        assert following.tolist() == [*ids[0, 1:5].tolist(), *ids[1, 1:3].tolist()]  # three words and one, with ends
        assert following[3] == following[5] == captions.end
        frames, other = torch.randn(2, 4, 32), ids.clone()
        other[0, 2] = ids[1, 1]  # the second word
        one, two = captions.logits(frames, ids)[0], captions.logits(frames, other)[0]
        assert torch.allclose(one[:2], two[:2], atol=1e-6) and not torch.allclose(one[2], two[2], atol=1e-3)


def test_frequent_words_and_the_ends_count_less() -> None:
    captions, encoder = captioner()
    a, cat = (int(encoder.tokenizer([word])[0, 1]) for word in ("a", "cat"))
    assert "a" in FREQUENT and captions.weights[a] == captions.weights[captions.end] == 0.25
    assert captions.weights[captions.start] == 0.25 and captions.weights[cat] == 1
    none, _ = captioner(frequent=())
    assert none.weights[a] == 1 and none.weights[none.end] == 0.25


def test_the_captions_loss_is_a_weighted_mean() -> None:
    captions, encoder = captioner()
    text, frames = encoder.tokenizer(["a red cat", "star"]), torch.randn(2, 4, 32)
    video = VideoFeatures(frames.mean(1), frames)
    seen = Seen(video, None, (), torch.empty(0), Batch(torch.empty(2, 3, 1, 1), ["", ""], text=text))
    with torch.no_grad():
        scores, following = captions.logits(frames, text)
        each = F.cross_entropy(scores, following, reduction="none")
        weights = captions.weights[following]
        assert torch.allclose(captions(seen)["loss"], (weights * each).sum() / weights.sum())


def test_the_head_starts_as_the_embeddings_and_words_get_no_gradient_from_captions() -> None:
    captions, encoder = captioner()
    table = encoder.text.tower.token_embedding.weight  # type: ignore[union-attr]
    assert torch.equal(captions.head.weight, table) and not any(
        "tower" in name for name, _ in captions.named_parameters()
    )
    frames = torch.randn(1, 4, 32, requires_grad=True)
    scores, _ = captions.logits(frames, encoder.tokenizer(["a cat"]))
    scores.sum().backward()
    assert frames.grad is not None and frames.grad.any() and table.grad is None
    assert isinstance(captions.bridge, torch.nn.Identity)
    wide = Captioner(tiny_clip(width=32, embed=16))
    assert wide.logits(torch.randn(1, 4, 16), encoder.tokenizer(["a cat"]))[0].shape == (3, 128)
