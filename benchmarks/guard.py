"""A guard against regressions: ratios of the benchmarks at quick settings, each with a bound; exits 1 if one breaks.

``ENTRIES`` says for every ratio which script measures it with which words, where it stands in the script's JSON, and
between what it may lie. A script that several entries ask for with the same words runs once, in a process of its own,
on one thread. Quick settings are noisy, so bounds leave room over what was measured: the guard finds what became worse
for good, the numbers of docs/benchmarks.md come from longer runs. A script that fails or lacks its ratio breaks its
bound.

    python benchmarks/guard.py [SCRIPT ...] [--out FILE.json] [--plot FILE.svg] [--timeout 900] [--json | --markdown]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from table import table


@dataclass(frozen=True, slots=True)
class Entry:
    """A ratio (or an exponent of growth) and its bound; ``path``: its keys in the JSON of ``script`` with ``words``."""

    script: str
    words: tuple[str, ...]
    path: tuple[str, ...]
    bound: float
    direction: Literal["at most", "at least"]
    says: str


@dataclass(frozen=True, slots=True)
class Finding:
    """What an entry's ratio was; None with the reason in ``told`` when there is none."""

    entry: Entry
    ratio: float | None
    told: str = ""

    @property
    def ok(self) -> bool:
        """Within the bound; a ratio that is no number isn't."""
        if self.ratio is None or not math.isfinite(self.ratio):
            return False
        return self.ratio <= self.entry.bound if self.entry.direction == "at most" else self.ratio >= self.entry.bound


def entries(script: str, words: str, *rows: tuple[str, float, str, str]) -> list[Entry]:
    """Entries of one run of ``script``: (path with slashes, bound, "<" or ">", what it says)."""
    kinds: dict[str, Literal["at most", "at least"]] = {"<": "at most", ">": "at least"}
    return [
        Entry(script, tuple(shlex.split(words)), tuple(p.split("/")), bound, kinds[k], says)
        for p, bound, k, says in rows
    ]


ENTRIES: tuple[Entry, ...] = (
    *entries(
        "cli_start",
        "--repeat 2",
        ("cases/clipgraft --help/x_torch", 0.3, "<", "CPU: clipgraft --help / import torch"),
    ),
    *entries(
        "trainer_overhead",
        "--blocks 3 --steps 8",
        ("ratio", 1.08, "<", "CPU: training step / bare torch loop"),
    ),
    *entries(
        "open_clip_loop",
        "--blocks 3 --steps 8",
        ("fp32/ratio", 1.08, "<", "CPU: training step / open_clip's loop, fp32"),
        ("bf16/ratio", 1.12, "<", "CPU: training step / open_clip's loop, bf16"),
    ),
    *entries(
        "two_pass",
        "--memory 90 --chunks 4 --blocks 3",
        ("ratio", 1.8, "<", "CPU per sample: two passes / plain step"),
        ("of_open_clip", 1.2, "<", "CPU per sample: two passes / open_clip's --accum-freq"),
        ("times_the_batch", 2.0, ">", "batch at equal memory: two passes of 4 chunks / plain step"),
    ),
    *entries(
        "memory",
        "--repeats 1",
        ("works/open/clipgraft, a folder/cpu_ratio", 0.25, "<", "CPU: open a folder / open_clip"),
        ("works/open/clipgraft, its export/cpu_ratio", 0.8, "<", "CPU: open and verify an export / open_clip"),
        ("works/open/clipgraft, its export/models", 0.02, "<", "memory: open an export / size of the model"),
        ("works/export/clipgraft/cpu_ratio", 1.0, "<", "CPU: export / open_clip's save_for_hf"),
        ("works/export/clipgraft/memory_ratio", 0.02, "<", "memory: export / open_clip's save_for_hf"),
        ("works/convert/clipgraft/cpu_ratio", 0.5, "<", "CPU: convert / transformers by hand"),
        ("works/convert/clipgraft/memory_ratio", 0.2, "<", "memory: convert / transformers by hand"),
        ("works/merge/clipgraft/cpu_ratio", 2.6, "<", "CPU: merge two models / load both"),
        ("works/merge/clipgraft/memory_ratio", 0.25, "<", "memory: merge two models / load both"),
    ),
    *entries(
        "zero_shot",
        "--names 20 --templates 4 --repeats 1",
        ("times_faster", 4.0, ">", "CPU: open_clip's zero-shot classifier / ours"),
    ),
    *entries(
        "zero_shot_evaluation",
        "--classes 10 --templates 4 --images 40 --repeats 1 --precision fp32",
        ("precisions/fp32/ratio/whole", 1.0, ">", "CPU: CLIP_benchmark's way to evaluate / ours"),
    ),
    *entries(
        "embed_throughput",
        "--images 60 --repeats 1",
        ("cases/ours fp32/cpu_ratio", 0.9, ">", "CPU: open_clip's loop that embeds / ours, fp32"),
    ),
    *entries(
        "retrieval_memory",
        "--size 6000",
        ("times_less_cpu_seconds", 2.5, ">", "CPU: recall by one-hot matrices / ours"),
        ("times_less_private_mb", 1.4, ">", "memory: recall by one-hot matrices / ours"),
    ),
    *entries(
        "growth",
        "--only 'ranks of retrieval;search' --repeats 1",
        ("cases/ranks of retrieval/fits/time/exponent", 2.2, "<", "growth: time of recall with its pairs, exponent"),
        ("cases/search/fits/time/exponent", 1.2, "<", "growth: time of search with its vectors, exponent"),
    ),
    *entries(
        "diffusion_step",
        "--blocks 2 --steps 1 --repeats 1",
        ("cases/ours/time_ratio", 0.97, "<", "CPU: DIVA's step / official order"),
        ("cases/ours, recomputed/memory_ratio", 0.6, "<", "memory: DIVA's step, recomputed / official order"),
    ),
    *entries(
        "anomaly_training",
        "--images 4 --epochs 2",
        ("cpu/times_faster", 5.0, ">", "CPU: AnomalyCLIP's epoch, uncached / cached"),
    ),
)


def ran(script: str, words: Sequence[str], *, folder: Path, timeout: float) -> tuple[Any, str]:
    """The JSON of one script; or None and why there is none."""
    command = [sys.executable, str(folder / f"{script}.py"), *words, "--json"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=timeout)
    except subprocess.TimeoutExpired:
        return None, f"took longer than {timeout:g} s"
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        return None, f"ended with {done.returncode}{': ' if last else ''}{''.join(last)[:200]}"
    try:
        return json.loads(done.stdout), ""
    except ValueError:
        return None, "printed no JSON"


def judge(entry: Entry, found: Any, told: str) -> Finding:
    """The entry's ratio in the JSON of its script."""
    if told:
        return Finding(entry, None, told)
    for key in entry.path:
        if not isinstance(found, dict) or key not in found:
            return Finding(entry, None, f"its JSON has no {' / '.join(entry.path)}")
        found = found[key]
    if isinstance(found, bool) or not isinstance(found, int | float):
        return Finding(entry, None, f"{' / '.join(entry.path)} is no number")
    return Finding(entry, float(found))


def guard(chosen: Sequence[Entry], *, folder: Path, timeout: float) -> list[Finding]:
    """Run what the entries need, telling progress, and judge them."""
    results: dict[tuple[str, tuple[str, ...]], tuple[Any, str]] = {}
    for entry in chosen:
        key = entry.script, entry.words
        if key not in results:
            began = time.monotonic()
            results[key] = ran(*key, folder=folder, timeout=timeout)
            told = results[key][1] or "done"
            print(f"{entry.script} {' '.join(entry.words)}: {told}, {time.monotonic() - began:.0f} s", file=sys.stderr)
    return [judge(entry, *results[entry.script, entry.words]) for entry in chosen]


def plot(findings: Sequence[Finding], file: Path) -> None:
    """Bars of the ratios from 1 on a logarithmic axis, a mark at each bound; colours for light and dark pages."""
    import matplotlib

    matplotlib.use("svg" if file.suffix == ".svg" else "agg")
    from matplotlib import pyplot

    ink, fine, broken = "#808890", "#4f8fba", "#cf6a3a"
    style = {"font.size": 9, "font.family": "DejaVu Sans", "text.color": ink, "axes.labelcolor": ink}
    style |= {"xtick.color": ink, "ytick.color": ink, "axes.edgecolor": ink, "svg.hashsalt": "guard"}
    shown = [f for f in findings if f.ratio is not None and f.ratio > 0 and math.isfinite(f.ratio)]
    with pyplot.rc_context(style):
        figure, axis = pyplot.subplots(figsize=(9.5, 1.1 + 0.34 * max(1, len(shown))))
        for row, found in enumerate(shown):
            assert found.ratio is not None
            axis.barh(row, found.ratio - 1, left=1, height=0.55, color=fine if found.ok else broken)
            axis.plot([found.entry.bound] * 2, [row - 0.4, row + 0.4], color=ink, linewidth=2)
        values = [v for f in shown for v in (f.ratio or 1, f.entry.bound)] or [1]
        axis.set_xscale("log")
        axis.set_xlim(min(0.5, *values) / 1.6, max(2, *values) * 1.6)
        for row, found in enumerate(shown):
            told = f"{found.ratio:.3g}  ({'≤' if found.entry.direction == 'at most' else '≥'} {found.entry.bound:g})"
            place = (1.01, row), ("axes fraction", "data")
            axis.annotate(told, (1, row), *place, va="center", annotation_clip=False)
        axis.axvline(1, color=ink, linewidth=0.8)
        axis.set_yticks(range(len(shown)), [f.entry.says for f in shown])
        axis.invert_yaxis()
        ticks = [10.0**k * m for k in range(-4, 4) for m in (1, 2, 5)]
        low, high = axis.get_xlim()
        axis.set_xticks([t for t in ticks if low <= t <= high], [f"{t:g}" for t in ticks if low <= t <= high])
        axis.minorticks_off()
        axis.set_xlabel("ratio; the mark is the bound, orange is beyond it")
        for side in ("top", "right", "left"):
            axis.spines[side].set_visible(False)
        axis.tick_params(axis="y", length=0)
        options: dict[str, Any] = {"metadata": {"Date": None}} if file.suffix == ".svg" else {"dpi": 130}
        figure.savefig(file, transparent=True, bbox_inches="tight", **options)
        pyplot.close(figure)


def main(argv: Sequence[str] | None = None, *, known: Sequence[Entry] = ENTRIES, folder: Path | None = None) -> int:
    """Measure, tell, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scripts", nargs="*", metavar="SCRIPT", help="only the entries of these scripts")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg")
    parser.add_argument("--timeout", type=float, default=900, help="seconds per script")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args(argv)
    names = list(dict.fromkeys(entry.script for entry in known))
    if odd := [name for name in options.scripts if name not in names]:
        parser.error(f"the guard has no entry for {odd[0]!r}; it has {', '.join(names)}")
    chosen = [entry for entry in known if not options.scripts or entry.script in options.scripts]
    findings = guard(chosen, folder=folder or Path(__file__).parent, timeout=options.timeout)
    rows = [{**asdict(f.entry), "ratio": f.ratio, "ok": f.ok, "told": f.told} for f in findings]
    result = {"ok": all(f.ok for f in findings), "entries": rows}
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n", "utf-8")
    if options.plot:
        plot(findings, options.plot)
    if options.json:
        print(json.dumps(result))
    else:
        cells = [
            (
                f"{f.entry.script}: {f.entry.says}",
                "-" if f.ratio is None else f"{f.ratio:.3g}",
                f"{f.entry.direction} {f.entry.bound:g}",
                "ok" if f.ok else "broken",
            )
            for f in findings
        ]
        print(table(("ratio", "found", "bound", "verdict"), cells, markdown=options.markdown))
    for found in findings:
        if found.told:
            print(f"{found.entry.script}: {found.told}", file=sys.stderr)
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
