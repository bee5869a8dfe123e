from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from clipgraft.errors import InputError
from clipgraft.evaluation import records
from clipgraft.evaluation.base import Evaluation
from clipgraft.evaluation.comparison import compare
from clipgraft.evaluation.statistics import Share, intervals, value
from clipgraft_evaluation.page import number, signed, size
from clipgraft_evaluation.report import write_report

VOID = {"meta", "img", "br", "hr", "link", "input", "path", "use", "rect", "wbr"}


class Page(HTMLParser):
    """Collects headings, attributes and text; fails on tags that don't nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.headings: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("h1", "h2", "h3"):
            self.headings.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("style", "script"):
            return
        self.words.append(data)
        if {"h1", "h2", "h3"} & set(self.open):
            self.headings[-1] += data

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture
def page(page_text: str) -> Page:
    return Page(page_text)


def test_it_says_what_changed_in_sections(page: Page) -> None:
    headings = [" ".join(h.split()) for h in page.headings]
    assert headings[0].startswith("fake/sharper on base")
    assert headings[1:] == [
        "Before and after",
        "Pairs that changed",
        "Confused before, told apart after",
        "Told apart before, confused after",
        "Training",
        "00-generator 100 steps",
        "01-clip 100 steps",
        "How it was made",
        "Left out",
    ]
    assert "core/zero-shot on squares/other?split=test" in page.text
    assert "top1 0.768 0.744 −0.024" in page.text and "orientation 0.000 0.000 +0.000" in page.text
    assert re.search(
        r"mean 0\.100 \[0\.000, 0\.\d+] 0\.333 \[0\.\d+, 0\.\d+] \+0\.233 \[[+−]0\.\d+, \+0\.\d+]", page.text
    )
    assert "cannot tell p = 0.092" in page.text and "adjusted for the 1 tests of this section" in page.text
    assert "3 of 30 right before, 10 after: 10 newly right, 3 newly wrong (two-sided sign test, p = 0.092)" in page.text
    assert "10 of 10, spread over the patterns" in page.text
    assert "torch 2.15.0" in page.text and "plugin squares clipgraft-squares 0.1" in page.text
    assert "61 s, 100 steps, seed 7" in page.text


def forget(run: Path, share: float) -> None:
    """Let a run have lost half of what it knew, and gained where less is better."""
    samples = {when: [{"id": f"k{i}", "top1": i < right, "gap": 2.0 * (i < right)} for i in range(80)]
               for when, right in (("before", 80), ("after", round(80 * share)))}  # fmt: skip
    found = {}
    for when, rows in samples.items():
        told = {"top1": Share("top1"), "gap": Share("gap")}
        metrics = {name: value(statistic, rows) for name, statistic in told.items()}
        evaluation = Evaluation(metrics, {}, tuple(rows), told, intervals(told, rows), frozenset({"gap"}))
        found[when] = {"core/zero-shot": evaluation}
        records.save(run / "evaluation" / f"retention-{when}", found[when])
    rows = compare(found["before"], found["after"])
    (run / "forgetting.json").write_text(json.dumps({"rows": [row.as_dict() for row in rows]}))
    nodes = [{"use": "zero-shot", "data": "squares/kept?n=80"}]
    (run / "retention.json").write_text(json.dumps({"evaluators": nodes, "before": {}, "after": {}}))


def test_what_was_kept_and_what_was_not(run_dir: Path, squares: object) -> None:
    forget(run_dir, 0.5)
    page = Page(write_report(run_dir).read_text("utf-8"))
    assert "What was kept" in page.headings and "core/zero-shot on squares/kept?n=80 , 80 samples" in page.text
    assert "Worse now: core/zero-shot top1. Better now: core/zero-shot gap." in page.text
    assert re.search(r"top1 1\.000 \[1\.000, 1\.000] 0\.500 \[0\.\d+, 0\.\d+] −0\.500 \[−0\.\d+, −0\.\d+]", page.text)
    assert re.search(r"gap less is better 2\.000 .* −1\.000 .* better", page.text)
    classes = [attrs.get("class") for tag, attrs in page.tags if tag == "td"]
    assert "down" in classes and "up" in classes
    forget(run_dir, 1.0)
    page = Page(write_report(run_dir).read_text("utf-8"))
    assert "Nothing is measurably worse. For 2 of 2 metrics these samples can't tell." in page.text


def test_forgetting_that_was_not_measured_is_explained(run_dir: Path, squares: object) -> None:
    (run_dir / "retention.json").write_text('{"left_out": "no plugin in use offers it"}')
    assert "forgetting was not measured: no plugin in use offers it" in Page(write_report(run_dir).read_text()).text
    (run_dir / "retention.json").write_text('{"before": {}}')
    assert "was not measured after the training" in Page(write_report(run_dir).read_text()).text


def test_damaged_records_cost_only_the_tests(run_dir: Path, squares: object) -> None:
    good = write_report(run_dir).read_text("utf-8")
    (run_dir / "evaluation/after/core-pairs.parquet").write_bytes(b"no parquet")
    page = Page(write_report(run_dir).read_text("utf-8"))
    assert "Records of samples" in page.text and "can't be read as Parquet" in page.text
    assert "top1 0.768 0.744 −0.024" in page.text and "cannot tell p = 0.092" in Page(good).text


def test_what_is_missing_is_named(page: Page) -> None:
    assert "Patch features this run wrote no export" in page.text


def test_the_gallery_shows_both_pictures_and_texts_of_every_pattern(page: Page) -> None:
    images = [attrs for tag, attrs in page.tags if tag == "img"]
    assert len(images) == 2 * (10 + 3)
    assert images[0]["alt"] == "square 0 on the <left> & up" and images[1]["alt"] == "square 0 on the right"
    assert len({attrs["src"] for attrs in images[:2]}) == 2
    captions = re.findall(r"(orientation|quantity|colour) p(\d+)", page.text)
    assert [pattern for pattern, _ in captions[:3]] == ["orientation", "quantity", "colour"]
    assert {int(i) for _, i in captions} == set(range(13))


def test_nothing_on_the_page_is_loaded_from_elsewhere(page_text: str) -> None:
    assert not re.search(r"https?:|//[a-z]|url\((?!#)|@import|<script|<link|<iframe", page_text)
    for tag, attrs in Page(page_text).tags:
        for name in ("src", "href", "srcset", "data", "action"):
            value = attrs.get(name) or ""
            assert name not in attrs or value.startswith(("data:image/", "#")), (tag, name, value)
    assert "default-src 'none'" in page_text


def test_names_from_the_run_are_escaped(page_text: str) -> None:
    assert "<script>" not in page_text and "&lt;script&gt;alert(1)" in page_text
    assert "&lt;left&gt; &amp; up" in page_text


def test_tables_and_pictures_are_accessible(page: Page) -> None:
    names = [tag for tag, _ in page.tags]
    assert names.count("table") == names.count("caption") >= 4
    assert all(attrs.get("scope") in ("col", "row") for tag, attrs in page.tags if tag == "th")
    assert all(attrs.get("alt") for tag, attrs in page.tags if tag == "img")
    curves = [attrs["aria-label"] for tag, attrs in page.tags if tag == "svg"]
    assert len(curves) == 2 * 5 and "loss over 100 steps, from 2.041 to 0.069" in curves
    assert names.count("h1") == 1 and ("html", {"lang": "en"}) in page.tags


def test_ids_are_unique_and_every_reference_resolves(page_text: str) -> None:
    ids = re.findall(r'\bid="([^"]+)"', page_text)
    assert len(ids) == len(set(ids))
    targets = re.findall(r'(?:url\(#|href="#|aria-labelledby=")([^")]+)', page_text)
    assert targets and set(targets) <= set(ids)


def test_the_same_run_gives_the_same_page(run_dir: Path, squares: object) -> None:
    first = write_report(run_dir).read_text("utf-8")
    assert write_report(run_dir).read_text("utf-8") == first


def test_a_bare_run_still_has_a_page(run_dir: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.yaml").write_text("model:\n  from: open_clip:ViT-B-32\n")
    (bare / "status.json").write_text(
        json.dumps({"recipe": "core/finetune", "status": "failed", "error": "disk <full>"})
    )
    page = Page(write_report(bare, tmp_path / "deep" / "page.html").read_text("utf-8"))
    assert "disk <full>" in page.text and "this run evaluated nothing" in page.text
    assert [h.split()[0] for h in page.headings] == ["core/finetune", "How", "Left"]
    assert not (bare / "report.html").exists()


def test_data_that_is_gone_costs_only_its_section(run_dir: Path) -> None:
    page = Page(write_report(run_dir).read_text("utf-8"))
    assert "Minimal pairs unknown dataset 'squares/pairs'" in page.text
    assert "Before and after" in page.headings


def test_values_that_are_not_finite_leave_gaps(run_dir: Path, squares: object) -> None:
    rows = [
        {"step": s, "loss": math_nan if s % 2 else 0.5, "terms": {}} for s in range(1, 9) for math_nan in [float("nan")]
    ]
    log = run_dir / "stages" / "00-generator" / "metrics.jsonl"
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = Page(write_report(run_dir).read_text("utf-8"))
    labels = [attrs["aria-label"] for tag, attrs in page.tags if tag == "svg"]
    assert "loss over 8 steps, from 0.500 to 0.500" in labels


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no run directory \(it has no config.yaml\)"):
        write_report(tmp_path)


def test_damage_in_the_middle_of_a_log_is_named(run_dir: Path) -> None:
    log = run_dir / "stages" / "00-generator" / "metrics.jsonl"
    log.write_text('{"step": 1\n{"step": 2, "loss": 1}\n')
    with pytest.raises(InputError, match=r"metrics.jsonl, line 1 is not JSON"):
        write_report(run_dir)


def test_numbers_for_people() -> None:
    assert [number(v) for v in (None, 0.0, 0.12345, 9.8e-4, 1e-5, 12345.0)] == [
        "–",
        "0.000",
        "0.123",
        "0.001",
        "1e-05",
        "1.23e+04",
    ]
    assert [signed(v) for v in (None, 0.25, -0.25)] == ["–", "+0.250", "−0.250"]
    assert [size(v) for v in (0, 999, 1536, 3 * 1024**2)] == ["0 B", "999 B", "1.5 kB", "3.0 MB"]


def test_what_a_recipe_watched_is_drawn(run_dir: Path, squares: object) -> None:
    without = Page(write_report(run_dir).read_text("utf-8"))
    rows = [
        {"step": s, "weight_drift": s / 1e4, "canary": 0.8, "canary_right": 8, "seconds": 0.1} for s in (0, 50, 100)
    ]
    (run_dir / "stages/01-clip/watch.jsonl").write_text("\n".join(map(json.dumps, rows)))
    page = Page(write_report(run_dir).read_text("utf-8"))
    labels = [str(attributes.get("aria-label")) for tag, attributes in page.tags if tag == "svg"]
    assert "weight drift over 100 steps, from 0.000 to 0.010" in labels
    assert "canary over 100 steps, from 0.800 to 0.800" in labels
    assert not [label for label in labels if label.startswith(("seconds", "canary right"))]
    assert "Watched beside the training" in page.text and "Watched beside" not in without.text


def test_what_a_stage_drew_is_on_the_page(run_dir: Path, squares: object) -> None:
    drawing = '<svg xmlns="http://www.w3.org/2000/svg" width="10" height="10"><text>a path</text></svg>'
    (run_dir / "stages/01-clip/path.svg").write_text(drawing)
    text = write_report(run_dir).read_text("utf-8")
    drawn = [a for tag, a in Page(text).tags if tag == "img" and a.get("class") == "drawn"]
    assert [a["alt"] for a in drawn] == ["path, drawn by the stage clip"]
    assert base64.b64decode(str(drawn[0]["src"]).partition(",")[2]).decode() == drawing
