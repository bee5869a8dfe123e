"""Images in a folder: one sub-folder per class, or flat."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from clipgraft.data.images import MAX_PIXELS, SUFFIXES, ImageFiles
from clipgraft.errors import InputError


def open_folder(folder: str | Path, *, max_pixels: int = MAX_PIXELS) -> ImageFiles:
    """``folder:DIR``. Sub-folders are classes in the order of their names; images directly in DIR have no label.

    Hidden files and folders are left out. A linked folder is an error if it leaves DIR and else not entered twice.
    """
    root, name = Path(folder).expanduser().resolve(), f"folder:{folder}"
    if not root.is_dir():
        raise InputError(f"{name}: there is no such folder")
    found = []
    for here, folders, files in os.walk(root):
        folders[:] = _enter(Path(here), folders, root=root, source=name)
        images = [file for file in files if Path(file).suffix.lower() in SUFFIXES and not file.startswith(".")]
        found += [Path(here, file).relative_to(root).as_posix() for file in images]
    flat, nested = [path for path in found if "/" not in path], [path for path in found if "/" in path]
    if flat and nested:
        raise InputError(f"{name}: {min(flat)} lies beside class folders ({min(nested)}); move it into one of them")
    classes = [] if flat else sorted(_enter(root, os.listdir(root), root=root, source=name))
    if bare := set(classes) - {path.partition("/")[0] for path in nested}:
        raise InputError(f"{name}: class folder {min(bare)!r} holds no image; add some or remove the folder")
    if not found:
        raise InputError(f"{name}: no image found; their names end in {', '.join(sorted(SUFFIXES))}")
    labels = {path: classes.index(path.partition("/")[0]) for path in nested}
    return ImageFiles(name, root, dict.fromkeys(sorted(found), ()), labels, classes, max_pixels)


def _enter(here: Path, names: Sequence[str], *, root: Path, source: str) -> list[str]:
    """The folders among ``names`` to look into."""
    kept = [name for name in names if not name.startswith((".", "__")) and (here / name).is_dir()]
    links = [name for name in kept if (here / name).is_symlink()]
    for link in links:
        if not (here / link).resolve().is_relative_to(root):
            raise InputError(f"{source}: {link} links to a folder outside; copy it in, or open its target instead")
    return [name for name in kept if name not in links]
