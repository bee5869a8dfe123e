"""Encoders: open any model reference, apply and merge grafts. Nothing heavy is imported before it is needed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from clipgraft.errors import ClipgraftError, InputError, unknown_name

if TYPE_CHECKING:
    from clipgraft.config.schema import Node
    from clipgraft.encoders.base import Encoder
    from clipgraft.registry import Registry


def load(uri: str, *, registry: Registry | None = None) -> Encoder:
    """Open ``open_clip:ARCH[/TAG]``, ``local-dir:DIR``, ``hf-hub:ORG/NAME``, ``hf:ORG/NAME``, a folder, or a plugin's.

    A registered ``plugin/encoder`` comes before a folder of that name (write ``./plugin/encoder``); what nothing here
    recognises is offered to the plugins' ``clipgraft_open``.
    """
    from clipgraft.encoders import openclip
    from clipgraft.files import check_path
    from clipgraft.registry import current

    check_path(uri, origin="model")
    scheme, _, rest = uri.partition(":")
    if scheme in ("open_clip", "local-dir", "hf-hub", "hf"):
        if not rest:
            raise InputError(f"{uri!r} names nothing; expected {scheme}:NAME")
        if scheme == "open_clip":
            return openclip.open_architecture(rest)
        if scheme == "local-dir":
            with _one_line(rest):
                return openclip.open_folder(Path(rest), uri=uri)
        return _open_hub(rest, uri=uri, registry=registry)
    registry = registry or current()
    registered = uri in {found.name for found in registry.list("encoder")}
    encoder = None
    if not registered:
        encoder = _open_directory(Path(uri), uri=uri, registry=registry) or registry.open(uri)
    if encoder is None and not registered and (Path(uri).exists() or uri.startswith((".", "/", "~"))):
        raise InputError(
            f"nothing opens {uri!r}; expected a folder with clipgraft.json, open_clip_config.json or config.json"
        )
    if encoder is not None:
        return encoder
    names = [found.name for found in registry.list("encoder")]
    if not registered and uri not in {name.rpartition("/")[2] for name in names}:
        hint = f"{registry.hint(uri)} Or give a folder, open_clip:ARCH[/TAG] or hf:ORG/NAME.".strip()
        raise unknown_name("model", uri, names, hint=hint)
    return registry.build("encoder", uri, {})  # type: ignore[no-any-return]


def _open_directory(folder: Path, *, uri: str, registry: Registry | None = None) -> Encoder | None:
    """Our export, an open_clip folder or a Hugging Face folder; None when it is none of them."""
    with _one_line(folder):
        if (folder / "clipgraft.json").is_file():
            from clipgraft.checkpoint import open_export

            return open_export(folder, registry=registry)
        if (folder / "open_clip_config.json").is_file():
            from clipgraft.encoders.openclip import open_folder

            return open_folder(folder, uri=uri)
        if (folder / "config.json").is_file():
            from clipgraft.encoders.huggingface import open_folder as open_huggingface

            return open_huggingface(folder, uri=uri)
    return None


@contextmanager
def _one_line(folder: Path | str) -> Iterator[None]:
    """Whatever a folder's files make the libraries raise becomes an ``InputError`` that names the folder.

    What a configuration says is first checked by the layers that it builds, each in its own way.
    """
    try:
        yield
    except (ClipgraftError, MemoryError):
        raise
    except Exception as error:
        from clipgraft.manifests import one_line

        raise InputError(f"{folder} can't be opened as a model: {one_line(error)[:200]}; fetch it again") from error


def _open_hub(name: str, *, uri: str, registry: Registry | None = None) -> Encoder:
    """A repository of the Hugging Face hub, or its cache: small files, then the weights or their shards."""
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    from clipgraft.encoders.openclip import WEIGHT_FILES, shard_files

    try:
        folder = Path(snapshot_download(name, allow_patterns=["*.json", "*.txt", "*.model"]))
        if (folder / "clipgraft.json").is_file():  # our export names its files, components among them
            ours = json.loads((folder / "clipgraft.json").read_text(encoding="utf-8"))
            folder = Path(snapshot_download(name, allow_patterns=["clipgraft.json", *ours["files"]]))
            return _open_directory(folder, uri=uri, registry=registry)  # type: ignore[return-value]
        for file in WEIGHT_FILES:
            try:
                hf_hub_download(name, file)
                break
            except (EntryNotFoundError, LocalEntryNotFoundError):
                continue
        else:
            for shard in shard_files(folder):
                hf_hub_download(name, shard.name)
    except ClipgraftError:
        raise
    except Exception as error:  # network, name and permission errors alike
        raise InputError(f"{uri} could not be fetched: {' '.join(str(error).split())[:200]}") from None
    if uri.startswith("hf:") and (folder / "config.json").is_file():
        from clipgraft.encoders.huggingface import open_folder as open_huggingface

        return open_huggingface(folder, uri=uri)
    if encoder := _open_directory(folder, uri=uri):
        return encoder
    raise InputError(f"{uri} has neither open_clip_config.json nor config.json; it is no CLIP that can be opened")


def apply_grafts(encoder: Encoder, nodes: Sequence[Node], registry: Registry) -> Encoder:
    """Build the named grafts and apply them in order; the encoder remembers name and full config of each."""
    from clipgraft.encoders.base import AppliedGraft

    for node in nodes:
        name, cls = registry.get("graft", node.use).name, registry.config_class("graft", node.use)
        graft = registry.build("graft", name, node.settings)
        config = {} if cls is None else cls(**node.settings).model_dump(mode="json")
        encoder = graft.apply(encoder)
        portable = getattr(graft, "portable", True)
        encoder.data.grafts.append(AppliedGraft(name=name, config=config, graft=graft, portable=portable))
    return encoder


def merge_grafts(encoder: Encoder) -> Encoder:
    """Fold every graft into plain weights, last first, in place; those that can't be folded stay listed."""
    for applied in reversed(encoder.data.grafts):
        encoder = applied.graft.merge(encoder)
    encoder.data.grafts = [g for g in encoder.data.grafts if not g.portable]
    return encoder
