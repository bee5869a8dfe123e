"""Pixels, masks and minimal pairs."""

from __future__ import annotations

import pytest
import torch

from clipgraft_toyworld.captions import records
from clipgraft_toyworld.crowds import crowds
from clipgraft_toyworld.defects import inspections
from clipgraft_toyworld.pairs import minimal_pairs
from clipgraft_toyworld.render import PLATE, draw, place, render, without_objects
from clipgraft_toyworld.shapes import EXTENT, distance, lookup
from clipgraft_toyworld.world import DETAILS, SHAPES, generator, sample_jitter, sample_scene


def scenes(n: int = 64):
    rng = generator("tune", stream="images", seed=7, block=0)
    return sample_scene(n, rng), sample_jitter(n, rng)


@pytest.mark.parametrize("size", [32, 64])
def test_pictures_are_deterministic_and_in_range(size: int) -> None:
    first, again = render(*scenes(), size=size), render(*scenes(), size=size)
    assert torch.equal(first.image, again.image)
    assert first.image.shape == (64, 3, size, size)
    assert first.image.min() >= 0 and first.image.max() <= 1
    assert first.image.std((1, 2, 3)).min() > 0.05  # no empty picture


def test_masks_agree_with_the_pixels() -> None:
    scene, jitter = scenes()
    objects = place(scene, jitter)
    with_objects = draw(objects, scene.background, jitter, size=64)
    without = draw(without_objects(objects), scene.background, jitter, size=64)
    change = (with_objects.image - without.image).abs().amax(1)
    coverage = with_objects.instances.sum(1)
    assert change[coverage == 0].max() == 0
    assert (change[coverage > 0.99] > 0.05).float().mean() > 0.9
    assert coverage.max() <= 1 + 1e-5


def test_there_are_as_many_instances_as_the_scene_says() -> None:
    scene, jitter = scenes()
    picture = render(scene, jitter, size=64)
    visible = (picture.instances.flatten(2).sum(2) > 20).sum(1)
    assert torch.equal(visible, scene.quantity + 1)


def test_semantics_name_the_shape() -> None:
    scene, jitter = scenes()
    picture = render(scene, jitter, size=64)
    for number, semantics in zip(scene.shape.tolist(), picture.semantics, strict=True):
        assert semantics.unique().tolist() == [0, number + 1]


def test_the_table_holds_the_distances() -> None:
    line = torch.linspace(-1.5, 1.5, 61)
    v, u = torch.meshgrid(line, line, indexing="ij")
    for index, name in enumerate(SHAPES):
        found = lookup(torch.tensor([index]), u[None], v[None])[0]
        assert (found - distance(name, u, v)).abs().max() < 0.025, name
    assert EXTENT > 2  # half an image side over the smallest radius must stay inside the table or be far outside


def test_no_shape_looks_alike_upside_down_or_like_another() -> None:
    line = torch.linspace(-1, 1, 41)
    v, u = torch.meshgrid(line, line, indexing="ij")
    views = {name: distance(name, u, v) < 0 for name in SHAPES} | {f"{n}'": distance(n, -u, -v) < 0 for n in SHAPES}
    names = list(views)
    for i, one in enumerate(names):
        for two in names[i + 1 :]:
            overlap = (views[one] & views[two]).sum() / (views[one] | views[two]).sum()
            assert overlap < 0.75, (one, two)


def test_a_pair_differs_in_exactly_one_attribute_and_says_which() -> None:
    pairs = minimal_pairs("tune", per_pattern=20, size=32)
    first, second = pairs.statements()
    texts = zip(first, second, strict=True)
    rows = zip(records(pairs.first_scene), records(pairs.second_scene), pairs.detail.tolist(), texts, strict=True)
    for one, two, index, (text, other) in rows:
        assert [name for name in one if one[name] != two[name]] == [DETAILS[index].name]
        assert text.split()[:3] == other.split()[:3] and text != other
    changed = (pairs.first != pairs.second).flatten(1).any(1)
    assert changed.float().mean() > 0.99
    side = round(PLATE * 32)
    outside = (pairs.first != pairs.second)[:, :, side:, side:].flatten(1).any(1)
    assert not outside[pairs.detail == 7].any()  # a glyph changes nothing but its plate


def test_more_pairs_extend_fewer() -> None:
    few, many = (minimal_pairs("test", per_pattern=n, size=32) for n in (3, 5))
    assert torch.equal(few.first[:3], many.first[:3])
    assert torch.equal(few.second[3:6], many.second[5:8])


def test_damage_changes_pixels_where_its_mask_is() -> None:
    clean, mixed = (inspections("tune", n=128, size=32, seed=1, damaged=share) for share in (0.0, 1.0))
    change = (clean.image - mixed.image).abs().amax(1)
    assert not clean.mask.any() and (clean.kind == 0).all() and (mixed.kind > 0).all()
    assert change[~mixed.mask].max() < 0.5 and (change[mixed.mask] > 0.02).float().mean() > 0.9
    assert mixed.mask.flatten(1).any(1).float().mean() > 0.97
    assert (mixed.mask & (mixed.silhouette < 0.1)).sum() == 0


def test_inspections_keep_to_the_shapes_asked_for() -> None:
    data = inspections("train", n=64, size=32, shapes=("moon", "ell"))
    assert {SHAPES[index] for index in data.scene.shape.tolist()} == {"moon", "ell"}


def test_a_crowd_shows_two_different_objects() -> None:
    crowd = crowds("tune", n=64, size=64)
    assert (crowd.shape[:, 0] != crowd.shape[:, 1]).all() and (crowd.color[:, 0] != crowd.color[:, 1]).all()
    for shapes, semantics in zip(crowd.shape.tolist(), crowd.picture.semantics, strict=True):
        assert set(semantics.unique().tolist()) <= {0, shapes[0] + 1, shapes[1] + 1}
    assert ((crowd.picture.instances > 0.5).flatten(2).sum(2) > 50)[:, :2].float().mean() > 0.97
