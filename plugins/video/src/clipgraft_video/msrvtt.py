"""``msrvtt:DIR``: MSR-VTT's captions and splits as the retrieval papers use them.

DIR holds ``MSRVTT_data.json`` (``sentences`` with video_id and caption), ``MSRVTT_train.9k.csv`` or
``MSRVTT_train.7k.csv`` (a column video_id) and ``MSRVTT_JSFUSION_test.csv`` (video_id, sentence: one per video).
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Literal

from pydantic import Field

from clipgraft.errors import InputError
from clipgraft_video.archive import exists, is_archive
from clipgraft_video.sources import ClipConfig, VideoFile, Videos

LISTS = {"train-9k": "MSRVTT_train.9k.csv", "train-7k": "MSRVTT_train.7k.csv", "test-1k": "MSRVTT_JSFUSION_test.csv"}


class MsrvttConfig(ClipConfig):
    """MSR-VTT."""

    path: str = Field(..., description="folder of the annotation files")
    videos: str | None = Field(
        None, description="folder or uncompressed tar of the videos; by default videos/ or all/ in path, or path"
    )
    split: Literal["train-9k", "train-7k", "test-1k"] = Field(
        "test-1k", description="9,000 or 7,010 videos to train on, or JSFUSION's 1,000 with one caption each"
    )
    held_out: int = Field(0, ge=0, description="last videos of a training list to leave out, or with tune to take")
    tune: bool = Field(False, description="take the held-out videos instead; best states are chosen on these")


def msrvtt(
    *,
    path: str,
    videos: str | None = None,
    split: Literal["train-9k", "train-7k", "test-1k"] = "test-1k",
    held_out: int = 0,
    tune: bool = False,
    **clip: object,
) -> Videos:
    """The videos of a split with their captions; ``InputError`` names the file that is missing or damaged."""
    folder, name = Path(path).expanduser().resolve(), f"msrvtt:{path}"
    listed = _rows(folder / LISTS[split], name)
    if split == "test-1k":
        if tune or held_out:
            raise InputError(f"{name}: held_out and tune belong to training lists; the test is not chosen on")
        captions = {row["video_id"]: [row["sentence"]] for row in listed if row.get("sentence")}
    else:
        captions = _sentences(folder / "MSRVTT_data.json", name)
    ids = [row["video_id"] for row in listed]
    if held_out >= len(ids):
        raise InputError(f"{name}: held_out {held_out} leaves none of {len(ids)} videos")
    if tune and not held_out:
        raise InputError(f"{name}: tune needs held_out, the number of videos to take")
    ids = ids[len(ids) - held_out :] if tune else ids[: len(ids) - held_out]
    if bare := next((i for i in ids if not captions.get(i)), None):
        raise InputError(f"{name}: {bare} has no caption; the list and the captions don't belong together")
    candidates = [folder / "videos", folder / "all", folder]
    base = Path(videos).expanduser().resolve() if videos else next(p for p in candidates if p.is_dir())
    if not base.is_dir() and not is_archive(base):
        raise InputError(f"{name}: videos {videos} is no folder and no tar")
    files = [VideoFile(i, _file(base, i), None, tuple(captions[i])) for i in ids]
    return Videos(f"{name}?split={split}", files, root=base, classes=(), clip=ClipConfig.model_validate(clip))


def _file(base: Path, video: str) -> Path:
    return next((p for s in (".mp4", ".avi", ".webm") if exists(p := base / f"{video}{s}")), base / f"{video}.mp4")


def _rows(file: Path, where: str) -> list[dict[str, str]]:
    if not file.is_file():
        raise InputError(f"{where}: there is no {file.name}")
    with file.open(encoding="utf-8-sig", newline="") as lines:
        rows = list(csv.DictReader(lines))
    if not rows or not rows[0].get("video_id"):
        raise InputError(f"{where}: {file.name} has no column video_id")
    return rows


def _sentences(file: Path, where: str) -> dict[str, list[str]]:
    if not file.is_file():
        raise InputError(f"{where}: there is no {file.name}")
    found: dict[str, list[str]] = {}
    try:
        for row in json.loads(file.read_text("utf-8"))["sentences"]:
            found.setdefault(row["video_id"], []).append(row["caption"])
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{where}: {file.name} is damaged; expected sentences with video_id and caption") from None
    return found
