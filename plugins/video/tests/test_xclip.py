"""Facts of X-CLIP, and equality with transformers' model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from clipgraft.encoders import load
from clipgraft.encoders.base import Encoder
from clipgraft.errors import InputError
from clipgraft.testing.tiny import tiny_clip
from clipgraft_video.blocks import new_parameters
from clipgraft_video.model import HEAD, VideoModel
from clipgraft_video.xclip.graft import MessageBlock, XClipGraft
from clipgraft_video.xclip.head import XClipHead
from clipgraft_video.xclip.recipe import groups


def grafted(frames: int = 4, **settings: Any) -> Encoder:
    torch.manual_seed(0)
    encoder = XClipGraft(frames=frames, **settings).apply(tiny_clip(width=64, embed=64)).eval()
    with torch.no_grad():  # norms at their initial 1 and 0 would hide mistakes
        for name, p in encoder.image.named_parameters():
            if "ln" in name or "norm" in name:
                p.add_(0.1 * torch.randn_like(p))
    return encoder


def clips(n: int = 2, frames: int = 4) -> Tensor:
    return torch.rand(n, frames, 3, 32, 32, generator=torch.Generator().manual_seed(5))


def head_of(encoder: Encoder) -> XClipHead:
    return getattr(encoder.image, HEAD)  # type: ignore[no-any-return]


@torch.no_grad()
def scores(model: VideoModel, x: Tensor, texts: Tensor) -> Tensor:
    return model.logits(model(x), texts)


def texts(k: int = 5, dim: int = 64) -> Tensor:
    return torch.randn(k, dim, generator=torch.Generator().manual_seed(7))


def test_without_prompts_scores_are_scaled_cosines() -> None:
    encoder = grafted()
    model = VideoModel(encoder)
    head_of(encoder).prompts.alpha.data.zero_()
    wanted = encoder.logit_scale.exp() * model(clips()).unit() @ F.normalize(texts(), dim=-1).T
    assert torch.allclose(scores(model, clips(), texts()), wanted, atol=1e-5)


def test_without_positions_the_order_of_frames_does_not_matter_with_them_it_does() -> None:
    encoder = grafted()
    model, turned = VideoModel(encoder), clips()[:, [2, 0, 3, 1]]
    assert not torch.allclose(scores(model, clips(), texts()), scores(model, turned, texts()), atol=1e-4)
    head_of(encoder).mit.positional_embedding.data.zero_()
    assert torch.allclose(scores(model, clips(), texts()), scores(model, turned, texts()), atol=1e-4)


def test_a_classs_score_does_not_depend_on_other_classes_nor_on_other_videos() -> None:
    model = VideoModel(grafted())
    every = scores(model, clips(), texts())
    assert torch.allclose(scores(model, clips(), texts()[:2]), every[:, :2], atol=1e-5)
    assert torch.allclose(scores(model, clips()[:1], texts()), every[:1], atol=1e-5)


def test_messages_need_two_blocks_to_carry_pixels() -> None:
    def features(depth: int) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        encoder = XClipGraft(frames=4).apply(tiny_clip(width=64, embed=64, depth=depth)).eval()
        changed = clips(1)
        changed[:, 3] = 1 - changed[:, 3]
        model = VideoModel(encoder)
        return model(clips(1)).frames[0, :3], model(changed).frames[0, :3]

    with torch.no_grad():
        one, other = features(1)
        assert torch.allclose(one, other, atol=1e-6)  # the first message holds no pixel: all class tokens start alike
        one, other = features(2)
        assert not torch.allclose(one, other, atol=1e-4)


def test_in_one_block_a_class_token_reaches_all_frames_a_patch_its_own() -> None:
    encoder = grafted()
    block, clock = encoder.image.tower.transformer.resblocks[0], encoder.image.clock
    x = torch.randn(4, 17, 64)
    for place, reached in ((0, [True] * 4), (5, [False, True, False, False])):
        changed = x.clone()
        changed[1, place] += 1
        with torch.no_grad(), clock.showing(4):
            moved = (block(changed) - block(x)).abs().amax((1, 2)) > 1e-6
        assert moved.tolist() == reached
    assert block(x).shape == x.shape  # the message is dropped


def test_one_frame_hears_itself_and_zero_messages_are_not_vanilla() -> None:
    encoder, plain = grafted(), tiny_clip(width=64, embed=64).eval()
    pixels = torch.rand(2, 3, 32, 32)
    assert encoder.image(pixels).pooled.shape == (2, 64)  # pictures pass, one by one
    with torch.no_grad():
        for block in encoder.image.tower.transformer.resblocks:
            for p in (*block.message_fc.parameters(), *block.message_attn.out_proj.parameters()):
                p.zero_()
        for name, p in plain.image.state_dict().items():
            encoder.image.state_dict()[name].copy_(p)
        assert not torch.allclose(encoder.image(pixels).pooled, plain.image(pixels).pooled, atol=1e-4)


def test_prompts_see_patches_of_the_last_block_not_the_class_token() -> None:
    head = head_of(grafted())
    from clipgraft.types import ImageFeatures

    pooled, patches = torch.randn(8, 64), torch.randn(8, 16, 64)
    base = head(ImageFeatures(pooled, layers={-1: patches}), 4)
    other = head(ImageFeatures(pooled + 1, layers={-1: patches}), 4)
    assert torch.equal(base.tokens, other.tokens) and not torch.equal(base.pooled, other.pooled)  # type: ignore[arg-type]


def test_another_number_of_frames_takes_interpolated_positions() -> None:
    model = VideoModel(grafted(frames=4))
    assert torch.isfinite(scores(model, clips(1, 7), texts())).all()


def test_what_the_paper_adds_to_vit_b_16() -> None:
    import open_clip

    with torch.device("meta"):
        vit = open_clip.model.CLIP(**open_clip.get_model_config("ViT-B-16"))
        from clipgraft_video.clock import Clock

        block = MessageBlock(vit.visual.transformer.resblocks[0], Clock())
        head = XClipHead(768, 512, 8)
    new = sum(p.numel() for p in new_parameters(block, MessageBlock)) * 12
    mit = sum(p.numel() for p in head.mit.parameters())
    prompts = sum(p.numel() for p in head.parameters()) - mit
    assert (new, mit, prompts) == (35_453_952, 3_156_480, 6_697_984)
    assert 86_192_640 + new + mit + prompts == 131_501_056


def test_groups_hold_every_trained_parameter_once() -> None:
    image = grafted().image
    tower, new = groups(image, new_lr=10.0)
    ids = [id(p) for group in (tower, new) for p in group["params"]]
    assert len(ids) == len(set(ids)) == len(list(image.parameters())) and new["lr_scale"] == 10.0


def test_a_tower_is_grafted_once_and_must_be_a_vit() -> None:
    with pytest.raises(InputError, match="mixes frames already"):
        XClipGraft().apply(grafted())
    with pytest.raises(InputError, match="open_clip ViT"):
        XClipGraft().apply(tiny_clip(kind="siglip-timm"))


def xclip_model() -> Any:
    from transformers import XCLIPConfig, XCLIPModel

    torch.manual_seed(3)
    text = {"vocab_size": 99, "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 1, "max_position_embeddings": 16, "eos_token_id": 2, "pad_token_id": 0}
    vision = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 1}
    vision |= {"image_size": 32, "patch_size": 8, "num_frames": 4, "mit_hidden_size": 64, "mit_intermediate_size": 256}
    vision |= {"mit_num_hidden_layers": 1, "mit_num_attention_heads": 1}
    config = XCLIPConfig(text_config=text, vision_config=vision, projection_dim=64, prompt_num_attention_heads=1)
    model = XCLIPModel(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                p.add_(0.1 * torch.randn_like(p))
            if "position" in name or name.endswith("alpha"):
                p.normal_(std=0.2)
    return model


def test_a_folder_of_transformers_gives_equal_features(tmp_path: Path) -> None:
    from transformers import CLIPImageProcessor

    from clipgraft.testing.tiny import TinyTokenizer

    theirs = xclip_model()
    theirs.save_pretrained(tmp_path)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    TinyTokenizer(context_length=16, vocab=99).save(str(tmp_path))
    encoder = load(f"xclip:{tmp_path}").eval()
    x, ids = clips(), torch.randint(3, 97, (5, 16))
    ids[:, -1] = 98  # the highest id is the end for both
    pixels = encoder.preprocess.normalize(x.flatten(0, 1)).unflatten(0, (2, 4))
    with torch.no_grad():
        wanted = theirs(input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids)).logits_per_video
        raw = encoder.text(ids).pooled  # type: ignore[misc]
        found = scores(VideoModel(encoder), x, raw)
    assert torch.allclose(found, wanted, atol=1e-4), (found - wanted).abs().max()
    with pytest.raises(InputError, match=r"no config\.json"):
        load(f"xclip:{tmp_path}/absent")
