"""Reports in a real browser: nothing is loaded, nothing complains, and they are readable, at any width and in the dark.

``nox -s browser`` runs these; without a Chromium they are skipped (see ``conftest.py``).
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from clipgraft.execution import run_recipe
from clipgraft_evaluation.report import write_report
from clipgraft_evaluation.two_runs import write_comparison

pytestmark = [pytest.mark.slow, pytest.mark.browser]

PAGES = ("pictures", "videos", "inspection", "two-runs")
WIDE, PHONE, NARROW = 1200, 390, 320
TAB, ENTER = ("Tab", 9), ("Enter", 13)

CONTRAST = """(() => {
  const parse = c => {
    const m = c.match(/[\\d.]+/g).map(Number), scale = c.startsWith('color(') ? 255 : 1;
    return [...m.slice(0, 3).map(v => v * scale), m[3] ?? 1];
  };
  const over = (a, b) => [0, 1, 2].map(k => a[k] * a[3] + b[k] * (1 - a[3])).concat(1);
  const linear = v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
  const light = c => .2126 * linear(c[0] / 255) + .7152 * linear(c[1] / 255) + .0722 * linear(c[2] / 255);
  const line = e => e ? [getComputedStyle(e), ...line(e.parentElement)] : [];
  const ground = e => line(e).reverse().reduce((under, s) => over(parse(s.backgroundColor), under), [255, 255, 255, 1]);
  const bad = [];
  let seen = 0;
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let n; (n = walk.nextNode());) {
    const e = n.parentElement, style = getComputedStyle(e);
    if (!n.textContent.trim() || !e.getBoundingClientRect().width || !e.checkVisibility()) continue;
    const under = ground(e), ink = parse(e instanceof SVGElement ? style.fill : style.color);
    ink[3] *= line(e).reduce((share, s) => share * s.opacity, 1);
    const [x, y] = [light(over(ink, under)), light(under)].sort((a, b) => b - a), ratio = (x + .05) / (y + .05);
    const size = parseFloat(style.fontSize), large = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);
    seen += 1;
    if (ratio < (large ? 3 : 4.5)) bad.push([ratio.toFixed(2), n.textContent.trim().slice(0, 40), e.className]);
  }
  return {bad: bad.slice(0, 20), seen, ground: ground(document.body).slice(0, 3)};
})()"""
"""WCAG 2.2, 1.4.3: 4.5 to 1, and 3 to 1 for large text, over whatever colours lie below."""

FIGURES = """[...document.querySelectorAll('img, svg')].map(e => {
  const box = e.getBoundingClientRect(), picture = e.tagName === 'IMG';
  return {name: e.tagName, alt: (picture ? e.alt : e.getAttribute('aria-label') || '').trim(),
    role: e.getAttribute('role'), width: box.width, height: box.height,
    decoded: !picture || (e.complete && e.naturalWidth > 0)};
})"""

HEADINGS = "[...document.querySelectorAll('h1, h2, h3, h4, h5, h6')].map(e => +e.tagName[1])"

TABLES = """[...document.querySelectorAll('table')].map(t => ({caption: t.caption && t.caption.textContent.trim(),
  heads: [...t.querySelectorAll('th')].map(h => [h.scope, h.textContent.trim()]),
  rows: [...t.tBodies].flatMap(b => [...b.rows]).map(r => r.cells[0].tagName),
  wide: t.tHead ? t.tHead.rows[0].cells.length : 0,
  cells: [...new Set([...t.tBodies].flatMap(b => [...b.rows]).map(r => r.cells.length))]}))"""

FOCUS = """(() => { const e = document.activeElement, style = getComputedStyle(e), box = e.getBoundingClientRect();
  e.__seen = true;
  const outline = style.outlineStyle !== 'none' && parseFloat(style.outlineWidth) >= 1;
  return {name: e.tagName, text: e.textContent.trim().slice(0, 40), outline, width: box.width, top: box.top}; })()"""

REACHABLE = "[...document.querySelectorAll('a[href], summary, [tabindex=\"0\"]')].filter(e => e.checkVisibility())"

OVERFLOW = """(() => { const page = document.documentElement, wide = page.clientWidth;
  const out = [...document.querySelectorAll('body *')].filter(e => {
    if (e.closest('.scroll, pre') || e.matches('.sr, .skip') || !e.checkVisibility()) return false;
    const box = e.getBoundingClientRect(); return box.width && (box.right > wide + 1 || box.left < -1); });
  return {page: page.scrollWidth, wide, out: out.slice(0, 5).map(e => e.outerHTML.slice(0, 120))}; })()"""


@pytest.fixture(scope="module")
def pages(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Reports of short runs of the toy world: pictures, videos, inspection, and a comparison of two runs."""
    root = tmp_path_factory.mktemp("reports")
    short = {"train.steps": 6, "train.log_every": 1, "train.warmup": 0, "train.batch_size": 8}

    def run(name: str, recipe: str, **more: Any) -> Path:
        run_recipe(recipe, overrides={**short, **more}, out=root / name)
        return root / name

    images, pairs = "toyworld/images?split=tune&n=64", "toyworld/pairs?split=tune&per_pattern=6"
    measured = [f"core/zero-shot@{images}", f"core/pairs@{pairs}", f"core/retrieval@{images}"]
    tuned = {"model.from": "toyworld/clip", "data.from": images, "evaluate.on": measured, "train.lr": 1e-3}
    first = run("first", "finetune", **tuned)
    second = run("second", "finetune", **tuned, **{"evaluate.retention": "none", "seed": 1})
    clips = "toyworld/videos?split=tune&n=24"
    seen = {"data.from": clips, "evaluate.on": [f"video/classification@{clips}"], "evaluate.retention": "none"}
    videos = run("videos", "x-clip:tiny", **seen)
    parts = "toyworld/defects?split=tune&n=24&size=64"
    looked = {"data.from": parts, "evaluate.on": [f"anomaly/inspection@{parts}"], "evaluate.retention": "none"}
    inspection = run("inspection", "anomalyclip:tiny", **looked)
    written = [*map(write_report, (first, videos, inspection)), write_comparison(first, second)]
    return dict(zip(PAGES, written, strict=True))


@pytest.fixture(params=PAGES)
def page(request: pytest.FixtureRequest, pages: dict[str, Path]) -> Path:
    """Each of them."""
    return pages[request.param]


def test_nothing_is_asked_for_and_nothing_complains(page: Path, tab: Any) -> None:
    with tab(page) as opened:
        opened.run("[...document.querySelectorAll('details')].forEach(d => d.open = true)")
        assert opened.complaints() == [] and opened.requests() == []
        assert opened.run("document.querySelectorAll('script').length") == 0
        assert opened.run("document.title").strip() and opened.run("document.documentElement.lang") == "en"


def test_every_figure_has_a_size_and_says_what_is_to_be_seen(page: Path, tab: Any) -> None:
    with tab(page) as opened:
        figures = opened.run(FIGURES)
    assert len(figures) > 3
    for figure in figures:
        assert figure["alt"] and figure["decoded"] and min(figure["width"], figure["height"]) >= 20, figure
        assert figure["name"] == "IMG" or figure["role"] == "img", figure


def test_what_plugins_write_is_there(pages: dict[str, Path], tab: Any) -> None:
    heads = {}
    for name, file in pages.items():
        with tab(file) as opened:
            heads[name] = opened.run("[...document.querySelectorAll('h2')].map(e => e.textContent)")
    assert {"Before and after", "What was kept", "Pairs that changed", "What captions find"} <= set(heads["pictures"])
    assert {"Videos as they go on", "Which frame hears which"} <= set(heads["videos"])
    assert "Where it sees damage" in heads["inspection"]
    assert {"After both runs", "Training", "Configuration", "Environment"} <= set(heads["two-runs"])


@pytest.mark.parametrize("width", [WIDE, PHONE, NARROW])
def test_no_page_is_wider_than_its_window(page: Path, tab: Any, width: int) -> None:
    with tab(page, width=width) as opened:
        opened.run("[...document.querySelectorAll('details')].forEach(d => d.open = true)")
        found = opened.run(OVERFLOW)
    assert found["wide"] == width and found["page"] <= width and found["out"] == []


def test_numbers_fit_a_phone_without_scrolling(pages: dict[str, Path], tab: Any) -> None:
    for file in pages.values():
        with tab(file, width=PHONE) as opened:
            wide = "[...document.querySelectorAll('.scroll')].filter(e => e.querySelector('.metrics, .shaded') && {})"
            over = opened.run(wide.format("e.scrollWidth > e.clientWidth + 1") + ".map(e => e.ariaLabel)")
            assert over == []
            small = opened.run("[...document.querySelectorAll('.row img')].filter(e => e.clientWidth < 56).length")
            assert small == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_word_has_enough_contrast(page: Path, tab: Any, scheme: str) -> None:
    with tab(page, scheme=scheme) as opened:
        opened.run("[...document.querySelectorAll('details')].forEach(d => d.open = true)")
        found = opened.run(CONTRAST)
    assert found["seen"] > 50 and found["bad"] == []
    assert (sum(found["ground"]) / 3 < 60) == (scheme == "dark")


def test_the_keyboard_reaches_everything_in_order_and_shows_where_it_is(page: Path, tab: Any) -> None:
    with tab(page) as opened:
        wanted = opened.run(f"{REACHABLE}.length")
        reached = []
        for _ in range(wanted):
            opened.press(*TAB)
            reached.append(opened.run(FOCUS))
        assert opened.run(f"{REACHABLE}.filter(e => !e.__seen).map(e => e.outerHTML.slice(0, 80))") == []
        assert all(one["outline"] and one["width"] for one in reached), [o for o in reached if not o["outline"]]
        first = reached[0]
        assert first["name"] == "A" and first["text"] == "Skip to the report" and first["top"] >= 0


def test_the_first_link_skips_to_the_report_and_a_summary_opens(page: Path, tab: Any) -> None:
    with tab(page) as opened:
        opened.press(*TAB)
        opened.press(*ENTER, text="\r")
        assert opened.run("document.activeElement.id") == "main"
        opened.run("document.querySelector('summary').focus()")
        before = opened.run("document.querySelector('details').open")
        opened.press(*ENTER, text="\r")
        assert opened.run("document.querySelector('details').open") is not before


def test_headings_go_down_one_step_at_a_time_and_links_lead_to_them(page: Path, tab: Any) -> None:
    with tab(page) as opened:
        levels = opened.run(HEADINGS)
        links = opened.run("[...document.querySelectorAll('a[href^=\"#\"]')].map(a => a.hash.slice(1))")
        ids = opened.run("[...document.querySelectorAll('[id]')].map(e => e.id)")
    assert levels[0] == 1 and levels.count(1) == 1 and set(links) <= set(ids) and len(links) > 3
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))


def test_tables_have_captions_and_heads_that_say_of_what(page: Path, tab: Any) -> None:
    with tab(page) as opened:
        tables = opened.run(TABLES)
    assert tables
    for table in tables:
        assert table["caption"] and all(scope in ("col", "row") and text for scope, text in table["heads"]), table
        assert set(table["rows"]) == {"TH"} and table["cells"] == [table["wide"]], table


def test_a_screen_reader_hears_the_numbers_of_a_heat_map(pages: dict[str, Path], tab: Any) -> None:
    with tab(pages["videos"]) as opened:
        nodes = opened.call("Accessibility.getFullAXTree")["nodes"]
    names = {(node.get("role", {}).get("value"), node.get("name", {}).get("value", "").strip()) for node in nodes}
    assert ("rowheader", "frame 3") in names and ("columnheader", "8") in names
    assert any(role == "cell" and name.replace(".", "").isdigit() for role, name in names if role)
    assert any(role == "image" and "frame 3 of 8" in name for role, name in names)
    assert ("link", "Skip to the report") in names and ("navigation", "On this page") in names
