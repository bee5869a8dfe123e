"""``clipgraft claims``: run the papers' claims and print the rule, the numbers and the verdict, in this order."""

from __future__ import annotations

import hashlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer

from clipgraft import files
from clipgraft.claims import Claim
from clipgraft.cli.output import JsonFlag, emit
from clipgraft.errors import ClipgraftError, InputError, unknown_name
from clipgraft.registry import Registry, current
from clipgraft_evaluation.verdict import Job, Verdict, check


def claims(
    names: Annotated[list[str] | None, typer.Argument(help="Which [default: all].", metavar="[NAME]...")] = None,
    plugin: Annotated[str | None, typer.Option(help="Only the claims of this plugin.", metavar="NAME")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs per arm; a verdict needs two.")] = 3,
    out: Annotated[Path, typer.Option(help="Folder; finished runs in it are reused.")] = Path("runs/claims"),
    json: JsonFlag = False,
) -> None:
    """Check the papers' claims by experiment."""
    from rich.console import Console
    from rich.markdown import Markdown

    registry, verdicts = current(), list[Verdict]()
    for claim in _chosen(registry, names or [], plugin):
        typer.echo(f"{claim.name}: {claim.statement}\n{claim.rule}", err=True)
        verdicts.append(check(claim, seeds=seeds, out=out, run_arm=run_in_subprocess, identity=identity))
        write_results(verdicts, out)
        if not json:
            Console().print(Markdown(page(verdicts[-1])))
    if json:
        return emit({"claims": [verdict.as_json() for verdict in verdicts]})
    print(f"written: {out / 'claims.md'}, {out / 'claims.json'}")


def _chosen(registry: Registry, names: Sequence[str], plugin: str | None) -> list[Claim]:
    """The named claims, or all; each under its full name."""
    found = [registry.get("claim", name) for name in names] or registry.list("claim")
    if plugin is not None and plugin not in (known := {p.name for p in registry.plugins}):
        raise unknown_name("plugin", plugin, known)
    found = [r for r in found if plugin in (None, r.plugin)]
    if not found:
        raise InputError("no claim to check; install a plugin that brings some, such as clipgraft-diffusion")
    return [replace(registry.resolve(r.component.target), name=r.name) for r in found]


def identity(job: Job) -> str:
    """What decides the numbers of a run: the code of the plugins in use and the whole resolved config."""
    from clipgraft.config.load import dump_yaml, load_recipe

    _, config = load_recipe(job.arm.recipe, overrides=[*job.overrides, f"seed={job.seed}"], registry=current())
    code = hashlib.sha256()
    for plugin in (p for p in current().plugins if p.status == "ok"):
        path = Path(plugin.path)
        for file in [path] if plugin.distribution == "(file)" else sorted(path.parent.rglob("*.py")):
            code.update(file.read_bytes())
    return f"# code {code.hexdigest()}\n{dump_yaml(config)}"


def run_in_subprocess(job: Job) -> None:
    """``clipgraft run`` on one thread, its messages in ``<folder>.log``; a failure is raised with its last line."""
    given = [word for p in current().plugins if p.distribution == "(file)" for word in ("--plugin", p.path)]
    command = [sys.executable, "-m", "clipgraft", *given, "run", job.arm.recipe, "--out", str(job.folder), "--json"]
    command += ["--seed", str(job.seed), *(word for override in job.overrides for word in ("--set", override))]
    log, single = job.folder.with_name(f"{job.folder.name}.log"), {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("w", encoding="utf-8") as messages:
        start, nothing = time.monotonic(), subprocess.DEVNULL
        done = subprocess.run(command, stdin=nothing, stdout=nothing, stderr=messages, env=single)
    if done.returncode:
        lines = [line for line in log.read_text("utf-8", "replace").splitlines() if line.strip()]
        last = lines[-1].removeprefix("error: ") if lines else f"exit code {done.returncode}"
        raise ClipgraftError(f"arm {job.arm.name!r} with seed {job.seed} failed: {last} (log: {log})")
    typer.echo(f"  seed {job.seed}, {job.arm.name}: {time.monotonic() - start:.0f} s", err=True)


def page(verdict: Verdict) -> str:
    """Statement, rule, means and standard deviations over seeds, every condition, arms: as Markdown."""
    claim, arms = verdict.claim, verdict.arms
    outcome = "holds" if not verdict.unmet else "undecided" if verdict.p_value is None else "does not hold"
    lines = [f"## {claim.name}: {outcome}", "", f"> {claim.statement}", "", claim.paper, "", claim.rule, ""]
    lines += [f"| arm | {' | '.join(claim.metrics)} |", f"|---|{'--:|' * len(claim.metrics)}"]
    for name in ("before", *(arm.name for arm in claim.controls), "after"):
        lines.append(f"| {name} | {' | '.join(_spread(arms[name][metric]) for metric in claim.metrics)} |")
    lines += ["", *(f"- met: {text}" for text in verdict.met), *(f"- **unmet**: {text}" for text in verdict.unmet)]
    lines += ["", f"Bases {', '.join(claim.bases)}; {verdict.seconds:.0f} s (budget {claim.budget:.0f} s).", ""]
    for name, arm in [("after", claim.method), *((arm.name, arm) for arm in claim.controls)]:
        lines.append(f"- {name}: `{' '.join((arm.recipe, *arm.overrides))}` {arm.note}".rstrip())
    return "\n".join([*lines, "", *([f"Tried: {claim.tried}", ""] if claim.tried else [])])


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


def write_results(verdicts: Sequence[Verdict], out: Path) -> None:
    """claims.json, claims.md and a plot per claim."""
    from clipgraft_evaluation.claim_plot import claim_plot

    entries = [v.as_json() | {"met": v.met, "unmet": v.unmet, "rule": v.claim.rule} | asdict(v.claim) for v in verdicts]
    pages = [page(v) for v in verdicts]
    for number, v in enumerate(verdicts):
        pages[number] += f"\n![{v.claim.name}: one dot per seed and arm]({claim_plot(v, out).name})\n"
    files.write_json(out / "claims.json", {"claims": entries})
    files.write_text(out / "claims.md", "\n".join(["# Claims", "", *pages]))
