"""MMVP-VLM: pairs of images that CLIP confuses, in nine visual patterns (Tong et al. 2024, arXiv 2401.06209)."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from clipgraft.config.schema import Config
from clipgraft.errors import InputError
from clipgraft_evaluation.layouts import ImagePairs, PairRow, folder_of

TABLE, COLUMNS = "Questions.csv", ("question id", "type", "statement")
IMAGE_FOLDERS = ("MLLM_VLM Images", "MLLM_VLM_Images", "MMVP_VLM_Images")
"""As the data, DIVA's scripts and MMVP's README spell it."""


class MmvpConfig(Config):
    """``mmvp:DIR``."""

    path: str = Field(description=f"folder with {TABLE} and a folder of images per pattern in '{IMAGE_FOLDERS[0]}'")
    prompt: str = Field("a photo of {}", description="the text for a statement, which goes where {} is")


def open_mmvp(*, path: str, prompt: str = "a photo of {}") -> ImagePairs:
    """Pairs are the ids 1 and 2, 3 and 4 and so on, in that order, wherever their rows stand in the table.

    A pattern is what the column Type says. The official script takes neighbouring rows as pairs and every 15 of them
    as a pattern, which is the same for the table as it is published.
    """
    name = f"mmvp:{path}"
    if prompt.count("{}") != 1:
        raise InputError(f"{name}: the prompt {prompt!r} must hold {{}} once, where the statement goes")
    root = folder_of(path, source=name, holds=TABLE)
    images = next((folder for folder in IMAGE_FOLDERS if (root / folder).is_dir()), None)
    if images is None:
        raise InputError(f"{name}: no folder of images beside {TABLE}; it is called {' or '.join(IMAGE_FOLDERS)}")
    found = _read(root / TABLE, source=name)
    rows = []
    for odd in sorted({number - 1 + number % 2 for number in found}):
        if missing := [number for number in (odd, odd + 1) if number not in found]:
            raise InputError(f"{name}: {TABLE} has no row {missing[0]}, the other half of the pair {odd}-{odd + 1}")
        (first, one), (second, two) = found[odd], found[odd + 1]
        if first != second:
            raise InputError(f"{name}: the pair {odd}-{odd + 1} has two types, {first!r} and {second!r}; correct one")
        folder = _folder(root / images, first)
        files = (f"{folder}/{odd}.jpg", f"{folder}/{odd + 1}.jpg")
        rows.append(PairRow(f"{odd}-{odd + 1}", files, (prompt.replace("{}", one), prompt.replace("{}", two)), first))
    return ImagePairs(name, root / images, rows)


def _folder(images: Path, pattern: str) -> str:
    """The pattern's folder, with underscores for spaces where it is spelt so."""
    spelt = (pattern, pattern.replace(" ", "_"), pattern.replace("_", " "))
    return next((folder for folder in spelt if (images / folder).is_dir()), pattern)


def _read(file: Path, *, source: str) -> dict[int, tuple[str, str]]:
    """{id: (type, statement)}; a statement with commas needs no quotes where it is the last column."""
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            table = csv.reader(lines, skipinitialspace=True)
            order = _columns(next(table, []), where=f"{source}: {file.name}")
            found: dict[int, tuple[str, str]] = {}
            for cells in table:
                if not any(cell.strip() for cell in cells):
                    continue
                where = f"{source}: {file.name} line {table.line_num}"
                if len(cells) > 3 and order[-1] == 2:
                    cells = [*cells[:2], ", ".join(cell.strip() for cell in cells[2:])]
                if len(cells) != 3:
                    raise InputError(f"{where} has {len(cells)} cells, expected 3; put quotes around the statement")
                number, pattern, statement = (cells[k].strip() for k in order)
                if not number.isdecimal() or not int(number):
                    raise InputError(f"{where}: the id {number!r} is no number from 1 on; take the published table")
                if int(number) in found:
                    raise InputError(f"{where}: the id {number} stands there twice; keep one of its rows")
                if not pattern or not statement:
                    raise InputError(f"{where}: an id without type or statement; fill both in")
                found[int(number)] = pattern, statement
    except UnicodeDecodeError as error:
        raise InputError(f"{source}: {file.name} is not UTF-8 at byte {error.start}; save it as UTF-8") from None
    except csv.Error as error:
        raise InputError(f"{source}: {file.name} is not a table that can be read: {error}") from None
    if not found:
        raise InputError(f"{source}: {file.name} has no row below the header")
    return found


def _columns(header: Sequence[str], *, where: str) -> tuple[int, int, int]:
    """Where id, type and statement stand."""
    names = [" ".join(cell.replace("_", " ").lower().split()) for cell in header]
    if sorted(names) != sorted(COLUMNS):
        raise InputError(f"{where}: expected the columns Question ID, Type and Statement, found {', '.join(header)}")
    number, pattern, statement = (names.index(column) for column in COLUMNS)
    return number, pattern, statement
