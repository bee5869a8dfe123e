"""``clipgraft export``: any model reference as a directory, and to the Hugging Face hub."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer

from clipgraft.cli.output import JsonFlag, emit
from clipgraft.errors import InputError
from clipgraft.registry import current


def export(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Registered name, open_clip:ARCH[/TAG], hf:ORG/NAME, DIR or RUN.")
    ],
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Directory to write.")] = None,
    format: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="clipgraft; open_clip, a directory that open_clip alone can open; huggingface, a CLIPModel or "
            "SiglipModel of transformers; or a plugin's (clipgraft list exporters).",
        ),
    ] = "clipgraft",
    license: Annotated[
        str | None, typer.Option(metavar="ID", help="Licence of the model, for its card, such as apache-2.0.")
    ] = None,
    sources: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Licences of the base model and the data, for the card.")
    ] = None,
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="ORG/NAME", help="Upload it to the Hugging Face hub.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="On the hub, only you and ORG can see it.")] = False,
    json: JsonFlag = False,
) -> None:
    """Write a model as a directory that clipgraft, and where possible open_clip alone, can open."""
    from clipgraft import hub

    if out is None and push_to_hub is None:
        raise InputError("say where to: --out DIR, or --push-to-hub ORG/NAME")
    if private and push_to_hub is None:
        raise InputError("--private goes with --push-to-hub ORG/NAME")
    if push_to_hub is not None:
        hub.check(push_to_hub)
    with TemporaryDirectory() as temporary, redirect_stdout(sys.stderr):  # whatever libraries print
        folder = Path(temporary) / "model" if out is None else out
        card = {"license": license, "sources": sources}
        found = _write(model, folder, format=format, card=card, where=push_to_hub or "DIR")
        if push_to_hub is not None:
            found["hub"] = hub.push(folder, push_to_hub, private=private)
        if out is None:
            found["export"] = None
    if json:
        emit({"model": model, **found})
        return
    for place in filter(None, (found["export"], found.get("hub"))):
        print(f"model: {place}")


def _write(model: str, out: Path, *, format: str, card: dict[str, Any], where: str) -> dict[str, Any]:
    """Write ``model`` into ``out``; what there is to say about it."""
    from clipgraft.checkpoint import MANIFEST, copy_export, read_manifest, write_export
    from clipgraft.encoders import load
    from clipgraft.encoders.huggingface import write_huggingface
    from clipgraft.encoders.openclip import why_not_open_clip

    folder = Path(model) / "export" if (Path(model) / "export" / MANIFEST).is_file() else Path(model)
    ours = read_manifest(folder) if (folder / MANIFEST).is_file() else {}
    model = str(folder) if ours else model
    if format in ("clipgraft", "open_clip") and ours:
        if format == "open_clip" and ours["reason"]:
            raise InputError(_refusal(model, ours["reason"]))
        return {"export": str(copy_export(folder, out, card=card, where=where))}
    if format not in ("clipgraft", "open_clip", "huggingface"):
        return dict(current().build("exporter", format, {})(model, out, registry=current()))
    encoder = load(model, registry=current())
    card = (ours.get("card") or {}) | {key: value for key, value in card.items() if value is not None}
    if format == "huggingface":
        if left := [component["name"] for component in ours.get("components", ())]:
            print(f"left out, transformers has no place for it: {', '.join(left)}")
        return {"export": str(write_huggingface(encoder, out, card=card, where=where))}
    if format == "open_clip" and (reason := why_not_open_clip(encoder)):
        raise InputError(_refusal(model, reason))
    return {"export": str(write_export(encoder, out, card=card, where=where))}


def _refusal(model: str, reason: str) -> str:
    return f"open_clip can't hold {model}: {reason}; leave --format out to export for clipgraft"
