"""Prompts from masks, masks from the model, and pictures with their masks moved along."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from clipgraft.data.base import BadSample, Sample
from clipgraft.errors import InputError
from clipgraft_merging.sam.opening import sam_parts
from clipgraft_merging.samclip.masked_source import MaskedSource, has_masks
from clipgraft_merging.samclip.prompts import automatic_masks, sample_prompts


def two_masks():
    """(2, 3, 8, 8): a rectangle at the top left, a column at the right, and an empty one; of the second image none."""
    masks = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    masks[0, 0, 1:4, 0:2] = 1
    masks[0, 1, :, 6] = 1
    return masks


def test_points_lie_in_masks_and_boxes_around_them():
    torch.manual_seed(0)
    found = sample_prompts(two_masks(), size=(64, 32), points=200, boxes=200, noise=0.0)
    assert found.points.shape == (2, 200, 1, 2) and found.boxes.shape == (2, 200, 4) and bool((found.labels == 1).all())
    x, y = (found.points[0, :, 0] + 0.5).unbind(-1)
    first = (x >= 0) & (x <= 8) & (y >= 8) & (y <= 32)
    second = (x >= 24) & (x <= 28)
    assert bool((first ^ second).all()) and 60 < int(first.sum()) < 140
    boxes = {tuple(b) for b in (found.boxes[0] + 0.5).tolist()}
    assert boxes == {(0.0, 8.0, 8.0, 32.0), (24.0, 0.0, 28.0, 64.0)}


def test_an_image_without_masks_gets_points_anywhere_and_its_whole_as_the_box():
    found = sample_prompts(two_masks(), size=(64, 32), points=100, boxes=1, noise=0.0)
    assert (found.boxes[1, 0] + 0.5).tolist() == [0, 0, 32, 64]
    assert float(found.points[1, ..., 0].max()) > 20 and float(found.points[1, ..., 1].max()) > 40


def test_noisy_boxes_stay_in_the_image_and_keep_their_order():
    found = sample_prompts(two_masks(), size=(64, 32), points=0, boxes=500, noise=0.5)
    assert found.points.shape == (2, 0, 1, 2)
    x0, y0, x1, y1 = found.boxes.unbind(-1)
    assert bool(
        (x0 <= x1).all() and (y0 <= y1).all() and (x0 >= -0.5).all() and (x1 <= 31.5).all() and (y1 <= 63.5).all()
    )
    assert len(found.boxes[0].unique(dim=0)) > 100


def test_draws_come_from_the_global_state_alone():
    torch.manual_seed(3)
    a = sample_prompts(two_masks(), size=(64, 64), points=5, boxes=5)
    torch.manual_seed(3)
    b = sample_prompts(two_masks(), size=(64, 64), points=5, boxes=5)
    assert torch.equal(a.points, b.points) and torch.equal(a.boxes, b.boxes)


def test_automatic_masks_are_the_models_own_without_doubles(sam_model):
    promptable, features = sam_parts(sam_model).promptable, torch.randn(2, 16, 8, 8)
    found = automatic_masks(promptable, features, side=4, keep=20, iou=-10.0, area=(0.0, 1.0))
    assert found.shape == (2, 20, 32, 32) and found.dtype == torch.bool
    none = automatic_masks(promptable, features, side=4, keep=3, iou=10.0)
    assert not none.any()
    for image in automatic_masks(promptable, features, side=4, keep=4, iou=1e-9, overlap=0.3, area=(0.0, 1.0)):
        kept = [m for m in image if m.any()]
        for i, a in enumerate(kept):
            for b in kept[:i]:
                assert float((a & b).sum() / (a | b).sum()) <= 0.3 + 1e-6


class Pictures:
    name, fingerprint, classes, templates, attributes = "pictures", "f", (), (), {}

    def __init__(self, samples):
        self.samples = samples

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        if isinstance(self.samples[index], BadSample):
            raise self.samples[index]
        return self.samples[index]


def test_masks_move_with_their_picture():
    image = Image.new("RGB", (80, 40))
    masks = torch.zeros(3, 40, 80, dtype=torch.uint8)
    masks[0, :20, :40], masks[1, :, :4], masks[2, 39, 79] = 1, 1, 1
    source = Pictures([Sample("a", image, extra={"instances": masks, "other": torch.zeros(1)})])
    fill = (0.4, 0.6, 0.8)
    found = MaskedSource(source, size=16, cells=8, masks=2, fit="pad", fill=fill)[0]
    assert found.image.shape == (3, 16, 16) and found.image[:, 8:].unique().tolist() == [102, 153, 204]
    assert not found.image[:, :8].any()
    assert found.extra["instances"].shape == (2, 8, 8) and set(found.extra) == {"instances"}
    assert found.extra["instances"][0].nonzero().amax(0).tolist() == [1, 3]  # a quarter of the picture's 4 x 8 cells
    squashed = MaskedSource(source, size=16, cells=8, masks=2, fit="squash", fill=fill)[0]
    assert squashed.extra["instances"][0].nonzero().amax(0).tolist() == [3, 3] and not squashed.image.any()
    assert MaskedSource(source, size=16, cells=8, masks=0, fit="pad", fill=fill)[0].extra == {}


def test_a_tensor_of_the_right_size_is_left_alone_and_missing_masks_are_empty():
    image = torch.randint(0, 255, (3, 16, 16), dtype=torch.uint8)
    source = Pictures([Sample("a", image)])
    found = MaskedSource(source, size=16, cells=8, masks=2, fit="pad", fill=(0, 0, 0))[0]
    assert torch.equal(found.image, image) and not found.extra["instances"].any()


def test_whether_a_source_has_masks():
    bad, plain = BadSample("x", "broken"), Sample("a", torch.zeros(3, 4, 4, dtype=torch.uint8))
    assert has_masks(Pictures([bad, plain])) is False
    assert has_masks(Pictures([bad, Sample("a", plain.image, extra={"instances": torch.zeros(1, 4, 4)})])) is True
    with pytest.raises(InputError, match="holds no readable picture"):
        has_masks(Pictures([bad, bad]))
