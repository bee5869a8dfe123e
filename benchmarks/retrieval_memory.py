"""Peak memory and CPU seconds of recall at 1, 5 and 10, ours against CLIP-benchmark's way, in this run.

N images and N captions as random unit vectors. The peer holds all scores and all right pairs as matrices and, for 64
rows at a time, the k best as one-hot rows over all candidates, as CLIP-benchmark does; it is written here from that
description. Each case runs in a process of its own; memory is the peak of RssAnon above its value before.

    python benchmarks/retrieval_memory.py [--size 10000] [--dim 512] [--repeats 1] [--json | --markdown]
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import time
from typing import Any

from table import table
from usage import Peak

KS = (1, 5, 10)
CASES = {"one-hot": "all scores, the k best as one-hot rows", "ours": "ranks, a bounded number of scores at a time"}


def one_hot(images: Any, texts: Any) -> dict[str, float]:
    """Any right candidate among the k best, through one-hot rows."""
    import torch
    from torch.nn import functional as F

    scores = texts @ images.T
    right = torch.zeros_like(scores, dtype=torch.bool)
    right[torch.arange(len(texts)), torch.arange(len(texts))] = True
    found = {}
    for k in KS:
        for name, s, r in (("text_to_image", scores, right), ("image_to_text", scores.T, right.T)):
            hits = 0
            for first in range(0, len(s), 64):
                best = F.one_hot(s[first : first + 64].topk(k, dim=1).indices, num_classes=s.shape[1])
                hits += int(((best * r[first : first + 64, None]).sum((1, 2)) > 0).sum())
            found[f"{name}_r{k}"] = hits / len(s)
    return found


def ranks(images: Any, texts: Any) -> dict[str, float]:
    """The evaluator itself on given features."""
    import torch

    from clipgraft.data.base import Sample
    from clipgraft.evaluation.retrieval import Retrieval

    class Given:
        """Features as numbers."""

        def samples(self, source: Any) -> list[Sample]:
            return [Sample(str(k), torch.empty(0), (str(k),)) for k in range(len(images))]

        def images(self, source: Any) -> Any:
            return images

        def texts(self, captions: list[str]) -> Any:
            return texts

    features: Any = Given()
    return Retrieval(ks=KS)(features, features).metrics


def measure(case: str, size: int, dim: int) -> dict[str, Any]:
    """Recall once in this process."""
    import torch
    from torch.nn import functional as F

    import clipgraft.evaluation.retrieval  # noqa: F401 - imported before the clock starts

    torch.set_num_threads(1)
    rng = torch.Generator().manual_seed(0)
    images = F.normalize(torch.randn(size, dim, generator=rng), dim=-1)
    texts = F.normalize(torch.randn(size, dim, generator=rng) + 3.5 * images, dim=-1)
    texts[0] @ images[:64].T  # the matrix library's own buffers
    gc.collect()
    with Peak() as peak:
        start = time.thread_time()  # this thread's: the watcher's own reading doesn't count
        metrics = {"one-hot": one_hot, "ours": ranks}[case](images, texts)
        seconds = time.thread_time() - start
    return {"cpu_seconds": seconds, "private_mb": peak.value - peak.start, "metrics": metrics}


def main() -> None:
    """Run both ways ``--repeats`` times, interleaved, and keep the best CPU time and the smallest peak of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=10_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(options.case, options.size, options.dim)))
        return
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in CASES}
    for _ in range(options.repeats):
        for name in CASES:
            command = [sys.executable, __file__, "--case", name, "--size", str(options.size), "--dim", str(options.dim)]
            runs[name].append(json.loads(subprocess.run(command, capture_output=True, check=True).stdout))
    if runs["ours"][0]["metrics"] != runs["one-hot"][0]["metrics"]:
        sys.exit(f"the recalls differ: {runs['ours'][0]['metrics']} and {runs['one-hot'][0]['metrics']}")
    rows = {
        name: {key: round(min(run[key] for run in found), 2) for key in ("cpu_seconds", "private_mb")}
        for name, found in runs.items()
    }
    peer, own = rows["one-hot"], rows["ours"]
    ratios = {f"times_less_{key}": round(peer[key] / own[key], 2) for key in peer}
    if options.json:
        print(json.dumps({"size": options.size, "cases": rows, **ratios, "metrics": runs["ours"][0]["metrics"]}))
        return
    lines = [(f"{name}: {CASES[name]}", row["cpu_seconds"], row["private_mb"]) for name, row in rows.items()]
    print(table(("recall", "CPU s", "private MB"), lines, markdown=options.markdown))
    less = f"memory {ratios['times_less_private_mb']} x less, CPU {ratios['times_less_cpu_seconds']} x less"
    print(f"\n{options.size} images and as many captions: {less}")


if __name__ == "__main__":
    main()
