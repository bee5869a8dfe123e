"""Segmentations for the page of a run: pictures labelled by words before and after it, beside the truth."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from clipgraft.data.loader import BadSamples
from clipgraft.errors import ClipgraftError
from clipgraft.reporting import Figure, Picture, Section, Table, encoded
from clipgraft_merging.segmentation.drawing import colours, overlay
from clipgraft_merging.segmentation.labelling import ReadingConfig
from clipgraft_merging.segmentation.pictures import Frame, evaluating, frames
from clipgraft_merging.segmentation.refinement import RefinementConfig
from clipgraft_merging.segmentation.segment import Asked, Labeller
from clipgraft_merging.segmentation.vocabulary import VocabularyConfig

if TYPE_CHECKING:
    from clipgraft.encoders.base import Encoder
    from clipgraft.registry import Registry
    from clipgraft.rundir import RunRecord

EVALUATORS = ("merging/word-segments", "merging/zero-shot-seg")
SHOWN, SIDE = 6, 192
"""Pictures on the page, and their longest side [pixels]."""
TOLD = 6
"""Classes of a picture whose shares are told."""


def segmentations(run: RunRecord, *, registry: Registry) -> list[Section]:
    """What the base and the export call every pixel; nothing for runs that labelled no pixels."""
    names = [name for evaluator in EVALUATORS for name in run.measured(evaluator)]
    if not names:
        return []
    from clipgraft.data import open_source
    from clipgraft.encoders import load

    reference = run.data_of(names[0])
    if run.export is None or reference is None:
        raise ClipgraftError("this run wrote no export" if run.export is None else f"{names[0]} names no data")
    source: Any = open_source(reference, registry=registry)
    opened = {"before": load(run.base, registry=registry).eval()}
    opened["after"] = load(str(run.path / "export"), registry=registry).eval()
    labellers = [
        Labeller(when, encoder, source, _asked(run.node(names[0]), encoder), None) for when, encoder in opened.items()
    ]
    classes, bad = labellers[0].words.names, BadSamples(len(source))
    seen = set[int]()
    palette, figures, rows = colours(len(classes)), list[Figure](), list[tuple[str | float, ...]]()
    places = range(0, len(source), max(1, len(source) // SHOWN))[:SHOWN]
    parts = [part for one in labellers for part in (one.encoder, one.segmenter) if part is not None]
    with evaluating(*parts):
        for frame in frames(source, bad, places):
            maps = {one.name: one.labels(frame) for one in labellers}
            truth = frame.sample.extra.get("semantics")
            if truth is not None:
                maps["truth"] = torch.as_tensor(truth).long()
            seen |= {int(k) for label in maps.values() for k in label.unique() if 0 < int(k) <= len(classes)}
            figures.append(_figure(frame, maps, palette, classes))
            rows += [(f"{frame.sample.id}, {when}", _shares(label, classes)) for when, label in maps.items()]
    return [
        Section(
            "What it calls the pixels",
            "Every pixel in the colour of the word that it is nearest to, before the run, after it, and as the data "
            "have it; pixels that don't count are grey or plain. Colours are one for all pictures.",
            (*figures, *_legend(seen, palette, classes)),
            (Table("The same in words: the largest classes", ("picture", "classes"), tuple(rows), folded=True),),
        )
    ]


def _asked(node: Any, encoder: Encoder) -> Asked:
    """How the evaluator labelled: its settings, and for ``word-segments`` the way that suits the tower."""
    from clipgraft_merging.samclip.image import SamImage

    reading = {k: node[k] for k in ("size", "shape", "dense") if node.get(k) is not None}
    refine = node.get("refine")
    if node.get("use", "").endswith("word-segments"):
        reading["dense"] = "last" if isinstance(encoder.image, SamImage) else "value"
        refine = {"sam": node.get("sam")} if node.get("way") == "refined" else None
    words = {k: node[k] for k in VocabularyConfig.model_fields if node.get(k)}
    return Asked(
        ReadingConfig.model_validate(reading),
        VocabularyConfig.model_validate(words),
        None if refine is None else RefinementConfig.model_validate(refine),
    )


def _figure(frame: Frame, maps: dict[str, Tensor], palette: Any, classes: tuple[str, ...]) -> Figure:
    share = SIDE / max(frame.size)
    size = max(1, round(frame.size[0] * share)), max(1, round(frame.size[1] * share))
    plain = frame.pixels(_as_it_is(size), size).mul(255).round().to(torch.uint8)
    pixels, pictures = (
        plain.permute(1, 2, 0).numpy(),
        [Picture(encoded(plain), f"picture {frame.sample.id}", "picture")],
    )
    for when, label in maps.items():
        small = F.interpolate(label[None, None].float(), size=size, mode="nearest")[0, 0].long().numpy()
        drawn = Image.fromarray(overlay(pixels, small, palette))
        pictures.append(Picture(encoded(drawn), f"{when}: {_shares(label, classes)}", when))
    return Figure(tuple(pictures), frame.sample.id, across=len(pictures))


def _legend(seen: set[int], palette: Any, classes: tuple[str, ...]) -> list[Figure]:
    """The colours of the labels that are on the page."""
    swatches = tuple(
        Picture(encoded(Image.new("RGB", (64, 16), palette[k - 1])), f"the colour of {classes[k - 1]}", classes[k - 1])
        for k in sorted(seen)
    )
    return [Figure(swatches, "Colours", across=8)] if swatches else []


def _as_it_is(size: tuple[int, int]) -> Any:
    from clipgraft.encoders.base import Preprocess

    return Preprocess(size=size, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), resize_mode="squash")


def _shares(label: Tensor, classes: tuple[str, ...]) -> str:
    """The largest classes of a label map with their shares of the pixels, in words."""
    counts = torch.bincount(label.flatten(), minlength=256)[: 1 + len(classes)]
    named = zip(("nothing", *classes), counts.tolist(), strict=True)
    best = sorted(((count, name) for name, count in named if count), reverse=True)[:TOLD]
    return ", ".join(f"{name} {100 * count / label.numel():.0f} %" for count, name in best) or "nothing"
