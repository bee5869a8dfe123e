"""Exports: a folder that open_clip opens without us, plus what it can't say, with a hash of every file.

``clipgraft.json`` names grafts and components by registered name, config, distribution and version; there is no class
path and no pickle. Portability: L0 plain CLIP weights; L1 the same plus components that need a plugin; L2 an encoder
that open_clip can't hold, kept under our own tensor names in ``encoder.safetensors``.
"""

from __future__ import annotations

import copy
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipgraft.errors import InputError
from clipgraft.files import check_tensors, parse_json, settle, sha256_of, whole_folder, write_json, write_tensors

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from clipgraft.encoders.base import Encoder
    from clipgraft.registry import Registry

SCHEMA = 1
MANIFEST, CARD, OWN_WEIGHTS = "clipgraft.json", "README.md", "encoder.safetensors"


def _maker(name: str) -> dict[str, str]:
    """Distribution and version of the plugin that a registered name belongs to."""
    from importlib.metadata import PackageNotFoundError, version

    from clipgraft.registry import current

    plugin = name.partition("/")[0]
    usual = "clipgraft" if plugin == "core" else f"clipgraft-{plugin}"
    distribution = next((p.distribution for p in current().plugins if p.name == plugin), usual)
    try:
        return {"distribution": distribution, "version": version(distribution)}
    except PackageNotFoundError:
        return {"distribution": distribution, "version": ""}


def _component(name: str, module: nn.Module) -> dict[str, Any]:
    """The manifest's record of a component."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9_.-]*", name) or name in ("encoder", "open_clip_model"):
        raise InputError(f"a component can't be named {name!r}; use lower-case letters, digits, dots and hyphens")
    use, config = getattr(module, "registered", ("", {}))
    record: dict[str, Any] = {"name": name, "file": f"{name}.safetensors", "use": use, "config": config}
    return record | (_maker(use) if use else {})


def write_export(
    encoder: Encoder,
    folder: Path,
    *,
    components: Mapping[str, nn.Module] = {},
    lineage: Sequence[dict[str, Any]] = (),
    card: str | Mapping[str, Any] | None = None,
    where: str = "DIR",
    dtype: torch.dtype | None = None,
) -> Path:
    """Write ``encoder`` with adapters merged on a copy, ``components`` by name, and how it came to be.

    A component that was built from the registry says so in its attribute ``registered`` = (name, config). ``card`` is
    what a run tells of itself (``clipgraft.card``), or the text of the model card; ``where`` the hub's ORG/NAME that it
    names, if the folder goes there. ``dtype`` stores the encoder in another precision; it is read back as fp32.
    """
    from clipgraft.card import render
    from clipgraft.encoders import merge_grafts
    from clipgraft.encoders.openclip import CONFIG, WEIGHTS, open_clip_state

    records = [_component(name, module) for name, module in components.items()]
    history = [{"use": g.name, "config": g.config, "merged": g.portable, **_maker(g.name)} for g in encoder.data.grafts]
    if encoder.data.grafts:
        shared = [encoder.data.tokenizer, *(g.graft for g in encoder.data.grafts)]  # may be large, or hold other models
        encoder = merge_grafts(copy.deepcopy(encoder, {id(x): x for x in shared}))
    manifest = described(encoder, grafts=history, components=records, lineage=lineage)
    manifest |= {} if isinstance(card, str) or not card else {"card": dict(card)}
    data, reason, preprocess = encoder.data, manifest["reason"], manifest["preprocess"]
    weights, state = (OWN_WEIGHTS, encoder.state_dict()) if reason else (WEIGHTS, open_clip_state(encoder))
    with whole_folder(Path(folder), marker=MANIFEST) as draft:
        write_tensors(draft / weights, state, dtype=dtype)
        if not reason:
            write_json(draft / CONFIG, {"model_cfg": data.model_config, "preprocess_cfg": preprocess | {"mode": "RGB"}})
        for name, module in components.items():
            write_tensors(draft / f"{name}.safetensors", module.state_dict())
        if data.tokenizer is not None:
            data.tokenizer.save(str(draft))
        (draft / CARD).write_text(card if isinstance(card, str) else render(manifest, where=where), encoding="utf-8")
        write_json(draft / MANIFEST, manifest | {"files": _hashes(draft)})
    return Path(folder)


def described(
    encoder: Encoder,
    *,
    grafts: Sequence[dict[str, Any]] = (),
    components: Sequence[dict[str, Any]] = (),
    lineage: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    """``clipgraft.json`` of an encoder, apart from the files."""
    from clipgraft.encoders.openclip import WEIGHTS, why_not_open_clip

    data, reason = encoder.data, why_not_open_clip(encoder)
    named = "huggingface" if data.model_config.get("text_cfg", {}).get("hf_tokenizer_name") else "bpe"
    weights = OWN_WEIGHTS if reason else WEIGHTS
    return {
        "schema": SCHEMA,
        "clipgraft": _maker("core")["version"],
        "level": "L2" if reason else "L1" if components else "L0",
        "reason": reason,
        "encoder": {"uri": data.origin.uri, "architecture": data.origin.architecture, "weights": weights},
        "model_config": data.model_config,
        "preprocess": data.preprocess.as_dict(),
        "tokenizer": named if encoder.text is not None else "",
        "grafts": list(grafts),
        "components": list(components),
        "lineage": [*data.origin.lineage, *lineage],
    }


def copy_export(folder: Path, out: Path, *, card: Mapping[str, Any] = {}, where: str = "DIR") -> Path:
    """The export in ``folder`` once more, components included, with ``card`` over what its run told and a new README.

    ``where``: the hub's ORG/NAME that the README names, if it goes there.
    """
    from clipgraft.card import render

    manifest = read_manifest(folder)
    told = dict(manifest.get("card") or {})
    manifest["card"] = told | {key: value for key, value in card.items() if value is not None}
    with whole_folder(Path(out), marker=MANIFEST) as draft:
        for name in manifest["files"]:
            (draft / name).parent.mkdir(parents=True, exist_ok=True)
            if name != CARD:
                shutil.copyfile(folder / name, draft / name)
        (draft / CARD).write_text(render(manifest, where=where), encoding="utf-8")
        write_json(draft / MANIFEST, manifest | {"files": _hashes(draft)})
    return Path(out)


def _hashes(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and sha256 of every file."""
    files = {str(f.relative_to(folder)): f for f in sorted(folder.rglob("*")) if f.is_file()}
    return {name: {"sha256": sha256_of(f), "bytes": f.stat().st_size} for name, f in files.items()}


def read_manifest(folder: Path) -> dict[str, Any]:
    """``clipgraft.json``, after every file that it names was checked; the model card may have been edited."""
    folder = Path(folder)
    if not folder.exists():
        settle(Path(os.path.abspath(folder)))
    try:
        manifest = dict(parse_json((folder / MANIFEST).read_bytes()))
        schema = int(manifest["schema"])
        files = {str(name): (entry["bytes"], entry["sha256"]) for name, entry in dict(manifest["files"]).items()}
    except FileNotFoundError:
        raise InputError(f"{folder} has no {MANIFEST}; it is not an export of clipgraft") from None
    except (OSError, OverflowError, ValueError, KeyError, TypeError):
        raise InputError(f"{folder / MANIFEST} is damaged; write the export again") from None
    if schema > SCHEMA:
        raise InputError(f"{folder} was written by a later clipgraft ({manifest.get('clipgraft')}); upgrade clipgraft")
    for name, (length, sha256) in files.items():
        file = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise InputError(f"{folder / MANIFEST} names {name!r}, which is no file of that folder; don't trust it")
        if name == CARD:
            continue
        if not file.is_file():
            raise InputError(f"{file} is missing; fetch or write the export again")
        if (size := file.stat().st_size) != length:
            raise InputError(f"{file} is damaged: {size} bytes instead of {length}; write the export again")
        if sha256_of(file) != sha256:
            raise InputError(f"{file} is damaged: its contents changed after the export; write the export again")
        if file.suffix == ".safetensors":
            check_tensors(file)
    return manifest


_opening: ContextVar[frozenset[Path]] = ContextVar("exports that are being opened", default=frozenset())


def open_export(folder: Path, *, registry: Registry | None = None) -> Encoder:
    """The encoder of an export; grafts that could not be merged are applied again, from their names and configs."""
    from clipgraft.config.schema import GraftNode
    from clipgraft.encoders import apply_grafts, load, openclip
    from clipgraft.encoders.base import Origin
    from clipgraft.encoders.tokenizers import tokenizer_for

    folder, manifest = Path(folder), read_manifest(folder)
    try:
        weights, config = manifest["encoder"]["weights"], manifest["model_config"]
        lineage, sha256 = tuple(map(dict, manifest["lineage"])), str(manifest["files"][weights]["sha256"])
        origin = Origin(str(folder), str(manifest["encoder"]["architecture"]), sha256, lineage)
        text, preprocess = dict(config["text_cfg"]) if config else {}, dict(manifest["preprocess"])
        reason, uri = manifest["reason"], str(manifest["encoder"]["uri"])
        kept = [GraftNode(use=g["use"], **g["config"]) for g in manifest["grafts"] if not g["merged"]]
    except (KeyError, TypeError, AttributeError, ValueError):
        raise InputError(f"{folder / MANIFEST} is damaged; write the export again") from None
    state = openclip.read_weights(folder / weights)
    tokenizer = tokenizer_for(text, folder=folder) if config else None
    build: dict[str, Any] = {"preprocess": preprocess, "tokenizer": tokenizer, "origin": origin}
    if not reason:
        return openclip.build(config, state, **build)
    if registry is None:
        from clipgraft.registry import current

        registry = current()
    if not config and (again := folder.resolve()) in (opening := _opening.get()):
        raise InputError(f"{folder} refers to itself ({MANIFEST} names {uri} as its encoder); write the export again")
    if config:
        encoder = openclip.build(config, None, **build)
    else:
        token = _opening.set(opening | {again})
        try:
            encoder = load(uri, registry=registry)
        finally:
            _opening.reset(token)
    encoder = apply_grafts(encoder, kept, registry)
    encoder.data.origin = replace(encoder.data.origin, uri=str(folder), sha256=sha256, lineage=lineage)
    missing, unexpected = encoder.load_state_dict(state, strict=False, assign=True)
    if missing or unexpected:
        raise InputError(f"{folder / weights} doesn't fit its grafts: {(missing + unexpected)[0]}; upgrade the plugin")
    return encoder


def read_component(folder: Path, name: str) -> dict[str, Tensor]:
    """The tensors of a component of an export."""
    from clipgraft.encoders.openclip import read_weights

    names = [c["name"] for c in read_manifest(folder)["components"]]
    if name not in names:
        raise InputError(f"{folder} has no component {name!r}; it has {', '.join(names) or 'none'}")
    return read_weights(Path(folder) / f"{name}.safetensors")
