"""Scenes: deterministic by seed, and splits that share no random stream."""

from __future__ import annotations

import pytest
import torch

from clipgraft.errors import InputError
from clipgraft_toyworld.world import (
    CLASSES,
    SIZES,
    SPLITS,
    STREAMS,
    class_names,
    generator,
    sample_jitter,
    sample_scene,
)


def test_the_same_address_draws_the_same_scene() -> None:
    draws = [sample_scene(64, generator("tune", stream="images", seed=3, block=5)) for _ in range(2)]
    for name in SIZES:
        assert torch.equal(draws[0].value(name), draws[1].value(name))


def test_every_address_is_a_different_32_bit_seed() -> None:
    corners = [
        generator(split, stream=stream, seed=seed, block=block).initial_seed()
        for split in SPLITS
        for stream in STREAMS
        for seed in (0, 1, 2047)
        for block in (0, 1, 65535)
    ]
    assert len(set(corners)) == len(corners)
    assert max(corners) < 2**32  # the engine ignores higher bits, so they must not be needed


def test_splits_draw_different_jitter() -> None:
    shifts = [sample_jitter(256, generator(split, stream="images", seed=0, block=0)).shift for split in SPLITS]
    for one, two in ((0, 1), (0, 2), (1, 2)):
        assert not torch.isin(shifts[one], shifts[two]).all(1).any()


@pytest.mark.parametrize(("seed", "block"), [(2048, 0), (-1, 0), (0, 65536)])
def test_an_address_outside_its_range_is_refused(seed: int, block: int) -> None:
    with pytest.raises(InputError, match="out of range"):
        generator("train", stream="images", seed=seed, block=block)


def test_attributes_are_uniform_and_independent() -> None:
    scene = sample_scene(40_000, torch.Generator().manual_seed(0))
    for name, size in SIZES.items():
        share = torch.bincount(scene.value(name), minlength=size) / len(scene)
        assert torch.allclose(share, torch.full((size,), 1 / size), atol=0.01)
    joint = torch.bincount(scene.coarse() * 4 + scene.background, minlength=CLASSES * 4) / len(scene)
    assert (joint - 1 / (CLASSES * 4)).abs().max() < 0.002


def test_class_names_follow_the_class_number() -> None:
    scene = sample_scene(10, torch.Generator().manual_seed(1))
    names = class_names()
    for color, shape, number in zip(scene.color.tolist(), scene.shape.tolist(), scene.coarse().tolist(), strict=True):
        from clipgraft_toyworld.world import COLORS, SHAPES

        assert names[number] == f"{COLORS[color]} {SHAPES[shape]}"


def test_an_unknown_attribute_is_named_with_the_known_ones() -> None:
    with pytest.raises(InputError, match="orientation"):
        sample_scene(2, torch.Generator()).value("mood")
