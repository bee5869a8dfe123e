"""A checkpoint: any model reference as tensors under canonical names, read one at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clipgraft.encoders.base import EncoderData, Origin, Preprocess
from clipgraft.encoders.tokenizers import tokenizer_for
from clipgraft.errors import InputError
from clipgraft_merging.weights.layouts import Layout, Place, layout_of, places
from clipgraft_merging.weights.stores import FileStore, MemoryStore, Store

if TYPE_CHECKING:
    from clipgraft.registry import Registry


@dataclass(frozen=True, slots=True)
class Facts:
    """What a folder says of its weights. ``encoder`` and ``grafts`` are as ``clipgraft.json`` writes them."""

    model_config: dict[str, Any]
    preprocess: Preprocess
    architecture: str
    lineage: tuple[dict[str, Any], ...] = ()
    reason: str = ""
    """Why open_clip can't hold the encoder; empty when it can."""
    uri: str = ""
    """The reference that rebuilds an encoder which open_clip can't hold."""
    grafts: tuple[dict[str, Any], ...] = ()
    components: tuple[str, ...] = ()


@dataclass(frozen=True)
class Checkpoint:
    """Tensors by canonical name. ``ref`` is what it was opened by, ``folder`` None for a file or a registered model."""

    ref: str
    store: Store
    layout: Layout
    folder: Path | None
    facts: Facts | None
    where: str
    """The file or folder that messages name."""
    tokenizer: Callable[[], Any] = field(default=lambda: None)
    places: Mapping[str, Place] = field(init=False)

    def __post_init__(self) -> None:
        names = [*self.store.entries, *self.store.aliases]
        object.__setattr__(self, "places", places(names, layout=self.layout, where=self.where))

    def keys(self) -> list[str]:
        """Canonical names, sorted; a tensor with two names has both."""
        return sorted(self.places)

    @cached_property
    def aliases(self) -> dict[str, str]:
        """{second canonical name: first} of tensors that are stored once."""
        by_names = {place.names: key for key, place in self.places.items()}
        second = {a: b for a, b in self.store.aliases.items() if (a,) in by_names and (b,) in by_names}
        return {by_names[(a,)]: by_names[(b,)] for a, b in second.items()}

    def shape(self, key: str) -> tuple[int, ...]:
        """From the header."""
        place = self.places[key]
        found = [torch.empty(self._entry(name).shape, device="meta") for name in place.names]
        return tuple(place.of(found).shape)

    def dtype(self, key: str) -> torch.dtype:
        """From the header."""
        return self._entry(self.places[key].names[0]).dtype

    def tensor(self, key: str) -> Tensor:
        """Freshly read, in its own dtype; of a registered model the tensor itself, which must not be changed."""
        place = self.places[key]
        return place.of([self.store.read(self.store.aliases.get(name, name)) for name in place.names])

    def piece(self, key: str, start: int, stop: int) -> Tensor:
        """(stop - start,) numbers of the tensor in row-major order, not to be changed."""
        place = self.places[key]
        if not place.flat:
            return self.tensor(key).flatten()[start:stop]
        found, before = [], 0
        for name in place.names:
            name = self.store.aliases.get(name, name)
            size = math.prod(self.store.entries[name].shape)
            low, high = max(start - before, 0), min(stop - before, size)
            if low < high:
                found.append(self.store.piece(name, low, high))
            before += size
        return found[0] if len(found) == 1 else torch.cat(found)

    def stored_shape(self, key: str) -> tuple[int, ...]:
        """As ``shape``, but of the first tensor in the file that it is made of."""
        return tuple(self._entry(self.places[key].names[0]).shape)

    def file(self, key: str) -> str:
        """The file that holds a tensor, for messages."""
        return str(self._entry(self.places[key].names[0]).file or self.where)

    @property
    def sha256(self) -> str:
        """Of the weights file or files, or of the tensors of a registered model."""
        return self.store.sha256

    @cached_property
    def data(self) -> EncoderData:
        """What travels with the weights; ``InputError`` for a weights file alone."""
        if self.facts is None:
            raise InputError(f"{self.ref} is a weights file without a configuration; give the folder it belongs to")
        facts = self.facts
        origin = Origin(self.ref, facts.architecture, self.sha256, facts.lineage)
        return EncoderData(facts.preprocess, self.tokenizer(), origin, dict(facts.model_config))

    def _entry(self, name: str) -> Any:
        return self.store.entries[self.store.aliases.get(name, name)]


def open_checkpoint(ref: str | Path, *, registry: Registry | None = None) -> Checkpoint:
    """A .safetensors file, an open_clip, export, Hugging Face or run folder, or what else ``clipgraft.load`` takes."""
    ref = str(ref)
    path = Path(ref).expanduser()
    if registry is None:
        from clipgraft.registry import current

        registry = current()
    if ref not in {found.name for found in registry.list("encoder")}:
        if path.suffix == ".safetensors" or path.is_file():
            return _open_file(path, ref=ref)
        folder = Path(ref.removeprefix("local-dir:")).expanduser() if ref.startswith("local-dir:") else path
        if folder.is_dir() and (found := _open_folder(folder, ref=ref)):
            return found
    return _open_encoder(ref, registry=registry)


def _open_file(path: Path, *, ref: str) -> Checkpoint:
    if path.suffix != ".safetensors":
        raise InputError(f"{path} is no .safetensors file; convert it with clipgraft export, or give a model folder")
    store = FileStore([path])
    return Checkpoint(ref, store, layout_of(store.entries), None, None, str(path))


def _open_folder(folder: Path, *, ref: str) -> Checkpoint | None:
    """A folder whose weights are safetensors; None when ``clipgraft.load`` must open it, or complain."""
    from clipgraft.checkpoint import MANIFEST
    from clipgraft.encoders.openclip import CONFIG

    if (folder / MANIFEST).is_file():
        return _open_export(folder, ref=ref)
    if (folder / "export" / MANIFEST).is_file():
        return _open_export(folder / "export", ref=ref)
    if (folder / "status.json").is_file():
        raise InputError(f"the run {folder} has no export yet; finish it with clipgraft resume {folder}")
    kind = next((name for name in (CONFIG, "config.json") if (folder / name).is_file()), None)
    files = _weight_files(folder)
    if kind is None or not files:
        return None
    facts, tokenizer = _open_clip_facts(folder) if kind == CONFIG else _huggingface_facts(folder)
    store = FileStore(files)
    return Checkpoint(ref, store, layout_of(store.entries), folder, facts, str(folder), tokenizer)


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors of a folder, in the order in which the core looks for them; none when they are pickles."""
    from clipgraft.encoders.openclip import WEIGHT_FILES, shard_files

    first = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if first is not None:
        return [first] if first.suffix == ".safetensors" else []
    return shard_files(folder)


def _open_export(folder: Path, *, ref: str) -> Checkpoint:
    from clipgraft.checkpoint import read_manifest

    manifest = read_manifest(folder)  # every file is checked against its hash
    weights, config, pre = manifest["encoder"]["weights"], manifest["model_config"], dict(manifest["preprocess"])
    for key in ("size", "mean", "std"):
        pre[key] = tuple(pre[key])
    kept = tuple(g for g in manifest["grafts"] if not g["merged"])
    facts = Facts(
        config,
        Preprocess(**pre),
        manifest["encoder"]["architecture"],
        tuple(manifest["lineage"]),
        reason=manifest["reason"],
        uri=manifest["encoder"]["uri"],
        grafts=kept,
        components=tuple(c["name"] for c in manifest["components"]),
    )
    store = FileStore([folder / weights], sha256=manifest["files"][weights]["sha256"])
    layout: Layout = "own" if facts.reason else layout_of(store.entries)

    def tokenizer() -> Any:
        return tokenizer_for(config["text_cfg"], folder=folder) if config else None

    return Checkpoint(ref, store, layout, folder, facts, str(folder), tokenizer)


def _open_clip_facts(folder: Path) -> tuple[Facts, Callable[[], Any]]:
    from clipgraft.encoders.openclip import CONFIG, architecture_name, preprocess_from

    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        model, vision, text = config["model_cfg"], config["model_cfg"]["vision_cfg"], config["model_cfg"]["text_cfg"]
    except (ValueError, KeyError, TypeError):
        raise InputError(
            f"{folder / CONFIG} is no open_clip configuration; expected model_cfg, preprocess_cfg"
        ) from None
    size = vision.get("image_size", 224)
    size = (size, size) if isinstance(size, int) else tuple(size)
    pre = preprocess_from(config.get("preprocess_cfg", {}), size=size, where=str(folder))
    return Facts(model, pre, architecture_name(model)), lambda: tokenizer_for(text, folder=folder)


def _huggingface_facts(folder: Path) -> tuple[Facts, Callable[[], Any]]:
    import transformers

    from clipgraft.encoders import huggingface
    from clipgraft.encoders.openclip import preprocess_from

    kind = huggingface._read_json(folder / "config.json").get("model_type")
    if kind not in ("clip", "siglip"):
        raise InputError(f"{folder} holds a {kind!r} model; expected model_type clip or siglip")
    reader: Any = transformers.CLIPConfig if kind == "clip" else transformers.SiglipConfig
    config = reader.from_pretrained(folder)
    model = huggingface._model_config(config)
    text, size = model["text_cfg"], config.vision_config.image_size
    if kind == "siglip" or text["vocab_size"] != 49408:  # else it is open_clip's built-in vocabulary
        text |= {"hf_tokenizer_name": "tokenizer"}
        text |= {"tokenizer_kwargs": {"clean": "canonicalize"}} if kind == "siglip" else {}
    timm = model["vision_cfg"].get("timm_kwargs")
    pre = preprocess_from(huggingface._read_preprocess(folder), size=(size, size), where=str(folder))
    reason = f"its timm image tower differs from the registered one by {sorted(timm)}" if timm else ""
    return Facts(model, pre, f"hf-{kind}", reason=reason, uri=str(folder)), lambda: tokenizer_for(text, folder=folder)


def _open_encoder(ref: str, *, registry: Registry) -> Checkpoint:
    """Whatever else is a model reference: its tensors are those of the encoder."""
    from clipgraft.encoders import load
    from clipgraft.encoders.openclip import open_clip_state, why_not_open_clip

    encoder = load(ref, registry=registry)
    data, reason = encoder.data, why_not_open_clip(encoder)
    state = encoder.state_dict() if reason else open_clip_state(encoder)
    kept = tuple({"use": g.name, "config": g.config, "merged": False} for g in data.grafts if not g.portable)
    origin = data.origin
    facts = Facts(data.model_config, data.preprocess, origin.architecture, origin.lineage, reason, origin.uri, kept)
    store = MemoryStore(state)
    layout: Layout = "own" if reason else "open_clip"
    return Checkpoint(ref, store, layout, None, facts, ref, lambda: data.tokenizer)
