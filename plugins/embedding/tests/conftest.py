"""A folder of photographs, one of them broken, and a tiny CLIP as an export."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipgraft.checkpoint import write_export
from clipgraft.encoders.base import Encoder
from clipgraft.testing.tiny import tiny_clip

BROKEN = "011.jpg"


@pytest.fixture(scope="session")
def encoder() -> Encoder:
    """Random weights; the same in every session."""
    return tiny_clip(seed=3).eval()


@pytest.fixture(scope="session")
def model(encoder: Encoder, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The encoder as a reference for the command line."""
    return str(write_export(encoder, tmp_path_factory.mktemp("model") / "export"))


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 images of several sizes, number 11 no image."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for k in range(40):
        coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
        coarse.resize((60 + k % 9, 44 + k % 5), Image.Resampling.BICUBIC).save(folder / f"{k:03}.jpg", quality=90)
    (folder / BROKEN).write_bytes(b"<html>not found</html>")
    return folder


@pytest.fixture(scope="session")
def captioned(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same images with captions, as ``csv:FILE``; every fourth has two."""
    file = tmp_path_factory.mktemp("table") / "captions.csv"
    colours = ("red", "green", "blue", "yellow", "purple")
    with file.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["image", "caption"])
        for k in range(40):
            for extra in range(2 if k % 4 == 0 else 1):
                writer.writerow([f"images/{k:03}.jpg", f"a {colours[k % 5]} square number {extra}"])
    (file.parent / "images").mkdir()
    for image in photos.iterdir():
        (file.parent / "images" / image.name).write_bytes(image.read_bytes())
    return f"csv:{file}"
