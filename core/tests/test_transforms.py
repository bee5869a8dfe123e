"""Pixels equal open_clip's and torchvision's, and never touch the global random state."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from clipgraft.data.transforms import evaluation_transform, training_transform
from clipgraft.encoders.base import Preprocess

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def photo(name: str) -> Image.Image:
    if name in ("china.jpg", "flower.jpg"):
        sklearn = pytest.importorskip("sklearn")
        return Image.open(Path(sklearn.__file__).parent / "datasets" / "images" / name)
    skimage = pytest.importorskip("skimage")
    return Image.open(Path(skimage.__file__).parent / "data" / name)


def preprocess(**changes: Any) -> Preprocess:
    return Preprocess(**{"size": (32, 32), "mean": MEAN, "std": STD, **changes})


@pytest.mark.parametrize("resize_mode", ["shortest", "squash", "longest"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [(32, 32), (48, 40)])
def test_evaluation_equals_open_clip_bit_for_bit(resize_mode: str, interpolation: str, size: tuple[int, int]) -> None:
    open_clip = pytest.importorskip("open_clip")
    ours = preprocess(size=size, resize_mode=resize_mode, interpolation=interpolation, fill_color=7)
    theirs = open_clip.transform.image_transform(
        size, False, MEAN, STD, resize_mode=resize_mode, interpolation=interpolation, fill_color=7
    )
    for image in (photo("china.jpg"), photo("camera.png"), photo("chelsea.png").rotate(90, expand=True)):
        pixels = evaluation_transform(ours)(image)
        assert pixels.shape == (3, *size) and pixels.min() >= 0 and pixels.max() <= 1
        assert torch.equal(ours.normalize(pixels), theirs(image))


def test_tiny_and_extreme_pictures_have_the_right_size() -> None:
    for mode in ("shortest", "squash", "longest"):
        for size in ((1, 1), (5, 300), (300, 5)):
            assert evaluation_transform(preprocess(resize_mode=mode))(Image.new("RGB", size)).shape == (3, 32, 32)
            crop = training_transform(preprocess(), (0.9, 1.0))
            assert crop(Image.new("RGB", size), torch.Generator()).shape == (3, 32, 32)


def test_tensors_of_the_right_size_take_the_short_way() -> None:
    array = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    transform = evaluation_transform(preprocess())
    assert torch.equal(transform(tensor), transform(Image.fromarray(array)))
    assert torch.equal(transform(tensor), tensor.float() / 255)
    larger = evaluation_transform(preprocess(size=(64, 64)))
    assert torch.equal(larger(tensor), larger(Image.fromarray(array)))


def test_every_mode_is_composited_before_resizing() -> None:
    image = Image.new("RGBA", (40, 40), (255, 0, 0, 0))
    assert torch.equal(evaluation_transform(preprocess())(image), torch.ones(3, 32, 32))
    assert torch.equal(training_transform(preprocess(), (0.5, 1.0))(image, torch.Generator()), torch.ones(3, 32, 32))


@pytest.mark.parametrize("crop", [(0.9, 1.0), (0.1, 0.4)])
def test_training_draws_what_torchvision_draws(crop: tuple[float, float]) -> None:
    from torchvision.transforms import InterpolationMode, RandomResizedCrop
    from torchvision.transforms.functional import to_tensor

    theirs = RandomResizedCrop(32, scale=crop, interpolation=InterpolationMode.BICUBIC)
    ours = training_transform(preprocess(), crop)
    for image in (photo("flower.jpg"), photo("text.png").convert("RGB"), Image.new("RGB", (200, 3), (9, 9, 9))):
        for seed in range(3):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                expected = to_tensor(theirs(image))
            assert torch.equal(ours(image, torch.Generator().manual_seed(seed)), expected)


def test_transforms_leave_the_global_random_state_alone_and_pickle() -> None:
    image = photo("chelsea.png")
    before = torch.get_rng_state()
    ours = training_transform(preprocess(), (0.3, 1.0))
    first = ours(image, torch.Generator().manual_seed(1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(pickle.loads(pickle.dumps(ours))(image, torch.Generator().manual_seed(1)), first)
    assert not torch.equal(ours(image, torch.Generator().manual_seed(2)), first)
