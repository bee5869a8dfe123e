"""Sessions of the workspace. ``nox -s tests`` is the default; sessions share one environment, torch alone is gigabytes.

CLIPGRAFT_NOX_PYTHON=/path/to/python uses that interpreter, with requirements-dev.txt installed, instead.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from pathlib import Path

import nox

ROOT = Path(__file__).parent
PLUGINS = sorted(path.parent.name for path in ROOT.glob("plugins/*/pyproject.toml"))
GIVEN = os.environ.get("CLIPGRAFT_NOX_PYTHON")
NOTHING_TO_RUN = 5
"""pytest's exit code when no test was selected."""

nox.needs_version = ">=2024.10.9"
nox.options.sessions = ["tests"]
nox.options.reuse_existing_virtualenvs = True


def shared(session: nox.Session) -> str:
    """The interpreter that most sessions share, built or brought up to date when a requirement changed."""
    if GIVEN:
        return GIVEN
    folder = ROOT / ".nox" / "shared"
    projects = [ROOT / "core" / "pyproject.toml", *sorted(ROOT.glob("plugins/*/pyproject.toml"))]
    stamp, files = folder / "stamp", [ROOT / "requirements-dev.txt", *projects]
    wanted = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    python = interpreter(session, folder)
    if not stamp.exists() or stamp.read_text("utf-8") != wanted:
        session.run(python, "-m", "pip", "install", "-q", "-r", "requirements-dev.txt", external=True)
        stamp.write_text(wanted, "utf-8")
    return python


def interpreter(session: nox.Session, folder: Path) -> str:
    """The interpreter of the virtual environment in ``folder``, created when it isn't there."""
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.exists():
        session.run(sys.executable, "-m", "venv", str(folder), external=True)
    return str(python)


def pytest(session: nox.Session, python: str, *args: str, **variables: str) -> None:
    """pytest with one thread per operation (small tensors are slower with more) and the session's own arguments."""
    env = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", **variables}
    command = [python, "-m", "pytest", *args, *session.posargs]
    session.run(*command, env=env, external=True, success_codes=[0, NOTHING_TO_RUN])


@nox.session(venv_backend="none")
def tests(session: nox.Session) -> None:
    """Everything that isn't slow."""
    pytest(session, shared(session), "-m", "not slow and not faults")


@nox.session(venv_backend="none")
def slow(session: nox.Session) -> None:
    """The slow tests, but for those in a browser and of many processes."""
    pytest(session, shared(session), "-m", "slow and not browser and not distributed and not faults")


@nox.session(venv_backend="none")
def distributed(session: nox.Session) -> None:
    """Every recipe in two and three processes, whole and sharded, against one; a state of two ranks in four."""
    pytest(session, shared(session), "-m", "distributed")


@nox.session(venv_backend="none")
def faults(session: nox.Session) -> None:
    """Kills at fifty moments of each kind of work, full and read-only disks, damage, dead workers, NaN, the clock."""
    moments = os.environ.get("CLIPGRAFT_FAULTS", "50")
    pytest(session, shared(session), "tests/faults", "-m", "faults", CLIPGRAFT_FAULTS=moments)


@nox.session(venv_backend="none")
def browser(session: nox.Session) -> None:
    """Reports in a headless Chromium: CLIPGRAFT_CHROMIUM or one on the PATH; without one this fails."""
    pytest(session, shared(session), "tests", "-m", "browser", CLIPGRAFT_BROWSER="required")


@nox.session(venv_backend="none")
def fuzz(session: nox.Session) -> None:
    """Bad input by the thousands: ``nox -s fuzz -- tests/fuzz/test_fuzz_images.py`` tries one kind."""
    chosen = [] if any(not arg.startswith("-") for arg in session.posargs) else ["tests/fuzz"]
    pytest(session, shared(session), *chosen, "-m", "fuzz", CLIPGRAFT_FUZZ="thorough")


def alone(session: nox.Session, *members: str) -> str:
    """An environment with wheels of ``members`` and what they declare, nothing else: undeclared imports fail here."""
    folder, wheels = ROOT / ".nox" / "alone", Path(session.create_tmp()) / "wheels"
    python = interpreter(session, folder)
    shutil.rmtree(wheels, ignore_errors=True)
    session.run(
        python, "-m", "pip", "install", "-q", "hypothesis", "packaging", "pytest", "pytest-timeout", external=True
    )
    session.run(python, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(wheels), *members, external=True)
    found = [str(wheel) for wheel in wheels.glob("*.whl")]
    session.run(python, "-m", "pip", "install", "-q", "--force-reinstall", "--no-deps", *found, external=True)
    session.run(python, "-m", "pip", "install", "-q", *found, external=True)
    session.run(python, str(ROOT / "tests" / "prune.py"), *found, external=True)
    return python


@nox.session(venv_backend="none")
def core(session: nox.Session) -> None:
    """The core alone, no plugin installed."""
    pytest(session, GIVEN or alone(session, "./core"), "core/tests", "-m", "not slow", CLIPGRAFT_PLUGINS="")


@nox.session(venv_backend="none")
@nox.parametrize("name", [nox.param(name, id=name) for name in PLUGINS])
def plugin(session: nox.Session, name: str) -> None:
    """One plugin with the core alone."""
    python = GIVEN or alone(session, "./core", f"./plugins/{name}")
    pytest(session, python, f"plugins/{name}/tests", "-m", "not slow", CLIPGRAFT_PLUGINS=name)


TEMPLATES = {"recipe": "keeps", "merger": "midpoint", "head": "reads"}
"""Templates of ``clipgraft new plugin``, and the claims that they bring."""


@nox.session(venv_backend="none")
@nox.parametrize("template", [nox.param(name, id=name) for name in TEMPLATES])
def scaffold(session: nox.Session, template: str) -> None:
    """A new plugin with the core's wheel alone: its tests and the suite; then, on the toy world, its run and claim."""
    name, place = f"fresh-{template}", Path(session.create_tmp()).resolve()
    shutil.rmtree(place / name, ignore_errors=True)
    python = alone(session, "./core")
    cli = [python, "-c", "from clipgraft.cli import main; main()"]
    env = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    session.run(*cli, "new", "plugin", name, f"--{template}", "--out", str(place / name), env=env, external=True)
    python = alone(session, "./core", str(place / name))  # wheels, so that what isn't packaged isn't there
    with session.chdir(place):
        pytest(session, python, name, "-p", "no:cacheprovider")
        suite = ("--pyargs", "clipgraft.testing.conformance", "--clipgraft-plugin", name)
        pytest(session, python, *suite, "-p", "no:cacheprovider", CLIPGRAFT_PLUGINS=name)
    python = alone(session, "./core", "./plugins/toyworld", "./plugins/evaluation", str(place / name))
    with session.chdir(place):
        shutil.rmtree("runs", ignore_errors=True)
        session.run(*cli, "run", f"{name}:tiny", "--out", f"runs/{name}", env=env, external=True)
        session.run(*cli, "claims", f"{name}/{TEMPLATES[template]}", "--seeds", "3", env=env, external=True)


@nox.session(venv_backend="none")
def together(session: nox.Session) -> None:
    """Everything in one environment: the conformance suite over every plugin, and plugins on each other's exports."""
    python = shared(session)
    plugins = [word for name in ("core", *PLUGINS) for word in ("--clipgraft-plugin", name)]
    pytest(session, python, "--pyargs", "clipgraft.testing.conformance", *plugins)
    pytest(session, python, "tests/test_composition.py")


@nox.session
def broken(session: nox.Session) -> None:
    """Packages that go wrong, installed for real beside the command line (without torch, so this one is small)."""
    session.install("packaging", "pluggy", "pytest", "rich", "typer")
    session.install("--no-deps", "./core", *map(str, sorted((ROOT / "tests" / "packages").glob("*/"))))
    session.run("pytest", "tests/test_broken_packages.py", *session.posargs)


@nox.session(venv_backend="none")
def lint(session: nox.Session) -> None:
    """ruff, its format, and declared against imported dependencies."""
    python = shared(session)
    session.run(python, "-m", "ruff", "check", ".", external=True)
    session.run(python, "-m", "ruff", "format", "--check", ".", external=True)
    for member in ["core", *(f"plugins/{name}" for name in PLUGINS)]:
        with session.chdir(member):
            session.run(python, "-m", "deptry", "src", external=True)


@nox.session(venv_backend="none")
def types(session: nox.Session) -> None:
    """mypy, strict, on the core."""
    session.run(shared(session), "-m", "mypy", external=True)


@nox.session(venv_backend="none")
def docs(session: nox.Session) -> None:
    """Generate the reference and build the pages; a broken link is an error."""
    python = shared(session)
    session.run(python, "docs/generate.py", external=True)
    session.run(python, "-m", "mkdocs", "build", "--strict", *session.posargs, external=True)


@nox.session(venv_backend="none")
def claims(session: nox.Session) -> None:
    """Check the papers' claims: ``nox -s claims -- NAME --seeds 3``; without words all, into docs/claims.md."""
    python = shared(session)
    command = [python, "-c", "from clipgraft.cli import main; main()", "claims"]
    session.run(*command, *session.posargs, env={"OMP_NUM_THREADS": "1"}, external=True)
    if not session.posargs:
        session.run(python, "docs/claims_page.py", "runs/claims", external=True)


@nox.session(venv_backend="none")
def bench(session: nox.Session) -> None:
    """The guard over the benchmarks' ratios, with its own words; or those named: ``nox -s bench -- memory``."""
    python, folder = shared(session), ROOT / "benchmarks"
    named = [word for word in session.posargs if (folder / f"{word}.py").is_file()]
    runs = [[str(folder / f"{name}.py")] for name in named] or [[str(folder / "guard.py"), *session.posargs]]
    for words in runs:
        session.run(python, *words, env={"OMP_NUM_THREADS": "1"}, external=True)
