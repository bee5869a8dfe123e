"""Pictures and models to label maps, overlays, one sheet and one page: what ``clipgraft merging segment`` writes."""

from __future__ import annotations

import html
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from clipgraft import files
from clipgraft.data.base import Source
from clipgraft.data.loader import BadSamples
from clipgraft.data.transforms import evaluation_transform
from clipgraft.encoders.base import Encoder, Preprocess
from clipgraft.errors import InputError
from clipgraft.evaluation.features import EncoderFeatures
from clipgraft_merging.sam.segmenter import segmenter_of
from clipgraft_merging.segmentation.drawing import Bytes, Panel, colours, overlay, sheet
from clipgraft_merging.segmentation.labelling import PatchReader, ReadingConfig, decided
from clipgraft_merging.segmentation.pictures import Frame, evaluating, frames
from clipgraft_merging.segmentation.refinement import RefinementConfig, refined
from clipgraft_merging.segmentation.vocabulary import Vocabulary, VocabularyConfig

if TYPE_CHECKING:
    from clipgraft.log import RunLog

ON_SHEET = 12
"""Pictures on the sheet; the page shows all."""
SHOWN = 640
"""Longest side of an overlay [pixels]; label maps keep the picture's size."""
SMALL = 192
"""Shorter side to which tiny pictures are enlarged [pixels]."""
STYLE = """body{font:15px/1.5 system-ui,sans-serif;margin:2rem;max-width:100rem;color:#141414;background:#fff}
table{border-collapse:collapse}td,th{padding:.3rem .5rem;text-align:left;vertical-align:top;font-weight:400}
img{display:block;min-width:160px;max-width:320px;height:auto;image-rendering:pixelated}
.k{display:inline-block;margin:0 1rem .3rem 0}.k i{display:inline-block;width:1em;height:1em;margin-right:.4em;
border:1px solid #141414;vertical-align:-.1em}small{color:#555}"""


@dataclass(frozen=True, slots=True)
class Asked:
    """How pictures are labelled; ``refine`` None leaves patches alone, else models with masks of their own use them."""

    reading: ReadingConfig
    vocabulary: VocabularyConfig
    refine: RefinementConfig | None


class Labeller:
    """One model's labels of pictures."""

    def __init__(self, name: str, encoder: Encoder, source: Source, asked: Asked, log: RunLog | None) -> None:
        self.name, self.encoder = name, encoder
        self.reader: PatchReader = asked.reading.reader(encoder)
        self.words: Vocabulary = asked.vocabulary.vocabulary(EncoderFeatures(encoder, log=log), source)
        own = asked.refine is not None and (asked.refine.sam is not None or segmenter_of(encoder) is not None)
        self.refine = asked.refine if own else None
        self.segmenter = self.refine.segmenter(encoder).eval() if self.refine is not None else None

    @torch.no_grad()
    def labels(self, frame: Frame) -> Tensor:
        """(H, W') int64."""
        scores = self.words.scores(self.reader.maps([frame], self.reader.size_of(frame.size)))[0]
        found = decided(self.words, scores, frame.size)
        if self.segmenter is None or self.refine is None:
            return found.cpu()
        side = self.refine.size or self.segmenter.tower.native
        pixels = frame.pixels(self.segmenter.preprocess, (side, side))[None].to(scores)
        return refined(self.segmenter, pixels, scores, self.words, frame.size, settings=self.refine, coarse=found).cpu()


def segment(
    models: Sequence[tuple[str, Encoder]], source: Source, out: Path, *, asked: Asked, most: int, log: RunLog
) -> dict[str, Any]:
    """Write labels/, overlays/, sheet.png, index.html and segments.json into ``out``; returns the last as a dict."""
    began = time.monotonic()
    labellers = [Labeller(name, encoder, source, asked, log) for name, encoder in models]
    names = labellers[0].words.names
    palette, bad, n = colours(len(names)), BadSamples(len(source)), min(most, len(source))
    rows, lines = list[list[Panel]](), list[dict[str, Any]]()
    modules = [part for one in labellers for part in (one.encoder, one.segmenter) if part is not None]
    with evaluating(*modules), log.progress("segmenting", n) as bar:
        for number, frame in enumerate(frames(source, bad, range(n))):
            stem = f"{number:04d}-{_stem(frame.sample.id)}"
            maps = {one.name: one.labels(frame) for one in labellers}
            if "semantics" in frame.sample.extra:
                maps["truth"] = frame.extra("semantics", source).long()
            panels, line = _drawn(frame, maps, palette), {"id": frame.sample.id, "stem": stem, "labels": {}}
            for panel in panels:
                _write_png(out / "overlays" / panel.title_slug / f"{stem}.png", panel.pixels)
            for one in labellers:
                label = maps[one.name]
                _write_labels(out / "labels" / slug(one.name) / f"{stem}.png", label, palette)
                line["labels"][one.name] = _shares(label, names)
            rows += [[Panel(p.title, p.pixels) for p in panels]] if len(rows) < ON_SHEET else []
            line["panels"] = [(p.title, f"overlays/{p.title_slug}/{stem}.png") for p in panels]
            lines.append(line)
            bar.advance()
    if not lines:
        raise InputError(f"{source.name} has nothing that can be read: {bad}")
    legend = dict(zip(names, palette, strict=True))
    files.write_bytes(out / "sheet.png", _png(sheet(rows, legend)))
    files.write_bytes(out / "index.html", _page(source.name, lines, legend).encode())
    document = {
        "out": str(out),
        "data": source.name,
        "models": [name for name, _ in models],
        "classes": list(names),
        "background": asked.vocabulary.background,
        "refined": [one.name for one in labellers if one.refine is not None],
        "pictures": [{key: line[key] for key in ("id", "stem", "labels")} for line in lines],
        "unreadable": bad.count,
        "seconds": round(time.monotonic() - began, 2),
    }
    files.write_json(out / "segments.json", document)
    return document


@dataclass(frozen=True, slots=True)
class _Drawn:
    title: str
    title_slug: str
    pixels: Bytes


def _drawn(frame: Frame, maps: dict[str, Tensor], palette: Sequence[tuple[int, int, int]]) -> list[_Drawn]:
    """The picture, then every model's labels on it, then the truth, at a size that suits a page."""
    times = -(-SMALL // min(frame.size))
    scale = times if times > 1 and times * max(frame.size) <= SHOWN else min(1.0, SHOWN / max(frame.size))
    size = (max(1, round(frame.size[0] * scale)), max(1, round(frame.size[1] * scale)))
    plain = Preprocess(size=size, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), resize_mode="squash")
    pixels = evaluation_transform(plain)(frame.image).mul(255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    found = [_Drawn("picture", "picture", pixels)]
    for name, label in maps.items():
        small = torch.nn.functional.interpolate(label[None, None].float(), size=size, mode="nearest")[0, 0]
        found.append(_Drawn(name, slug(name), overlay(pixels, small.long().numpy(), palette)))
    return found


def _shares(label: Tensor, names: Sequence[str]) -> dict[str, float]:
    """Share of the pixels of every class that was found, largest first."""
    counts = torch.bincount(label.flatten(), minlength=1 + len(names))
    shares = {name: float(counts[1 + k]) / label.numel() for k, name in enumerate(names) if counts[1 + k]}
    return {name: round(share, 4) for name, share in sorted(shares.items(), key=lambda item: -item[1])}


def slug(name: str) -> str:
    """A model's name as a folder name."""
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in name).strip("-.") or "model"


def _stem(sample_id: str) -> str:
    return slug(Path(sample_id).stem)[:80]


def _png(image: Any) -> bytes:
    import io

    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def _write_png(path: Path, pixels: Bytes) -> None:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_bytes(path, _png(Image.fromarray(pixels)))


def _write_labels(path: Path, label: Tensor, palette: Sequence[tuple[int, int, int]]) -> None:
    """An index PNG whose palette shows the classes' colours: 0 background, 1 + class."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(label.numpy().astype(np.uint8)).convert("P")
    image.putdata(label.flatten().tolist())
    image.putpalette([0, 0, 0, *(value for colour in palette for value in colour)])
    files.write_bytes(path, _png(image))


def _page(title: str, lines: Sequence[dict[str, Any]], legend: dict[str, tuple[int, int, int]]) -> str:
    keys = "".join(
        f'<span class="k"><i style="background:rgb{colour}"></i>{html.escape(name)}</span>'
        for name, colour in legend.items()
    )
    body = []
    for line in lines:
        cells = "".join(
            f'<td><img src="{html.escape(file)}" alt="{html.escape(name)}"><small>{html.escape(name)}</small></td>'
            for name, file in line["panels"]
        )
        body.append(f"<tr><th>{html.escape(line['id'])}</th>{cells}</tr>")
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Segments of {html.escape(title)}</title>'
        f"<style>{STYLE}</style><h1>Segments of {html.escape(title)}</h1><p>{keys}</p>"
        f"<table>{''.join(body)}</table></html>\n"
    )
