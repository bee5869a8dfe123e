"""Two heads: coarse probabilities become points and mask prompts, and masks become labels."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from clipgraft.errors import InputError
from clipgraft.testing.tiny import tiny_clip
from clipgraft_merging.sam.promptable import Masks
from clipgraft_merging.segmentation.refinement import RefinementConfig, mask_prompt, refined, spread_points
from clipgraft_merging.segmentation.vocabulary import Vocabulary


def test_points_are_the_best_cell_and_then_the_farthest_ones() -> None:
    probability = torch.zeros(8, 8)
    probability[1, 1], probability[1, 7], probability[6, 1], probability[1, 2] = 0.9, 0.8, 0.7, 0.85
    assert spread_points(probability, above=0.5, most=3) == [(1, 1), (1, 7), (6, 1)]
    assert spread_points(probability, above=0.5, most=1) == [(1, 1)]
    assert spread_points(probability, above=0.95, most=3) == []
    near = torch.zeros(4, 4)
    near[1, 1], near[1, 2] = 0.9, 0.8
    assert spread_points(near, above=0.5, most=3) == [(1, 1)]  # a neighbour says nothing new


def test_a_mask_prompt_is_bounded_logits_on_four_times_the_grid() -> None:
    probability = torch.tensor([[[0.0, 1.0], [0.5, 0.5]]])
    prompt = mask_prompt(probability, (8, 8), most=6.0)
    assert prompt.shape == (1, 8, 8) and prompt.min() == -6 and prompt.max() == 6
    assert prompt[0, -1].abs().max() < 1e-6


class _Echo(torch.nn.Module):
    """Answers every prompt with its own mask prompt."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = SimpleNamespace(native=32)
        self.seen: dict[str, torch.Tensor] = {}

    def embed(self, pixels: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(pixels), 4, 4, 4)

    def masks(self, features, points, labels, *, mask_prompts, multimask):  # type: ignore[no-untyped-def]
        self.seen = {"points": points, "labels": labels}
        assert not multimask and mask_prompts.shape[-2:] == (16, 16)
        return Masks(mask_prompts[:, :, None], torch.ones(*mask_prompts.shape[:2], 1))


def _scores() -> torch.Tensor:
    scores = torch.zeros(2, 4, 4)
    scores[0, :, :2], scores[1, :, 2:] = 1.0, 1.0
    return scores


@pytest.mark.parametrize("background", ["none", "threshold"])
def test_refinement_paints_the_surest_mask_and_keeps_the_rest(background: str) -> None:
    vocabulary = Vocabulary(("a", "b"), torch.eye(2), 10.0, background, 0.5)
    echo, settings = _Echo(), RefinementConfig()
    coarse = torch.full((12, 12), 2)
    found = refined(echo, torch.rand(1, 3, 32, 32), _scores(), vocabulary, (12, 12), settings=settings, coarse=coarse)
    assert found[:, :6].eq(1).all() and found[:, 6:].eq(2).all()
    points, labels = echo.seen["points"][0], echo.seen["labels"][0]
    assert points.shape == (2, 3, 2) and labels.max() == 1
    for row, side in ((0, slice(0, 16)), (1, slice(16, 32))):  # points of a class lie on its half, in pixels
        x = points[row][labels[row] == 1][:, 0]
        assert len(x) > 1 and ((x >= side.start - 0.5) & (x < side.stop)).all()


def test_where_no_class_is_sure_enough_the_coarse_labels_or_background_stay() -> None:
    flat, coarse = torch.zeros(2, 4, 4), torch.full((12, 12), 2)
    given = {"settings": RefinementConfig(above=0.6), "coarse": coarse}
    pixels = torch.rand(1, 3, 32, 32)
    none = Vocabulary(("a", "b"), torch.eye(2), 10.0, "none", 0.5)
    assert refined(_Echo(), pixels, flat, none, (12, 12), **given).eq(2).all()
    unsure = Vocabulary(("a", "b"), torch.eye(2), 10.0, "threshold", 0.6)
    assert refined(_Echo(), pixels, flat, unsure, (12, 12), **given).eq(0).all()


def test_background_with_words_gets_no_prompt() -> None:
    vocabulary = Vocabulary(("a",), torch.eye(2), 10.0, "class", 0.5)
    echo, coarse = _Echo(), torch.ones(12, 12).long()
    scores = _scores()  # background on the left, the class on the right
    found = refined(
        echo, torch.rand(1, 3, 32, 32), scores, vocabulary, (12, 12), settings=RefinementConfig(), coarse=coarse
    )
    assert echo.seen["points"].shape[1] == 1
    assert found[:, :6].eq(0).all() and found[:, 6:].eq(1).all()


def test_a_clip_without_masks_says_what_to_name() -> None:
    with pytest.raises(InputError, match=r"refine\.sam"):
        RefinementConfig().segmenter(tiny_clip(0))


def test_bilinear_enlargement_comes_before_the_decision() -> None:
    from clipgraft_merging.segmentation.labelling import decided

    vocabulary = Vocabulary(("a", "b"), torch.eye(2), 10.0, "none", 0.5)
    found = decided(vocabulary, _scores(), (16, 16))
    expected = F.interpolate(_scores()[None], size=(16, 16), mode="bilinear", align_corners=False).argmax(1)[0] + 1
    assert torch.equal(found, expected)
