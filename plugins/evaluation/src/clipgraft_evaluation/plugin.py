"""The manifest of ``evaluation``."""

from __future__ import annotations

from clipgraft.spec import CommandSpec, hookimpl


@hookimpl
def clipgraft_commands() -> list[CommandSpec]:
    """Commands that the core leaves to this plugin."""
    table = {
        "demo": ("demo:demo", "Improve a tiny CLIP, measure it before and after, write a report."),
        "report": ("report_command:report", "Write the HTML report of a run."),
        "claims": ("claim_command:claims", "Check the papers' claims by experiment."),
    }
    return [
        CommandSpec(name=name, target=f"clipgraft_evaluation.{target}", help=text)
        for name, (target, text) in table.items()
    ]
