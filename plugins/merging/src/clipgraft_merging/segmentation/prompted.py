"""``merging/prompted-masks``: how well promptable masks follow their prompts, against truth and against a SAM."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from clipgraft.config.schema import Config
from clipgraft.data.base import Source
from clipgraft.errors import InputError
from clipgraft.evaluation.base import Evaluation
from clipgraft.evaluation.features import EncoderFeatures
from clipgraft.evaluation.statistics import Share, Statistic
from clipgraft_merging.sam.segmenter import Segmenter, open_segmenter, segmenter_of
from clipgraft_merging.segmentation.pictures import Frame, Row, each_batch, evaluating
from clipgraft_merging.segmentation.prompts import boxes_of, inner_points, mask_iou

Prompt = Literal["point", "box"]


class PromptedMasks(Config):
    """Mean IoU of the mask of every object, prompted by a point inside it or by the box around it.

    The source's samples hold ``instances`` (K, H, W'), or else ``semantics`` (H, W'), whose classes then count as
    objects. ``against`` names a SAM that gets the same prompts: ``agreement`` is the IoU with its masks.
    """

    prompt: Prompt = Field("box", description="point: the pixel farthest from the object's border; box: its bounds")
    sam: str | None = Field(None, description="a SAM to measure instead of the model's own masks")
    against: str | None = Field(None, description="a SAM whose masks to compare with; null: with the truth alone")
    size: int | None = Field(None, gt=0, description="side at which the tower reads pictures [pixels]; null: its own")
    multimask: bool = Field(False, description="three masks per prompt, of which the best by its own guess counts")
    smallest: int = Field(16, ge=1, description="objects with fewer pixels are left out [pixels]")
    batch_size: int = Field(8, gt=0, description="pictures per forward pass")

    def __call__(self, features: EncoderFeatures, source: Source) -> Evaluation:
        """Records: id, objects, iou (sum over objects), agreement and reference likewise with ``against``."""
        device = next(features.encoder.parameters()).device
        own = segmenter_of(features.encoder) if self.sam is None else open_segmenter(self.sam)
        if own is None:
            raise InputError(
                f"{features.encoder.data.origin.uri} has no promptable masks; measure a run of sam-clip, or name a SAM "
                "with sam"
            )
        other = None if self.against is None else open_segmenter(self.against, setting="against")
        models = [model.to(device) for model in (own, other) if model is not None]

        def work(batch: list[Frame], _: tuple[int, int]) -> list[Row]:
            truths = [objects_of(frame, source, smallest=self.smallest).to(device) for frame in batch]
            found = [self._found(model, batch, truths) for model in models]
            rows = []
            for i, (frame, truth) in enumerate(zip(batch, truths, strict=True)):
                row: Row = {"id": frame.sample.id, "objects": len(truth), "iou": _sum(found[0][i], truth)}
                if len(models) > 1:
                    row |= {"agreement": _sum(found[0][i], found[1][i]), "reference": _sum(found[1][i], truth)}
                rows.append(row)
            return rows

        with evaluating(*models):
            rows, bad = each_batch(
                source,
                work,
                size_of=lambda _: (0, 0),
                batch_size=self.batch_size,
                title="prompting on",
                log=features.log,
            )
        if not any(row["objects"] for row in rows):
            raise InputError(f"{source.name} shows no object of {self.smallest} pixels or more; lower smallest")
        names = ("iou", "agreement", "reference") if other is not None else ("iou",)
        statistics: dict[str, Statistic] = {name: Share(name, of="objects") for name in names}
        once = torch.ones(1, len(rows), dtype=torch.float64)
        metrics = {name: float(statistic.bind(rows)(once)) for name, statistic in statistics.items()}
        metrics["objects"] = float(sum(row["objects"] for row in rows))
        return Evaluation(
            metrics | ({"skipped": float(bad.count)} if bad.count else {}), samples=tuple(rows), statistics=statistics
        )

    def _found(self, model: Segmenter, batch: list[Frame], truths: list[Tensor]) -> list[Tensor]:
        """Masks (P, H, W') bool of every picture's objects."""
        side = self.size or model.tower.native
        pixels = torch.stack([frame.pixels(model.preprocess, (side, side)) for frame in batch]).to(truths[0].device)
        embedded = model.embed(pixels)
        return [
            prompted(model, embedded[i : i + 1], truth, side=side, prompt=self.prompt, multimask=self.multimask)
            for i, truth in enumerate(truths)
        ]


def prompted(
    model: Segmenter, embedded: Tensor, truth: Tensor, *, side: int, prompt: Prompt, multimask: bool
) -> Tensor:
    """One embedded picture (1, C, h, w) and objects (P, H, W') -> masks (P, H, W') bool that their prompts give."""
    if not len(truth):
        return truth
    size = truth.shape[-2:]
    scale = torch.tensor([side / size[1], side / size[0]], device=truth.device)
    given: dict[str, Any] = {}
    if prompt == "box":
        given["boxes"] = ((boxes_of(truth).view(-1, 2, 2) + 0.5) * scale - 0.5).view(1, -1, 4)
    else:
        given["points"] = ((inner_points(truth) + 0.5) * scale - 0.5)[None, :, None]
        given["labels"] = torch.ones(1, len(truth), 1, dtype=torch.long, device=truth.device)
    logits = model.masks(embedded, **given, multimask=multimask).best()
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=False)[0] > 0


def objects_of(frame: Frame, source: Any, *, smallest: int) -> Tensor:
    """(P, H, W') bool: the sample's instances, or the regions of its classes, that are large enough."""
    if "instances" in frame.sample.extra:
        masks = frame.extra("instances", source) > 0
    else:
        semantics = frame.extra("semantics", source)
        labels = [k for k in semantics.unique().tolist() if k not in (0, 255)]
        masks = torch.stack([semantics == k for k in labels]) if labels else torch.zeros(0, *semantics.shape).bool()
    return masks[masks.flatten(1).sum(1) >= smallest]


def _sum(found: Tensor, truth: Tensor) -> float:
    return float(mask_iou(found, truth).double().sum())
