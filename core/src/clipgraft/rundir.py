"""A run directory, read without changing it and without importing what it was made with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from clipgraft import retention
from clipgraft.config.load import parse_yaml
from clipgraft.errors import InputError
from clipgraft.evaluation import records
from clipgraft.evaluation.base import Evaluation
from clipgraft.evaluation.comparison import Row
from clipgraft.evaluation.records import file_stem, read_rows

Record = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class StageLog:
    """One training stage: the lines of its metrics.jsonl, in order, and of the watch.jsonl that some recipes write."""

    name: str
    rows: tuple[Record, ...]
    watched: tuple[Record, ...] = ()


@dataclass(frozen=True, slots=True)
class RunRecord:
    """What a run wrote. ``before`` and ``after``: {evaluator: {metric: value}}."""

    path: Path
    config: Record
    config_text: str
    command: str
    environment: Record
    plugins: Any
    status: Record
    before: Mapping[str, Mapping[str, float]]
    after: Mapping[str, Mapping[str, float]]
    stages: tuple[StageLog, ...]
    export: Record | None
    """clipgraft.json of the export, None when the run wrote none."""
    kept: tuple[Row, ...] = ()
    """What the training should not cost, compared before and after; with ``retention``, how it was measured."""
    retention: Record = field(default_factory=dict)

    @property
    def recipe(self) -> str:
        """The recipe's full name, such as ``video/x-clip``; empty when the run doesn't say."""
        return str(self.status.get("recipe") or "")

    def measured(self, evaluator: str) -> list[str]:
        """The names under which an evaluator, such as ``video/classification``, measured after (and before) the run."""
        return [n for n in {**self.after, **self.before} if n.partition("@")[0].partition("[")[0] == evaluator]

    @property
    def base(self) -> str:
        """The model reference that the run started from."""
        return str(self.config.get("model", {}).get("from", ""))

    @property
    def data(self) -> str:
        """The data reference that the run trained on."""
        return str(self.config.get("data", {}).get("from", ""))

    def samples(self, when: str, evaluator: str) -> tuple[Record, ...]:
        """Per-sample records of one evaluator "before" or "after"; empty when it kept none."""
        path = self.path / "evaluation" / when / f"{file_stem(evaluator)}.parquet"
        return tuple(read_rows(path)) if path.is_file() else ()

    def told(self, when: str) -> dict[str, Evaluation]:
        """The metrics alone, "before" or "after"."""
        return {name: Evaluation(dict(m)) for name, m in (self.before if when == "before" else self.after).items()}

    def results(self, when: str) -> dict[str, Evaluation]:
        """As ``told`` with samples, statistics and intervals where they were kept; or "retention-before" and so on."""
        folder = self.path / "evaluation" / when
        saved = records.read(folder) if (folder / records.SUMMARY).is_file() else {}
        if when not in ("before", "after"):
            return saved
        return {name: replace(saved.get(name, e), metrics=e.metrics) for name, e in self.told(when).items()}

    def kept_data(self, evaluator: str) -> str | None:
        """The data reference on which an evaluator measured what should not be forgotten."""
        name, _, data = evaluator.partition("@")
        nodes = [
            node for node in self.retention.get("evaluators", ()) if node["use"].split("/")[-1] == name.split("/")[-1]
        ]
        return data or next((node["data"] for node in nodes if node.get("data")), None)

    def node(self, evaluator: str) -> Record:
        """The entry of ``evaluate.on`` behind "NAME", "NAME@SRC" or "NAME[SETTINGS]@SRC"; empty without one."""
        name, _, data = evaluator.partition("@")
        bare, _, told = name.partition("[")
        default = self.config.get("evaluate", {}).get("data")
        for node in self.config.get("evaluate", {}).get("on", ()):
            settings = ",".join(f"{k}={v}" for k, v in node.items() if k not in ("use", "data"))
            same = node["use"].split("/")[-1] == bare.split("/")[-1] and told.removesuffix("]") in ("", settings)
            if same and data in ("", node.get("data") or default):
                return dict(node)
        return {}

    def data_of(self, evaluator: str) -> str | None:
        """The data reference that an evaluator measured on."""
        told = evaluator.partition("@")[2] or self.node(evaluator).get("data")
        data = told or self.config.get("evaluate", {}).get("data")
        return None if data is None else str(data)


def read_run(path: Path) -> RunRecord:
    """Read the run directory ``path``; pieces that a run may lack are empty."""
    if not (path / "config.yaml").is_file():
        raise InputError(f"{path} is no run directory (it has no config.yaml); give the folder that a run printed")
    text = (path / "config.yaml").read_text("utf-8")
    evaluations = _json(path / "evaluations.json") or {}
    logs = sorted(path.glob("stages/*/metrics.jsonl")) + sorted(path.glob("steps/**/stages/*/metrics.jsonl"))
    command = path / "command.txt"
    return RunRecord(
        path=path,
        config=parse_yaml(text, origin=str(path / "config.yaml")) or {},
        config_text=text,
        command=command.read_text("utf-8").strip() if command.is_file() else "",
        environment=_json(path / "env.json") or {},
        plugins=_json(path / "plugins.json") or [],
        status=_json(path / "status.json") or {},
        before=evaluations.get("before", {}),
        after=evaluations.get("after", {}),
        stages=tuple(
            StageLog(_stage(log.parent.relative_to(path)), read_lines(log), read_lines(log.with_name("watch.jsonl")))
            for log in logs
        ),
        export=_json(path / "export" / "clipgraft.json"),
        kept=tuple(retention.read(path)),
        retention=_json(path / retention.STATE) or {},
    )


def _stage(folder: Path) -> str:
    """stages/00-train -> 00-train; of a pipeline steps/01-two/stages/00-train -> 01-two/00-train."""
    return "/".join(part for part in folder.parts if part not in ("stages", "steps"))


def read_lines(path: Path) -> tuple[Record, ...]:
    """The JSON lines of a file; none when it is absent. A last line cut short by a kill is left out."""
    lines = path.read_text("utf-8").splitlines() if path.is_file() else []
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise InputError(f"{path}, line {number} is not JSON; the file is damaged") from error
    return tuple(rows)


def _json(path: Path) -> Any:
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not JSON; the file is damaged") from error
