"""SugarCrepe: hard negatives that read as well as the caption (Hsieh et al., NeurIPS 2023, arXiv 2306.14610)."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from clipgraft.config.schema import Config
from clipgraft.errors import InputError
from clipgraft_evaluation.layouts import CaptionRow, CaptionTests, entries_of, folder_of, read_json, text_of

PARTS = ("add_att", "add_obj", "replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj")
IMAGE_FOLDERS = ("val2017", "images/val2017", "coco/images/val2017", "data/coco/images/val2017")
Part = Literal["all", "add_att", "add_obj", "replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj"]


class SugarCrepeConfig(Config):
    """``sugarcrepe:DIR``."""

    path: str = Field(description="folder with the seven JSON files, or with them in data/")
    part: Part = Field("all", description="which kind of negative")
    images: str | None = Field(
        None, description="folder of COCO's val2017; null: val2017, images/val2017 or coco/images/val2017 below path"
    )


def open_sugarcrepe(*, path: str, part: Part = "all", images: str | None = None) -> CaptionTests:
    """Groups are the kinds of negative, ids ``kind/key`` with the key in the file."""
    name, parts = f"sugarcrepe:{path}", PARTS if part == "all" else (part,)
    root = folder_of(path, source=name, holds=f"{parts[0]}.json", inside=("", "data"))
    below = Path(path).expanduser().resolve()
    places = [Path(images).expanduser().resolve()] if images else [below / folder for folder in IMAGE_FOLDERS]
    pictures = next((folder for folder in places if folder.is_dir()), None)
    if pictures is None:
        given = f"{images} is no folder" if images else f"no images in {', '.join(IMAGE_FOLDERS[:3])}"
        raise InputError(f"{name}: {given}; unpack COCO's val2017 there, or write sugarcrepe:{path}?images=DIR")
    rows = []
    for kind in parts:
        table = read_json(root / f"{kind}.json", source=name)
        keys = list(table) if isinstance(table, dict) else range(len(table) if isinstance(table, list) else 0)
        entries = list(table.values()) if isinstance(table, dict) else table
        for key, entry in zip(keys, entries_of(entries, where=f"{name}: {kind}.json"), strict=True):
            where = f"{name}: {kind}.json entry {key}"
            caption, wrong = (text_of(entry, column, where=where) for column in ("caption", "negative_caption"))
            image = text_of(entry, "filename", where=where)
            rows.append(CaptionRow(f"{kind}/{key}", image, caption, (wrong,), kind))
    return CaptionTests(name, pictures, rows)
