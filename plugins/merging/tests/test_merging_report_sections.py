"""What merging adds to the page of a run: pixels by words, and the numbers behind its figures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipgraft.checkpoint import write_export
from clipgraft.errors import ClipgraftError
from clipgraft.registry import current
from clipgraft.rundir import read_run
from clipgraft.testing.tiny import tiny_clip
from clipgraft_merging.path.report_section import merge_numbers
from clipgraft_merging.segmentation.report_section import segmentations


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of two tiny CLIPs on three pictures with masks of two classes."""
    root = tmp_path / "data"
    (root / "images").mkdir(parents=True)
    (root / "masks").mkdir()
    for k in range(3):
        pixels = np.random.default_rng(k).integers(0, 255, (32, 32, 3)).astype(np.uint8)
        mask = np.ones((32, 32), np.uint8)
        mask[:, :16] = 2
        Image.fromarray(pixels).save(root / "images" / f"{k}.png")
        Image.fromarray(mask).save(root / "masks" / f"{k}.png")
    (root / "classes.txt").write_text("cat\ndog\n")
    path = tmp_path / "run"
    base = write_export(tiny_clip(0), tmp_path / "base")
    write_export(tiny_clip(1), path / "export")
    node = {"use": "merging/zero-shot-seg", "dense": "value", "classes": ["cat", "dog"]}
    node |= {"data": f"merging/segmentation:{root}"}
    (path / "config.yaml").write_text(json.dumps({"model": {"from": str(base)}, "evaluate": {"on": [node]}}))
    (path / "evaluations.json").write_text(json.dumps({"after": {"merging/zero-shot-seg": {"miou": 0.5}}}))
    return path


def test_pixels_by_words_before_after_and_as_the_data_have_them(run: Path) -> None:
    (section,) = segmentations(read_run(run), registry=current())
    *pictures, legend = section.figures
    assert len(pictures) == 3 and [swatch.caption for swatch in legend.pictures] == ["cat", "dog"]
    for figure in pictures:
        assert [picture.caption for picture in figure.pictures] == ["picture", "before", "after", "truth"]
        assert figure.pictures[-1].alt == "truth: dog 50 %, cat 50 %"
        assert len({picture.image for picture in figure.pictures[:2]}) == 2
    (table,) = section.tables
    assert table.folded and len(table.rows) == 9
    assert table.rows[0][1] == section.figures[0].pictures[1].alt.removeprefix("before: ")


def test_runs_that_labelled_no_pixels_say_nothing_and_a_lost_export_is_named(run: Path) -> None:
    (run / "export/clipgraft.json").rename(run / "kept.json")
    with pytest.raises(ClipgraftError, match="wrote no export"):
        segmentations(read_run(run), registry=current())
    (run / "evaluations.json").write_text("{}")
    assert segmentations(read_run(run), registry=current()) == []


def test_a_path_and_accuracies_are_tables(run: Path) -> None:
    assert merge_numbers(read_run(run), registry=current()) == []
    line, merges = run / "stages/01-interpolate", run / "stages/02-merge"
    line.mkdir(parents=True)
    merges.mkdir()
    points = [{"block": "", "alpha": a, "held out": 0.5 + a / 4} for a in (1.0, 0.0, 0.5)]
    points.append({"block": "0", "alpha": 0.5, "held out": 0.9})
    told = {"metric": "core/zero-shot.top1", "path": points, "chosen_alpha": 0.5}
    (line / "path.json").write_text(json.dumps(told))
    rows = ["method,order,merged,task,accuracy", "opcm,0,1,birds,0.75", "opcm,0,2,birds,0.5", "opcm,0,2,cars,1.0"]
    rows += ["opcm,1,1,cars,0.1", "base,,0,birds,0.2"]
    (merges / "accuracy.csv").write_text("\n".join(rows))
    (section,) = merge_numbers(read_run(run), registry=current())
    path, matrix = section.tables
    assert path.header == ("α", "held out")
    assert path.rows == (("0", 0.5), ("0.5, chosen", 0.625), ("1", 0.75))
    assert matrix.header[1:] == ("birds", "cars") and matrix.shaded
    assert matrix.rows == (("after merge 1", 75.0, "–"), ("after merge 2", 50.0, 100.0))
