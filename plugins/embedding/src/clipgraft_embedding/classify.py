"""Images into classes that are given as words (Radford et al. 2021, arXiv 2103.00020, section 3.1).

Shape legend: b batch, K classes, D joint embedding.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from clipgraft.data import open_source
from clipgraft.data.base import Source
from clipgraft.data.images import MAX_PIXELS, SUFFIXES, ImageFiles
from clipgraft.encoders.base import Encoder
from clipgraft.errors import InputError
from clipgraft.evaluation.features import EncoderFeatures
from clipgraft.evaluation.templates import prompt_templates
from clipgraft.log import RunLog
from clipgraft_embedding.stream import read, spans, usual_workers
from clipgraft_embedding.tower import Precision, Tower, usual_batch_size


@dataclass(frozen=True, slots=True)
class Verdict:
    """The likeliest labels of one image with their probabilities, best first."""

    id: str
    labels: tuple[str, ...]
    probabilities: tuple[float, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        pairs = zip(self.labels, self.probabilities, strict=True)
        return {"id": self.id, "top": [{"label": label, "probability": p} for label, p in pairs]}


@dataclass
class Classifier:
    """A zero-shot classifier: ``weights`` (K, D) of length one, ``scale`` the model's own factor on cosines."""

    encoder: Encoder
    labels: Sequence[str]
    templates: Sequence[str] = ()

    def __post_init__(self) -> None:
        labels = list(self.labels)
        if len(labels) < 2:
            given = f"one label ({labels[0]})" if labels else "no label"
            raise InputError(f"{given} was given where two or more compete; e.g. --labels cat,dog")
        if twice := [label for label in labels if labels.count(label) > 1 or not label.strip()]:
            raise InputError(f"the label {twice[0]!r} is {'there twice' if twice[0].strip() else 'empty'}")
        self.weights = EncoderFeatures(self.encoder).classifier(labels, self.templates)
        self.scale = float(self.encoder.logit_scale.detach().exp())

    def alike(self) -> list[str]:
        """Labels that the model reads as another one, up to rounding: it has no words for them."""
        close = self.weights.double() @ self.weights.double().T > 1 - 1e-6  # (K, K)
        return [label for label, row in zip(self.labels, close, strict=True) if int(row.sum()) > 1]

    def probabilities(self, images: Tensor) -> Tensor:
        """(b, D) of length one -> (b, K): softmax of scaled cosines. A sigmoid model's bias cancels in it."""
        return (self.scale * images.double() @ self.weights.double().T).softmax(-1)


def classify(
    classifier: Classifier,
    source: Source,
    *,
    top: int = 3,
    batch_size: int | None = None,
    workers: int | None = None,
    precision: Precision = "fp32",
    bad: list[str] | None = None,
    log: RunLog | None = None,
) -> Iterator[Verdict]:
    """A verdict per readable image, in order, as they are made; the others go to ``bad`` with their reason."""
    encoder, top = classifier.encoder, min(top, len(classifier.labels))
    tower, bad = Tower(encoder, precision=precision), bad if bad is not None else []
    workers = usual_workers(source, "images") if workers is None else workers
    batch_size = usual_batch_size(encoder) if batch_size is None else batch_size
    todo = [span for part in spans(len(source), shard_size=batch_size, batch_size=batch_size) for span in part]
    log = log or RunLog(is_main=False)
    with log.progress(f"classifying {source.name}", len(source)) as bar:
        for rows in read(source, todo, kind="images", preprocess=encoder.preprocess, workers=workers):
            bad += rows.bad
            if rows.pixels is not None:
                best = classifier.probabilities(tower(rows.pixels)).sort(dim=-1, descending=True, stable=True)
                columns = zip(rows.ids, best.indices[:, :top].tolist(), best.values[:, :top].tolist(), strict=True)
                for name, indices, values in columns:
                    yield Verdict(name, tuple(classifier.labels[i] for i in indices), tuple(values))
            bar.advance(rows.span.stop - rows.span.start)


def open_images(ref: str) -> Source:
    """A folder with images at any depth, one image file, or any data reference. Labels, if known, are ignored."""
    path = Path(ref).expanduser()
    if path.is_file():
        return ImageFiles(ref, path.resolve().parent, {path.name: ()}, {}, (), MAX_PIXELS)
    if not path.is_dir():
        try:
            source = open_source(ref)
        except InputError as error:
            if set(ref) & set(":?"):
                raise
            raise InputError(f"{ref} is neither a folder nor an image; as data: {error}") from None
        if hasattr(source, "patterns"):
            raise InputError(f"{ref} holds minimal pairs; give single images")
        return source
    root, found = path.resolve(), []
    for here, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith((".", "__"))]
        images = [name for name in files if Path(name).suffix.lower() in SUFFIXES and not name.startswith(".")]
        found += [Path(here, name).relative_to(root).as_posix() for name in images]
    if not found:
        raise InputError(f"{ref}: no image found; their names end in {', '.join(sorted(SUFFIXES))}")
    return ImageFiles(ref, root, dict.fromkeys(sorted(found), ()), {}, (), MAX_PIXELS)


TEMPLATES = {"plain": (), "simple": "simple", "openai": "openai-imagenet"}
"""What ``--templates`` calls the core's sets."""


def read_templates(name: str) -> tuple[str, ...]:
    """``plain`` (one), open_clip's ``simple`` (7) or ``openai`` (80), or a file with one template per line."""
    if name not in TEMPLATES and not Path(name).is_file():
        raise InputError(f"--templates {name} is neither {', '.join(TEMPLATES)} nor a file with one template per line")
    return prompt_templates(TEMPLATES.get(name, f"file:{name}"))


def read_lines(path: Path, *, what: str) -> tuple[str, ...]:
    """The lines of a file that aren't blank."""
    try:
        lines = tuple(line.strip() for line in path.read_text("utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} can't be read as text ({error}); write one {what} per line in UTF-8") from None
    if not lines:
        raise InputError(f"{path} is empty; write one {what} per line")
    return lines
