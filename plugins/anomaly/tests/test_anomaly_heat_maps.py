"""Heat maps on the page of a run: the worst and the best pictures of what was measured."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipgraft.checkpoint import write_export
from clipgraft.errors import ClipgraftError
from clipgraft.evaluation import evaluate, records
from clipgraft.registry import current
from clipgraft.rundir import read_run
from clipgraft.testing.tiny import tiny_clip
from clipgraft_anomaly.report_heat_maps import EACH, heat_maps


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that measured hand-written prompts on 16 pictures of two kinds of part."""
    root, rng = tmp_path_factory.mktemp("heat-maps"), np.random.default_rng(0)
    for part in ("nut", "bolt"):
        for k in range(8):
            kind = ("good", "dent")[k % 2]
            where = root / "parts" / part / "test" / kind
            where.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 255, (24, 32, 3)).astype(np.uint8)).save(where / f"{k}.png")
            if k % 2:
                mask = np.zeros((24, 32), np.uint8)
                mask[4:12, 6:20] = 255
                (root / "parts" / part / "ground_truth" / kind).mkdir(parents=True, exist_ok=True)
                Image.fromarray(mask).save(root / "parts" / part / "ground_truth" / kind / f"{k}_mask.png")
    path, data = root / "run", f"mvtec:{root / 'parts'}"
    export = write_export(tiny_clip(), path / "export")
    asked = "anomaly/inspection?method=anomaly/prompts"
    found = evaluate(tiny_clip().eval(), [asked], registry=current(), default_data=data)
    records.save(path / "evaluation" / "after", found)
    (path / "evaluations.json").write_text(json.dumps({"after": {n: dict(e.metrics) for n, e in found.items()}}))
    node = {"use": "anomaly/inspection", "method": "anomaly/prompts", "data": data}
    (path / "config.yaml").write_text(json.dumps({"model": {"from": str(export)}, "evaluate": {"on": [node]}}))
    return path


def test_the_worst_and_the_best_pictures_stand_beside_their_maps(run):
    record = read_run(run)
    (section,) = heat_maps(record, registry=current())
    assert len(section.figures) == 4 * EACH and "Of 16 pictures" in section.text
    rows = sorted(record.samples("after", "anomaly/inspection"), key=lambda row: row["score"])
    lowest = [row["id"] for row in rows if row["label"] == 1][:EACH]
    shown = [figure.pictures[0].alt.partition(", ")[0] for figure in section.figures]
    assert shown[:EACH] == lowest and len(set(shown)) == len(shown)
    for figure in section.figures:
        picture, overlay = figure.pictures
        assert picture.media == overlay.media == "image/jpeg" and picture.image != overlay.image
        assert overlay.alt.startswith("the same below its heat map, score ")
    titles = [figure.caption.partition(":")[0] for figure in section.figures]
    assert titles[0] == "Damage with the lowest scores" and titles[EACH] == "Normal with the highest scores"


def test_runs_that_inspected_nothing_say_nothing_and_a_lost_export_is_named(run, tmp_path: Path):
    (tmp_path / "config.yaml").write_text("model: {from: toyworld/clip}")
    assert heat_maps(read_run(tmp_path), registry=current()) == []
    (run / "export").rename(run / "elsewhere")
    with pytest.raises(ClipgraftError, match="wrote no export"):
        heat_maps(read_run(run), registry=current())
    (run / "elsewhere").rename(run / "export")
