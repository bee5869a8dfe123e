"""CPU seconds of a whole zero-shot evaluation, ours against code in the manner of CLIP_benchmark, in one run.

A ViT-B-32 with random weights classifies a folder of JPEG photographs (crops of scikit-image's) whose sub-folders are
names of ImageNet's classes, with OpenAI's templates. Ours is what ``clipgraft eval MODEL --on core/zero-shot?templates=
openai-imagenet --data folder:DIR`` runs: no cache, intervals and records included. The peer is written from
CLIP_benchmark's behaviour: class by class all prompts at full context length, normalise, mean, normalise; a DataLoader
over torchvision's ImageFolder with open_clip's preprocess, encode, normalise, 100 x cosine, top 1 and 5. Its ``--amp``
is CUDA's autocast, of images alone, and does nothing on a CPU; the peer's bf16 case has a CPU's autocast in its place.

Cases take turns, on one thread and without worker processes; the median over turns of the peer's CPU time over ours
counts. Predictions at fp32 must be equal wherever the two best scores of the peer are more than 1e-5 apart.

    OMP_NUM_THREADS=1 python benchmarks/zero_shot_evaluation.py [--classes 40] [--templates 8] [--images 200]
        [--repeats 2] [--precision fp32,bf16] [--json | --markdown]

A full ImageNet has 1.6 prompts per image, as the default has; ``--templates 80`` takes ten times as long.
"""

from __future__ import annotations

import argparse
import inspect
import json
import logging
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from embed_throughput import write_photos
from table import table
from usage import cpu_seconds

AIM = 1.2
"""The peer's CPU time over ours, whole evaluation, at fp32."""
CLOSE = 1e-5
"""Scores (cosines) nearer than this are a tie."""
Times = dict[str, float]


def spread(items: Sequence[Any], count: int) -> list[Any]:
    """``count`` of the items, evenly over all."""
    count = min(count, len(items))
    return [items[k * len(items) // count] for k in range(count)]


def write_classes(folder: Path, names: Sequence[str], count: int, size: tuple[int, int]) -> None:
    """``count`` photographs, dealt into a folder per class."""
    for name in names:
        (folder / name).mkdir(parents=True)
    photos = folder.with_name("photos")
    photos.mkdir()
    write_photos(photos, count, size)
    for k, file in enumerate(sorted(photos.iterdir())):
        file.rename(folder / names[k % len(names)] / file.name)


@contextmanager
def clock(times: Times, part: str) -> Iterator[None]:
    """Add the CPU seconds of the block to ``times[part]``."""
    start = cpu_seconds()
    try:
        yield
    finally:
        times[part] = times.get(part, 0.0) + cpu_seconds() - start


def peer(model: Any, preprocess: Any, folder: Path, formats: Sequence[str], batch: int, half: bool) -> tuple[Any, ...]:
    """Metrics, scores (n, K) and times by part."""
    import open_clip
    import torch
    from torch.nn import functional as F
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder

    times: Times = {}
    around = torch.autocast("cpu", torch.bfloat16) if half else nullcontext()
    data = ImageFolder(folder, transform=preprocess)
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    with torch.no_grad(), clock(times, "texts"):
        means = []
        for name in data.classes:
            each = F.normalize(model.encode_text(tokenizer([text.replace("{}", name) for text in formats])), dim=-1)
            means.append(F.normalize(each.mean(0), dim=0))
        classifier = torch.stack(means, 1)
    right, found = [0, 0], []
    with torch.no_grad(), clock(times, "images"):
        for pixels, labels in DataLoader(data, batch_size=batch):
            with around:
                scores = 100 * F.normalize(model.encode_image(pixels), dim=-1) @ classifier
            hits = scores.topk(5).indices == labels[:, None]
            right = [right[0] + int(hits[:, 0].sum()), right[1] + int(hits.sum())]
            found.append(scores.float())
    return {f"top{k}": n / len(data) for k, n in zip((1, 5), right, strict=True)}, torch.cat(found) / 100, times


def ours(encoder: Any, folder: Path, formats: Sequence[str], batch: int, half: bool) -> tuple[Any, ...]:
    """Metrics, predictions (n,) and times by part of ``clipgraft eval``'s own function."""
    import torch

    from clipgraft.config.schema import EvaluatorNode
    from clipgraft.evaluation import evaluate, features
    from clipgraft.log import RunLog
    from clipgraft.performance import quick_products

    times: Times = {}
    options = {"precision": "bf16"} if half else {}
    kind, node = features.EncoderFeatures, EvaluatorNode(use="core/zero-shot", templates=tuple(formats))
    plain = {"texts": kind.classifier, "images": kind.labels}

    def watched(part: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            with clock(times, part):
                return plain[part](*arguments)

        return call

    kind.classifier, kind.labels = watched("texts"), watched("images")  # type: ignore[method-assign]
    try:
        with quick_products(torch.device("cpu")):  # as the command does
            found = evaluate(
                encoder, [node], default_data=f"folder:{folder}", batch_size=batch, workers=0, log=RunLog(), **options
            )
    finally:
        kind.classifier, kind.labels = plain["texts"], plain["images"]  # type: ignore[method-assign]
    (result,) = found.values()
    return result.metrics, torch.tensor([row["prediction"] for row in result.samples]), times


def opened() -> tuple[Any, Any, Any]:
    """Our encoder, open_clip's model over the same tensors, its preprocess."""
    import open_clip
    import torch

    from clipgraft.encoders.base import Origin
    from clipgraft.encoders.openclip import build

    torch.set_num_threads(1)
    torch.manual_seed(0)
    logging.disable(logging.WARNING)  # there are no pretrained weights, on purpose
    model, _, preprocess = open_clip.create_model_and_transforms("ViT-B-32")
    logging.disable(logging.NOTSET)
    config, usual = open_clip.get_model_config("ViT-B-32"), open_clip.transform.PreprocessCfg()
    assert config is not None
    looks = {"mean": usual.mean, "std": usual.std}
    encoder = build(config, model.state_dict(), preprocess=looks, origin=Origin("open_clip:ViT-B-32", "ViT-B-32"))
    return encoder.eval(), model.eval(), preprocess


def differing(prediction: Any, scores: Any) -> tuple[int, int]:
    """How many predictions (n,) differ from the best of ``scores`` (n, K), and how many of these are no ties."""
    best = scores.topk(2).values
    other = prediction != scores.argmax(1)
    return int(other.sum()), int((other & (best[:, 0] - best[:, 1] > CLOSE)).sum())


def compare(options: argparse.Namespace, precisions: Sequence[str]) -> dict[str, Any]:
    """Both ways in turns: {precision: {"peer", "ours": CPU seconds by part, "ratio": by part, ...}}."""
    import open_clip

    names = [name for name in open_clip.IMAGENET_CLASSNAMES if name.replace(" ", "").isalpha()]
    names = spread(sorted(set(names)), options.classes)
    formats = [form("{}") for form in spread(open_clip.OPENAI_IMAGENET_TEMPLATES, options.templates)]
    encoder, model, preprocess = opened()
    turns: dict[str, list[dict[str, Times]]] = {precision: [] for precision in precisions}
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "classes"
        write_classes(folder, names, options.images, tuple(options.size))
        for turn in range(options.repeats):
            for precision in precisions:
                half, turned = precision == "bf16", {}
                start = cpu_seconds()
                theirs, scores, turned["peer"] = peer(model, preprocess, folder, formats, options.batch_size, half)
                turned["peer"]["whole"] = cpu_seconds() - start
                start = cpu_seconds()
                mine, prediction, turned["ours"] = ours(encoder, folder, formats, options.batch_size, half)
                turned["ours"]["whole"] = cpu_seconds() - start
                turns[precision].append(turned)
                other, wrong = differing(prediction, scores)
                if wrong and not half:
                    sys.exit(f"{wrong} of {len(prediction)} predictions differ")
                rows[precision] = {
                    "metrics": {"peer": theirs, "ours": {k: mine[k] for k in ("top1", "top5")}},
                    "other_predictions": other,
                    "without_ties": wrong,
                }
            print(f"turn {turn + 1} of {options.repeats}", file=sys.stderr)
    for precision, found in turns.items():
        for part in ("texts", "images", "whole"):
            for way in ("peer", "ours"):
                rows[precision].setdefault(way, {})[part] = statistics.median(t[way][part] for t in found)
            ratio = statistics.median(t["peer"][part] / t["ours"][part] for t in found)
            rows[precision].setdefault("ratio", {})[part] = ratio
    return rows


def cells_of(rows: dict[str, Any]) -> list[list[str]]:
    """Header and cells."""
    cells = [["precision", "way", "texts, CPU s", "images, CPU s", "whole, CPU s", "times as fast", "top 1", "top 5"]]
    for precision, row in rows.items():
        for way, name in (("peer", "CLIP_benchmark's manner"), ("ours", "clipgraft")):
            times = [f"{row[way][part]:.2f}" for part in ("texts", "images", "whole")]
            quick = "1.00" if way == "peer" else f"{row['ratio']['whole']:.2f}"
            accuracy = [f"{row['metrics'][way][k]:.3f}" for k in ("top1", "top5")]
            cells.append([precision, name, *times, quick, *accuracy])
        parts = [f"{row['ratio'][part]:.2f} x" for part in ("texts", "images", "whole")]
        cells.append([precision, "times as fast", *parts, "", "", ""])
    return cells


def main() -> None:
    """Print the table, markdown or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, default=40)
    parser.add_argument("--templates", type=int, default=8)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--size", type=int, nargs=2, default=(640, 480), metavar=("W", "H"))
    parser.add_argument("--batch-size", type=int, default=64, help="CLIP_benchmark's default")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--precision", default="fp32,bf16")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()

    from clipgraft.evaluation import evaluate

    offered = ["fp32", "bf16"] if "precision" in inspect.signature(evaluate).parameters else ["fp32"]
    precisions = options.precision.split(",")
    if odd := [p for p in precisions if p not in offered]:
        parser.error(f"{odd[0]!r} is none of {', '.join(offered)}")
    if options.classes < 5:
        parser.error("top 5 needs 5 classes")
    rows = compare(options, precisions)
    if options.json:
        settings = {k: v for k, v in vars(options).items() if k not in ("json", "markdown")}
        print(json.dumps({"precisions": rows, "aim": AIM, **settings}))
        return
    header, *cells = cells_of(rows)
    print(table(header, cells, left=2, markdown=options.markdown))
    if options.markdown:
        return
    for precision, row in rows.items():
        print(
            f"{precision}: {row['other_predictions']} predictions differ, {row['without_ties']} of them without a tie"
        )
    print(f"aim for the whole at fp32: {AIM} times as fast")


if __name__ == "__main__":
    main()
