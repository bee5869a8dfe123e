from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path

from clipgraft.claims import Arm, Claim, Gain, Kept
from clipgraft_evaluation.claim_plot import claim_plot
from clipgraft_evaluation.figures import curve, inline, panels, smooth
from clipgraft_evaluation.verdict import judge

CLAIM = Claim(
    name="fake/sharper",
    statement="Details become readable.",
    paper="A. Author, 2025",
    bases=("a", "b"),
    method=Arm(name="method", recipe="fake/sharper:tiny"),
    controls=(Arm(name="anchor-only", recipe="x"), Arm(name="shuffled", recipe="x")),
    gains=(Gain(metric="core/pairs.mean", over="anchor-only", at_least=0.08),),
    kept=(Kept(metric="core/zero-shot.top1", share=0.95),),
    budget=480,
)


def test_a_dot_per_seed_and_arm_and_a_line_where_the_rule_is(tmp_path: Path) -> None:
    numbers = {"before": 0.20, "after": 0.33, "anchor-only": 0.21, "shuffled": 0.22}
    arms = {
        arm: {"core/pairs.mean": [value, value + 0.01, value + 0.02], "core/zero-shot.top1": [0.8, 0.79, 0.78]}
        for arm, value in numbers.items()
    }
    path = claim_plot(judge(CLAIM, arms), tmp_path)
    assert path == tmp_path / "fake-sharper.svg"
    text = path.read_text()
    root = ET.fromstring(text)
    words = ["".join(node.itertext()) for node in root.iter("{http://www.w3.org/2000/svg}text")]
    for word in ("before", "anchor-only", "shuffled", "after", "core/pairs.mean", "core/zero-shot.top1"):
        assert words.count(word) == 1, word
    dots = [n for n in root.iter("{http://www.w3.org/2000/svg}use") if "fill-opacity: 0.75" in n.get("style", "")]
    assert len(dots) == 2 * 4 * 3
    assert text.count("stroke-dasharray: 4.8") == 2
    assert claim_plot(judge(CLAIM, arms), tmp_path).read_text() == text, "the same numbers are the same file"


def test_an_inline_figure_brings_nothing_along_and_keeps_its_ids_apart() -> None:
    def draw(name: str) -> str:
        figure, (axis,) = panels(1, width=300, height=200)
        curve(axis, list(range(100)), [1 / (i + 1) for i in range(100)], title="a < b & c")
        return str(inline(figure, name=name, label='the "loss" <b>'))

    first, second = draw("one"), draw("two")
    assert first.startswith('<svg role="img" aria-label="the &#34;loss&#34; &lt;b&gt;" style="max-width: 300px"')
    assert not re.search(r"http|xmlns|<style|font-family|<metadata", first)
    assert "a &lt; b &amp; c" in first and "var(--muted)" in first
    ids = [set(re.findall(r'id="([^"]+)"', text)) for text in (first, second)]
    assert ids[0] and not ids[0] & ids[1]
    assert first.replace("one-", "two-") == second


def test_the_running_mean_keeps_the_length_and_skips_what_is_no_number() -> None:
    assert smooth([1.0, 2.0, 6.0], window=3) == [1.5, 3.0, 4.0]
    assert smooth([1.0, float("nan"), 3.0], window=3) == [1.0, 2.0, 3.0]
    assert smooth([5.0], window=1) == [5.0]
