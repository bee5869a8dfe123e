"""Overlap, patches, vocabularies, prompts: the parts that segmentation is made of."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from clipgraft.encoders.towers import ResNetImage
from clipgraft.errors import InputError
from clipgraft.testing.tiny import tiny_clip
from clipgraft.types import FeatureRequest
from clipgraft_merging.segmentation.overlap import IGNORE, MeanShare, confusion, counts_of, evaluation, record
from clipgraft_merging.segmentation.patches import patch_embeddings, step_of, why_no_patches
from clipgraft_merging.segmentation.pictures import target_size
from clipgraft_merging.segmentation.prompts import boxes_of, inner_points, mask_iou, pairwise_iou
from clipgraft_merging.segmentation.proposals import distinct
from clipgraft_merging.segmentation.vocabulary import Vocabulary


def test_a_confusion_matrix_by_hand_leaves_out_what_does_not_count() -> None:
    truth = torch.tensor([[0, 1, 1], [2, IGNORE, 2]])
    found = torch.tensor([[0, 1, 2], [2, 1, 1]])
    matrix = confusion(found, truth, labels=3)
    assert matrix.tolist() == [[1, 0, 0], [0, 1, 1], [0, 1, 1]]
    counts = counts_of(matrix)
    assert counts.union.tolist() == [1, 3, 3] and counts.true.tolist() == [1, 2, 2]
    row = record("a", counts)
    assert row["pixels"] == 5 and row["right"] == 3 and row["iou"] == pytest.approx((1 + 1 / 3 + 1 / 3) / 3)


def test_miou_is_that_of_the_summed_matrix_and_skips_labels_that_never_occur() -> None:
    generator = torch.Generator().manual_seed(0)
    truths = torch.randint(0, 4, (5, 8, 8), generator=generator)
    founds = torch.randint(0, 4, (5, 8, 8), generator=generator)
    matrices = [confusion(f, t, labels=6) for f, t in zip(founds, truths, strict=True)]
    rows = [record(str(i), counts_of(m)) for i, m in enumerate(matrices)]
    total = torch.stack(matrices).sum(0)[:4, :4].double()
    by_hand = total.diagonal() / (total.sum(0) + total.sum(1) - total.diagonal())
    names = {k: f"c{k}" for k in range(6)}  # 4 and 5 never occur
    found = evaluation(rows, names, per_class=True)
    assert found.metrics["miou"] == pytest.approx(float(by_hand.mean()))
    assert found.metrics["mean_accuracy"] == pytest.approx(float((total.diagonal() / total.sum(1)).mean()))
    assert found.metrics["pixel_accuracy"] == pytest.approx(float(total.diagonal().sum() / total.sum()))
    assert [found.metrics[f"iou/c{k}"] for k in range(4)] == pytest.approx(by_hand.tolist())
    assert "iou/c4" not in found.metrics
    # a draw that takes one picture twice is the metric of that data
    weights = torch.tensor([[2.0, 0, 0, 1, 0]], dtype=torch.float64)
    drawn = (2 * matrices[0] + matrices[3])[:4, :4].double()
    drawn_iou = drawn.diagonal() / (drawn.sum(0) + drawn.sum(1) - drawn.diagonal())
    assert float(MeanShare((0, 1, 2, 3)).bind(rows)(weights)) == pytest.approx(float(drawn_iou.mean()))


def test_a_label_that_was_found_but_is_nowhere_counts_as_nothing_right() -> None:
    matrix = confusion(torch.tensor([[1, 2]]), torch.tensor([[1, 1]]), labels=3)
    assert evaluation([record("a", counts_of(matrix))], {1: "a", 2: "b"}, per_class=False).metrics["miou"] == 0.25


def test_last_patches_are_the_towers_tokens_through_its_projection() -> None:
    encoder = tiny_clip(0)
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        tokens = encoder.image(pixels, FeatureRequest(tokens=True)).tokens
        found = patch_embeddings(encoder.image, pixels)
        assert found.grid == (4, 4) and found.map().shape == (2, 16, 4, 4)
        assert torch.allclose(found.embeddings, tokens @ encoder.image.tower.proj, atol=1e-5)


def test_the_value_path_is_the_last_block_when_every_token_attends_to_itself_alone() -> None:
    encoder = tiny_clip(1)
    tower, pixels = encoder.image.tower, torch.randn(2, 3, 32, 32)
    seen: list[torch.Tensor] = []
    hook = tower.transformer.resblocks[-1].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.no_grad():
        patch_embeddings(encoder.image, pixels)
        hook.remove()
        alone = torch.full((17, 17), -torch.inf).fill_diagonal_(0)
        x = tower.transformer.resblocks[-1](seen[0], attn_mask=alone)
        expected = tower.ln_post(x)[:, 1:] @ tower.proj
        found = patch_embeddings(encoder.image, pixels, path="value").embeddings
        assert torch.allclose(found, expected, atol=1e-5)
        assert not torch.allclose(found, patch_embeddings(encoder.image, pixels).embeddings, atol=1e-3)


def test_a_vit_reads_other_sizes_and_shapes_and_says_which_fit() -> None:
    encoder = tiny_clip(0)
    with torch.no_grad():
        assert patch_embeddings(encoder.image, torch.randn(1, 3, 64, 48)).grid == (8, 6)
    with pytest.raises(InputError, match="multiple"):
        patch_embeddings(encoder.image, torch.randn(1, 3, 36, 32))
    assert step_of(encoder.image) == 8


def test_an_attention_pooled_tower_gives_every_token_pooled_alone() -> None:
    encoder = tiny_clip(0, kind="siglip-timm")
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        found = patch_embeddings(encoder.image, pixels, path="value")
        tokens = encoder.image(pixels, FeatureRequest(tokens=True)).tokens
        trunk = encoder.image.tower.trunk
        one = encoder.image.tower.head(trunk.forward_head(tokens[1:, 5:6]))
    assert found.grid == (4, 4) and torch.allclose(found.embeddings[1, 5], one[0], atol=1e-5)
    assert step_of(encoder.image) is None


def test_a_resnet_gives_its_value_path_and_refuses_another() -> None:
    from open_clip.modified_resnet import ModifiedResNet

    torch.manual_seed(0)
    image = ResNetImage(ModifiedResNet([1, 1, 1, 1], output_dim=16, heads=4, image_size=64, width=8), embed_dim=16)
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        found = patch_embeddings(image.eval(), pixels, path="value")
        x, pool = image(pixels, FeatureRequest(tokens=True)).tokens, image.tower.attnpool
        assert torch.allclose(found.embeddings, pool.c_proj(pool.v_proj(x)), atol=1e-6)
    assert found.grid == (2, 2)
    assert "set dense to value" in why_no_patches(image, path="last")


def test_sizes_of_pictures_follow_side_shape_and_patch() -> None:
    def at(size: tuple[int, int], **given: object) -> tuple[int, int]:
        return target_size(size, **({"side": None, "native": (32, 32), "step": 8, "shape": "squash"} | given))

    assert at((100, 50)) == (32, 32) and at((100, 50), side=64) == (64, 64)
    assert at((100, 50), side=64, shape="keep") == (128, 64) and at((50, 120), shape="keep") == (32, 80)
    assert at((100, 50), step=None) == (32, 32)
    with pytest.raises(InputError, match="use 64"):
        at((100, 50), side=65)
    with pytest.raises(InputError, match="nothing else"):
        at((100, 50), side=64, step=None)


def _vocabulary(background: str, words: torch.Tensor, **more: float) -> Vocabulary:
    return Vocabulary(("a", "b"), F.normalize(words, dim=-1), more.get("scale", 10.0), background, more.get("t", 0.9))


def test_background_is_left_out_thresholded_or_named() -> None:
    words = torch.eye(4)[:3]
    maps = torch.stack([words[0], words[1], words[2], words[0] + words[1]], 1)[None, :, None]  # (1, 4, 1, 4)
    none = _vocabulary("none", words[:2])
    assert none.decide(none.scores(maps))[0, 0].tolist()[:2] == [1, 2] and list(none.labels) == [1, 2]
    unsure = _vocabulary("threshold", words[:2])
    assert unsure.decide(unsure.scores(maps))[0, 0].tolist() == [1, 2, 0, 0] and list(unsure.labels) == [0, 1, 2]
    named = _vocabulary("class", words)
    scores = named.scores(maps)
    assert scores.shape == (1, 3, 1, 4) and named.decide(scores)[0, 0].tolist()[:3] == [1, 2, 0]
    several = _vocabulary("class", torch.cat([words[:2], torch.eye(4)[3:], words[2:]]))  # two words for background
    assert several.scores(maps).shape == (1, 3, 1, 4) and several.decide(several.scores(maps))[0, 0, 2] == 0
    truth = torch.tensor([[0, 1]])
    assert none.truth(truth, ignore=IGNORE).tolist() == [[IGNORE, 1]] and named.truth(truth, ignore=IGNORE)[0, 0] == 0


def test_cosines_ignore_the_length_of_patches() -> None:
    vocabulary = _vocabulary("none", torch.randn(2, 8))
    maps = torch.randn(1, 8, 3, 3)
    assert torch.allclose(vocabulary.scores(maps), vocabulary.scores(7 * maps), atol=1e-6)


def test_prompts_of_masks_lie_in_them_and_bound_them() -> None:
    masks = torch.zeros(2, 20, 30, dtype=torch.bool)
    masks[0, 3:12, 5:14] = True
    masks[1, 15:17, 20:29] = True
    assert boxes_of(masks).tolist() == [[5, 3, 13, 11], [20, 15, 28, 16]]
    points = inner_points(masks)
    assert points[0].tolist() == [9, 7]
    assert all(masks[i, int(y), int(x)] for i, (x, y) in enumerate(points.tolist()))
    assert mask_iou(masks, masks).tolist() == [1, 1] and mask_iou(masks, masks.flip(0)).tolist() == [0, 0]
    shifted = torch.stack([masks[0], masks[0].roll(3, 1)])
    assert pairwise_iou(shifted)[0, 1] == pytest.approx(54 / 108)
    assert torch.allclose(pairwise_iou(shifted).diagonal(), torch.ones(2))


def test_of_masks_that_overlap_the_first_stays() -> None:
    masks = torch.zeros(3, 10, 10, dtype=torch.bool)
    masks[0, :, :5] = masks[1, :9, :5] = masks[2, :, 6:] = True
    assert distinct(masks, overlap=0.7).tolist() == [0, 2]
    assert distinct(masks, overlap=0.95).tolist() == [0, 1, 2]
    assert distinct(masks[:0], overlap=0.5).tolist() == []
