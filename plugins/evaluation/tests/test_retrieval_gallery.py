"""The gallery of captions: which are shown, among what, and from a run to the page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from clipgraft.checkpoint import write_export
from clipgraft.data import open_source
from clipgraft.errors import ClipgraftError
from clipgraft.evaluation import evaluate, records
from clipgraft.registry import current
from clipgraft.rundir import read_run
from clipgraft.testing.tiny import tiny_clip
from clipgraft_evaluation.retrieval_gallery import moved, pool_of, retrieval_gallery


def test_captions_that_moved_and_that_stayed_take_turns() -> None:
    before = {"up": 9, "up a little": 3, "down": 0, "first": 0, "lost": 7}
    after = {"up": 0, "up a little": 1, "down": 8, "first": 0, "lost": 7}
    assert moved(before, after) == ["up", "down", "first", "up a little", "lost"]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of two tiny CLIPs on a table of twelve pictures, measured before and after."""
    rows = ["image,caption"]
    for k in range(12):
        Image.new("RGB", (40, 40), (20 * k, 255 - 20 * k, 90)).save(tmp_path / f"{k}.png")
        rows.append(f"{k}.png,number {k} <b>")
    (tmp_path / "table.csv").write_text("\n".join(rows))
    data, path = f"csv:{tmp_path / 'table.csv'}", tmp_path / "run"
    base = write_export(tiny_clip(0), tmp_path / "base")
    write_export(tiny_clip(1), path / "export")
    found = {}
    for when, seed in (("before", 0), ("after", 1)):
        measured = evaluate(tiny_clip(seed).eval(), ["core/retrieval"], registry=current(), default_data=data)
        records.save(path / "evaluation" / when, measured)
        found[when] = {name: dict(e.metrics) for name, e in measured.items()}
    (path / "evaluations.json").write_text(json.dumps(found))
    config = f"model: {{from: {base}}}\nevaluate: {{on: [{{use: core/retrieval}}], data: '{data}'}}\n"
    (path / "config.yaml").write_text(config)
    return path


def test_a_run_shows_captions_before_and_after(run: Path) -> None:
    (section,) = retrieval_gallery(read_run(run), registry=current())
    assert len(section.figures) == 2 * 4 and all(len(figure.pictures) == 5 for figure in section.figures)
    assert [figure.caption.split(":")[0] for figure in section.figures] == ["before", "after"] * 4
    for figure in section.figures:
        own = [picture for picture in figure.pictures if picture.tone == "right"]
        assert len(own) <= 1 and all(picture.alt == figure.caption.partition(": ")[2] for picture in own)
        assert [picture.caption[0] for picture in figure.pictures] == list("12345")
    assert "among 12 pictures" in section.text


def test_marks_agree_with_the_ranks_that_were_measured(run: Path) -> None:
    record = read_run(run)
    (section,) = retrieval_gallery(record, registry=current())
    for when in ("before", "after"):
        ranks = {
            f"number {int(Path(str(r['id'])).stem)} <b>": r["image_ranks"][0]
            for r in record.samples(when, "core/retrieval")
        }
        for figure in (f for f in section.figures if f.caption.startswith(when)):
            shown = next((k for k, p in enumerate(figure.pictures) if p.tone == "right"), None)
            rank = ranks[figure.caption.partition(": ")[2]]
            assert shown == rank or (shown is None and rank >= 5)


def test_without_an_export_or_records_it_says_why(run: Path) -> None:
    (run / "export/clipgraft.json").rename(run / "kept.json")
    with pytest.raises(ClipgraftError, match="wrote no export"):
        retrieval_gallery(read_run(run), registry=current())
    (run / "kept.json").rename(run / "export/clipgraft.json")
    next((run / "evaluation/before").glob("*.parquet")).unlink()
    with pytest.raises(ClipgraftError, match="kept no records before and after"):
        retrieval_gallery(read_run(run), registry=current())
    (run / "evaluations.json").write_text("{}")
    assert retrieval_gallery(read_run(run), registry=current()) == []


def test_the_pool_holds_the_asked_pictures_and_each_once(run: Path, tmp_path: Path) -> None:
    source = open_source(f"csv:{tmp_path / 'table.csv'}")
    ids = [source[k].id for k in range(12)]
    pool = pool_of(source, [ids[7], ids[2]], ids)  # type: ignore[arg-type]
    assert [sample.id for sample in pool.rows[:2]] == [ids[7], ids[2]]
    assert sorted(sample.id for sample in pool.rows) == sorted(ids)
