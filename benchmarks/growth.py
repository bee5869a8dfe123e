"""How costs grow with the size of the work: exponents of time and memory, fitted over five sizes or more.

Each case runs its own function of clipgraft at several sizes on tiny random models, in turns; the best CPU time of a
size counts. Memory is the kernel's high-water mark of resident memory above what the process held before (VmHWM, reset
before each call; Linux). ``cost = a * size ** b`` is fitted by least squares in the logarithms; the standard error of b
is the usual one of a regression slope. Fixed costs make b smaller at small sizes, so b is compared with an upper bound
only: a guard finds what has begun to grow faster than it must.

    OMP_NUM_THREADS=1 python benchmarks/growth.py [--repeats 3] [--only NAME,NAME] [--plot FILE.svg]
        [--json | --markdown]
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from table import table
from usage import resident

FLOOR_MB = 1.0
"""Memory below this is one page cache or another: it counts as this much, so that a flat cost has the exponent 0."""


@dataclass(frozen=True, slots=True)
class Fit:
    """``cost = scale * size ** exponent``, and the standard error of the exponent."""

    exponent: float
    error: float
    scale: float

    def at(self, size: float) -> float:
        """The cost that the fit gives."""
        return self.scale * size**self.exponent


def fit(sizes: Sequence[float], costs: Sequence[float]) -> Fit:
    """Least squares in the logarithms over three points or more of different size."""
    if len(sizes) != len(costs) or len(set(sizes)) < 3:
        raise ValueError(f"{len(sizes)} sizes and {len(costs)} costs; an exponent needs three different sizes or more")
    if min(*sizes, *costs) <= 0:
        raise ValueError("a size or a cost is not positive and has no logarithm")
    x, y = [math.log(s) for s in sizes], [math.log(c) for c in costs]
    mid_x, mid_y = sum(x) / len(x), sum(y) / len(y)
    spread = sum((a - mid_x) ** 2 for a in x)
    slope = sum((a - mid_x) * (b - mid_y) for a, b in zip(x, y, strict=True)) / spread
    left = sum((b - mid_y - slope * (a - mid_x)) ** 2 for a, b in zip(x, y, strict=True))
    return Fit(slope, math.sqrt(left / (len(x) - 2) / spread), math.exp(mid_y - slope * mid_x))


@dataclass(frozen=True, slots=True)
class Case:
    """``prepare(size, folder)`` gives what is measured. ``bounds``: {"time" or "memory": (expected, bound, reason)}."""

    name: str
    unit: str
    sizes: tuple[int, ...]
    prepare: Callable[[int, Path], Callable[[], Any]]
    bounds: dict[str, tuple[float, float, str]] = field(default_factory=dict)


class Noise:
    """``count`` noise images of 32 px, each with a caption."""

    classes, templates, attributes = (), (), {}

    def __init__(self, count: int) -> None:
        import torch

        self.name = self.fingerprint = f"noise-{count}"
        self.count, self.pixels = count, torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        from clipgraft.data.base import Sample

        return Sample(str(index), self.pixels[index % 64], captions=(f"picture {index}",))


def units(count: int, width: int, seed: int = 0) -> Any:
    """(count, width) random rows of length one."""
    import torch

    rows = torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(rows, dim=-1)


def embedding(size: int, folder: Path) -> Callable[[], Any]:
    from clipgraft.testing.tiny import tiny_clip
    from clipgraft_embedding.embed import embed

    encoder, source = tiny_clip().eval(), Noise(size)
    out = folder / f"embedded-{size}.safetensors"
    return lambda: embed(encoder, source, out=out, workers=0, restart=True)  # type: ignore[arg-type]


def classifier(size: int, folder: Path) -> Callable[[], Any]:
    from clipgraft.evaluation.features import EncoderFeatures
    from clipgraft.testing.tiny import tiny_clip

    encoder, names = tiny_clip().eval(), [f"thing {k}" for k in range(size)]
    templates = ("a photo of a {}", "a picture of the {}", "a {}", "an image with one {}")
    return lambda: EncoderFeatures(encoder).classifier(names, templates)


def retrieval(size: int, folder: Path) -> Callable[[], Any]:
    import torch

    from clipgraft.data.base import Sample
    from clipgraft.evaluation.retrieval import Retrieval

    class Features:
        """What the evaluator asks of an encoder, computed before."""

        def samples(self, source: Any) -> Any:
            return samples

        def images(self, source: Any) -> Any:
            return images

        def texts(self, texts: Any) -> Any:
            return texts_

    images, texts_ = units(size, 64), units(size, 64, 1)
    samples = [Sample(str(k), torch.empty(0), captions=(f"caption {k}",)) for k in range(size)]
    evaluator, source = Retrieval(ks=None), Noise(size)
    return lambda: evaluator(Features(), source)  # type: ignore[arg-type]


def merging(merger: str) -> Callable[[int, Path], Callable[[], Any]]:
    """Preparation of a merge of ``size`` models beside their base."""

    def prepare(size: int, folder: Path) -> Callable[[], Any]:
        import torch

        from clipgraft.checkpoint import write_export
        from clipgraft.testing.tiny import tiny_clip
        from clipgraft_merging.soup.uniform import UniformSoup
        from clipgraft_merging.ties.merger import Ties
        from clipgraft_merging.weights.engine import merge_to, open_inputs

        for k in range(size + 1):
            if not (path := folder / f"model-{k}").exists():
                encoder = tiny_clip(width=128, depth=4)
                with torch.no_grad():
                    for weight in encoder.parameters():
                        weight += 0.01 * k * torch.randn_like(weight)
                write_export(encoder, path)
        base, *models = [folder / f"model-{k}" for k in range(size + 1)]
        method: Any = UniformSoup() if merger == "soup" else Ties()
        start = None if merger == "soup" else base
        return lambda: merge_to(folder / f"{merger}-{size}", open_inputs(models, base=start), method)

    return prepare


def video(graft: str) -> Callable[[int, Path], Callable[[], Any]]:
    """Preparation of encoding one clip of ``size`` frames."""

    def prepare(size: int, folder: Path) -> Callable[[], Any]:
        import torch

        from clipgraft.testing.tiny import tiny_clip
        from clipgraft_video.model import VideoModel
        from clipgraft_video.xclip.graft import XClipGraft

        torch.manual_seed(0)
        encoder = tiny_clip(width=64, depth=3)
        if graft == "x-clip":
            encoder = XClipGraft(frames=size).apply(encoder)
        model, clip = VideoModel(encoder).eval(), torch.rand(1, size, 3, 32, 32)

        def run() -> Any:
            with torch.no_grad():
                return model(clip)

        return run

    return prepare


def step(size: int, folder: Path) -> Callable[[], Any]:
    import torch

    from clipgraft.config.schema import TrainConfig
    from clipgraft.data.loader import TrainLoader
    from clipgraft.finetune import FinetuneStage
    from clipgraft.losses.contrastive import ClipLoss
    from clipgraft.testing.tiny import tiny_clip

    encoder, source = tiny_clip(), Noise(size)
    config = TrainConfig(steps=1, batch_size=size, lr=1e-6)
    stage = FinetuneStage("train", train=config, source=source, encoder=encoder, losses=[ClipLoss()], weights=(1.0,))  # type: ignore[arg-type]
    loader = TrainLoader(
        source,  # type: ignore[arg-type]
        preprocess=encoder.preprocess,
        tokenizer=encoder.tokenizer,
        batch_size=size,
        seed=0,
    )
    batch, weights = next(iter(loader.iterate(0))), [p for p in stage.train().parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-6, fused=True)

    def run() -> None:
        stage(batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run


def search(size: int, folder: Path) -> Callable[[], Any]:
    from types import SimpleNamespace

    from clipgraft_embedding.search import exact

    class Stored:
        """Rows as a file of embeddings gives them."""

        about, path, rows = SimpleNamespace(dim=64, rows=size), Path("rows"), units(size, 64)

        def __len__(self) -> int:
            return size

        def chunks(self, rows: int = 65536) -> Iterator[tuple[int, Any]]:
            yield from ((start, self.rows[start : start + rows]) for start in range(0, size, rows))

    found, queries = Stored(), units(16, 64, 1)
    return lambda: exact(found, queries, 10)  # type: ignore[arg-type]


def duplicates(size: int, folder: Path) -> Callable[[], Any]:
    import numpy as np

    from clipgraft.log import RunLog
    from clipgraft_data.duplicates import near_pairs

    hashes = np.random.default_rng(0).integers(0, 2**63, size, dtype=np.uint64)
    return lambda: list(near_pairs(hashes, distance=4, log=RunLog(is_main=False)))


LINEAR = "each is computed once; what doesn't depend on the number makes it less"
FLAT = "a bounded part is held at a time"
CASES = (
    Case("embed images", "images", (256, 512, 1024, 2048, 4096), embedding, {
        "time": (1.0, 1.1, LINEAR),
        "memory": (0.0, 0.6, "batches are written as they come; ids are kept"),
    }),
    Case("zero-shot classifier", "classes", (64, 128, 256, 512, 1024), classifier, {"time": (1.0, 1.1, LINEAR)}),
    Case("ranks of retrieval", "pairs", (2000, 3000, 4000, 6000, 8000), retrieval, {
        "time": (2.0, 2.1, "every image is compared with every caption"),
        "memory": (0.0, 0.5, "a bounded block of scores is held at a time, and a record per pair"),
    }),
    Case("soup", "models", (2, 3, 5, 8, 12), merging("soup"), {
        "time": (1.0, 1.1, "each model is hashed and read once"), "memory": (0.0, 0.3, FLAT),
    }),
    Case("TIES", "models", (2, 3, 5, 8, 12), merging("ties"), {
        "time": (1.0, 1.1, "each model is hashed once and read three times"),
        "memory": (1.0, 1.6, "a histogram per model, of any size of model, steeper where it leaves the floor"),
    }),
    Case("video, mean of frames", "frames", (16, 32, 64, 128, 256), video("mean"), {"time": (1.0, 1.1, LINEAR)}),
    Case("video, X-CLIP", "frames", (16, 32, 64, 128, 256), video("x-clip"), {
        "time": (1.0, 1.25, "attention over frames has a square in it, small beside their towers"),
    }),
    Case("training step", "pairs in the batch", (64, 128, 256, 512, 1024), step, {
        "time": (1.0, 1.15, "the contrastive loss has a square in it, small beside the towers"),
        "memory": (1.0, 1.15, "activations of every pair are kept for the gradient"),
    }),
    Case("search", "vectors", (65536, 131072, 196608, 262144, 393216), search, {
        "time": (1.0, 1.1, "each vector is compared with each query"),
        "memory": (0.0, 0.5, "scores of a bounded chunk of vectors are held at a time"),
    }),
    Case("near duplicates", "images", (2000, 4000, 8000, 16000, 32000), duplicates, {
        "time": (1.0, 1.5, "images that share a part of their hash are compared: rare among few, a square among many"),
    }),
)  # fmt: skip


def memory_of(run: Callable[[], Any]) -> float:
    """Peak MB above what was held before, at least ``FLOOR_MB``."""
    run()
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # freed blocks that are still there would be taken again unseen
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again at VmRSS
    before = resident("VmRSS")
    run()
    return max(resident("VmHWM") - before, FLOOR_MB)


def allocator(*, steady: bool) -> bool:
    """``steady``: freed blocks go back to the kernel at once, so that peaks are what a call held; else they are kept.

    False where there is no such account of memory.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
        for what in (-3, -1):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
            libc.mallopt(what, 1 << 16 if steady else 1 << 25)
        libc.malloc_trim(0)  # what earlier calls left would be taken again unseen
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def measure(case: Case, *, repeats: int, folder: Path) -> dict[str, Any]:
    """Costs by size, and fits with their bounds."""
    allocator(steady=False)
    runs = {size: case.prepare(size, folder) for size in case.sizes}
    for run in list(runs.values())[:2]:
        run()  # imports, lazy initialisation
    times = dict.fromkeys(case.sizes, math.inf)
    for _ in range(repeats):
        for size, run in runs.items():
            times[size] = min(times[size], best_time(run))
    costs = {"time": [times[size] for size in case.sizes]}
    if "memory" in case.bounds and allocator(steady=True):
        costs["memory"] = [memory_of(run) for run in runs.values()]
    found: dict[str, Any] = {"unit": case.unit, "sizes": list(case.sizes), "costs": costs, "fits": {}}
    for cost, values in costs.items():
        fitted, (expected, bound, reason) = fit(case.sizes, values), case.bounds[cost]
        found["fits"][cost] = asdict(fitted) | {"expected": expected, "bound": bound, "reason": reason}
        found["fits"][cost]["within"] = fitted.exponent <= bound
    return found


def best_time(run: Callable[[], Any]) -> float:
    """CPU seconds of one call, over as many calls as take 20 ms."""
    count, start = 0, time.process_time()
    while (spent := time.process_time() - start) < 0.02:
        run()
        count += 1
    return spent / count


def plot(found: dict[str, Any], file: Path) -> None:
    """Log-log panels: measured points, the fitted line, the exponent in the title."""
    import matplotlib

    matplotlib.use("svg" if file.suffix == ".svg" else "agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    style = {"font.size": 8.5, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "growth",
             "font.family": "DejaVu Sans", "axes.edgecolor": "#888888",
             "text.color": "#222222", "xtick.labelsize": 7}  # fmt: skip
    panels = [(name, cost) for name, row in found.items() for cost in row["costs"]]
    columns = min(4, len(panels))
    lines = -(-len(panels) // columns)
    with pyplot.rc_context(style):
        figure, axes = pyplot.subplots(lines, columns, figsize=(2.75 * columns, 2.35 * lines), squeeze=False)
        for axis in axes.flat[len(panels) :]:
            axis.set_axis_off()
        for axis, (name, cost) in zip(axes.flat, panels, strict=False):
            row, facts = found[name], found[name]["fits"][cost]
            sizes, values = row["sizes"], [v * (1e3 if cost == "time" else 1) for v in row["costs"][cost]]
            line = [facts["scale"] * s ** facts["exponent"] * (1e3 if cost == "time" else 1) for s in sizes]
            colour = "#33658a" if cost == "time" else "#86562f"
            axis.loglog(sizes, line, color=colour, linewidth=1.2, alpha=0.6)
            axis.loglog(sizes, values, "o", color=colour, markersize=4)
            low, high = min(values + line), max(values + line)
            if high < 10 * low:  # a decade at least, so that flat costs look flat
                mid = math.sqrt(low * high)
                low, high = mid / 10**0.5, mid * 10**0.5
            axis.set_ylim(low / 1.4, high * 1.4)
            axis.set_xticks(sizes, [f"{s / 1000:.3g}k" if s >= 1000 else str(s) for s in sizes])
            axis.xaxis.set_minor_formatter(NullFormatter())
            axis.xaxis.set_minor_locator(LogLocator(subs=()))
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.yaxis.set_minor_formatter(NullFormatter())
            axis.set_title(f"{name}\n{cost}: exponent {facts['exponent']:.2f} ± {facts['error']:.2f}", fontsize=8.5)
            axis.set_xlabel(row["unit"])
            axis.set_ylabel("CPU ms" if cost == "time" else "peak MB")
            axis.grid(True, which="major", color="#e6e6e6", linewidth=0.6)
            axis.set_axisbelow(True)
        figure.tight_layout()
        figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None, dpi=130)


HEADER = ("what", "grows with", "sizes", "cost", "least", "most", "exponent", "expected", "bound", "")


def cells_of(found: dict[str, Any]) -> list[list[str]]:
    """Rows under ``HEADER``."""
    cells = []
    for name, row in found.items():
        for cost, values in row["costs"].items():
            facts = row["fits"][cost]
            scaled = [v * 1e3 if cost == "time" else v for v in (min(values), max(values))]
            ends = [f"{v:,.0f}" if v >= 100 else f"{v:.3g}" for v in scaled]
            ends = [f"{end} {'ms' if cost == 'time' else 'MB'}" for end in ends]
            cells.append([
                name, row["unit"], f"{row['sizes'][0]:,} to {row['sizes'][-1]:,}", cost, *ends,
                f"{facts['exponent']:.2f} ± {facts['error']:.2f}", f"{facts['expected']:g}", f"{facts['bound']:g}",
                "" if facts["within"] else "above",
            ])  # fmt: skip
    return cells


def main() -> None:
    """Print the table, markdown or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", help="cases, separated by semicolons")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    names = [case.name for case in CASES]
    asked = [name.strip() for name in options.only.split(";")] if options.only else names
    if odd := [name for name in asked if name not in names]:
        parser.error(f"{odd[0]!r} is none of: {'; '.join(names)}")

    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    found = {}
    for case in CASES:
        if case.name in asked:
            print(f"measuring {case.name}", file=sys.stderr)
            with tempfile.TemporaryDirectory() as folder:
                row = found[case.name] = measure(case, repeats=options.repeats, folder=Path(folder))
            for cost, facts in row["fits"].items():
                print(f"  {cost}: {facts['exponent']:.2f} +- {facts['error']:.2f}", file=sys.stderr)
    if options.plot:
        plot(found, options.plot)
    if options.json:
        print(json.dumps({"cases": found, "repeats": options.repeats}))
        return
    print(table(HEADER, cells_of(found), left=4, markdown=options.markdown))


if __name__ == "__main__":
    main()
