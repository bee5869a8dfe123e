"""CPU seconds, wall seconds and images/s of embedding JPEG files: ours against the plain open_clip loop, in one run.

Scikit-image's photographs, cropped and re-encoded as JPEG, lie in a temporary folder. Each case reads all of them from
file to normalised embedding. The peer is what one writes by hand: open_clip's preprocess in a DataLoader,
``encode_image``, normalise. Ours is ``embed``: hashing the weights, writing parts and joining them included. Cases
alternate; the best CPU time (workers included) of each counts. CPU time is the anchor on a machine that is shared;
wall time is comparable only where nothing else runs.

    python benchmarks/embed_throughput.py [--model ViT-B-32] [--images 400] [--threads 1] [--workers 1]
        [--json | --markdown]
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from table import table
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader
from usage import cpu_seconds

from clipgraft.data.folder import open_folder
from clipgraft.encoders.base import Encoder, Origin
from clipgraft.encoders.openclip import build
from clipgraft.testing.tiny import tiny_clip
from clipgraft_embedding.embed import embed
from clipgraft_embedding.store import Embeddings
from clipgraft_embedding.stream import pixels_of

BUDGET = {"ours fp32": 1.2, "ours bf16": 1.9}
"""Aims: CPU time of the peer at fp32 over ours."""


def write_photos(folder: Path, count: int, size: tuple[int, int]) -> None:
    """``count`` JPEGs: crops of scikit-image's colour photographs, enlarged to ``size`` where they are smaller."""
    import skimage
    from PIL import Image

    names = ("astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg", "retina.jpg", "hubble_deep_field.jpg")
    photos = [Image.open(Path(skimage.__file__).parent / "data" / name).convert("RGB") for name in names]
    for k in range(count):
        photo = photos[k % len(photos)]
        inset = k // len(photos) % 20 / 100
        box = (inset * photo.width, inset * photo.height, photo.width, photo.height)
        photo.resize(size, Image.Resampling.BICUBIC, box=box).save(folder / f"{k:05}.jpg", quality=90)


class Files:
    """What a user's dataset looks like."""

    def __init__(self, folder: Path, preprocess: Callable[[Any], Tensor]) -> None:
        self.files, self.preprocess = sorted(folder.iterdir()), preprocess

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        from PIL import Image

        return self.preprocess(Image.open(self.files[index]))


def peer(encode: Callable[[Tensor], Tensor], data: Files, dtype: torch.dtype, batch: int, workers: int) -> Tensor:
    """The plain loop: (n, D) of length one."""
    found = []
    loader: Any = DataLoader(data, batch_size=batch, num_workers=workers)  # type: ignore[arg-type]
    with torch.no_grad():
        for pixels in loader:
            found.append(F.normalize(encode(pixels.to(dtype)), dim=-1))
    return torch.cat(found).float()


def opened(name: str) -> tuple[Encoder, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], Any]:
    """Our encoder, the peer's encoders in fp32 and bf16, and the peer's preprocess; equal weights."""
    import open_clip
    from open_clip.transform import PreprocessCfg, image_transform_v2

    torch.manual_seed(0)
    if name == "tiny":
        encoder, twin = (
            tiny_clip(image_size=64, width=128, depth=4).eval(),
            tiny_clip(image_size=64, width=128, depth=4),
        )
        preprocess = image_transform_v2(PreprocessCfg(**encoder.preprocess.as_dict()), is_train=False)
        return encoder, encoder.image.tower, twin.image.tower.bfloat16(), preprocess
    logging.disable(logging.WARNING)  # there are no pretrained weights, on purpose
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    half = open_clip.create_model(name, precision="pure_bf16").eval()
    logging.disable(logging.NOTSET)
    half.load_state_dict(model.state_dict())
    config, usual = open_clip.get_model_config(name), open_clip.transform.PreprocessCfg()
    assert config is not None
    options = {"preprocess": {"mean": usual.mean, "std": usual.std}, "origin": Origin(f"open_clip:{name}", name)}
    encoder = build(config, model.state_dict(), **options)  # type: ignore[arg-type]
    return encoder.eval(), model.eval().encode_image, half.encode_image, preprocess


def decode_ms(folder: Path, data: Files, encoder: Encoder, count: int) -> dict[str, float]:
    """CPU milliseconds per image from file to pixels, best of three passes over ``count`` images."""
    source, ours = open_folder(folder), pixels_of(encoder.preprocess)
    ways: dict[str, Callable[[int], Any]] = {"open_clip": data.__getitem__, "ours": lambda k: ours(source[k].image)}
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(3):
        for name, read in ways.items():
            start = time.process_time()
            for k in range(count):
                read(k)
            best[name] = min(best[name], (time.process_time() - start) / count * 1e3)
    return best


def main() -> None:
    """Print the table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-B-32", help="open_clip architecture with random weights, or tiny")
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--size", type=int, nargs=2, default=(640, 480), metavar=("W", "H"))
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    encoder, full, half, preprocess = opened(options.model)
    rows: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "photos"
        folder.mkdir()
        write_photos(folder, options.images, tuple(options.size))
        data, source = Files(folder, preprocess), open_folder(folder)
        size, workers = options.batch_size, options.workers

        def ours(precision: str) -> Tensor:
            out, shared = Path(name) / f"{precision}.safetensors", {"batch_size": size, "workers": workers}
            embed(encoder, source, out=out, precision=precision, restart=True, **shared)  # type: ignore[arg-type]
            return Embeddings.open(out).embeddings

        cases: dict[str, Callable[[], Tensor]] = {
            "open_clip fp32": lambda: peer(full, data, torch.float32, size, workers),
            "ours fp32": lambda: ours("fp32"),
            "open_clip bf16": lambda: peer(half, data, torch.bfloat16, size, workers),
            "ours bf16": lambda: ours("bf16"),
        }
        decoding = decode_ms(folder, data, encoder, min(options.images, 60))
        reference: Tensor | None = None
        for _ in range(options.repeats):
            for case, run in cases.items():
                cpu, wall = cpu_seconds(), time.perf_counter()
                found = run()
                cpu, wall = cpu_seconds() - cpu, time.perf_counter() - wall
                reference = found.clone() if reference is None else reference
                error = float((1 - F.cosine_similarity(found.double(), reference.double())).max())
                before = rows.get(case, {"cpu_seconds": float("inf"), "wall_seconds": float("inf")})
                rows[case] = {
                    "cpu_seconds": min(cpu, before["cpu_seconds"]),
                    "wall_seconds": min(wall, before["wall_seconds"]),
                    "max_cosine_error": error,
                }
    plain = rows["open_clip fp32"]
    for row in rows.values():
        row["cpu_ratio"] = plain["cpu_seconds"] / row["cpu_seconds"]
        row["wall_ratio"] = plain["wall_seconds"] / row["wall_seconds"]
        row["images_per_second"] = options.images / row["wall_seconds"]
    if options.json:
        print(json.dumps({"cases": rows, "decode_ms": decoding, "budget": BUDGET, **vars(options)}))
        return
    lines = [
        (
            case,
            f"{row['cpu_seconds']:.2f}",
            f"{row['cpu_ratio']:.3f}",
            f"{row['wall_seconds']:.2f}",
            f"{row['wall_ratio']:.3f}",
            f"{row['images_per_second']:.1f}",
            f"{row['max_cosine_error']:.0e}",
            BUDGET.get(case, ""),
        )
        for case, row in rows.items()
    ]
    header = ("case", "CPU s", "times as fast", "wall s", "times as fast", "images/s", "cosine error", "aim")
    print(table(header, lines, markdown=options.markdown))
    print("\nfile to pixels: " + ", ".join(f"{way} {ms:.2f} ms" for way, ms in decoding.items()) + " of CPU per image")


if __name__ == "__main__":
    main()
