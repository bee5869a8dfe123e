"""A SAM from a transformers directory, the Hugging Face hub, or a registered name, with its weights pinned if asked."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from clipgraft import files
from clipgraft.encoders.base import Preprocess
from clipgraft.errors import InputError
from clipgraft_merging.sam.promptable import Promptable
from clipgraft_merging.sam.settings import SamSettings
from clipgraft_merging.sam.tower import SamTower

if TYPE_CHECKING:
    from clipgraft.log import RunLog
    from clipgraft.registry import Registry

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""SAM's on [0, 1] values; its own code states them for 0 to 255."""
TIED = ("shared_image_embedding.positional_embedding", "prompt_encoder.shared_embedding.positional_embedding")


@dataclass(frozen=True, slots=True)
class SamParts:
    """A SAM in parts, in fp32 and eval mode. ``config`` is transformers' ``SamConfig`` as a dict; ``sha256`` of the

    tensors; ``preprocess`` the size and normalisation that it was trained with.
    """

    tower: SamTower
    promptable: Promptable
    config: dict[str, Any]
    preprocess: Preprocess
    reference: str
    sha256: str


def open_sam(
    reference: str,
    *,
    revision: str | None = None,
    sha256: str | None = None,
    setting: str = "sam",
    registry: Registry | None = None,
    log: RunLog | None = None,
) -> SamParts:
    """Open a directory in transformers' format, a hub id such as ``facebook/sam-vit-base``, or a registered head.

    A registered head must build to the path of such a directory or to a ``SamModel``. Only safetensors are read;
    ``sha256`` pins the one weights file, ``revision`` a commit of a hub repository. ``setting`` names the key that held
    the reference in error messages.
    """
    from transformers import SamModel

    found = _registered(reference, registry)
    if isinstance(found, SamModel):
        return sam_parts(found, reference=reference)
    folder = Path(str(found)) if found is not None else _folder(reference, revision, setting)
    _check(folder, reference, sha256, setting, log)
    model = _loaded(folder, f"{setting}: {reference}")
    return sam_parts(model, reference=reference, normalisation=_normalisation(folder))


def sam_problem(
    reference: str, *, sha256: str | None = None, setting: str = "sam", registry: Registry | None = None
) -> str | None:
    """Why a directory can't be opened, without reading its weights; None for what lies elsewhere or looks whole."""
    if (folder := _here(reference, registry)) is None:
        return None
    try:
        _check(folder, reference, sha256, setting, None)
    except InputError as error:
        return str(error)
    return None


def sam_settings(reference: str, *, registry: Registry | None = None) -> SamSettings | None:
    """The sizes of a SAM whose config.json is on this machine; None otherwise."""
    found = _registered(reference, registry)
    if hasattr(found, "vision_encoder"):
        return SamSettings.of(found.config.to_dict())
    folder = _here(reference, registry)
    if folder is None or not (folder / "config.json").is_file():
        return None
    return SamSettings.of(json.loads((folder / "config.json").read_text("utf-8")))


def _here(reference: str, registry: Registry | None) -> Path | None:
    """The folder behind a path, a registered head or a cached hub id."""
    found = _registered(reference, registry)
    if isinstance(found, str | Path):
        return Path(found)
    path = Path(reference).expanduser()
    if found is not None or path.exists() or reference.startswith((".", "/", "~")):
        return path if found is None else None
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(reference, "config.json") if "/" in reference else None
    return Path(cached).parent if isinstance(cached, str) else None


def sam_parts(model: Any, *, reference: str = "", normalisation: Preprocess | None = None) -> SamParts:
    """The parts of a transformers ``SamModel``."""
    model = model.float().eval()
    config, side = model.config.to_dict(), int(model.config.vision_config.image_size)
    return SamParts(
        tower=SamTower(model.vision_encoder),
        promptable=Promptable(model.prompt_encoder, model.mask_decoder),
        config=config,
        preprocess=normalisation or Preprocess((side, side), MEAN, STD, "bilinear", "longest"),
        reference=reference,
        sha256=files.tensors_digest(model.state_dict()),
    )


def _loaded(folder: Path, what: str) -> Any:
    """The ``SamModel`` of a directory, every tensor of it from the file."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    with torch.device("meta"):
        model = SamSettings.of(json.loads((folder / "config.json").read_text("utf-8"))).model()
    shards = [folder / WEIGHTS] if (folder / WEIGHTS).is_file() else sorted(folder.glob("*-of-*.safetensors"))
    try:
        state = {name: tensor.float() for file in shards for name, tensor in load_file(file).items()}
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{what} has damaged weights ({' '.join(str(error).split())[:120]}); download them again"
        ) from None
    if TIED[0] in state:  # one tensor under two names; files may hold either or both
        state.setdefault(TIED[1], state[TIED[0]])
    want = model.state_dict()
    if missing := sorted(want.keys() - state.keys()):
        raise InputError(
            f"{what} lacks {missing[0]} ({len(missing)} tensors in all); it isn't a whole SAM, download it again"
        )
    for name, tensor in want.items():
        if state[name].shape != tensor.shape:
            raise InputError(
                f"{what} holds {name} of {tuple(state[name].shape)}, its config.json asks for {tuple(tensor.shape)}; "
                "get config.json and weights of one model"
            )
    model.load_state_dict({name: state[name] for name in want}, assign=True)
    return model


def _registered(reference: str, registry: Registry | None) -> Any:
    """What a registered head of that name builds to; None when there is none."""
    if registry is None:
        from clipgraft.registry import current

        registry = current()
    names = {found.name for found in registry.list("head")}
    return registry.build("head", reference, {}) if reference in names else None


def _folder(reference: str, revision: str | None, setting: str) -> Path:
    path = Path(reference).expanduser()
    if path.exists() or reference.startswith((".", "/", "~")):
        if revision is not None:
            raise InputError(f"{setting}: {reference} is a directory, which has no revision; set it to null")
        return path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", reference):
        raise InputError(
            f"{setting}: {reference!r} is neither a directory nor a Hugging Face id; expected a SAM in transformers' "
            "format, such as facebook/sam-vit-base"
        )
    from huggingface_hub import snapshot_download

    try:
        wanted = ["config.json", "preprocessor_config.json", "*.safetensors", "*.safetensors.index.json"]
        return Path(snapshot_download(reference, revision=revision, allow_patterns=wanted))
    except Exception as error:  # network, name and permission errors alike
        raise InputError(
            f"{setting}: {reference} could not be fetched ({' '.join(str(error).split())[:160]}); give a local "
            "directory with config.json and model.safetensors"
        ) from None


def _check(folder: Path, reference: str, sha256: str | None, setting: str, log: RunLog | None) -> None:
    """One line for what is wrong with a directory before transformers reads it."""
    if not (folder / "config.json").is_file():
        raise InputError(f"{setting}: {reference} has no config.json; expected a SAM in transformers' format")
    try:
        kind = json.loads((folder / "config.json").read_text("utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError):
        raise InputError(f"{setting}: {folder / 'config.json'} is no JSON object; download the model again") from None
    if kind != "sam":
        raise InputError(f"{setting}: {reference} holds a model of type {kind!r}, not 'sam'; give a SAM")
    if not (folder / WEIGHTS).is_file() and not (folder / INDEX).is_file():
        raise InputError(f"{setting}: {reference} has no {WEIGHTS}; no other weights are read, add its safetensors")
    if sha256 is None:
        return
    if not (folder / WEIGHTS).is_file():
        raise InputError(f"{setting}: a sha256 pins one {WEIGHTS}, {reference} has shards; remove the sha256")
    if (given := files.sha256_of(folder / WEIGHTS)) != sha256.lower():
        raise InputError(
            f"{setting}: {reference} has the sha256 {given}, the settings say {sha256}; get the right "
            "files or correct it"
        )
    if log is not None:
        log.info(f"{setting}: {reference} has the sha256 {given}, as pinned")


def _normalisation(folder: Path) -> Preprocess | None:
    """What preprocessor_config.json says; None without one."""
    file = folder / "preprocessor_config.json"
    if not file.is_file():
        return None
    told = json.loads(file.read_text("utf-8"))
    side = int(told.get("size", {}).get("longest_edge", 1024))
    mean, std = tuple(told.get("image_mean", MEAN)), tuple(told.get("image_std", STD))
    return Preprocess((side, side), mean, std, "bilinear", "longest")
