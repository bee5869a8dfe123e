"""``video:LIST`` and ``video:DIR``: video files, or folders of pictures, as samples with frames."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator
from torch import Generator, Tensor

from clipgraft.config.schema import Config
from clipgraft.data.base import BadSample, Entry, Sample
from clipgraft.data.images import LEAVES, MAX_PIXELS
from clipgraft.errors import InputError
from clipgraft_video.archive import content, exists, is_archive, is_folder, stamp, walk
from clipgraft_video.class_lists import ClassList, read_classes
from clipgraft_video.decoding import SUFFIXES, BadVideo, VideoInfo
from clipgraft_video.flips import may_flip, mirrored_places
from clipgraft_video.frame_rules import Rule, indices
from clipgraft_video.media import PICTURES, frames_of, info_of
from clipgraft_video.pixels import Augment, test_clip, training_clip
from clipgraft_video.protocols import few_shot, halves, within
from clipgraft_video.torchcodec_frames import Decoder, chosen
from clipgraft_video.video_lists import Listing, read_list


class ClipConfig(Config):
    """How a video becomes a clip."""

    frames: int = Field(8, gt=0, le=512, description="frames per clip")
    size: int = Field(224, gt=0, description="side of the frames [pixels]; that of the model")
    rule: Rule = Field("tsn", description="which frames are looked at")
    stride: int = Field(16, gt=0, description="of the rule dense [frames]")
    fps: float = Field(25.0, gt=0, description="of folders of pictures, which don't say it [1/s]")
    antialias: bool = Field(True, description="when resizing; false is what the official OpenCV code does")
    flip: Literal["auto", "on", "off", "swap"] = Field(
        "auto",
        description="auto: off when a class says left or right, and for captions; swap: a mirrored video has the class "
        "with left and right exchanged",
    )
    jitter_per_frame: bool = Field(False, description="other colours in every frame, as in ViFi-CLIP's code")
    max_damaged: float = Field(0.5, ge=0, le=1, description="largest share of frames that a damaged tail may lack")
    max_pixels: int = Field(MAX_PIXELS, gt=0, description="largest frame that is decoded [pixels]")
    decoder: Decoder = Field(
        "auto", description="auto: torchcodec where it is installed and exact on test clips, else PyAV; or force one"
    )

    @field_validator("decoder", mode="before")
    @classmethod
    def _no_decord(cls, value: object) -> object:
        if value == "decord":
            raise ValueError("decord gives other frames than were asked for in files with B-frames; write decoder=pyav")
        return value


class VideosConfig(ClipConfig):
    """A folder with a sub-folder per class, a flat folder, the same inside a tar, or a list of any known form."""

    path: str = Field(..., description="folder, uncompressed tar, or list")
    root: str | None = Field(
        None, description="folder or uncompressed tar that a list's paths start from; the list's folder by default"
    )
    classes: str | None = Field(None, description="file of class names")
    shots: int | None = Field(None, gt=0, description="only so many videos of every class, drawn by shots_seed")
    shots_seed: int = Field(0, ge=0, description="of the draw")
    half: Literal["all", "base", "novel"] = Field("all", description="only the first or the second half of the classes")


@dataclass(frozen=True, slots=True)
class VideoFile:
    """One video: ``id``, its path, label and captions."""

    id: str
    path: Path
    label: int | None
    captions: tuple[str, ...]


class Videos:
    """Videos as samples: ``extra["frames"]`` (T, 3, S, S) uint8, ``image`` the frame in the middle of them.

    ``source[i]`` is what a test sees; training draws frames, crop and colours anew (``varied``). A damaged tail is
    filled with the last good frame, up to ``max_damaged`` of the frames; other damage is a ``BadSample``.
    """

    templates: Sequence[str] = ()
    attributes: Mapping[str, Sequence[str]] = {}

    def __init__(
        self, name: str, files: Sequence[VideoFile], *, root: Path, classes: Sequence[str], clip: ClipConfig
    ) -> None:
        self.name, self.files, self.root, self.classes, self.clip = name, list(files), root, list(classes), clip
        if clip.flip == "swap" and not self.classes:
            raise InputError(f"{name}: flip=swap exchanges classes, and it names none; leave flip out")
        self._mirror = mirrored_places(self.classes) if clip.flip == "swap" else list(range(len(self.classes)))
        flips = clip.flip in ("on", "swap") or (clip.flip == "auto" and bool(self.classes) and may_flip(self.classes))
        self.augment = Augment(flip=0.5 if flips else 0.0, jitter_per_frame=clip.jitter_per_frame)
        digest = hashlib.sha256(repr((self.classes, clip.model_dump())).encode())
        for file in self.files:
            told = (file.id, file.label, file.captions, stamp(file.path))
            digest.update(repr(told).encode("utf-8", "backslashreplace"))
        self.fingerprint = digest.hexdigest()
        self._known: dict[int, VideoInfo] = {}
        self._decoder = chosen(clip.decoder)

    def __len__(self) -> int:
        return len(self.files)

    def entry(self, index: int) -> Entry:
        """Everything but the frames."""
        file = self.files[index]
        return Entry(file.id, file.captions, file.label, file=file.path.name)

    def content(self, index: int) -> bytes:
        """The file as it is."""
        path = self._inside(self.files[index])
        if is_folder(path):
            raise LookupError(f"{path.name} is a folder of pictures")
        return content(path)

    def __getitem__(self, index: int) -> Sample:
        return self._sample(self.files[index], self.view(index))

    def view(self, index: int, *, view: int = 0, views: int = 1, crop: int = 0, crops: Literal[1, 3] = 1) -> Tensor:
        """(T, 3, S, S) uint8 of one view of a deterministic test."""
        file, c = self.files[index], self.clip
        info, path = self.info(index), self._inside(file)
        at = indices(c.rule, info.frames, c.frames, view=view, views=views, stride=c.stride, fps=info.fps)
        return test_clip(self._read(file, path, at), c.size, crop=crop, crops=crops, antialias=c.antialias)

    def varied(self, index: int, rng: Generator) -> Sample:
        """As training sees it."""
        file, c = self.files[index], self.clip
        info, path = self.info(index), self._inside(file)
        at = indices(c.rule, info.frames, c.frames, rng=rng, stride=c.stride, fps=info.fps)
        frames = self._read(file, path, at)
        cut = training_clip(frames, c.size, augment=self.augment, rng=rng, antialias=c.antialias)
        if cut.mirrored and file.label is not None:
            file = replace(file, label=self._mirror[file.label])
        return self._sample(file, cut.frames)

    def info(self, index: int) -> VideoInfo:
        """What the file holds; asked of the file once."""
        if index not in self._known:
            file, c = self.files[index], self.clip
            try:
                self._known[index] = info_of(self._inside(file), fps=c.fps, max_pixels=c.max_pixels)
            except BadVideo as error:
                raise BadSample(file.id, str(error)) from None
        return self._known[index]

    def _inside(self, file: VideoFile) -> Path:
        path = file.path.resolve()
        if not path.is_relative_to(self.root):
            raise BadSample(file.id, LEAVES)
        if not exists(path):
            raise BadSample(file.id, "missing file")
        return path

    def _read(self, file: VideoFile, path: Path, at: Sequence[int]) -> Tensor:
        try:
            found = frames_of(path, at, max_pixels=self.clip.max_pixels, decoder=self._decoder)
        except BadVideo as error:
            raise BadSample(file.id, str(error)) from None
        if found.repeated > self.clip.max_damaged * len(at):
            raise BadSample(file.id, f"{found.repeated} of {len(at)} frames are missing at the end")
        return found.pixels

    @staticmethod
    def _sample(file: VideoFile, frames: Tensor) -> Sample:
        return Sample(file.id, frames[len(frames) // 2], file.captions, file.label, extra={"frames": frames})


def videos(
    *,
    path: str,
    root: str | None = None,
    classes: str | None = None,
    shots: int | None = None,
    shots_seed: int = 0,
    half: Literal["all", "base", "novel"] = "all",
    **clip: object,
) -> Videos:
    """``video:PATH``: class names come from ``classes``, else from the folders, else from the labels."""
    name, place = f"video:{path}", Path(path).expanduser().resolve()
    named = None if classes is None else read_classes(classes)
    if place.is_dir() or is_archive(place):
        base, rows = place, _walk(place, name)
    elif place.is_file():
        base = place.parent if root is None else Path(root).expanduser().resolve()
        rows = read_list(place, where=name)
    else:
        raise InputError(f"{name}: there is no such folder or list")
    if not base.is_dir() and not is_archive(base):
        raise InputError(f"{name}: root {root} is no folder and no tar; give the one that the paths start from")
    files, names = _labelled(rows, named, base=base, where=name)
    files, names = _part(files, names, shots=shots, seed=shots_seed, half=half, where=name)
    return Videos(name, files, root=base, classes=names, clip=ClipConfig.model_validate(clip))


def unlabelled(path: str | Path, *, clip: ClipConfig) -> Videos:
    """Every video below a folder or inside a tar, or one file, whatever the folders mean."""
    place = Path(path).expanduser().resolve()
    if place.is_file() and not is_archive(place):
        return Videos(str(path), [VideoFile(place.name, place, None, ())], root=place.parent, classes=(), clip=clip)
    if not place.is_dir() and not is_archive(place):
        raise InputError(f"{path}: there is no such file or folder")
    files = [VideoFile(name, place / name, None, ()) for name in _found(place, str(path))]
    return Videos(str(path), files, root=place, classes=(), clip=clip)


def _found(folder: Path, where: str) -> list[str]:
    """Video files below a folder or inside a tar, and folders that hold pictures alone, as paths from it."""
    found = []
    for at, parent, files in walk(folder):
        files = [file for file in files if not file.startswith(".")]  # ._a.mp4 in archives of a Mac is no video
        kinds = {Path(file).suffix.lower() for file in files}
        found += [f"{at}/{file}".removeprefix("./") for file in files if Path(file).suffix.lower() in SUFFIXES]
        if at != "." and not parent and kinds & PICTURES and not kinds & SUFFIXES:
            found.append(at)
    if not found:
        raise InputError(f"{where}: no video found; their names end in {', '.join(sorted(SUFFIXES))}")
    return found


def _walk(folder: Path, where: str) -> list[Listing]:
    """The videos of a folder; a class is the first folder."""
    found = _found(folder, where)
    flat = [path for path in found if "/" not in path and not is_folder(folder / path)]
    if flat and len(flat) < len(found):
        raise InputError(f"{where}: {flat[0]} lies beside class folders; move it into one of them")
    return [Listing(path, None if flat else path.partition("/")[0]) for path in found]


def _labelled(
    rows: Sequence[Listing], named: ClassList | None, *, base: Path, where: str
) -> tuple[list[VideoFile], list[str]]:
    """Labels as positions in the class names; ``InputError`` when one names no class."""
    labels = [row.label if row.label is not None else _folder(row) for row in rows]
    if named is None:
        distinct = {label for label in labels if label is not None}
        whole = all(label.lstrip("-").isdecimal() for label in distinct)
        names = sorted(distinct, key=int) if whole else sorted(distinct)
        places: Mapping[str, int] = {label: k for k, label in enumerate(names)}
    else:
        names, places = list(named.names), {**{n: k for k, n in enumerate(named.names)}, **named.places}
        if odd := next((label for label in labels if label is not None and label not in places), None):
            raise InputError(
                f"{where}: the label {odd} is none of the {len(names)} classes ({', '.join(list(named.places)[:3])}, "
                "...); give the class list that belongs to it"
            )
    files, seen = [], set[str]()
    for row, label in zip(rows, labels, strict=True):
        if row.video in seen:
            raise InputError(f"{where}: {row.video} is listed twice")
        seen.add(row.video)
        files.append(
            VideoFile(row.video, _existing(base / row.video), None if label is None else places[label], row.captions)
        )
    return files, names


def _folder(row: Listing) -> str | None:
    """UCF101's and HMDB51's lists leave the label to the folder."""
    head, slash, _ = row.video.partition("/")
    return head if slash and not row.captions else None


def _existing(path: Path) -> Path:
    """The file; with an ending that a list left out, where one exists."""
    if exists(path) or path.suffix.lower() in SUFFIXES:
        return path
    return next((p for s in (".mp4", ".webm", ".avi", ".mkv") if exists(p := path.with_name(path.name + s))), path)


def _part(
    files: list[VideoFile], names: list[str], *, shots: int | None, seed: int, half: str, where: str
) -> tuple[list[VideoFile], list[str]]:
    """The half of the classes and the few shots that were asked for; labels count anew inside a half."""
    if half == "all" and shots is None:
        return files, names
    labels = [file.label for file in files if file.label is not None]
    if len(labels) < len(files):
        raise InputError(f"{where}: shots and half need labels; give a list with labels, or folders of classes")
    if half != "all":
        chosen = halves(len(names)).of(half)
        kept, new = within({old: k for k, old in enumerate(chosen)}, labels)
        files = [VideoFile(files[i].id, files[i].path, k, files[i].captions) for i, k in zip(kept, new, strict=True)]
        names, labels = [names[k] for k in chosen], new
    if not files:
        raise InputError(f"{where}: it has no video of the {half} half; its labels belong to other classes")
    return (files if shots is None else [files[i] for i in few_shot(labels, shots, seed=seed)]), names
