"""Words around and for classes: prompt templates and class names, built in, from text files, or as given."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from clipgraft.errors import InputError, unknown_name

SETS = {"openai-imagenet": "OPENAI_IMAGENET_TEMPLATES", "simple": "SIMPLE_IMAGENET_TEMPLATES"}
"""Sets that open_clip ships: the 80 of Radford et al. 2021, and seven that do nearly as well."""


def prompt_templates(given: str | Sequence[str]) -> tuple[str, ...]:
    """A set by name, ``file:FILE`` with one template per line, or a list; each holds ``{}`` once."""
    if not isinstance(given, str):
        return tuple(given)
    if given.startswith("file:"):
        lines = _lines(given)
        if bad := [(number, line) for number, line in lines if line.count("{}") != 1]:
            raise InputError(f"{given} line {bad[0][0]}: {bad[0][1]!r} must hold {{}} once, where the class name goes")
        return tuple(line for _, line in lines)
    if given not in SETS:
        raise unknown_name("set of templates", given, SETS, hint="Or give file:FILE, or a list of templates.")
    import open_clip

    return tuple(template("{}") for template in getattr(open_clip, SETS[given]))


def class_names(given: str | Sequence[str], classes: Sequence[str], *, source: str) -> tuple[str, ...]:
    """What the ``classes`` of a source are called: a list, or ``file:FILE``, in their order; none leaves them.

    A line of the file is a name. Or it is a class as the source has it and its name, parted by a tab, or by a space
    where classes hold digits ("n01440764 tench"); then the order is free and further classes may be listed.
    """
    if not given:
        return tuple(classes)
    names, what = (tuple(given), "classnames") if not isinstance(given, str) else (None, given)
    if names is None:
        if not what.startswith("file:"):
            raise InputError(f"classnames {what!r} is neither a list nor a file; write file:{what}")
        lines = [line for _, line in _lines(what)]
        pairs = [_pair(line, classes) for line in lines]
        if any(pairs):
            known = dict(pair for pair in pairs if pair)
            if bare := [name for name in classes if name not in known]:
                raise InputError(f"{what} has no name for {bare[0]}, one of the classes of {source}; add a line for it")
            return tuple(known[name] for name in classes)
        names = tuple(lines)
    if len(names) != len(classes):
        raise InputError(f"{what} has {len(names)} names for the {len(classes)} classes of {source}; give one for each")
    return names


def _pair(line: str, classes: Sequence[str]) -> tuple[str, str] | None:
    first, _, rest = (part.strip() for part in line.partition("\t" if "\t" in line else " "))
    coded = "\t" in line or (first in classes and any(c.isdigit() for c in first))
    return (first, rest) if coded and rest else None


def _lines(reference: str) -> list[tuple[int, str]]:
    """Numbered lines of ``file:FILE`` without blank ones and # comments."""
    path = Path(reference.removeprefix("file:")).expanduser()
    try:
        lines = enumerate(path.read_text("utf-8-sig").splitlines(), 1)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise InputError(f"{reference} can't be read ({reason}); give a text file with one entry per line") from None
    found = [(number, line.strip()) for number, line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not found:
        raise InputError(f"{reference} holds no entry; write one per line")
    return found
