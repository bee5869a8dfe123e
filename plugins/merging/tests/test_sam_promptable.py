"""Prompts and masks: transformers' numbers, prompts of every kind per object, and other sizes."""

from __future__ import annotations

import pytest
import torch

from clipgraft.errors import InputError
from clipgraft_merging.sam.opening import sam_parts
from clipgraft_merging.sam.promptable import Promptable

POINTS = torch.tensor([[[3.0, 5.0], [40.0, 20.0]], [[10.0, 60.0], [33.0, 2.0]], [[1.0, 1.0], [9.0, 9.0]]])
LABELS = torch.tensor([[1, 0], [1, 1], [1, -1]])
BOXES = torch.tensor([[4.0, 4, 30, 30], [1, 2, 60, 50], [10, 20, 30, 60]])


@pytest.fixture
def features():
    return torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@pytest.mark.parametrize("multimask", [True, False])
def test_points_and_boxes_are_transformers_own(sam_model, features, multimask):
    ours = Promptable(sam_model.prompt_encoder, sam_model.mask_decoder)
    points, labels, boxes = POINTS.expand(2, 3, 2, 2), LABELS.expand(2, 3, 2), BOXES.expand(2, 3, 4)
    for given in (
        {"points": points, "labels": labels},
        {"boxes": boxes},
        {"points": points, "labels": labels, "boxes": boxes},
    ):
        theirs = sam_model(
            image_embeddings=features,
            input_points=given.get("points"),
            input_labels=given.get("labels"),
            input_boxes=given.get("boxes"),
            multimask_output=multimask,
        )
        found = ours.masks(features, **given, multimask=multimask)
        assert found.logits.shape == (2, 3, 3 if multimask else 1, 32, 32) and float(found.logits.std()) > 0.01
        torch.testing.assert_close(found.logits, theirs.pred_masks, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(found.iou, theirs.iou_scores, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_mask_prompt_is_transformers_where_transformers_can(sam_model, features):
    """One prompt per image: more is trap f, transformers' decoder adds masks before it repeats the image."""
    mask = torch.randn(2, 1, 32, 32)
    theirs = sam_model(image_embeddings=features, input_boxes=BOXES[:1].expand(2, 1, 4), input_masks=mask)
    found = Promptable(sam_model.prompt_encoder, sam_model.mask_decoder).masks(
        features, boxes=BOXES[:1].expand(2, 1, 4), mask_prompts=mask
    )
    torch.testing.assert_close(found.logits, theirs.pred_masks, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_trap_f_masks_per_prompt_are_each_prompt_alone(sam_model, features):
    ours, masks = sam_parts(sam_model).promptable, torch.randn(2, 3, 32, 32)
    together = ours.masks(features, boxes=BOXES.expand(2, 3, 4), mask_prompts=masks)
    for i in range(2):
        for k in range(3):
            alone = ours.masks(
                features[i : i + 1], boxes=BOXES[k].view(1, 1, 4), mask_prompts=masks[i : i + 1, k : k + 1]
            )
            torch.testing.assert_close(together.logits[i, k], alone.logits[0, 0], atol=1e-5, rtol=1e-4)
    only_masks = ours.masks(features, mask_prompts=masks)
    assert only_masks.best().shape == (2, 3, 32, 32)


@torch.no_grad()
def test_coordinates_are_those_of_the_image_that_the_tower_saw(sam_model):
    """A box over the whole picture is the same prompt at every size."""
    ours, features = sam_parts(sam_model).promptable, torch.randn(1, 16, 8, 8)
    native = ours._sparse(None, None, torch.tensor([[[-0.5, -0.5, 63.5, 63.5]]]), (8, 8))
    small = ours._sparse(None, None, torch.tensor([[[-0.5, -0.5, 71.5, 39.5]]]), (5, 9))
    torch.testing.assert_close(native, small, atol=1e-5, rtol=1e-4)
    assert ours.masks(features[..., :5, :7].contiguous(), POINTS[None], LABELS[None]).logits.shape == (1, 3, 3, 20, 28)


@torch.no_grad()
def test_cell_positions_are_transformers_at_the_native_grid(sam_model):
    ours = sam_parts(sam_model).promptable
    torch.testing.assert_close(ours.places(8, 8), sam_model.get_image_wide_positional_embeddings()[None][0])


def test_best_is_the_mask_with_the_highest_guess(sam_model, features):
    found = sam_parts(sam_model).promptable.masks(features, boxes=BOXES.expand(2, 3, 4))
    k = found.iou[1, 2].argmax()
    assert torch.equal(found.best()[1, 2], found.logits[1, 2, k])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "no prompt was given"),
        ({"points": POINTS.expand(2, 3, 2, 2)}, "points and labels belong together"),
        ({"boxes": BOXES[None]}, r"agree in \(images, prompts\) and with 2 images"),
        ({"boxes": BOXES.expand(2, 3, 4), "mask_prompts": torch.zeros(2, 3, 8, 8)}, "32 x 32 values, got 8 x 8"),
    ],
)
def test_wrong_prompts_are_one_line(sam_model, features, given, said):
    with pytest.raises(InputError, match=said):
        sam_parts(sam_model).promptable.masks(features, **given)
