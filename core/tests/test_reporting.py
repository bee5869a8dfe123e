"""Sections of reports: what the records refuse, and that the hook's target comes back as it is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from clipgraft.errors import ClipgraftError, InputError
from clipgraft.registry import Registry
from clipgraft.reporting import Figure, Picture, Section, Table, encoded
from clipgraft.rundir import read_run

PNG, JPEG = b"\x89PNG\r\n\x1a\n....", b"\xff\xd8\xff...."


def test_a_picture_says_what_it_is() -> None:
    pictures = [Picture(image, "a cat") for image in ("<?xml?><svg></svg>", PNG, JPEG)]
    assert [p.media for p in pictures] == ["image/svg+xml", "image/png", "image/jpeg"]


@pytest.mark.parametrize("image", ["<html>", "", b"GIF89a", b""])
def test_a_picture_of_another_kind_is_refused(image: str | bytes) -> None:
    with pytest.raises(ClipgraftError, match="neither SVG text nor a PNG or JPEG file"):
        Picture(image, "a cat")


def test_pictures_without_words_and_empty_figures_are_refused() -> None:
    with pytest.raises(ClipgraftError, match=r"needs a text .* \(alt\)"):
        Picture(PNG, " ")
    with pytest.raises(ClipgraftError, match="needs a picture"):
        Figure(())


def test_a_table_has_as_many_cells_as_columns() -> None:
    assert Table("counts", ("what", "n"), (("cats", 3),)).rows == (("cats", 3),)
    with pytest.raises(ClipgraftError, match="'counts' needs a caption and 2 cells in each row"):
        Table("counts", ("what", "n"), (("cats", 3, 4),))
    with pytest.raises(ClipgraftError, match="needs a caption"):
        Table("", ("what",), ())


def test_the_hook_gives_the_function_itself(tmp_path: Path) -> None:
    file = tmp_path / "cats_section.py"
    file.write_text(
        "from clipgraft.reporting import Section\n"
        "from clipgraft.spec import Component, hookimpl\n\n"
        "def cats(run, *, registry):\n    return [Section('Cats', run.base)]\n\n"
        "@hookimpl\ndef clipgraft_reports():\n"
        "    return [Component(name='cats', target='cats_section:cats')]\n"
    )
    (tmp_path / "config.yaml").write_text("model: {from: toyworld/clip}")
    registry = Registry.discover(allow=(), files=[file])
    (found,) = registry.list("report")
    sections = registry.build("report", found.name, {})(read_run(tmp_path), registry=registry)
    assert found.name == "cats-section/cats" and sections == [Section("Cats", "toyworld/clip")]


def test_records_load_without_torch_or_numpy() -> None:
    code = "import sys, clipgraft.reporting; sys.exit(bool({'torch', 'numpy', 'pydantic'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


CONFIG = """
data: {from: "folder:photos"}
evaluate:
  on:
  - {use: video/classification, pool: mean_raw, data: "video:clips"}
  - {use: video/classification, pool: mean_norm}
  - {use: core/zero-shot}
  data: "folder:kept"
"""


def test_a_run_is_read_with_what_was_measured_on_what(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(CONFIG)
    names = ["video/classification@video:clips", "video/classification@folder:kept", "core/zero-shot"]
    (tmp_path / "evaluations.json").write_text(json.dumps({"after": {name: {"top1": 0.5} for name in names}}))
    run = read_run(tmp_path)
    assert run.measured("video/classification") == names[:2] and run.measured("core/pairs") == []
    assert [run.data_of(name) for name in names] == ["video:clips", "folder:kept", "folder:kept"]
    assert [run.node(name).get("pool") for name in names] == ["mean_raw", "mean_norm", None]
    assert run.node("video/classification[pool=mean_norm]@folder:kept")["pool"] == "mean_norm"
    assert run.node("core/pairs") == {} and run.recipe == "" and run.export is None
    with pytest.raises(InputError, match=r"no run directory \(it has no config.yaml\)"):
        read_run(tmp_path / "absent")


def test_pictures_of_a_source_become_bytes_small_ones_exactly() -> None:
    import io

    import torch
    from PIL import Image

    pixels = torch.randint(0, 256, (3, 20, 30), dtype=torch.uint8)
    small = Image.open(io.BytesIO(encoded(pixels)))
    assert small.format == "PNG" and small.tobytes() == bytes(pixels.permute(1, 2, 0).flatten().tolist())
    large = Image.open(io.BytesIO(encoded(Image.new("L", (400, 200)), side=100)))
    assert large.format == "JPEG" and large.size == (100, 50) and large.mode == "RGB"
