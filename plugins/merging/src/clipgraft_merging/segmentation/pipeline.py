"""``merging/masked-zero-shot-seg``: two models in a row, a SAM that finds masks and a CLIP that names them.

The control that a single model with both abilities has to beat.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from clipgraft.data.base import Source
from clipgraft.encoders.base import Encoder
from clipgraft.evaluation.base import Evaluation
from clipgraft.evaluation.features import EncoderFeatures
from clipgraft_merging.sam.segmenter import Segmenter, open_segmenter, segmenter_of
from clipgraft_merging.segmentation.labelling import PatchReader, ReadingConfig, semantics_of
from clipgraft_merging.segmentation.overlap import IGNORE, confusion, counts_of, evaluation, record
from clipgraft_merging.segmentation.pictures import Frame, Row, each_batch, evaluating
from clipgraft_merging.segmentation.prompts import boxes_of
from clipgraft_merging.segmentation.proposals import ProposalConfig, proposals
from clipgraft_merging.segmentation.vocabulary import Vocabulary, VocabularyConfig

Naming = Literal["crop", "masked-crop", "pooled"]


class MaskedZeroShotSegmentation(VocabularyConfig, ReadingConfig):
    """Masks of a SAM, each named by the model: by its crop, by its crop without what lies around, or by its patches.

    Where no mask lies there is background; with ``background: none`` a pixel without a mask counts as wrong, unless
    the truth leaves it out.
    """

    sam: str | None = Field(None, description="the SAM that finds masks; null: the model's own")
    masks: ProposalConfig = ProposalConfig()
    naming: Naming = Field(
        "crop",
        description="crop: the box around the mask; masked-crop: with grey around the mask; pooled: mean of the "
        "patches' embeddings below the mask",
    )
    margin: float = Field(0.1, ge=0, description="added around a crop, in its longer side")
    per_class: bool = Field(False, description="report the IoU of each class too, as iou/NAME")

    def __call__(self, features: EncoderFeatures, source: Source) -> Evaluation:
        """Records: id, pixels, right, iou, and pixels per label (``overlap.record``)."""
        encoder = features.encoder
        vocabulary = self.vocabulary(features, source)
        found = segmenter_of(encoder) if self.sam is None else open_segmenter(self.sam)
        if found is None:
            from clipgraft.errors import InputError

            raise InputError(f"{encoder.data.origin.uri} has no promptable masks; name a SAM with sam")
        segmenter = found.to(next(encoder.image.parameters()).device)
        reader = self.reader(encoder) if self.naming == "pooled" else None
        labels = 1 + len(vocabulary.names)

        def work(batch: list[Frame], size: tuple[int, int]) -> list[Row]:
            return [self._row(frame, source, encoder, segmenter, vocabulary, reader, labels) for frame in batch]

        with evaluating(encoder, segmenter):
            rows, bad = each_batch(
                source,
                work,
                size_of=lambda _: (0, 0),
                batch_size=self.batch_size,
                title="segmenting",
                log=features.log,
            )
        return evaluation(rows, vocabulary.labels, per_class=self.per_class, skipped=bad.count)

    def _row(
        self,
        frame: Frame,
        source: Source,
        encoder: Encoder,
        segmenter: Segmenter,
        vocabulary: Vocabulary,
        reader: PatchReader | None,
        labels: int,
    ) -> Row:
        side = segmenter.tower.native
        device = next(encoder.image.parameters()).device
        pixels = frame.pixels(segmenter.preprocess, (side, side))[None].to(device)
        masks = proposals(segmenter, pixels, frame.size, self.masks).masks
        label = torch.zeros(frame.size, dtype=torch.long, device=device)
        if len(masks):
            scores = self._scores(frame, masks, encoder, vocabulary, reader)  # (P, K or 1 + K)
            names = vocabulary.decide(scores[:, :, None, None])[:, 0, 0]
            sure = scores.amax(1)
            for row in sure.argsort().tolist():  # the surest name is painted last
                label[masks[row]] = names[row]
        truth = vocabulary.truth(semantics_of(frame, source), ignore=IGNORE)
        return record(frame.sample.id, counts_of(confusion(label.cpu(), truth, labels=labels)))

    def _scores(
        self, frame: Frame, masks: Tensor, encoder: Encoder, vocabulary: Vocabulary, reader: PatchReader | None
    ) -> Tensor:
        """(P, K or 1 + K) cosines of every mask."""
        if reader is not None:
            maps = reader.maps([frame], reader.size_of(frame.size))
            cover = F.interpolate(masks[:, None].float(), size=maps.shape[-2:], mode="area")[:, 0]  # (P, h, w)
            unit = F.normalize(maps[0], dim=0)
            pooled = torch.einsum("phw,dhw->pd", cover, unit)
        else:
            pooled = encoder.image(encoder.preprocess.normalize(self._crops(frame, masks, encoder))).pooled.float()
        return vocabulary.scores(pooled[:, :, None, None])[:, :, 0, 0]

    def _crops(self, frame: Frame, masks: Tensor, encoder: Encoder) -> Tensor:
        """(P, 3, h, w) in [0, 1]: a square around every mask's box, resized to the tower's size."""
        size, (height, width) = encoder.preprocess.size, frame.size
        whole = frame.pixels(encoder.preprocess, frame.size).to(masks.device)  # (3, H, W')
        grey = whole.new_tensor(encoder.preprocess.mean)[:, None, None]
        crops = []
        for mask, box in zip(masks, boxes_of(masks).tolist(), strict=True):
            x0, y0, x1, y1 = box
            side = max(x1 - x0 + 1, y1 - y0 + 1) * (1 + 2 * self.margin)
            left, top = ((x0 + x1 + 1 - side) / 2, (y0 + y1 + 1 - side) / 2)
            shown = torch.where(mask, whole, grey) if self.naming == "masked-crop" else whole
            cols = slice(max(0, round(left)), max(1, min(width, round(left + side))))
            rows = slice(max(0, round(top)), max(1, min(height, round(top + side))))
            crop = shown[:, rows, cols]
            pad = [
                max(0, -round(left)),
                max(0, round(left + side) - width),
                max(0, -round(top)),
                max(0, round(top + side) - height),
            ]
            framed = F.pad(crop - grey, pad) + grey
            crops.append(F.interpolate(framed[None], size=size, mode="bicubic", antialias=True, align_corners=False)[0])
        return torch.stack(crops).clamp(0, 1)
