"""The file of embeddings: written from parts without holding them all, opened without reading it all.

safetensors: ``embeddings`` (n, D) fp32 or fp16, ``ids_json`` uint8: a JSON array of n ids in UTF-8, for texts
``captions_json`` alike; the metadata key ``clipgraft`` is JSON (``About``). Parquet: columns ``id``, ``embedding``
(fixed-size list), ``label`` (class name or null), ``caption`` (or null), one row group per part; the same metadata.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from clipgraft.errors import ClipgraftError, InputError
from clipgraft_embedding.parts import Plan, from_bytes

FORMAT = 1
SUFFIXES = (".safetensors", ".parquet")


@dataclass(frozen=True, slots=True)
class About:
    """Where embeddings came from: n ``rows`` of ``dim`` D from ``total`` samples, ``skipped`` of them unreadable."""

    kind: str
    model: str
    tower_sha256: str
    source: str
    fingerprint: str
    preprocess: Mapping[str, Any]
    precision: str
    dtype: str
    rows: int
    dim: int
    total: int
    skipped: int
    format: int = FORMAT


def check_suffix(path: Path) -> None:
    """``InputError`` unless the name says the format."""
    if path.suffix not in SUFFIXES:
        raise InputError(f"{path} says no format; let its name end in {' or '.join(SUFFIXES)}")


def join(path: Path, plan: Plan, parts: Sequence[Path], *, classes: Sequence[str], draft: Path) -> About:
    """Write ``path`` from all parts through ``draft`` (same file system); one part is in memory at a time."""
    rows, skipped, dim = 0, 0, 0
    for part in parts:
        with safe_open(part, "pt") as file:
            m, dim = file.get_slice("embeddings").get_shape()
            rows, skipped = rows + m, skipped + len(from_bytes(file.get_tensor("bad")))
    kept = {k: v for k, v in asdict(plan).items() if k not in ("batch_size", "shard_size")}
    about = About(**kept, rows=rows, dim=dim, skipped=skipped)
    if not rows:
        raise InputError(f"{plan.source} has nothing to embed: {skipped} of {plan.total} samples can't be read")
    try:
        if path.suffix == ".parquet":
            _write_parquet(draft, about, parts, classes=classes)
        else:
            _write_safetensors(draft, about, parts)
        with draft.open("rb") as file:
            os.fsync(file.fileno())
        draft.replace(path)
    except OSError as error:
        raise ClipgraftError(f"{path} could not be written: {error}; the parts are kept") from error
    return about


def _each(parts: Sequence[Path], name: str) -> Iterator[Tensor]:
    for part in parts:
        with safe_open(part, "pt") as file:
            yield file.get_tensor(name)


def _write_safetensors(path: Path, about: About, parts: Sequence[Path]) -> None:
    """The layout of safetensors: length of the header (8 bytes, little end first), header in JSON, tensors."""
    names = {"ids": "ids_json"} | ({"captions": "captions_json"} if about.kind == "texts" else {})
    code, size = ("F16", 2) if about.dtype == "fp16" else ("F32", 4)
    at = about.rows * about.dim * size
    header: dict[str, Any] = {
        "__metadata__": {"clipgraft": json.dumps(asdict(about), sort_keys=True), "format": "pt"},
        "embeddings": {"dtype": code, "shape": [about.rows, about.dim], "data_offsets": [0, at]},
    }
    for part_name, name in names.items():
        # arrays become one: brackets and commas of each part, less two brackets, plus a comma between full ones
        inner = [len(tensor) - 2 for tensor in _each(parts, part_name)]
        length = 2 + sum(inner) + max(sum(n > 0 for n in inner) - 1, 0)
        header[name] = {"dtype": "U8", "shape": [length], "data_offsets": [at, at + length]}
        at += length
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in _each(parts, "embeddings"):
            file.write(tensor.numpy().tobytes())
        for part_name in names:
            file.write(b"[")
            comma = b""
            for tensor in _each(parts, part_name):
                if inner_text := tensor.numpy().tobytes()[1:-1]:
                    file.write(comma + inner_text)
                    comma = b","
            file.write(b"]")


def _write_parquet(path: Path, about: About, parts: Sequence[Path], *, classes: Sequence[str]) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    kind = pa.float16() if about.dtype == "fp16" else pa.float32()
    columns = [("id", pa.string()), ("embedding", pa.list_(kind, about.dim)), ("label", pa.string())]
    metadata = {"clipgraft": json.dumps(asdict(about), sort_keys=True)}
    schema = pa.schema([*columns, ("caption", pa.string())], metadata=metadata)
    with parquet.ParquetWriter(path, schema) as writer:
        for part in parts:
            with safe_open(part, "pt") as file:
                found = {name: file.get_tensor(name) for name in ("ids", "embeddings", "labels", "captions")}
            if not len(found["embeddings"]):
                continue
            flat = pa.array(found["embeddings"].flatten().numpy(), kind)
            labels = [classes[k] if 0 <= k < len(classes) else None for k in found["labels"].tolist()]
            captions = [caption or None for caption in from_bytes(found["captions"])]
            embeddings = pa.FixedSizeListArray.from_arrays(flat, about.dim)
            arrays = [from_bytes(found["ids"]), embeddings, labels, captions]
            writer.write_table(
                pa.table([pa.array(a) if a is embeddings else pa.array(a, pa.string()) for a in arrays], schema)
            )


class Embeddings:
    """A file of embeddings. Rows of safetensors are mapped, those of Parquet read one row group at a time."""

    def __init__(self, path: Path, about: About) -> None:
        self.path, self.about = path, about

    @classmethod
    def open(cls, path: str | Path) -> Embeddings:
        """``InputError`` unless ``clipgraft embed`` wrote ``path``."""
        path = Path(path)
        if not path.is_file():
            raise InputError(f"there is no file {path}; write one with clipgraft embed MODEL --data SRC --out {path}")
        try:
            about = About(**json.loads(_metadata(path)["clipgraft"]))
        except (KeyError, ValueError, TypeError, OSError, SafetensorError):
            raise InputError(
                f"{path} was not written by clipgraft embed; make one with clipgraft embed MODEL --data SRC --out FILE"
            ) from None
        if about.format != FORMAT:
            raise InputError(f"{path} has format {about.format}, this version reads {FORMAT}; embed the data again")
        return cls(path, about)

    def __len__(self) -> int:
        return self.about.rows

    @cached_property
    def ids(self) -> list[str]:
        """n ids in row order: those of the samples, ``ID#k`` for caption k."""
        return self._texts("ids_json", "id")

    @cached_property
    def captions(self) -> list[str] | None:
        """n captions, None where the file has none."""
        if self.path.suffix != ".parquet" and self.about.kind != "texts":
            return None
        return [text or "" for text in self._texts("captions_json", "caption")]

    @cached_property
    def embeddings(self) -> Tensor:
        """(n, D) of length one in the stored type; safetensors is mapped, nothing is read before it is used."""
        if self.path.suffix == ".parquet":
            return torch.cat([rows for _, rows in self.chunks()])
        with safe_open(self.path, "pt") as file:
            rows: Tensor = file.get_tensor("embeddings")
        return rows

    def chunks(self, rows: int = 65536) -> Iterator[tuple[int, Tensor]]:
        """(first row, (m, D) fp32) over all rows."""
        if self.path.suffix != ".parquet":
            for start in range(0, len(self), rows):
                yield start, self.embeddings[start : start + rows].float()
            return
        from pyarrow import parquet

        start = 0
        with parquet.ParquetFile(self.path) as file:
            for batch in file.iter_batches(rows, columns=["embedding"]):
                flat = batch.column(0).flatten().to_numpy(zero_copy_only=False).copy()
                yield start, torch.from_numpy(flat).view(-1, self.about.dim).float()
                start += len(batch)

    def search(self, queries: Tensor, k: int = 10) -> tuple[Tensor, Tensor]:
        """(q, D) of any length -> cosines (q, k) and rows (q, k), best first; see ``search.exact``."""
        from clipgraft_embedding.search import exact

        return exact(self, queries, k)

    def _texts(self, tensor: str, column: str) -> list[str]:
        if self.path.suffix == ".parquet":
            from pyarrow import parquet

            values: list[str] = parquet.read_table(self.path, columns=[column]).column(0).to_pylist()
            return values
        with safe_open(self.path, "pt") as file:
            return from_bytes(file.get_tensor(tensor))


def _metadata(path: Path) -> Mapping[Any, Any]:
    if path.suffix == ".parquet":
        from pyarrow import parquet

        found = parquet.read_schema(path).metadata or {}
        return {"clipgraft": found[b"clipgraft"]}
    with safe_open(path, "pt") as file:
        return file.metadata() or {}
