"""The command line: one table of commands for core and plugins, targets imported on invocation, errors in one place.

Never import click here: Typer vendors its own.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperCommand, TyperGroup

from clipgraft.errors import ClipgraftError, InputError, lost_process
from clipgraft.manifests import one_line
from clipgraft.registry import Registry, current, use

if TYPE_CHECKING:
    from clipgraft.spec import CommandSpec


MARKUP: Literal["markdown"] = "markdown"
"""How help is read: Typer's default takes the brackets of ``ARCH[/TAG]`` for its own."""


class Root(TyperGroup):
    """``clipgraft``: stubs with the recorded help while rendering, the target imported on invocation."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Names in table order."""
        return list(self._table(ctx))

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """A stub that knows its help only."""
        self._table(ctx)
        return super().get_command(ctx, cmd_name)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The real command, imported now."""
        table = self._table(ctx)
        wanted = args[0] if args else ""
        if wanted not in table and (hint := ctx.obj.hint_command(wanted)):
            raise InputError(f"clipgraft {wanted} is not there: {hint}")
        name, stub, rest = super().resolve_command(ctx, args)
        return name, stub and _command(table[str(name)]), rest

    def _table(self, ctx: Any) -> dict[str, CommandSpec]:
        """Every command by name; the stubs are refreshed with it."""
        if ctx.obj is None:
            files = ctx.params.get("plugin") or ()
            ctx.obj = ctx.with_resource(use(Registry.discover(files=files))) if files else current()
        table = {spec.name: spec for spec in ctx.obj.commands()}
        self.commands = {name: TyperCommand(name, help=spec.help) for name, spec in table.items()}
        return table


def _command(spec: CommandSpec) -> Any:
    """The command that a spec's target makes."""
    target = current().resolve(spec.target)
    if isinstance(target, typer.Typer):
        target.rich_markup_mode = MARKUP
        return typer.main.get_group(target)
    app = typer.Typer(add_completion=False, rich_markup_mode=MARKUP)
    app.command(spec.name, help=spec.help)(target)
    return typer.main.get_command(app)


app = typer.Typer(
    cls=Root, name="clipgraft", no_args_is_help=True, context_settings={"help_option_names": ["-h", "--help"]}
)


def _version(wanted: bool) -> None:
    if wanted:
        import clipgraft

        print(f"clipgraft {clipgraft.__version__}")
        raise typer.Exit


@app.callback()
def root(
    plugin: Annotated[
        list[Path] | None, typer.Option(help="Also load this plugin file.", metavar="FILE", is_eager=True)
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Post-train, adapt, merge, evaluate and ship CLIP."""


def main(args: list[str] | None = None) -> None:
    """The console script: runs a command and exits with 0 done, 1 failed, 2 bad input, or 130 interrupted."""
    given = sys.argv[1:] if args is None else args
    debug = "--debug" in given
    given = [arg for arg in given if arg != "--debug"]  # welcome after the command as well
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be text; in JSON it is their escape
    try:
        code = typer.main.get_command(app).main(given, prog_name="clipgraft", standalone_mode=False)
        if code == 130:  # what Typer makes of Ctrl-C
            _failed("interrupted", code, debug=False)
    except ClipgraftError as error:
        code = _failed(str(error), error.exit_code, debug)
    except OSError as error:  # a full disk, no permission, a name that is too long
        place = f"{error.filename}: " if error.filename else ""
        code = _failed(f"{place}{error.strerror or one_line(error)}", 1, debug)
    except typer.Abort:
        code = _failed("aborted", 1, debug)
    except Exception as error:
        if lost := lost_process(error):
            code = _failed(lost, 1, debug)
        elif isinstance(error, RuntimeError) and "home directory" in str(error):  # of Path.expanduser, anywhere
            code = _failed("a path starts with ~ and a name that no user has; write the path in full", 2, debug)
        elif not hasattr(error, "format_message"):
            code = _failed(f"{one_line(error)}; run again with --debug for the traceback", 1, debug)
        elif message := error.format_message():  # wrong usage, from Typer's vendored click
            place = getattr(getattr(error, "ctx", None), "command_path", "clipgraft")
            code = _failed(f"{message} See {place} --help", 2, debug)
        else:  # a group without a command: its help was printed
            code = 2
    except (SystemExit, KeyboardInterrupt):
        raise
    except BaseException as error:  # such as a panic of a library in Rust
        code = _failed(f"{one_line(error)}; run again with --debug for the traceback", 1, debug)
    raise SystemExit(code if isinstance(code, int) else 0)


def _failed(message: str, code: int, debug: bool) -> int:
    """Print one line, after the traceback of the exception being handled when that was asked for."""
    if debug:
        import traceback

        traceback.print_exc()
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return code
