from __future__ import annotations

import base64
import io
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clipgraft.rundir import read_run
from clipgraft_evaluation.patches import patch_pictures, pca_colours
from clipgraft_evaluation.pictures import as_image, as_uri, tiles_as_uri
from clipgraft_evaluation.report import write_report


def opened(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


def tokens(seed: int, n: int = 3, patches: int = 16, width: int = 24) -> np.ndarray:
    draw = np.random.default_rng(seed)
    return draw.normal(size=(n, patches, 5)) @ draw.normal(size=(5, width)) + draw.normal(size=width)


def test_equal_tokens_have_equal_colours_and_all_lie_in_range() -> None:
    before = tokens(0)
    first, second, explained = pca_colours(before, before.copy())
    assert first.shape == second.shape == (3, 16, 3)
    assert np.allclose(first, second) and first.min() >= 0 and first.max() <= 1
    assert 0.5 < explained < 1


def test_three_directions_are_explained_in_full() -> None:
    draw = np.random.default_rng(1)
    flat = draw.normal(size=(2, 8, 3)) @ np.linalg.qr(draw.normal(size=(12, 3)))[0].T
    assert pca_colours(flat[:1], flat[1:])[2] == pytest.approx(1.0)


def test_colours_do_not_depend_on_the_basis_of_the_tokens() -> None:
    before, after = tokens(2), tokens(3)
    rotation = np.linalg.qr(np.random.default_rng(4).normal(size=(24, 24)))[0]
    plain, turned = pca_colours(before, after), pca_colours(before @ rotation, after @ rotation)
    for a, b in zip(plain[:2], turned[:2], strict=True):
        same, mirrored = np.abs(a - b).max((0, 1)), np.abs(a - (1 - b)).max((0, 1))
        assert (np.minimum(same, mirrored) < 0.1).all(), "up to the sign of each component"


def test_constant_and_narrow_tokens_give_a_picture_too() -> None:
    first, second, explained = pca_colours(np.ones((1, 4, 2)), np.ones((1, 4, 2)))
    assert first.shape == (1, 4, 3) and np.isfinite(first).all() and np.array_equal(first, second) and explained == 0


def test_small_pictures_stay_exact_and_photographs_shrink() -> None:
    pixels = torch.randint(0, 256, (3, 20, 30), dtype=torch.uint8)
    found = opened(as_uri(as_image(pixels)))
    assert found.format == "PNG" and np.array_equal(np.asarray(found), pixels.permute(1, 2, 0).numpy())
    photo = opened(as_uri(as_image(Image.new("RGBA", (900, 600)))))
    assert photo.format == "JPEG" and photo.size == (224, 149) and photo.getpixel((0, 0)) == (255, 255, 255)


def test_tiles_are_one_pixel_each() -> None:
    tiles = np.zeros((2, 4, 3))
    tiles[0, 3] = (1, 0.5, 0)
    assert opened(tiles_as_uri(tiles)).getpixel((3, 0)) == (255, 128, 0)


def test_the_page_shows_base_and_export_side_by_side(run_dir: Path, squares: object, tmp_path: Path) -> None:
    from clipgraft.checkpoint import write_export
    from clipgraft.testing.tiny import tiny_clip

    base = write_export(tiny_clip(0), tmp_path / "base")
    write_export(tiny_clip(1), run_dir / "export", lineage=[{"recipe": "fake/sharper", "base": str(base)}])
    config = run_dir / "config.yaml"
    config.write_text(re.sub("from: base.*", f"from: {base}", config.read_text()).replace("other?split=test", "pairs"))
    found = patch_pictures(read_run(run_dir), number=4)
    assert len(found.rows) == 4 and found.grid == (4, 4) and 0 < found.explained <= 1
    assert [opened(uri).size for uri in (found.rows[0].picture, found.rows[0].before)] == [(32, 32), (4, 4)]
    assert len({row.before for row in found.rows} | {row.after for row in found.rows}) == 8
    assert all(row.similarity < 0.9 for row in found.rows), "two different models"
    itself = {"model": {"from": str(run_dir / "export")}, "data": {"from": "squares/pairs"}}
    same = patch_pictures(replace(read_run(run_dir), config=itself, after={}), number=1)
    assert same.rows[0].before == same.rows[0].after and same.rows[0].similarity == pytest.approx(1)
    text = write_report(run_dir).read_text("utf-8")
    assert text.count("patch features of image") == 12 and "What the patches see" in text and "Left out" not in text
    assert f"base <code>{base}</code>" in text
