"""``hf:``: Hugging Face datasets, memory-mapped, or the first rows of a stream. No code of a data set ever runs."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipgraft.data.base import BadSample, Entry, Sample
from clipgraft.data.images import LEAVES, MAX_PIXELS, decode_image
from clipgraft.data.pairs import classes_of
from clipgraft.errors import InputError
from clipgraft.log import RunLog
from clipgraft_data.told import Told, caption_keys, class_name, told

if TYPE_CHECKING:
    from datasets import Features

CAPTIONS = ("captions", "caption", "text")
"""Columns of captions, in the order in which they are looked for."""
FILES = (".parquet", ".arrow")


class HuggingFace:
    """Rows of a data set with an image column: an Image feature, bytes, or {bytes, path}."""

    def __init__(
        self,
        *,
        path: str,
        name: str | None = None,
        split: str | None = None,
        revision: str | None = None,
        image: str = "image",
        caption: str | None = None,
        label: str | None = None,
        id: str | None = None,
        take: int | None = None,
        streaming: bool = False,
        max_pixels: int = MAX_PIXELS,
        scheme: str = "hf",
    ) -> None:
        self.name, self.image, self.max_pixels, self.id = f"{scheme}:{path}", image, max_pixels, id
        self.templates: Sequence[str] = ()
        self.attributes: Mapping[str, Sequence[str]] = {}
        if streaming and take is None:
            raise InputError(f"{self.name}: a stream has no index to resume by; write ?take=N to keep its first N rows")
        local = Path(path).expanduser()
        self.rows, features, mark = _opened(
            self.name, local if local.exists() else path, name=name, split=split, revision=revision, take=take
        )
        columns = list(features)
        caption = caption or next((column for column in CAPTIONS if column in columns), None)
        self.keys = {} if caption is None else caption_keys(caption, where=self.name)
        label = label or ("label" if "label" in columns else None)
        if absent := [c for c in (image, *self.keys, label, id) if c is not None and c not in columns]:
            raise InputError(
                f"{self.name}: no column {absent[0]!r}; it has {', '.join(columns)}. Write ?image=...&caption=..."
            )
        self.roots = [local.resolve() if local.is_dir() else local.resolve().parent] if local.exists() else _caches()
        if not isinstance(self.rows, list):
            self.rows, self.words = _views(self.rows, image, features)
        else:
            self.words = [{key: value for key, value in row.items() if key != image} for row in self.rows]
        self._name_classes(label, features)
        self._check_ids()
        told = (mark, split, name, image, caption, label, id, take, len(self.rows), [*self.classes])
        self.fingerprint = hashlib.sha256(repr(told).encode("utf-8", "backslashreplace")).hexdigest()

    def _name_classes(self, label: str | None, features: Features) -> None:
        """Names of a ClassLabel, or the distinct values of the column."""
        self.label, self.numbers = label, dict[str, int]()
        self.classes: Sequence[str] = ()
        if label is None:
            return
        if names := getattr(features[label], "names", None):
            self.classes, self.numbers = list(names), {str(k): k for k in range(len(names))}
            return
        try:
            values = {class_name(value) for value in _column(self.words, label)} - {None}
        except (ValueError, TypeError) as error:
            raise InputError(f"{self.name}: column {label}: {error}") from None
        self.classes = classes_of(value for value in values if value is not None)
        self.numbers = {value: k for k, value in enumerate(self.classes)}

    def _check_ids(self) -> None:
        if self.id is not None and len(set(_column(self.words, self.id))) < len(self):
            raise InputError(f"{self.name}: column {self.id} repeats itself; leave ?id= out or name another column")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        row = self.rows[range(len(self))[index]]
        name, found = self._id(index, row), self._told(index, row)
        if "" in found.captions:
            raise BadSample(name, "empty caption")
        picture = decode_image(io.BytesIO(self._bytes(name, row)), sample_id=name, max_pixels=self.max_pixels)
        return Sample(
            name,
            picture,
            found.captions,
            self.numbers.get(found.label or ""),
            caption_weights=found.weights,
            negatives=found.negatives,
            group=found.group,
        )

    def entry(self, index: int) -> Entry:
        """Everything but the image."""
        row = self.words[range(len(self))[index]]
        found = self._told(index, row)
        return Entry(self._id(index, row), found.captions, self.numbers.get(found.label or ""), found.group)

    def content(self, index: int) -> bytes:
        """The image file of a row."""
        row = self.rows[range(len(self))[index]]
        return self._bytes(self._id(index, row), row)

    def _id(self, index: int, row: Mapping[str, Any]) -> str:
        return str(row[self.id]) if self.id is not None else str(range(len(self))[index])

    def _told(self, index: int, row: Mapping[str, Any]) -> Told:
        try:
            return told(row, self.keys, label=self.label or "")
        except ValueError as error:
            raise BadSample(self._id(index, row), str(error)) from None

    def _bytes(self, name: str, row: Mapping[str, Any]) -> bytes:
        """The encoded image; a path is followed inside the data set's own folders only."""
        value = row[self.image]
        path = value.get("path") if isinstance(value, Mapping) else None
        value = value.get("bytes") if isinstance(value, Mapping) else value
        if isinstance(value, bytes):
            return value
        if value is None and path is None:
            raise BadSample(name, "missing image")
        if value is not None or not isinstance(path, str):
            raise BadSample(name, f"column {self.image} holds a {type(value).__name__}; for paths use table:")
        file = next((f for root in self.roots if (f := (root / path).resolve()).is_relative_to(root)), None)
        if file is None:
            raise BadSample(name, LEAVES)
        try:
            return file.read_bytes()
        except OSError:
            raise BadSample(name, "missing file") from None


def _opened(
    title: str, path: Path | str, *, name: str | None, split: str | None, revision: str | None, take: int | None
) -> tuple[Any, Features, object]:
    """Rows (a Dataset, or a list after ``take``), their features, and what their fingerprint follows."""
    import datasets

    if isinstance(path, str) and path.startswith(("/", ".", "~")):
        raise InputError(f"{title}: there is no such file or folder")
    try:
        if isinstance(path, Path) and path.is_dir() and list(path.glob("dataset_*.json")):
            rows: Any = datasets.load_from_disk(str(path))
        elif isinstance(path, Path) and path.suffix == ".arrow":
            rows = datasets.Dataset.from_file(str(path))
        elif isinstance(path, Path) and path.is_file():
            if path.suffix != ".parquet":
                raise InputError(f"{title}: expected a folder or a file that ends in {' or '.join(FILES)}")
            rows = datasets.load_dataset("parquet", data_files=str(path), streaming=take is not None)
        else:
            where = {"path": str(path), "name": name, "revision": revision, "split": split}
            rows = datasets.load_dataset(**where, streaming=take is not None)
    except InputError:
        raise
    except Exception as error:  # the hub's and the file system's errors have many classes and one meaning here
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise InputError(
            f"{title} can't be loaded: {reason}. Look at the name and ?split=; without network only what "
            "was downloaded before opens"
        ) from None
    if isinstance(rows, dict):
        if split not in rows and (split is not None or len(rows) > 1):
            raise InputError(f"{title}: split {split} unknown; it has {', '.join(rows)}: write ?split=NAME")
        rows = rows[split or next(iter(rows))]
    features = rows.features
    if isinstance(rows, datasets.IterableDataset):
        assert take is not None
        kept, features = _streamed(rows, take, title)
        return kept, features, [hashlib.sha256(repr(row).encode()).hexdigest() for row in kept]
    if take is not None:
        rows = rows.select(range(min(take, len(rows))))
    if isinstance(path, str):
        return rows, features, rows._fingerprint
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    return rows, features, [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files]


def _streamed(rows: Any, take: int, title: str) -> tuple[list[dict[str, Any]], Features]:
    """The first ``take`` rows, their images still encoded."""
    import datasets

    features = rows.features or rows._resolve_features().features
    for column, feature in features.items():
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(column, datasets.Image(decode=False))
    kept = []
    with RunLog().progress(f"streaming {title}", take) as bar:
        for row in islice(rows, take):
            kept.append(row)
            bar.advance()
    return kept, features


def _views(rows: Any, image: str, features: Features) -> tuple[Any, Any]:
    """The rows with their images still encoded, and without them."""
    import datasets

    words = rows.select_columns([column for column in features if column != image])
    if isinstance(features[image], datasets.Image):
        rows = rows.cast_column(image, datasets.Image(decode=False))
    return rows, words


def _column(words: Any, name: str) -> Iterable[Any]:
    return [row[name] for row in words] if isinstance(words, list) else words[name]


def _caches() -> list[Path]:
    """Where the hub's files are kept."""
    from datasets import config
    from huggingface_hub import constants

    return [Path(config.HF_DATASETS_CACHE).resolve(), Path(constants.HF_HUB_CACHE).resolve()]
