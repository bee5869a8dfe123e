"""The student: SAM's tower, the copied head, and an encoder that its export rebuilds by itself."""

from __future__ import annotations

import pytest
import torch

from clipgraft.checkpoint import read_manifest, write_export
from clipgraft.config.schema import GraftNode
from clipgraft.encoders import apply_grafts, load
from clipgraft.errors import InputError
from clipgraft.registry import Registry
from clipgraft.testing.tiny import tiny_clip
from clipgraft.types import FeatureRequest
from clipgraft_merging.sam.opening import sam_parts
from clipgraft_merging.sam.segmenter import open_segmenter, segmenter_of
from clipgraft_merging.samclip.recipe import start_from

BARE = Registry.discover(allow=["merging"])


def student(sizes, *more, **settings):
    nodes = [GraftNode(use="merging/sam-image", sam=sizes.model_dump(mode="json"), **{"size": 64, **settings}), *more]
    return apply_grafts(tiny_clip(), nodes, BARE).eval()


@pytest.fixture
def encoder(sam_sizes, sam_model):
    torch.manual_seed(5)
    found = student(sam_sizes)
    start_from(found.image, sam_parts(sam_model))
    return found


def test_fact_6_the_heads_blocks_are_sams_last_at_first(encoder, sam_model):
    last = sam_model.vision_encoder.layers[-1].state_dict()
    assert len(encoder.image.head.blocks) == 3
    for block in encoder.image.head.blocks:
        assert all(torch.equal(block.state_dict()[name], tensor) for name, tensor in last.items())
    sam = encoder.image.sam.state_dict()
    assert all(torch.equal(sam[f"encoder.{k}"], v) for k, v in sam_model.vision_encoder.state_dict().items())


@torch.no_grad()
def test_fact_8_pooling_does_not_care_for_the_order_of_patches(encoder):
    patches = torch.randn(2, 64, 32)
    head = encoder.image.head
    assert torch.equal(head.pooled(patches), head.pooled(patches[:, torch.randperm(64)]))


@torch.no_grad()
def test_patches_and_the_pooled_embedding_share_the_joint_space(encoder):
    pixels = torch.randn(2, 3, 64, 64)
    found = encoder.image(pixels, FeatureRequest(tokens=True, layers=(-1,)))
    assert found.pooled.shape == (2, 16) and found.tokens.shape == (2, 64, 16) and found.grid == (8, 8)
    assert found.map().shape == (2, 16, 8, 8) and found.layers[-1].shape == (2, 64, 32)
    patches = encoder.image.head.patches(found.layers[-1], (8, 8))
    torch.testing.assert_close(found.tokens, encoder.image.head.joint(patches))
    torch.testing.assert_close(found.pooled, encoder.image.head.joint(patches.amax(1)))
    layers = [m for m in encoder.image.head.mlp if isinstance(m, torch.nn.Linear)]
    assert [m.out_features for m in layers] == [32, 32, 16]  # two hidden layers, then the joint space


@torch.no_grad()
@pytest.mark.parametrize("size", [(32, 32), (40, 72)])
def test_any_resolution_that_the_patch_divides(encoder, size):
    found = encoder.image(torch.randn(1, 3, *size), FeatureRequest(tokens=True))
    assert found.grid == (size[0] // 8, size[1] // 8) and found.tokens.shape[1] == found.grid[0] * found.grid[1]


@torch.no_grad()
def test_an_export_rebuilds_everything_without_the_sam(encoder, tmp_path):
    write_export(encoder, tmp_path / "export")
    manifest = read_manifest(tmp_path / "export")
    assert manifest["level"] == "L2" and "merging/sam-image changes the architecture" in manifest["reason"]
    back, pixels = load(str(tmp_path / "export"), registry=BARE).eval(), torch.randn(1, 3, 64, 64)
    state = encoder.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in back.state_dict().items())
    torch.testing.assert_close(back.image(pixels).pooled, encoder.image(pixels).pooled, atol=1e-5, rtol=1e-4)
    assert back.preprocess == encoder.preprocess and back.preprocess.mean == (0.485, 0.456, 0.406)
    text = encoder.tokenizer(["a red circle"])
    torch.testing.assert_close(back.text(text).pooled, encoder.text(text).pooled, atol=1e-5, rtol=1e-4)
    ours, theirs = segmenter_of(encoder), open_segmenter(str(tmp_path / "export"), registry=BARE)
    picture, boxes = torch.rand(1, 3, 64, 64), torch.tensor([[[1.0, 2, 30, 40]]])
    logits = [s.masks(s.embed(picture), boxes=boxes).logits for s in (ours, theirs)]
    assert float(logits[0].std()) > 0.01
    torch.testing.assert_close(logits[0], logits[1], atol=1e-4, rtol=1e-3)
    head = BARE.build("head", "merging/sam-masks", {"model": str(tmp_path / "export")})
    torch.testing.assert_close(head.embed(picture), ours.embed(picture), atol=1e-5, rtol=1e-4)


def test_another_resolution_travels_with_the_export(sam_sizes, tmp_path):
    encoder = student(sam_sizes, GraftNode(use="merging/sam-resolution", size=96))
    assert encoder.preprocess.size == (96, 96) and encoder.image.grid == (12, 12)
    write_export(encoder, tmp_path / "export")
    back = load(str(tmp_path / "export"), registry=BARE)
    assert back.preprocess.size == (96, 96) and back.image.grid == (12, 12)


def test_a_plain_clip_and_a_plain_sam_have_no_masks_or_no_texts(tmp_path):
    assert segmenter_of(tiny_clip()) is None
    write_export(tiny_clip(), tmp_path / "clip")
    with pytest.raises(InputError, match="is a CLIP without SAM's decoder"):
        open_segmenter(str(tmp_path / "clip"), registry=BARE)


def test_what_does_not_fit_is_one_line(sam_sizes):
    with pytest.raises(InputError, match="size 60 is no multiple of SAM's patch of 8 pixels; set it to 56 or 64"):
        student(sam_sizes, size=60)
    with pytest.raises(InputError, match="this CLIP has no SAM tower; use core/resize-positions"):
        apply_grafts(tiny_clip(), [GraftNode(use="merging/sam-resolution", size=64)], BARE)
    with pytest.raises(InputError, match="size 60 is no multiple of SAM's patch"):
        student(sam_sizes, GraftNode(use="merging/sam-resolution", size=60))
    blind = tiny_clip()
    blind.text = None
    with pytest.raises(InputError, match="has no text tower"):
        apply_grafts(blind, [GraftNode(use="merging/sam-image", sam=sam_sizes.model_dump(mode="json"))], BARE)
