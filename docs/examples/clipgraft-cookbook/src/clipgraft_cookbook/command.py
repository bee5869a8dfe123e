"""`clipgraft cookbook size MODEL`. What is heavy is imported when a command is called, not before."""

from typing import Annotated

import typer

from clipgraft.cli.output import JsonFlag, emit, table

app = typer.Typer(no_args_is_help=True, help="How large a model is.")


@app.callback()
def cookbook() -> None:
    """How large a model is."""


@app.command()
def size(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Any model reference.")], json: JsonFlag = False
) -> None:
    """Count the weights of a model, e.g. clipgraft cookbook size toyworld/clip"""
    from clipgraft.encoders import load

    encoder = load(model)
    parts = {"image": encoder.image, "text": encoder.text, "all": encoder}
    rows = [
        {"part": name, "weights": sum(p.numel() for p in part.parameters())} for name, part in parts.items() if part
    ]
    if json:
        emit({"model": model, "weights": {row["part"]: row["weights"] for row in rows}})
    else:
        table(rows, ("part", "weights"))
