"""Errors that are one clear line with the fix. Exit codes: 2 for bad input, 1 for a failure while working."""

from __future__ import annotations

from collections.abc import Iterable


class ClipgraftError(Exception):
    """A failure while working; the command line prints it as one line and exits with ``exit_code``."""

    exit_code = 1


class InputError(ClipgraftError):
    """Bad input: a name, path, config value or file that the user can correct."""

    exit_code = 2


class PluginError(ClipgraftError):
    """A plugin could not be loaded, resolved or built."""


class NonFiniteLossError(ClipgraftError):
    """The loss became NaN or infinite; the optimizer step was not taken."""


class Interrupted(ClipgraftError):
    """The run was asked to stop (SIGINT, SIGTERM) and has saved its state."""

    exit_code = 130


def lost_process(error: BaseException) -> str:
    """What to say when an error is that a process this one relies on is gone; empty for other errors.

    torch raises ``RuntimeError`` and its children for both, so their words tell.
    """
    if not isinstance(error, RuntimeError):
        return ""
    text = str(error)
    if "DataLoader worker" in text:
        return "a process that reads data was killed, perhaps for want of memory: use fewer workers, or make room"
    if any(words in text for words in ("closed by peer", "reset by peer", "Broken pipe", "remote process exited")):
        return "another process of this command ended; its own message says why"
    return ""


def unknown_name(kind: str, name: str, known: Iterable[str], *, hint: str = "") -> InputError:
    """An ``InputError`` for a name that isn't there, with close matches."""
    import difflib

    choices = sorted(known)
    close = difflib.get_close_matches(name, choices, n=3, cutoff=0.5) if len(name) < 200 else []
    more = f" and {len(choices) - 12} more" if len(choices) > 12 else ""
    text = (
        f"did you mean {' or '.join(close)}?"
        if close
        else f"known: {', '.join(c[:60] for c in choices[:12]) or 'none'}{more}."
    )
    return InputError(f"unknown {kind} {name!r:.100}; {text}{' ' + hint if hint else ''}")
