"""``clipgraft new``: a plugin from a template, which installs, runs, and passes its tests at once."""

from __future__ import annotations

import importlib.util
import keyword
import re
from collections.abc import Iterator
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated

import typer

from clipgraft.cli.output import JsonFlag, emit
from clipgraft.errors import InputError
from clipgraft.registry import COMMANDS_OF, KNOWN_PLUGINS, current

app = typer.Typer(name="new", no_args_is_help=True, help="Write a plugin from a template.")

ENDING = ".tmpl"


@app.callback()
def new() -> None:
    """Write a plugin from a template."""


@app.command()
def plugin(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Lower-case letters, digits and hyphens.")],
    recipe: Annotated[bool, typer.Option("--recipe", help="A training method: a stage, a loss. The default.")] = False,
    merger: Annotated[bool, typer.Option("--merger", help="A way to merge models: a job and a command.")] = False,
    head: Annotated[bool, typer.Option("--head", help="Something trained beside a CLIP and shipped with it.")] = False,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="New or empty. Default: clipgraft-NAME.")] = None,
    json: JsonFlag = False,
) -> None:
    """Write a package with a method that works, its tests and its claim; change it into yours."""
    chosen = [kind for kind, wanted in {"recipe": recipe, "merger": merger, "head": head}.items() if wanted]
    if len(chosen) > 1:
        raise InputError(f"--{' and --'.join(chosen)} are different templates; give one of them")
    template, package = (chosen or ["recipe"])[0], package_of(name)
    folder = out if out is not None else Path(f"clipgraft-{name}")
    files = write(name, template, folder)
    if json:
        emit({"name": name, "template": template, "package": package, "folder": str(folder), "files": files})
        return
    print(f"{folder}: a {template}, {len(files)} files. Next:")
    claim = {"recipe": "keeps", "merger": "midpoint", "head": "reads"}[template]
    rows = {
        f"pip install -e {folder}": "",
        f"clipgraft run {name}:tiny": "on the toy world; pip install clipgraft-toyworld",
        f"clipgraft claims {name}/{claim}": "whether it does what it says; pip install clipgraft-evaluation",
        f"pytest {folder}": "its tests and the conformance suite; pip install pytest",
    }
    for command, why in rows.items():
        print(f"  {command:<{max(map(len, rows))}}  {why and f'# {why}'}".rstrip())


def package_of(name: str) -> str:
    """The import name of the plugin ``name``; raises when no plugin may have it, or one has."""
    bare = name.removeprefix("clipgraft-").removeprefix("clipgraft_")
    if bare != name:
        raise InputError(f"{name!r}: the package gets its prefix by itself; write clipgraft new plugin {bare}")
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name) or len(name) > 40:
        close = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-0123456789")[:40]
        hint = f"; {close} would do" if close else ""
        raise InputError(f"{name!r} is not lower-case letters, digits and single hyphens, a letter first{hint}")
    reserved = {"core", "clipgraft"} | {command.name for command in current().commands()}
    reserved |= {command for commands in COMMANDS_OF.values() for command in commands}
    if name in reserved or keyword.iskeyword(name):
        raise InputError(f"{name!r} is a name of the core or of Python; choose another one")
    package = f"clipgraft_{name.replace('-', '_')}"
    if name in KNOWN_PLUGINS or name in {info.name for info in current().plugins}:
        raise InputError(f"there is a plugin {name!r} already; choose another name")
    if importlib.util.find_spec(package) is not None:
        raise InputError(f"there is a package {package} already; choose another name")
    return package


def write(name: str, template: str, folder: Path) -> list[str]:
    """Write the files of a template into ``folder``; returns their paths in it."""
    package = package_of(name)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} is there and not empty; choose another folder with --out DIR")
    words = {"name": name, "package": package, "Class": "".join(part.capitalize() for part in name.split("-"))}
    written = []
    for path, source in _files(template):
        target = path.removesuffix(ENDING).replace("PACKAGE", package).replace("NAME", name)
        text = source.read_text("utf-8")
        for word, value in words.items():
            text = text.replace("{{" + word + "}}", value)
        try:
            (folder / target).parent.mkdir(parents=True, exist_ok=True)
            (folder / target).write_text(text, encoding="utf-8")
        except OSError as error:
            raise InputError(f"can't write {folder / target}: {error.strerror}; choose a writable --out DIR") from error
        written.append(target)
    return sorted(written)


def _files(template: str) -> Iterator[tuple[str, Traversable]]:
    """Path and file of what every template has, and of this one."""

    def walk(folder: Traversable, prefix: str) -> Iterator[tuple[str, Traversable]]:
        for entry in folder.iterdir():
            if entry.is_dir():
                yield from walk(entry, f"{prefix}{entry.name}/")
            elif entry.name.endswith(ENDING):
                yield f"{prefix}{entry.name}", entry

    for part in ("common", template):
        yield from walk(resources.files("clipgraft") / "templates" / part, "")
