"""`clipgraft anomaly`: every command in a module of its own, which imports what is heavy when it is called."""

from __future__ import annotations

import typer

from clipgraft_anomaly import command_eval, command_import, command_predict, command_reject, command_threshold

app = typer.Typer(no_args_is_help=True, help="Find defects with a CLIP.")


@app.callback()
def anomaly() -> None:
    """Find defects with a CLIP."""


app.command("eval")(command_eval.evaluate)
app.command("import")(command_import.import_)
app.command("predict")(command_predict.predict)
app.command("reject")(command_reject.reject)
app.command("threshold")(command_threshold.threshold)
