"""``table:``: manifests in Parquet or JSON lines, with images by path or, in Parquet, inside."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from clipgraft.data.base import Source
from clipgraft.data.images import MAX_PIXELS, ImageFiles
from clipgraft.data.pairs import classes_of
from clipgraft.errors import InputError
from clipgraft_data.told import Told, caption_keys, told

FIELDS = ("image", "caption_weights", "label", "negatives", "group")
LINES = (".jsonl", ".ndjson", ".json")


def table(*, path: str, captions: str | None = None, max_pixels: int = MAX_PIXELS) -> Source:
    """Columns image, caption or captions (a list), caption_weights (a list), label, negatives (a list), group.

    Rows of one image are put together. Nulls, NaN and empty captions are empty cells; other columns are ignored.
    """
    name, file = f"table:{path}", Path(path).expanduser().resolve()
    if not file.is_file():
        raise InputError(f"{name}: there is no such file")
    if file.suffix.lower() in LINES:
        rows = list(_json_lines(file, name))
        columns = {column for _, row in rows for column in row}
    elif file.suffix.lower() == ".parquet":
        columns, inside = _schema(file, name)
    else:
        raise InputError(f"{name}: expected a file that ends in .parquet or .jsonl; a .csv opens with csv:")
    if captions is None:
        captions = next((column for column in ("captions", "caption") if column in columns), None)
    keys = {} if captions is None else caption_keys(captions, where=name)
    if "image" not in columns or not ({"label"} | keys.keys()) & columns or keys.keys() - columns:
        found = ", ".join(sorted(columns)) or "none"
        raise InputError(f"{name}: expected the columns image and {captions or 'caption (or label)'}, found {found}")
    if file.suffix.lower() == ".parquet":
        if inside:
            from clipgraft_data.hub import HuggingFace

            unique = "id" if "id" in columns else None
            return HuggingFace(path=path, caption=captions, id=unique, max_pixels=max_pixels, scheme="table")
        rows = list(_parquet(file, sorted({*FIELDS, *keys} & columns), name))
    return gathered(rows, keys, name=name, root=file.parent, max_pixels=max_pixels)


def gathered(
    rows: Iterable[tuple[str, Mapping[str, Any]]],
    keys: Mapping[str, float],
    *,
    name: str,
    root: Path,
    max_pixels: int = MAX_PIXELS,
) -> ImageFiles:
    """(place for messages, row) with an image path each -> one sample per image."""
    found = dict[str, Told]()
    for where, row in rows:
        image = row.get("image")
        if not isinstance(image, str) or not image.strip():
            raise InputError(f"{name} {where}: a caption without an image; fill in the image column")
        image = image.strip()
        try:
            new = told(row, keys)
        except ValueError as error:
            raise InputError(f"{name} {where}: {error}") from None
        found[image] = _joined(found[image], new, where=f"{name} {where}: {image}") if image in found else new
    if not found:
        raise InputError(f"{name}: it holds no row")
    values = {image: one.label for image, one in found.items() if one.label is not None}
    if values and (bare := found.keys() - values.keys()):
        raise InputError(f"{name}: {min(bare)} has no label but others have one; fill in the label column")
    classes = classes_of(values.values())
    number = {value: k for k, value in enumerate(classes)}
    return ImageFiles(
        name,
        root,
        {image: one.captions for image, one in found.items()},
        {image: number[value] for image, value in values.items()},
        classes,
        max_pixels,
        weights={image: one.weights for image, one in found.items() if one.weights},
        negatives={image: one.negatives for image, one in found.items() if one.negatives},
        groups={image: one.group for image, one in found.items() if one.group},
    )


def _joined(old: Told, new: Told, *, where: str) -> Told:
    """Two rows of one image; captions without a weight weigh 1 where others have one."""
    for what, a, b in (("labels", old.label, new.label), ("groups", old.group or None, new.group or None)):
        if a is not None and b is not None and a != b:
            raise InputError(f"{where} has two {what}, {a!r} and {b!r}; keep one of them")
    weights: tuple[float, ...] = ()
    if old.weights or new.weights:
        weights = (old.weights or (1.0,) * len(old.captions)) + (new.weights or (1.0,) * len(new.captions))
    return replace(
        old,
        captions=old.captions + new.captions,
        weights=weights,
        negatives=old.negatives + new.negatives,
        label=old.label if new.label is None else new.label,
        group=old.group or new.group,
    )


def _json_lines(file: Path, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    number = 0
    try:
        with file.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise InputError(f"{name} line {number}: expected an object {{...}}, got a {type(row).__name__}")
                yield f"line {number}", row
    except UnicodeDecodeError as error:
        raise InputError(f"{name}: not UTF-8 at byte {error.start} after line {number}; save it as UTF-8") from None
    except (ValueError, RecursionError) as error:  # no JSON, numbers of 5,000 digits, 1,000 brackets
        raise InputError(f"{name} line {number}: no JSON ({error}); expected one object per line") from None


def _schema(file: Path, name: str) -> tuple[set[str], bool]:
    """Column names, and whether the images are inside."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        schema = pq.read_schema(file)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{name}: no Parquet file that can be read: {str(error).splitlines()[0]}") from None
    kind = schema.field("image").type if "image" in schema.names else pa.string()
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        binary = pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
        if not binary and not (pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0):
            raise InputError(f"{name}: column image is {kind}; expected paths (text) or encoded images (bytes)")
        return set(schema.names), True
    return set(schema.names), False


def _parquet(file: Path, columns: list[str], name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        for batch in pq.ParquetFile(file).iter_batches(columns=columns):
            for row in batch.to_pylist():
                number += 1
                yield f"row {number}", row
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{name}: can't be read after row {number}: {str(error).splitlines()[0]}") from None
