"""Where samples come from: folders, tables and registered datasets, opened by one kind of reference."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from clipgraft.data.base import PairSource, Source
from clipgraft.data.images import MAX_PIXELS
from clipgraft.errors import InputError

if TYPE_CHECKING:
    from clipgraft.registry import Registry


def open_source(ref: str, *, registry: Registry | None = None, max_pixels: int = MAX_PIXELS) -> Source | PairSource:
    """``folder:DIR``, ``csv:FILE`` or a registered dataset ``plugin/name?key=value&key=value`` (YAML scalars).

    ``name:REST?key=value`` is a registered dataset too, whose config has a field ``path``: it gets REST.
    """
    from clipgraft.config.load import parse_yaml
    from clipgraft.files import check_path
    from clipgraft.registry import current

    registry = registry or current()
    check_path(ref.partition("?")[0].partition(":")[2] or ref.partition("?")[0], origin="data reference")
    scheme, _, rest = ref.partition(":")
    if scheme == "folder":
        from clipgraft.data.folder import open_folder

        return open_folder(rest, max_pixels=max_pixels)
    if scheme == "csv":
        from clipgraft.data.pairs import open_table

        return open_table(rest, max_pixels=max_pixels)
    name, _, query = ref.partition("?")
    path: dict[str, object] = {}
    if ":" in name:
        path, name = {"path": name.partition(":")[2]}, scheme
        cls = registry.config_class("dataset", name) if name else None
        if cls is None or "path" not in cls.model_fields:
            raise InputError(f"{ref!r} is no data reference; expected folder:DIR, csv:FILE or a registered dataset")
        path |= {"max_pixels": max_pixels} if "max_pixels" in cls.model_fields else {}
    if not name:
        raise InputError(f"{ref!r} is no data reference; expected folder:DIR, csv:FILE or a registered dataset")
    pairs = [part.partition("=") for part in query.split("&") if part]
    if bad := [key for key, equals, _ in pairs if not equals]:
        raise InputError(f"{ref}: {bad[0]!r} has no value; write plugin/name?key=value&key=value")
    settings = path | {key: parse_yaml(value, origin=ref) for key, _, value in pairs}
    for key in ("path", "images", "root"):
        check_path(str(settings.get(key, "")), origin=f"{name}: {key}")
    try:
        source: Source | PairSource = registry.build("dataset", name, settings)
    except InputError as error:
        if not Path(name).exists():
            raise
        raise InputError(f"{error} For files write {'csv' if Path(name).is_file() else 'folder'}:{name}") from None
    if "/" not in name and not path and Path(name).exists():
        full = registry.get("dataset", name).name
        raise InputError(f"{name} is a file or folder here and a dataset; write folder:{name}, csv:{name} or {full}")
    if not len(source):
        raise InputError(f"{ref} is empty")
    return source
