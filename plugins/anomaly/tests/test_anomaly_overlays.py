"""Colours, outlines and map files."""

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from clipgraft.errors import InputError
from clipgraft_anomaly.overlays import CASING, OUTLINE, colour_table, heat, oklab_path, outline, outlined, overlay, srgb
from clipgraft_anomaly.predict_maps import map_limit, read_map, write_map


def test_colours_are_equally_far_apart_get_lighter_and_can_be_shown():
    path = oklab_path()
    steps = np.linalg.norm(np.diff(path, axis=0), axis=1)
    assert steps.max() / steps.min() < 1.001
    assert (np.diff(path[:, 0]) > 0).all()
    assert srgb(path).min() >= 0 and srgb(path).max() <= 1
    table = colour_table()
    assert table.shape == (256, 3) and len(np.unique(table, axis=0)) == 256


def test_oklab_is_the_published_one():
    # Ottosson's table: white, and the pure red, green and blue of sRGB
    oklab = [[1, 0, 0], [0.62795536, 0.22486306, 0.1258463], [0.86643961, -0.23388757, 0.17949847]]
    oklab += [[0.45201371, -0.03245698, -0.31152815]]
    assert srgb(np.array(oklab)) == pytest.approx(np.array([[1, 1, 1], [1, 0, 0], [0, 1, 0], [0, 0, 1]]), abs=2e-3)


def test_lightness_also_rises_in_cielab():
    color = pytest.importorskip("skimage.color")
    lab = color.rgb2lab(colour_table()[None] / 255)[0]
    assert (np.diff(lab[:, 0]) > 0).all() and lab[-1, 0] - lab[0, 0] > 75


def test_large_pictures_are_drawn_in_strips_without_a_seam():
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (600, 5, 3)).astype(np.uint8)
    scores = rng.random((600, 5)).astype(np.float32)
    whole = overlay(picture, scores, (0.1, 0.9))
    rows = [overlay(picture[k : k + 1], scores[k : k + 1], (0.1, 0.9)) for k in range(600)]
    assert np.array_equal(whole, np.concatenate(rows))


def test_one_scale_for_all_pictures_keeps_a_good_part_plain():
    picture = np.full((4, 6, 3), 120, np.uint8)
    good, bad = np.full((4, 6), 0.2, np.float32), np.full((4, 6), 0.2, np.float32)
    bad[1, 2], bad[3, 5] = 0.8, 9.0
    assert np.array_equal(overlay(picture, good, (0.2, 0.8)), picture)
    seen = overlay(picture, bad, (0.2, 0.8))
    assert np.array_equal(seen[0], picture[0])
    top = (0.3 * 120 + 0.7 * colour_table()[-1].astype(float)).round()
    assert np.array_equal(seen[1, 2], top) and np.array_equal(seen[3, 5], top)
    assert heat(bad, (0.5, 0.5)).max() == 1  # a scale without width divides by nothing


@pytest.mark.parametrize("width", [1, 2, 3])
def test_outlines_against_scipys_erosion(width):
    mask = np.random.default_rng(0).random((30, 40)) < 0.03
    mask = ndimage.binary_dilation(mask, iterations=4)
    assert np.array_equal(outline(mask, width=width), mask & ~ndimage.binary_erosion(mask, iterations=width))


def test_outlined_pictures_change_only_at_the_outline_and_the_dark_line_around_it():
    picture, mask = np.full((600, 700, 3), 99, np.uint8), np.zeros((600, 700), bool)
    mask[100:200, 150:300], mask[590:, :40] = True, True
    drawn = outlined(picture, mask)
    changed, edge = (drawn != picture).any(2), outline(mask, width=2)
    assert (drawn[edge] == OUTLINE).all() and (drawn[changed & ~mask] == CASING).all()
    assert np.array_equal(changed, edge | (ndimage.binary_dilation(mask) & ~mask))
    assert np.array_equal(outlined(picture, np.zeros_like(mask)), picture)


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.2, 0.4), (-3.0, 0.5), (0.0, 7.5)])
def test_raw_values_come_back_from_both_kinds_of_files(tmp_path, low, high):
    scores = np.random.default_rng(1).uniform(low, high, (337, 23)).astype(np.float32)
    code = write_map(tmp_path / "deep/er/a.png", scores)
    assert code == (min(0.0, float(scores.min())), max(1.0, float(scores.max())))
    assert np.abs(read_map(tmp_path / "deep/er/a.png") - scores).max() <= 0.501 * (code[1] - code[0]) / 65535
    with Image.open(tmp_path / "deep/er/a.png") as opened:  # as the documented formula says, without our reader
        pixels = np.asarray(opened)
        assert opened.mode == "I;16" and opened.size == (23, 337)
        by_hand = float(opened.text["low"]) + (float(opened.text["high"]) - float(opened.text["low"])) * pixels / 65535
    assert by_hand == pytest.approx(read_map(tmp_path / "deep/er/a.png"), abs=1e-6)
    write_map(tmp_path / "a.npy", scores)
    assert np.load(tmp_path / "a.npy").dtype == np.float16
    assert read_map(tmp_path / "a.npy") == pytest.approx(scores, rel=2**-11, abs=1e-7)


def test_pictures_share_one_code_unless_a_map_leaves_it(tmp_path):
    for value in (0.1, 0.9):
        assert write_map(tmp_path / "a.png", np.full((2, 2), value, np.float32), limit=4.0) == (0.0, 4.0)
    assert map_limit({"read": {"fuse": "sum", "layers": [6, 12, 18, 24]}}) == 4
    assert map_limit({"read": {"fuse": "mean", "layers": [6, 12]}}) == 1
    assert map_limit({"windows": {"combine": "sum"}}) == 2 and map_limit({}) == 1


def test_other_files_are_no_maps(tmp_path):
    Image.new("L", (3, 3)).save(tmp_path / "plain.png")
    (tmp_path / "broken.npy").write_bytes(b"nothing")
    for name in ("plain.png", "broken.npy", "missing.png"):
        with pytest.raises(InputError, match="is no map"):
            read_map(tmp_path / name)
