"""`clipgraft toyworld`: look at the world, rebuild its models, see what its generators notice."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

app = typer.Typer(
    no_args_is_help=True, help="Look at the toy world, rebuild its models, see what its generators notice."
)
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else.")]


def _print(document: object, *, as_json: bool) -> None:
    if as_json:
        import json

        print(json.dumps(document, indent=2))
    elif isinstance(document, dict):
        for key, value in document.items():
            print(f"{key:<24} {value:.3f}" if isinstance(value, float) else f"{key:<24} {value}")


@app.command()
def build(
    out: Annotated[Path, typer.Option(help="Folder for the models and their manifest.")],
    effort: Annotated[
        float, typer.Option(help="Scales every number of steps; .02 rehearses.", min=0.001, max=1.0)
    ] = 1.0,
    json: Json = False,
) -> None:
    """Train every shipped model again and print time and metrics (about 20 CPU-minutes)."""
    import sys

    from clipgraft_toyworld.build import build as build_models

    path = build_models(
        out, effort=effort, say=lambda line: print(line, file=sys.stderr if json else sys.stdout, flush=True)
    )
    if json:
        print(path.read_text(encoding="utf-8"), end="")


@app.command()
def sheet(
    out: Annotated[Path, typer.Option(help="PNG file to write.")],
    kind: Annotated[
        Literal["images", "pairs", "defects", "videos", "crowds"], typer.Option(help="What to show.")
    ] = "images",
    split: Annotated[Literal["train", "tune", "test"], typer.Option(help="Split.")] = "train",
    size: Annotated[int, typer.Option(help="Image side: 32 or 64 pixels.")] = 32,
    json: Json = False,
) -> None:
    """Write a contact sheet of the world."""
    from clipgraft.errors import InputError
    from clipgraft_toyworld.contact import contact_sheet

    if size not in (32, 64):
        raise InputError(f"size is {size}; the world is drawn at 32 or 64 pixels")
    if out.suffix.lower() != ".png":
        raise InputError(f"{out} doesn't end in .png; name a PNG file to write")
    contact_sheet(kind, split=split, size=size).save(out)
    _print({"sheet": str(out)}, as_json=json)


@app.command()
def sensitivity(
    name: Annotated[str, typer.Argument(help="generator or generator-own.")] = "generator",
    n: Annotated[int, typer.Option(help="Pictures of the tune split.", min=16, max=4096)] = 512,
    json: Json = False,
) -> None:
    """Relative rise of a generator's loss when one word of its condition is wrong; look before any post-training."""
    from clipgraft.errors import unknown_name
    from clipgraft_toyworld.measure import album
    from clipgraft_toyworld.models import folder, manifest
    from clipgraft_toyworld.towers import load_clip
    from clipgraft_toyworld.train_generator import bench, load_generator
    from clipgraft_toyworld.train_generator import sensitivity as rise

    known = ("generator", "generator-own")
    if name not in known:
        raise unknown_name("generator", name, known)
    tower = load_clip(folder(manifest()["models"][name]["recipe"]["tokens"]))
    data = bench(tower, album("tune", blocks=-(-n // 256)), n=n)
    _print(rise(load_generator(folder(name)), load_clip(folder("clip-0")), data, n=n), as_json=json)


@app.command()
def manifest(
    name: Annotated[str | None, typer.Argument(help="One model, e.g. clip-0; all without it.")] = None,
    json: Json = False,
) -> None:
    """What the shipped models are: seed, recipe, cost, metrics and hashes."""
    from clipgraft.errors import unknown_name
    from clipgraft_toyworld.models import manifest as read

    document = read()
    models = document["models"]
    if name is not None and name not in models:
        raise unknown_name("toy world model", name, models)
    if json:
        _print(document if name is None else models[name], as_json=True)
    elif name is not None:
        entry = models[name]
        print(f"{name}: seed {entry['seed']}, {entry['cpu_seconds']} CPU-s, {entry['recipe']}")
        _print(entry["metrics"], as_json=False)
    else:
        for key, entry in models.items():
            told = "  ".join(f"{k} {v:.3f}" for k, v in entry["metrics"].items() if "/" not in k)
            print(f"{key:<14} {told}")
