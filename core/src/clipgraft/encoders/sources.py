"""Which opener a model reference belongs to."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from clipgraft.errors import InputError

if TYPE_CHECKING:
    from clipgraft.encoders.base import Encoder
    from clipgraft.registry import Registry

MANIFEST = "clipgraft.json"


def open_reference(uri: str, *, registry: Registry | None = None) -> Encoder:
    """See ``clipgraft.encoders.load``."""
    from clipgraft.encoders import openclip

    scheme, _, rest = uri.partition(":")
    if scheme in ("open_clip", "local-dir", "hf-hub", "hf") and not rest:
        raise InputError(f"{uri!r} names nothing; expected {scheme}:NAME")
    if scheme == "open_clip":
        return openclip.open_architecture(rest)
    if scheme == "local-dir":
        return openclip.open_folder(Path(rest), uri=uri)
    if scheme in ("hf-hub", "hf"):
        return open_hub(rest, uri=uri)
    registry = registry or _current()
    if uri in {found.name for found in registry.list("encoder")}:
        encoder: Encoder = registry.build("encoder", uri, {})
        return encoder
    if Path(uri).is_dir() and (opened := open_directory(Path(uri), registry=registry)):
        return opened
    if opened := registry.open(uri):
        return opened
    if Path(uri).exists() or "/" in uri.removeprefix("./")[1:] and Path(uri).parent.is_dir():
        raise InputError(
            f"nothing opens {uri!r}; expected a folder with clipgraft.json, open_clip_config.json or config.json"
        )
    return registry.build("encoder", uri, {})  # type: ignore[no-any-return]


def _current() -> Registry:
    from clipgraft.registry import current

    return current()


def open_directory(folder: Path, *, registry: Registry | None = None, uri: str = "") -> Encoder | None:
    """Our export, an open_clip folder or a Hugging Face folder; None when it is none of them."""
    if (folder / MANIFEST).is_file():
        from clipgraft.checkpoint import open_export

        return open_export(folder, registry=registry)
    if (folder / "open_clip_config.json").is_file():
        from clipgraft.encoders.openclip import open_folder

        return open_folder(folder, uri=uri)
    if (folder / "config.json").is_file():
        from clipgraft.encoders.huggingface import open_folder as open_huggingface

        return open_huggingface(folder, uri=uri)
    return None


def open_hub(name: str, *, uri: str) -> Encoder:
    """A repository of the Hugging Face hub, from its cache when offline: config files, then the first weights file."""
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    from clipgraft.encoders.openclip import WEIGHT_FILES

    try:
        folder = Path(snapshot_download(name, allow_patterns=["*.json", "*.txt", "*.model"]))
        for file in WEIGHT_FILES:
            try:
                hf_hub_download(name, file)
                break
            except (EntryNotFoundError, LocalEntryNotFoundError):
                continue
    except Exception as error:  # network, name and permission errors alike
        raise InputError(f"{uri} could not be fetched: {' '.join(str(error).split())[:200]}") from None
    if uri.startswith("hf:") and (folder / "config.json").is_file():
        from clipgraft.encoders.huggingface import open_folder as open_huggingface

        return open_huggingface(folder, uri=uri)
    if opened := open_directory(folder, uri=uri):
        return opened
    raise InputError(f"{uri} has neither open_clip_config.json nor config.json; it is no CLIP that can be opened")
