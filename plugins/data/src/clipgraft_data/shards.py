"""``wds:``: webdataset tar shards as an indexable source, read by offset."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clipgraft.data.base import BadSample, Entry, Sample
from clipgraft.data.images import MAX_PIXELS, decode_image
from clipgraft.data.pairs import classes_of
from clipgraft.errors import InputError
from clipgraft.log import RunLog
from clipgraft_data.tar_index import IMAGES, Index, build
from clipgraft_data.told import Told, caption_keys, texts, told

LARGEST = 2**28
"""Bytes of a member that are read at most."""
MOST = 100_000
"""Shards that a pattern may name."""
OPEN = 64
"""Shards that a process keeps open."""


class Shards:
    """Samples of tar shards in the order of the shards; ids are SHARD/KEY.

    ``classnames.txt`` and ``zeroshot_classification_templates.txt`` beside the shards or one folder up, a line each,
    name the classes that numbers in .cls members count, and prompts, as CLIP_benchmark's sets have them.
    """

    templates: Sequence[str]
    attributes: Mapping[str, Sequence[str]]

    def __init__(
        self,
        *,
        path: str,
        captions: str | None = None,
        lines: bool = False,
        truncated: str = "refuse",
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.name, self.lines, self.max_pixels = f"wds:{path}", lines, max_pixels
        self.keys = caption_keys(captions, where=self.name) if captions is not None else {"caption": 1.0}
        self.from_json = captions is not None
        paths = shard_paths(path, name=self.name)
        with RunLog().progress(f"reading the index of {self.name}", len(paths)) as bar:
            self.index: Index = build(paths, name=self.name, keep_truncated=truncated == "keep", bar=bar)
        if not (self.index.suffix >= 0).any():
            raise InputError(
                f"{self.name}: {len(self.index.keys)} samples but no image; expected members that end in "
                f".{', .'.join(IMAGES)}"
            )
        root = Path(os.path.commonpath([p.parent for p in paths]))
        self.stems = [p.relative_to(root).with_suffix("").as_posix() for p in paths]
        self._name_classes(root)
        settings = (captions, lines, truncated, [*self.classes], [*self.templates])
        told = [(s.path.relative_to(root).as_posix(), s.bytes, s.mtime_ns) for s in self.index.shards]
        self.fingerprint = hashlib.sha256(repr((told, settings)).encode("utf-8", "backslashreplace")).hexdigest()
        self._open: OrderedDict[int, int] = OrderedDict()
        self._owner = os.getpid()

    def _name_classes(self, root: Path) -> None:
        """Labels as numbers, the classes' names and the prompts that come with them."""
        values = [label for label in self.index.labels if label is not None]
        names = _lines_beside(root, "classnames.txt") if values else []
        self.classes: Sequence[str] = names or classes_of(values)
        number = {str(k): k for k in range(len(names))} if names else {}
        number |= {name: k for k, name in enumerate(self.classes) if name not in number}
        if unknown := next((value for value in values if value not in number), None):
            raise InputError(f"{self.name}: class {unknown!r} is none of the {len(names)} in classnames.txt")
        if values and (bare := next((k for k, v in enumerate(self.index.labels) if v is None), None)) is not None:
            raise InputError(f"{self.name}: {self._id(bare)} has no .cls but others have one; add it")
        self.labels = [None if value is None else number[value] for value in self.index.labels]
        prompts = _lines_beside(root, "zeroshot_classification_templates.txt") if values else []
        self.templates = [prompt.replace("{c}", "{}") for prompt in prompts]
        self.attributes = {}

    def __len__(self) -> int:
        return len(self.index.keys)

    def __getitem__(self, index: int) -> Sample:
        found = self._told(index)
        if "" in found.captions:
            raise BadSample(self._id(index), "empty caption")
        image = decode_image(io.BytesIO(self.content(index)), sample_id=self._id(index), max_pixels=self.max_pixels)
        return Sample(
            self._id(index),
            image,
            found.captions,
            self.labels[index],
            caption_weights=found.weights,
            negatives=found.negatives,
            group=found.group,
        )

    def entry(self, index: int) -> Entry:
        """Everything but the image."""
        found, name, suffix = self._told(index), self._id(index), int(self.index.suffix[index])
        file = f"{name}.{IMAGES[suffix]}" if suffix >= 0 else ""
        return Entry(name, found.captions, self.labels[index], found.group, file)

    def content(self, index: int) -> bytes:
        """The image member."""
        content = self._read(index, "image")
        if content is None:
            raise BadSample(self._id(index), "a caption without an image")
        return content

    def _id(self, index: int) -> str:
        return f"{self.stems[self.index.shard[index]]}/{self.index.keys[index]}"

    def _told(self, index: int) -> Told:
        """Captions of .txt, or of .json when ``captions`` names its fields or there is no .txt."""
        try:
            text = None if self.from_json else self._read(index, "txt")
            if text is not None and not self.lines:
                return Told(captions=texts(text.decode(), "caption"))
            if text is not None:
                return Told(
                    captions=tuple(line.strip() for line in text.decode().splitlines() if line.strip()) or ("",)
                )
            row = self._read(index, "json")
            if row is None:
                return Told(captions=("",)) if self.from_json else Told()
            values = json.loads(row)
            if not isinstance(values, dict):
                raise ValueError("the .json member holds no object")
            return told(values, self.keys)
        except UnicodeDecodeError:
            reason = "the caption is not UTF-8"
        except json.JSONDecodeError as error:
            reason = f"the .json member can't be read: {error}"
        except (ValueError, RecursionError) as error:
            reason = str(error).splitlines()[0]
        raise BadSample(self._id(index), reason)

    def _read(self, index: int, kind: str) -> bytes | None:
        """The bytes of one member; None when the sample has none of this kind."""
        offset, size = map(int, self.index.at[kind][index])
        if size < 0:
            return None
        if size > LARGEST:
            raise BadSample(self._id(index), f"refused: {size} bytes, more than {LARGEST}")
        found = os.pread(self._handle(int(self.index.shard[index]), index), size, offset)
        if len(found) != size:
            raise BadSample(self._id(index), "the shard ends inside this sample")
        return found

    def _handle(self, shard: int, index: int) -> int:
        """A descriptor of this process; reading by position leaves nothing to share or to restore."""
        if self._owner != os.getpid():
            self._open, self._owner = OrderedDict(), os.getpid()
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        known = self.index.shards[shard]
        try:
            handle = os.open(known.path, os.O_RDONLY)
        except OSError as error:
            raise BadSample(self._id(index), f"the shard can't be read: {error.strerror}") from None
        stat = os.fstat(handle)
        if (stat.st_size, stat.st_mtime_ns) != (known.bytes, known.mtime_ns):
            os.close(handle)
            raise InputError(f"{self.name}: {known.path.name} changed since it was opened; start again")
        if len(self._open) == OPEN:
            os.close(self._open.popitem(last=False)[1])
        self._open[shard] = handle
        return handle

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": OrderedDict(), "_owner": -1}

    def __del__(self) -> None:
        if getattr(self, "_owner", -1) == os.getpid():
            for handle in self._open.values():
                os.close(handle)


def shard_paths(path: str, *, name: str) -> list[Path]:
    """The tar files that ``path`` names, braces expanded as webdataset does, without running or fetching anything."""
    import webdataset.utils
    from webdataset.shardlists import expand_urls

    webdataset.utils.enforce_security = True
    if any(part.lstrip().startswith("pipe:") for part in path.split("::")) or "://" in path:
        raise InputError(f"{name}: only files are opened, no commands and no addresses; download the shards first")
    folder = Path(path).expanduser()
    if folder.is_dir():
        found = sorted(p for p in folder.resolve().iterdir() if p.suffix == ".tar" and not p.name.startswith("."))
        if not found:
            raise InputError(f"{name}: no .tar file in this folder")
        return found
    try:
        if _stands_for(path) > MOST:  # before the names are made
            raise ValueError(f"more than {MOST} shards are named")
        found = [Path(part).expanduser().resolve() for part in expand_urls(path)]
    except Exception as error:  # braceexpand's own errors and webdataset's assertions
        raise InputError(f"{name}: {str(error) or type(error).__name__}; write {{000000..000009}}") from None
    if missing := next((p for p in found if not p.is_file()), None):
        several = f"; {len(found)} shards are named" if len(found) > 1 else ""
        raise InputError(f"{name}: there is no {missing.name} in {missing.parent.name or '/'}{several}")
    if len(set(found)) < len(found):
        raise InputError(f"{name}: names a shard twice; name each once")
    return found


def _stands_for(pattern: str) -> int:
    """How many names a pattern with braces makes, at most."""
    total, more = 1, True
    while more and total <= MOST:
        found = re.search(r"\{([^{}]*)\}", pattern)
        if more := found is not None:
            ends = re.match(r"(-?\d+)\.\.(-?\d+)", found[1])
            wide = ends is not None and max(map(len, ends.groups())) > 18
            span = abs(int(ends[2]) - int(ends[1])) + 1 if ends and not wide else found[1].count(",") + 1
            total *= MOST + 1 if wide else span
            pattern = pattern[: found.start()] + pattern[found.end() :]
    return total


def _lines_beside(root: Path, name: str) -> list[str]:
    """The lines of a file in ``root`` or its parent; [] when there is none."""
    for folder in (root, root.parent):
        if (folder / name).is_file():
            try:
                lines = (folder / name).read_text("utf-8").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                reason = getattr(error, "strerror", None) or "not UTF-8 text"
                raise InputError(f"{folder / name} can't be read ({reason}); correct it or move it away") from None
            return [line.strip() for line in lines if line.strip()]
    return []
