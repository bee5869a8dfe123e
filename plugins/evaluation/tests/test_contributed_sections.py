"""Sections that plugins write: they are on the page, escaped, and one that fails costs no other."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from clipgraft.registry import Registry
from clipgraft.reporting import Section, Table
from clipgraft.rundir import read_run
from clipgraft_evaluation.contributed import contributed
from clipgraft_evaluation.page import cell, shades, wordy
from clipgraft_evaluation.report import write_report

PLUGIN = """
from clipgraft.reporting import Figure, Picture, Section, Table
from clipgraft.spec import Component, hookimpl

SVG = '<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><script>alert(1)</script></svg>'


def strips(run, *, registry):
    pictures = (Picture(SVG, "frame <1>", "moving left", "right"), Picture(SVG, "frame 2", "shrinking", "wrong"))
    rows = (("frame 1", 0.25, 0.75), ("frame 2", 50, "n/a"))
    shares = Table("who hears <whom>", ("frame", "1", "2"), rows, shaded=True)
    words = Table("in words", ("frame", "class"), (("frame 1", "moving <left>"),), folded=True)
    figure = Figure(pictures, f"a video of {run.base}", across=8)
    return [Section("Strips & more", "First <part>.\\n\\nSecond part.", (figure,), (shares, words))]


def broken(run, *, registry):
    raise ZeroDivisionError("no frames")


def odd(run, *, registry):
    return ["<b>not a section</b>"]


def nothing(run, *, registry):
    return []


@hookimpl
def clipgraft_reports():
    return [Component(name=name, target=f"strips_plugin:{name}", summary=f"The {name} ones")
            for name in ("broken", "nothing", "odd", "strips")]
"""


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    file = tmp_path_factory.mktemp("plugin") / "strips_plugin.py"
    file.write_text(PLUGIN)
    return Registry.discover(allow=(), files=[file])


@pytest.fixture(scope="module")
def text(new_run: Callable[[Path], Path], registry: Registry, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A page with these sections."""
    return write_report(new_run(tmp_path_factory.mktemp("runs") / "a"), registry=registry).read_text("utf-8")


def test_a_section_that_fails_costs_no_other(run_dir: Path, registry: Registry) -> None:
    missing: list[tuple[str, str]] = []
    found = contributed(read_run(run_dir), registry=registry, missing=missing)
    assert [section.title for section in found] == ["Strips & more"]
    assert missing[0] == ("The broken ones", "ZeroDivisionError: no frames")
    assert missing[1][0] == "The odd ones" and "report returns clipgraft.reporting.Section records" in missing[1][1]
    assert len(missing) == 2


def test_a_section_is_on_the_page_with_its_pictures_and_tables(text: str) -> None:
    section = text[text.index('<h2 id="h-section-0">') :]
    section = section[: section.index("</section>")]
    plain = " ".join(re.sub(r"<[^>]+>", " ", section).split())
    assert section.startswith('<h2 id="h-section-0">Strips &amp; more</h2>')
    assert '<a href="#h-section-0">Strips &amp; more</a>' in text
    assert "First &lt;part&gt;." in section and section.count('<p class="note">') == 2
    assert 'alt="frame &lt;1&gt;"' in section and "right: moving left" in plain and "wrong: shrinking" in plain
    assert "a video of base&lt;script&gt;" in section and "--across: 8" in section
    assert section.count('<th scope="row">') == 3 and section.count('<th scope="col"') == 5
    assert "<summary>in words</summary>" in section and "moving &lt;left&gt;" in section
    assert "no frames" in text and "<b>not a section" not in text


def test_an_svg_stays_a_picture_so_that_nothing_in_it_runs(text: str) -> None:
    assert "<script>" not in text
    drawn = re.findall(r'<img class="drawn" src="data:image/svg\+xml;base64,([^"]+)"', text)
    assert len(drawn) == 2 and b"<script>" in base64.b64decode(drawn[0])


def test_a_heat_map_is_a_table_whose_numbers_are_shaded(text: str) -> None:
    shaded = text[text.index('<table class="shaded">') :]
    cells = re.findall(r'<td style="--shade: (\d+)%">([^<]+)</td>', shaded)
    assert cells == [("0", "0.250"), ("2", "0.750"), ("100", "50")]


def test_cells_for_people() -> None:
    table = Table("t", ("a", "b", "c"), (("x", 1.5, "y"), ("z", 2, 3)))
    assert wordy(table) == [True, False, True] and wordy(Table("t", ("a",), ())) == [False]
    assert [cell(v) for v in ("x", 1.5, 2)] == ["x", "1.500", "2"] and cell(1.25, 1) == "1.2"
    assert shades(table) == 3.0 and shades(Table("t", ("a", "b"), (("x", -1.0), ("y", float("nan"))))) == 1.0


def test_a_page_has_a_way_past_its_head_and_to_every_section(page_text: str) -> None:
    assert page_text.index('<a class="skip" href="#main">') < page_text.index("<header>")
    assert '<main id="main" tabindex="-1">' in page_text
    ids = re.findall(r'<h2 id="([^"]+)">', page_text)
    assert re.findall(r'<li><a href="#([^"]+)">', page_text) == ids and len(ids) > 3


def test_the_record_is_what_a_section_asks_for() -> None:
    assert Section("empty") == Section("empty", "", (), ())
