"""A run directory as ``clipgraft run`` leaves it, with minimal pairs that a plugin file offers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from clipgraft.evaluation import records
from clipgraft.evaluation.base import Evaluation
from clipgraft.evaluation.statistics import Share, intervals
from clipgraft.registry import Registry, use
from clipgraft_evaluation.report import write_report

PLUGIN = """
from clipgraft.data.base import Pair
from clipgraft.spec import Component, hookimpl

PATTERNS = ("orientation", "quantity", "colour")


class Squares:
    name, fingerprint, patterns = "squares/pairs", "v1", PATTERNS

    def __init__(self):
        import torch
        from PIL import Image, ImageDraw

        self.torch, self.image, self.draw = torch, Image, ImageDraw

    def __len__(self):
        return 30

    def __getitem__(self, index):
        a, b = self.image.new("RGB", (32, 32), "#ccd8e8"), self.image.new("RGB", (32, 32), "#ccd8e8")
        for image, x in ((a, 3), (b, 15)):
            box, fill = (x, index % 16, x + 12, index % 16 + 12), ("red", "navy", "green")[index % 3]
            self.draw.Draw(image).rectangle(box, fill=fill)
        tensor = self.torch.tensor(list(b.tobytes()), dtype=self.torch.uint8).reshape(32, 32, 3).permute(2, 0, 1)
        texts = (f"square {index} on the <left> & up", f"square {index} on the right")
        return Pair(f"p{index}", (a, tensor), texts, PATTERNS[index % 3])


@hookimpl
def clipgraft_datasets():
    return [Component(name="pairs", target="squares:Squares")]
"""

CONFIG = """\
model:
  from: base<script>alert(1)</script>
data:
  from: squares/pairs
evaluate:
  on:
  - use: core/zero-shot
    data: squares/other?split=test
  - use: core/pairs
  data: squares/pairs
seed: 7
"""


@pytest.fixture(scope="session")
def squares_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plugin file; one path per session, because a module is imported once."""
    file = tmp_path_factory.mktemp("plugin") / "squares.py"
    file.write_text(PLUGIN)
    return file


@pytest.fixture
def squares(squares_file: Path) -> Iterator[Registry]:
    """The registry in which ``squares/pairs`` is a data reference."""
    with use(Registry.discover(allow=(), files=[squares_file])) as registry:
        yield registry


@pytest.fixture(scope="session")
def new_run() -> Callable[[Path], Path]:
    """``new_run(path)`` makes a finished run there."""
    return make_run


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A finished run."""
    return make_run(tmp_path / "runs" / "sharper-1")


@pytest.fixture(scope="session")
def page_text(tmp_path_factory: pytest.TempPathFactory, squares_file: Path) -> str:
    """The report of a finished run, written once."""
    run = make_run(tmp_path_factory.mktemp("runs") / "sharper-1")
    with use(Registry.discover(allow=(), files=[squares_file])):
        return write_report(run).read_text("utf-8")


def make_run(run: Path, *, steps: int = 100) -> Path:
    """Two stages, pairs of which p0-p9 are gained and p10-p12 are lost, no export."""
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(CONFIG)
    (run / "command.txt").write_text("clipgraft run fake/sharper --set 'a=<b>'\n")
    write(run / "env.json", {"python": "3.11.9", "threads": 1, "versions": {"torch": "2.15.0", "numpy": None}})
    write(run / "plugins.json", [{"name": "squares", "distribution": "clipgraft-squares", "version": "0.1"}])
    write(run / "status.json", {"recipe": "fake/sharper", "status": "done", "seconds": 61.4, "steps": 100})
    pairs = {"mean": 0.1, "orientation": 0.0, "quantity": 0.1, "colour": 0.2}
    before = {"core/zero-shot": {"top1": 0.768, "top5": 0.99}, "core/pairs": pairs}
    after = {"core/zero-shot": {"top1": 0.744, "top5": 0.99}, "core/pairs": {**pairs, "mean": 1 / 3}}
    write(run / "evaluations.json", {"before": before, "after": after})
    patterns = ("orientation", "quantity", "colour")
    for when, right in (("before", range(10, 13)), ("after", range(10))):
        rows = [{"id": f"p{i}", "pattern": patterns[i % 3], "correct": i in right} for i in range(30)]
        folder = run / "evaluation" / when
        folder.mkdir(parents=True)
        told = {"mean": Share("correct")}
        spans = intervals(told, rows)
        records.save(folder, {"core/pairs": Evaluation({}, {}, tuple(rows), told, spans)})
    for name, scale in (("00-generator", 1.0), ("01-clip", 0.2)):
        stage = run / "stages" / name
        stage.mkdir(parents=True)
        rows = [
            {
                "step": s,
                "loss": scale * (1.2 + math.sin(s)) / math.sqrt(s),
                "terms": {"flow": scale / s, "anchor": 0.01 * s, "all": scale * (1.2 + math.sin(s)) / math.sqrt(s)},
                "lr": 1e-3 * (1 - s / (steps + 1)),
                "grad_norm": 1.0,
                "samples": s * 8,
                "seconds": s / 10,
            }
            for s in range(1, steps + 1)
        ]
        (stage / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 101, "lo')
    return run


def write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value))
