"""Facts of ViFi-CLIP's bridge and prompt."""

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
from clipgraft.types import FeatureRequest
from clipgraft_video.m2clip.graft import M2ClipGraft
from clipgraft_video.model import VideoModel, open_video_model
from clipgraft_video.vifi.prompts import PromptedText, PromptedVit, VifiPromptsGraft, prompt_parameters
from clipgraft_video.xclip.graft import XClipGraft

SETS = {"image_tokens": 3, "image_depth": 2, "text_tokens": 2, "text_depth": 2}


def plain() -> Encoder:
    encoder = tiny_clip(depth=3).eval()
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():  # norms at their initial 1 and 0 would hide mistakes
        for name, p in encoder.named_parameters():
            if "ln" in name:
                p.add_(0.1 * torch.randn(p.shape, generator=rng))
    return encoder


def grafted(**settings: Any) -> Encoder:
    torch.manual_seed(0)
    return VifiPromptsGraft(**{**SETS, **settings}).apply(plain()).eval()


def pixels() -> Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize(("tokens", "depth", "count"), [(16, 9, 184_320), (10, 12, 153_600)])
def test_what_the_paper_trains_of_vit_b_16(vit_b_16: Encoder, tokens: int, depth: int, count: int) -> None:
    graft = VifiPromptsGraft(image_tokens=tokens, image_depth=depth, text_tokens=tokens, text_depth=depth)
    with torch.device("meta"):
        encoder = graft.apply(copy.deepcopy(vit_b_16))
    learnt = prompt_parameters(encoder)
    assert len(learnt) == 2 * depth and sum(p.numel() for p in learnt) == count == depth * tokens * (768 + 512)
    assert sum(p.numel() for p in encoder.parameters()) == 149_620_737 + count


def test_prompts_start_as_the_paper_draws_them() -> None:
    encoder = grafted(image_tokens=16, text_tokens=8)
    values = torch.cat([p.detach().flatten() for p in prompt_parameters(encoder)])
    assert abs(float(values.std()) - 0.02) < 0.002 and abs(float(values.mean())) < 0.002


def test_prompts_may_start_from_words() -> None:
    text = grafted(words="photo of").text
    assert isinstance(text, PromptedText)
    ids = text.trim(plain().tokenizer(["photo of"]))[:, 1:-1]
    assert torch.equal(text.prompt.detach(), text.embed(ids)[0].detach())
    with pytest.raises(InputError, match="are 3 tokens, text_tokens is 2"):
        grafted(words="a photo of")


def test_words_in_the_slots_are_the_words_themselves() -> None:
    encoder, bare = grafted(words="photo of", text_depth=1), plain()
    with torch.no_grad():
        told = encoder.text(bare.tokenizer(["a red dog", "cat"])).pooled  # type: ignore[misc]
        wanted = bare.text(bare.tokenizer(["photo of a red dog", "photo of cat"])).pooled  # type: ignore[misc]
    assert torch.allclose(told, wanted, atol=1e-6)  # places, positions and the end are those of the whole sentence


def test_without_prompts_it_is_the_plain_clip_and_nothing_learns() -> None:
    encoder, bare = grafted(image_depth=0, text_depth=0), plain()
    ids = bare.tokenizer(["a cat"])
    with torch.no_grad():
        assert torch.equal(encoder.image(pixels()).pooled, bare.image(pixels()).pooled)
        assert torch.equal(encoder.text(ids).pooled, bare.text(ids).pooled)  # type: ignore[misc]
    assert not prompt_parameters(encoder)
    only = grafted(image_depth=0)
    assert not isinstance(only.image, PromptedVit) and len(prompt_parameters(only)) == 2


def test_tokens_enter_behind_the_patches_before_the_first_norm_and_are_replaced() -> None:
    encoder = grafted()
    tower, seen = encoder.image.tower, list[Tensor]()
    blocks = tower.transformer.resblocks
    for block in blocks:
        block.ln_1.register_forward_hook(lambda _, given, __: seen.append(given[0].detach()))
    with torch.no_grad():
        whole = tower.transformer(tower._embeds(pixels()))
        entering = tower._embeds(pixels())
        assert whole.shape[1] == 17 and [x.shape[1] for x in seen] == [20, 20, 20]  # dropped behind the last block
        assert torch.allclose(seen[0][:, :17], entering, atol=1e-6)
        assert torch.allclose(seen[0][0, 17:], tower.ln_pre(blocks[0].prompt), atol=1e-6)
        assert torch.equal(seen[1][1, 17:], blocks[1].prompt.detach())  # whatever the first set has become
        first = seen[1][:, :17].clone()
        blocks[0].prompt.add_(torch.randn_like(blocks[0].prompt))
        seen.clear()
        tower.transformer(tower._embeds(pixels()))
        assert torch.equal(seen[1][0, 17:], blocks[1].prompt.detach())
        assert not torch.allclose(seen[1][:, :17], first, atol=1e-4)  # but patches have seen it
    assert blocks[2].prompt is None


def test_slots_of_texts_are_replaced_in_each_of_the_next_blocks() -> None:
    encoder, seen = grafted(text_depth=3), list[Tensor]()
    text = encoder.text
    assert isinstance(text, PromptedText)
    blocks: Any = text.tower.transformer.resblocks
    for block in blocks:
        block.ln_1.register_forward_hook(lambda _, given, __: seen.append(given[0].detach()))
    ids = encoder.tokenizer(["a red dog"])
    with torch.no_grad():
        text(ids)
    position = text.tower.positional_embedding.detach()
    assert torch.allclose(seen[0][0, 1:3], (text.prompt + position[1:3]).detach(), atol=1e-6)
    assert all(torch.equal(seen[k][0, 1:3], blocks[k].prompt.detach()) for k in (1, 2))
    assert torch.allclose(seen[0][0, 3], text.embed(ids)[0, 1].detach() + position[3], atol=1e-6)


def test_a_long_text_loses_words_not_its_end() -> None:
    encoder = grafted(text_depth=1)
    text = encoder.text
    assert isinstance(text, PromptedText)
    long = encoder.tokenizer(["red " * 40])
    kept = encoder.tokenizer(["red " * 12])
    with torch.no_grad():
        whole, cut = text(long).pooled, text(kept).pooled
        alone = text(text.trim(kept)).pooled
    assert torch.allclose(whole, cut, atol=1e-6) and torch.allclose(alone, cut, atol=1e-6)
    embedded = text.embed(kept)
    with torch.no_grad():
        assert torch.allclose(text(embedded, ids=kept).pooled, cut, atol=1e-6)


def test_frames_stay_apart_and_features_on_request_are_those_of_patches() -> None:
    encoder = grafted()
    model, x = VideoModel(encoder), torch.rand(2, 4, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(model(x).pooled, model(x[:, [2, 0, 3, 1]]).pooled, atol=1e-6)
        assert torch.allclose(model(x[:1]).pooled, model(x).pooled[:1], atol=1e-6)
        still = model(x[:, :1].expand(-1, 4, -1, -1, -1)).pooled
        assert torch.allclose(still, encoder.image(encoder.preprocess.normalize(x[:, 0])).pooled, atol=1e-5)
        found = encoder.image(pixels(), FeatureRequest(tokens=True, layers=(0, -1)))
    assert found.grid == (4, 4) and found.tokens is not None and found.tokens.shape == (2, 16, 32)
    assert found.layers[0].shape == found.layers[-1].shape == (2, 16, 32)


def test_only_prompts_learn() -> None:
    encoder = grafted().requires_grad_(False)
    learnt = prompt_parameters(encoder)
    for p in learnt:
        p.requires_grad_(True)
    assert len(learnt) == 4
    model = VideoModel(encoder)
    (model(torch.rand(1, 2, 3, 32, 32)).pooled.sum() + model.texts(["a cat"], raw=True).square().sum()).backward()
    assert all(p.grad is not None and float(p.grad.abs().max()) > 0 for p in learnt)
    assert {name for name, p in encoder.named_parameters() if p.grad is not None} == {
        name for name, _ in encoder.named_parameters() if name.endswith("prompt")
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_depth": 4}, "set image_depth=3 or less"),
        ({"text_depth": 4}, "set text_depth=3 or less"),
        ({"text_tokens": 15}, "set text_tokens=13 or less"),
    ],
)
def test_what_does_not_fit_is_said(change: dict[str, int], message: str) -> None:
    encoder = plain()
    with pytest.raises(InputError, match=message):
        VifiPromptsGraft(**{**SETS, **change}).apply(encoder)
    assert torch.equal(encoder.image(pixels()).pooled, plain().image(pixels()).pooled)  # and nothing is half done


def test_prompts_twice_and_other_towers_are_refused() -> None:
    for other in (grafted(), M2ClipGraft(hidden=4).apply(plain()), XClipGraft().apply(plain())):
        with pytest.raises(InputError, match=r"plain residual blocks|mixes frames already"):
            VifiPromptsGraft(**SETS).apply(other)
    with pytest.raises(InputError, match="open_clip ViT"):
        VifiPromptsGraft(**SETS).apply(tiny_clip(kind="siglip-timm"))


def test_from_the_first_step_to_an_export(tmp_path: Path, write_video: Callable[..., Path]) -> None:
    write_export(plain(), tmp_path / "clip")
    for word in ("cat", "dog"):
        (tmp_path / "videos" / word).mkdir(parents=True)
        write_video(tmp_path / "videos" / word / "0.mp4", 8)
    given: dict[str, object] = {
        "data.from": f"video:{tmp_path}/videos?frames=2&size=32",
        "train": {"steps": 2, "batch_size": 2, "lr": 1e-2, "warmup": 0},
        "evaluate.retention": "none",
    }
    run_recipe("video/vifi-clip", overrides=given | {"model.from": str(tmp_path / "clip")}, out=tmp_path / "first")
    second = given | {"model.from": str(tmp_path / "first/export"), "method": SETS, "mixing.mixup": 0.0}
    run_recipe("video/vifi-clip-prompts", overrides=second, out=tmp_path / "second")
    one, two = (open_video_model(str(tmp_path / name), registry=current()) for name in ("first", "second"))
    before, after = one.encoder.state_dict(), two.encoder.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())  # the bridge stays as it was
    assert len(after) == len(before) + 4 and after["text.prompt"].abs().max() > 0
    for method, message in (
        ({**SETS, "image_depth": 0, "text_depth": 0}, "nothing to learn"),
        ({**SETS, "image_depth": 9}, "set image_depth=3 or less"),
    ):
        with pytest.raises(InputError, match=message):
            change = {"method": method}
            run_recipe("video/vifi-clip-prompts", overrides=second | change, out=tmp_path / "no", dry_run=True)
