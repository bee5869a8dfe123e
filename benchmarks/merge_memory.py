"""Merging 2 to 16 models of ViT-B-32's size: peak memory and time of the stream, against loading them all.

Random weights are written once; every model is a folder of its own with a file of its own. Each case runs in a process
of its own, cases take turns: ``stream`` is ``clipgraft merging soup``'s engine, which also hashes every input and its
result; ``load all`` reads every state dict, averages in fp32 and saves with safetensors, and hashes nothing;
``fusion_bench`` is ``simple_average`` of that package on the same state dicts, when it is installed. Results must agree
to 1e-6, else the program ends. Memory is the largest anonymous resident memory (RssAnon, looked at every millisecond)
above what the imports took, and the peak resident memory (VmHWM), which counts mapped files too; medians count. Time is
CPU seconds, as ``load all`` spends in the same run.

    python benchmarks/merge_memory.py [--models 2,4,8,16] [--arch ViT-B-32] [--method soup|task-arithmetic|ties]
        [--repeat 3] [--folder DIR] [--json]

The default writes 9.7 GB for 16 models and removes them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from usage import Peak, resident

AIM = 0.05
"""How far the stream's peak may lie from the one at the fewest models."""
CASES = ("stream", "load all", "fusion_bench")


def write_models(folder: Path, *, arch: str, count: int) -> list[Path]:
    """``count`` open_clip folders of random weights, the first one the base of the others."""
    import open_clip
    import torch

    from clipgraft.checkpoint import write_export
    from clipgraft.encoders.base import Origin
    from clipgraft.encoders.openclip import build

    config, usual = open_clip.get_model_config(arch), open_clip.transform.PreprocessCfg()
    assert config is not None, f"open_clip knows no {arch}"
    torch.manual_seed(0)
    encoder = build(config, None, preprocess={"mean": usual.mean, "std": usual.std}, origin=Origin("random", arch))
    folders = []
    for index in range(count):
        folders.append(folder / f"model-{index}")
        with torch.no_grad():
            for parameter in encoder.parameters() if index else ():
                parameter += 0.01 * torch.randn_like(parameter)
        write_export(encoder, folders[-1])
    return folders


def one(case: str, method: str, out: Path, folders: list[Path]) -> dict[str, float]:
    """One merge in this process."""
    import open_clip  # noqa: F401  (what the stream imports on the way is not its work)
    import torch
    import transformers  # noqa: F401

    from clipgraft_merging.soup.uniform import UniformSoup
    from clipgraft_merging.task_arithmetic.arithmetic import TaskArithmetic
    from clipgraft_merging.ties.merger import Ties
    from clipgraft_merging.weights.engine import merge_to, open_inputs

    torch.set_num_threads(1)
    base, *models = folders
    weights = "open_clip_model.safetensors"
    merger: Any = {"soup": UniformSoup, "task-arithmetic": TaskArithmetic, "ties": Ties}[method]()
    with Peak() as peak:
        wall, cpu = time.perf_counter(), time.process_time()
        if case == "stream":
            merge_to(out, open_inputs(models, base=None if method == "soup" else base), merger)
        else:
            out.mkdir(parents=True, exist_ok=True)
            average = loaded if case == "load all" else fused
            average([m / weights for m in models], base / weights, out / weights, method)
        seconds, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {"seconds": seconds, "cpu": cpu, "anon": peak.value - peak.start, "hwm": resident("VmHWM")}


def loaded(files: list[Path], base: Path, out: Path, method: str) -> None:
    """Every model in memory at once, as scripts do."""
    import torch
    from safetensors.torch import load_file, save_file

    states = [load_file(file) for file in files]
    start = load_file(base) if method != "soup" else {}
    merged = {}
    if method == "ties":
        keys = sorted(start)
        flat = torch.stack([torch.cat([(s[k] - start[k]).flatten() for k in keys]) for s in states])
        for row in flat:
            row[row.abs() < row.abs().kthvalue(len(row) - -(-len(row) // 5) + 1).values] = 0
        sign = flat.sum(0).sign()
        agree = (flat.sign() == sign) & (flat != 0)
        parts = ((flat * agree).sum(0) / agree.sum(0).clamp_min(1)).split([start[k].numel() for k in keys])
        merged = {k: start[k] + part.view_as(start[k]) for k, part in zip(keys, parts, strict=True)}
    elif method == "soup":
        merged = {key: sum(s[key] for s in states) / len(states) for key in states[0]}
    else:
        merged = {key: start[key] + 0.3 * sum(s[key] - start[key] for s in states) for key in start}
    save_file(merged, out, {"format": "pt"})


def fused(files: list[Path], base: Path, out: Path, method: str) -> None:
    """fusion_bench's own functions on state dicts."""
    from fusion_bench.method.simple_average import simple_average
    from fusion_bench.method.task_arithmetic.task_arithmetic import task_arithmetic_merge
    from safetensors.torch import load_file, save_file

    states = [load_file(file) for file in files]
    merge = simple_average(states) if method == "soup" else task_arithmetic_merge(load_file(base), states, 0.3)
    save_file(merge, out, {"format": "pt"})


def agree(first: Path, second: Path) -> float:
    """The largest difference between two files of weights."""
    from safetensors import safe_open

    with safe_open(first, framework="pt") as a, safe_open(second, framework="pt") as b:
        return max(float((a.get_tensor(k) - b.get_tensor(k)).abs().max()) for k in a.keys())  # noqa: SIM118


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="2,4,8,16")
    parser.add_argument("--arch", default="ViT-B-32")
    parser.add_argument("--method", default="soup", choices=["soup", "task-arithmetic", "ties"])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where models are written; a temporary folder by default")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--one", nargs="*", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        case, out, *folders = arguments.one
        print(json.dumps(one(case, arguments.method, Path(out), [Path(f) for f in folders])))
        return
    counts = sorted({int(n) for n in arguments.models.split(",")})
    cases = [c for c in CASES if c != "fusion_bench" or (find_spec(c) and arguments.method != "ties")]
    rows = []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        print(f"writing {counts[-1] + 1} models", file=sys.stderr)
        folders = write_models(Path(name), arch=arguments.arch, count=counts[-1] + 1)
        for count in counts:
            runs: dict[str, list[dict[str, float]]] = {case: [] for case in cases}
            for _ in range(arguments.repeat):
                for case in cases:
                    runs[case].append(call(case, arguments.method, Path(name), folders[: count + 1]))
            outs = [Path(name) / f"out-{case.replace(' ', '-')}" / "open_clip_model.safetensors" for case in cases]
            for case, out in zip(cases[1:], outs[1:], strict=True):
                if (worst := agree(outs[0], out)) > 1e-6:
                    sys.exit(f"the stream and {case} differ by {worst} at {count} models")
            for case in cases:
                middle = {k: statistics.median(r[k] for r in runs[case]) for k in runs[case][0]}
                rows.append({"models": count, "case": case, **{k: round(v, 2) for k, v in middle.items()}})
                rows[-1]["of load all"] = round(
                    middle["cpu"] / statistics.median(r["cpu"] for r in runs["load all"]), 2
                )
                print(rows[-1], file=sys.stderr)
    stream = [row for row in rows if row["case"] == "stream"]
    spread = max(abs(row["anon"] / stream[0]["anon"] - 1) for row in stream)
    if arguments.json:
        print(json.dumps({"method": arguments.method, "rows": rows, "spread": round(spread, 4), "aim": AIM}, indent=2))
        return
    print(f"{'models':>6}  {'case':<12}  {'anon MB':>8}  {'VmHWM MB':>8}  {'CPU s':>6}  {'of load all':>11}")
    for row in rows:
        print(
            f"{row['models']:>6}  {row['case']:<12}  {row['anon']:>8.0f}  {row['hwm']:>8.0f}  {row['cpu']:>6.2f}  "
            f"{row['of load all']:>11.2f}"
        )
    print(f"the stream's anonymous peak differs by {spread:.1%} at most (aim: {AIM:.0%})")


def call(case: str, method: str, folder: Path, folders: list[Path]) -> dict[str, float]:
    """``one`` in a process of its own."""
    out = folder / f"out-{case.replace(' ', '-')}"
    command = [sys.executable, __file__, "--method", method, "--one", case, str(out), *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        sys.exit(f"{case} with {len(folders) - 1} models ended with {done.returncode}: {done.stderr[-500:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    main()
