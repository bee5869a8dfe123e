"""The models inside the wheel: where they are, what the manifest says of them, and how they open.

Every folder opens without this package: the CLIPs in stock open_clip ("local-dir:"), the generators in diffusers, the
text teacher and the promptable SAM in transformers.
"""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipgraft.errors import unknown_name

if TYPE_CHECKING:
    from torch import nn

    from clipgraft.encoders.base import Encoder

MODELS = (
    "clip-0",
    "clip-1",
    "clip-2",
    "teacher",
    "generator",
    "generator-own",
    "mask-teacher",
    "text-teacher",
    "sam-teacher",
)


def models_folder() -> Path:
    """The folder of all shipped models."""
    return Path(str(files("clipgraft_toyworld").joinpath("models")))


def folder(name: str) -> Path:
    """The folder of one shipped model, e.g. "clip-0"."""
    if name not in MODELS:
        raise unknown_name("toy world model", name, MODELS)
    return models_folder() / name


def manifest() -> dict[str, Any]:
    """Recipe, seed, seconds, metrics and hashes of every shipped model."""
    result: dict[str, Any] = json.loads((models_folder() / "manifest.json").read_text(encoding="utf-8"))
    return result


def _encoder(name: str, uri: str) -> Encoder:
    from clipgraft.encoders.openclip import open_folder

    return open_folder(folder(name), uri=uri)


def clip() -> Encoder:
    """`toyworld/clip`: base 0."""
    return _encoder("clip-0", "toyworld/clip")


def clip_1() -> Encoder:
    """`toyworld/clip-1`: the same recipe from another seed, text tower included."""
    return _encoder("clip-1", "toyworld/clip-1")


def clip_2() -> Encoder:
    """`toyworld/clip-2`: the same recipe from a third seed."""
    return _encoder("clip-2", "toyworld/clip-2")


def teacher() -> Encoder:
    """`toyworld/teacher`: base 0's text tower with an image tower that says every detail."""
    return _encoder("teacher", "toyworld/teacher")


def generator() -> nn.Module:
    """`toyworld/generator`: restores the teacher's patch tokens from noise and base 0's text embedding."""
    from clipgraft_toyworld.train_generator import load_generator

    return load_generator(folder("generator"))


def generator_own() -> nn.Module:
    """`toyworld/generator-own`: the same over base 0's own patch tokens."""
    from clipgraft_toyworld.train_generator import load_generator

    return load_generator(folder("generator-own"))


def mask_teacher() -> nn.Module:
    """`toyworld/mask-teacher`: standardised pixels to logits of "an object is here"."""
    from clipgraft_toyworld.mask_teacher import load_mask_teacher

    return load_mask_teacher(folder("mask-teacher"))


def text_teacher() -> nn.Module:
    """`toyworld/text-teacher`: a `BertModel` that knows rare words; mean-pool its last hidden states."""
    from clipgraft_toyworld.text_teacher import load_text_teacher

    return load_text_teacher(folder("text-teacher"))


def sam_teacher() -> nn.Module:
    """`toyworld/sam-teacher`: a transformers `SamModel` of 64 pixels that outlines what a prompt points at."""
    from clipgraft_toyworld.sam_teacher import load_sam_teacher

    return load_sam_teacher(folder("sam-teacher"))
