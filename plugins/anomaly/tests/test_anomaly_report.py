"""The page of an evaluation: the numbers, the pictures it chooses, and that it loads nothing."""

import base64
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from clipgraft.checkpoint import write_export
from clipgraft.testing.tiny import tiny_clip
from clipgraft_anomaly.commands import app
from clipgraft_anomaly.detector import Detection, Detector
from clipgraft_anomaly.evaluate import evaluate_detector
from clipgraft_anomaly.inspection import open_inspection
from clipgraft_anomaly.overlays import OUTLINE
from clipgraft_anomaly.report_cases import GROUPS, SIDE, gallery
from clipgraft_anomaly.report_page import COLUMNS, share, write_page

torch.set_num_threads(1)
VOID = {"meta", "img", "br"}


class Bright(Detector):
    """The map is the red channel, the score its mean."""

    method = "bright"

    def __init__(self):
        super().__init__()
        self.encoder, self.size = tiny_clip(), 16

    def forward(self, pixels, names=None):
        return Detection(pixels[:, 0].mean((1, 2)), pixels[:, 0])


class Page(HTMLParser):
    """Checks that tags nest, and collects them."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.words = [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def data(root, names=("left", "right"), each=8):
    rng = np.random.default_rng(0)
    for name in names:
        for k in range(each):
            kind = ("good", "dent <b>")[k % 2]
            pixels = rng.integers(0, 100, (24, 32, 3)).astype(np.uint8)
            where = root / name / "test" / kind
            where.mkdir(parents=True, exist_ok=True)
            if k % 2:
                mask = np.zeros((24, 32), np.uint8)
                mask[4:12, 6:20] = 255
                pixels[4:12, 6:20, 0] = 110 + 5 * k
                (root / name / "ground_truth" / kind).mkdir(parents=True, exist_ok=True)
                Image.fromarray(mask).save(root / name / "ground_truth" / kind / f"{k}.png")
            Image.fromarray(pixels).save(where / f"{k}.png")
    return f"mvtec:{root}"


def decoded(uri):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))).astype(int)


@pytest.fixture
def measured(tmp_path):
    source, detector = open_inspection(data(tmp_path / "data")), Bright()
    return source, detector, evaluate_detector(detector, source)


def test_groups_hold_the_extremes_and_no_picture_twice(measured):
    source, detector, report = measured
    found = gallery(detector, source, report, each=3)
    assert [part.object for part in found.parts] == ["left", "right"]
    for part in found.parts:
        rows = [row for row in report.records if row["object"] == part.object]
        for side in (0, 1):
            ordered = sorted((row for row in rows if row["label"] == side), key=lambda row: row["score"])
            mine = [g for g, (label, *_) in zip(part.groups, GROUPS, strict=True) if label == side]
            worst, best = sorted(mine, key=lambda group: group.tone, reverse=True)
            ids = [row["id"] for row in (ordered if side else ordered[::-1])]
            assert [case.id for case in worst.cases] == ids[:3] and [case.id for case in best.cases] == ids[:2:-1]
    cases = [case for part in found.parts for group in part.groups for case in group.cases]
    assert len({case.id for case in cases}) == len(cases) == 16
    low, high = found.scale
    assert high == pytest.approx(np.quantile([row["map_max"] for row in report.records], 0.99)) and 0 < low < high


def test_pictures_carry_the_true_outline_where_there_is_damage(measured):
    source, detector, report = measured
    for part in gallery(detector, source, report).parts:
        for group, (label, *_) in zip(part.groups, GROUPS, strict=True):
            for case in group.cases:
                for uri in (case.picture, case.overlay):
                    pixels = decoded(uri)
                    assert pixels.shape == (SIDE * 24 // 32, SIDE, 3)
                    cyan = np.abs(pixels - OUTLINE).sum(2) < 90
                    assert cyan.any() == bool(label)
                    if label:
                        rows, columns = np.nonzero(cyan)
                        box = np.array([rows.min(), rows.max() + 1, columns.min(), columns.max() + 1]) * 32 / SIDE
                        assert box == pytest.approx([4, 12, 6, 20], abs=0.8)


def test_the_page_tells_every_number_and_loads_nothing(measured, tmp_path):
    source, detector, report = measured
    document = {"model": "m", "data": "mvtec:<d>", "method": "bright", "trained_on_test": 0, **report.as_dict()}
    text = write_page(tmp_path / "report.html", report, document, gallery(detector, source, report)).read_text()
    page = Page(text)
    assert "mvtec:&lt;d&gt;" in text and "dent <b>" not in text and "dent &lt;b&gt;" in text
    words = " ".join(page.words)
    for part in report.parts:
        for name in COLUMNS:
            assert share(part.metrics[name]) in words
    assert sum(tag == "img" for tag, _ in page.tags) == 32 and sum(tag == "polyline" for tag, _ in page.tags) == 6
    assert all(a["src"].startswith("data:image/jpeg;base64,") for tag, a in page.tags if tag == "img")
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    bare = re.sub(r'src="data:[^"]*"', "", text)
    assert not re.search(r"https?://|url\(|@import", bare) and '#fff"' not in bare.partition("<body>")[2]
    assert any("default-src 'none'" in a.get("content", "") for tag, a in page.tags if tag == "meta")


def test_undefined_metrics_are_dashes_and_missing_groups_are_left_out(tmp_path):
    source = data(tmp_path / "data", names=("only",))
    for file in (tmp_path / "data/only/test/good").iterdir():
        file.unlink()
    opened, detector = open_inspection(source), Bright()
    report = evaluate_detector(detector, opened)
    found = gallery(detector, opened, report)
    assert [group.title for group in found.parts[0].groups] == [GROUPS[0][2], GROUPS[2][2]]
    document = {"model": "m", "data": source, "method": "bright", "trained_on_test": 3, **report.as_dict()}
    text = write_page(tmp_path / "report.html", report, document, found).read_text()
    Page(text)
    assert "<td>–</td>" in text and "image_auroc: only" in text and "trained on 3 or more" in text
    assert share(None) == "–" and share(0.12345) == "12.3"


def test_eval_writes_the_page_also_for_pictures_that_a_source_makes(tmp_path):
    pytest.importorskip("clipgraft_toyworld")
    model = write_export(tiny_clip(context=48).eval(), tmp_path / "export")
    made = "toyworld/defects?split=test&n=24&size=32&shapes=[moon, tee]"
    words = ["eval", str(model), "--method", "prompts", "--data", made, "--out", str(tmp_path / "out"), "--json"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    text = (tmp_path / "out/report.html").read_text()
    Page(text)
    counts = [part[side] for part in told["objects"].values() for side in ("normal", "anomalous")]
    assert (
        text.count("<figure>") == sum(min(6, count) for count in counts) and share(told["mean"]["pixel_auroc"]) in text
    )
