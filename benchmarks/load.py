"""CPU seconds and private memory of opening a ViT-B-32, ours against open_clip's create_model, in this run.

Random weights are written once; every case runs in a process of its own, and libraries are imported before the clock
starts. Private memory is the peak of RssAnon above its value before loading; weights mapped from a file are not
private. "export" also verifies the sha256 of every file. Every parameter is read once after loading.

    python benchmarks/load.py [--repeats 3] [--json]
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

CASES = {
    "open_clip": "create_model(ARCH, pretrained=file)",
    "open_clip-dir": "create_model(local-dir:)",
    "ours": "load(local-dir:)",
    "ours-export": "load(export), hashes verified",
}


def private() -> int:
    """Anonymous resident memory of this process [bytes]."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def measure(case: str, folder: Path) -> dict[str, float]:
    """Load once in this process."""
    import open_clip
    import torch

    from clipgraft.encoders import load, openclip  # noqa: F401 - imported before the clock starts
    from clipgraft.registry import Registry

    torch.set_num_threads(1)
    registry, weights = Registry.discover(allow=()), folder / "plain" / "open_clip_model.safetensors"
    opened = {
        "open_clip": lambda: open_clip.create_model("ViT-B-32", pretrained=str(weights)),
        "open_clip-dir": lambda: open_clip.create_model(f"local-dir:{folder / 'plain'}"),
        "ours": lambda: load(f"local-dir:{folder / 'plain'}"),
        "ours-export": lambda: load(str(folder / "export"), registry=registry),
    }[case]
    gc.collect()
    gc.freeze()  # a full collection over the imported libraries costs as much as loading and falls on either side
    base, peak, done = private(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, private())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.thread_time()  # this thread's: the watcher's own reading doesn't count
    model = opened()
    seconds = time.thread_time() - start
    total = sum(float(p.sum()) for p in model.parameters())
    done.set()
    watcher.join()
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    grown = max(peak, private()) - base
    return {"cpu_seconds": seconds, "private_mb": max(grown, 0) / 1e6, "model_mb": size / 1e6, "sum": total}


def write(folder: Path) -> None:
    """A ViT-B-32 with random weights, as an open_clip folder and as our export."""
    import torch

    from clipgraft.checkpoint import write_export
    from clipgraft.encoders import load

    torch.manual_seed(0)
    write_export(load("open_clip:ViT-B-32"), folder / "export")
    (folder / "plain").mkdir()
    for name in ("open_clip_config.json", "open_clip_model.safetensors"):
        (folder / "plain" / name).write_bytes((folder / "export" / name).read_bytes())


def main() -> None:
    """Run every case ``--repeats`` times, interleaved, and keep the best CPU time of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--case", nargs=2, metavar=("NAME", "DIR"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(options.case[0], Path(options.case[1]))))
        return
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in CASES}
        for _ in range(options.repeats):
            for name in CASES:
                command = [sys.executable, __file__, "--case", name, folder]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                runs[name].append(json.loads(done.stdout.splitlines()[-1]))
    best = {name: min(found, key=lambda r: r["cpu_seconds"]) for name, found in runs.items()}
    if len({round(r["sum"], 1) for r in best.values()}) != 1:
        sys.exit("the cases loaded different weights")
    peer = best["open_clip"]
    rows = {
        name: {
            "cpu_seconds": round(r["cpu_seconds"], 3),
            "private_mb": round(r["private_mb"], 1),
            "cpu_ratio": round(r["cpu_seconds"] / peer["cpu_seconds"], 3),
            "private_models": round(r["private_mb"] / r["model_mb"], 3),
        }
        for name, r in best.items()
    }
    if options.json:
        print(json.dumps({"model_mb": round(peer["model_mb"], 1), "cases": rows}))
        return
    print(f"{'case':16}{'CPU s':>8}{'ratio':>8}{'private MB':>12}{'models':>8}")
    for name, row in rows.items():
        print(
            f"{name:16}{row['cpu_seconds']:8.3f}{row['cpu_ratio']:8.3f}{row['private_mb']:12.1f}"
            f"{row['private_models']:8.3f}  {CASES[name]}"
        )


if __name__ == "__main__":
    main()
