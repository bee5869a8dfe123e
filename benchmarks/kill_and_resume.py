"""Kill a run with SIGKILL (or SIGTERM, SIGINT) at random moments, resume it, and compare with an undisturbed run.

Every trial starts the command afresh, kills its process group at a random moment, resumes until it is done, and then
compares the exported weights, the final metrics.jsonl of every stage (without wall-clock times) and the state of the
run. Prints one line per trial; exits 1 if any differs.

    python benchmarks/kill_and_resume.py --trials 20 -- genhancer:tiny --set generator.steps=60 --set clip.steps=60
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "int": signal.SIGINT}


def start(arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
    """``clipgraft run ...`` in a process group of its own."""
    with log.open("ab") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "clipgraft", "run", *arguments], stdout=file, stderr=file, start_new_session=True
        )


def fingerprint(run: Path) -> dict[str, object]:
    """What must not depend on how often the run was killed."""
    manifest = json.loads((run / "export" / "clipgraft.json").read_text("utf-8"))
    weights = {name: entry["sha256"] if isinstance(entry, dict) else entry for name, entry in manifest["files"].items()}
    weights = {k: v for k, v in weights.items() if k.endswith(".safetensors")}
    metrics = {}
    for file in sorted(run.glob("stages/*/metrics.jsonl")):
        rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
        metrics[file.parent.name] = [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
    return {"weights": weights, "metrics": metrics}


def main() -> int:
    """Run the trials."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--signals", default="kill", help="comma-separated: kill, term, int")
    parser.add_argument("--most-kills", type=int, default=2, help="kills per trial")
    parser.add_argument("--out", type=Path, default=Path("runs/kill"))
    parser.add_argument("arguments", nargs="*", default=["genhancer:tiny"], help="what follows clipgraft run")
    options = parser.parse_args()
    shutil.rmtree(options.out, ignore_errors=True)
    options.out.mkdir(parents=True)
    whole = options.out / "undisturbed"
    began = time.monotonic()
    if start([*options.arguments, "--out", str(whole)], options.out / "undisturbed.log").wait():
        print(f"the undisturbed run failed; see {options.out / 'undisturbed.log'}")
        return 1
    seconds, wanted, rng, bad = time.monotonic() - began, fingerprint(whole), random.Random(options.seed), 0
    print(f"undisturbed run: {seconds:.1f} s")
    for trial in range(options.trials):
        run, log = options.out / f"{trial:02d}", options.out / f"{trial:02d}.log"
        kills: list[str] = []
        while True:
            resumed = (run / "config.yaml").exists()
            process = start(["--resume", str(run)] if resumed else [*options.arguments, "--out", str(run)], log)
            if len(kills) == options.most_kills:
                code: int | None = process.wait()
            else:
                name = rng.choice(options.signals.split(","))
                moment = rng.uniform(0.2, seconds)
                try:
                    code = process.wait(moment)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, SIGNALS[name])
                    process.wait()
                    kills.append(f"{name} at {moment:.1f} s")
                    continue
            if code == 130:  # the run said goodbye properly
                continue
            break
        same = code == 0 and fingerprint(run) == wanted
        bad += not same
        print(
            f"trial {trial:02d}: {'; '.join(kills) or 'was done before the kill'}: {'identical' if same else 'DIFFERS'}"
        )
        if same:
            shutil.rmtree(run)
    print(f"{options.trials - bad} of {options.trials} resumed runs are bit-identical to the undisturbed one")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
