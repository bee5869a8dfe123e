"""``merging/zero-shot-seg``: which word every pixel is nearest to, as mIoU."""

from __future__ import annotations

import torch
from pydantic import Field

from clipgraft.data.base import Source
from clipgraft.evaluation.base import Evaluation
from clipgraft.evaluation.features import EncoderFeatures
from clipgraft_merging.segmentation.labelling import ReadingConfig, decided, semantics_of
from clipgraft_merging.segmentation.overlap import IGNORE, confusion, counts_of, evaluation, record
from clipgraft_merging.segmentation.pictures import Frame, Row, each_batch, evaluating
from clipgraft_merging.segmentation.refinement import RefinementConfig, refined
from clipgraft_merging.segmentation.vocabulary import VocabularyConfig


class ZeroShotSegmentation(VocabularyConfig, ReadingConfig):
    """Zero-shot semantic segmentation: patches against texts, enlarged to the truth, argmax, mIoU.

    The source's samples hold ``semantics`` (H, W'): 0 background, 1 + class, 255 for what doesn't count. With
    ``refine`` promptable masks sharpen the coarse labels (SAM-CLIP's two heads).
    """

    per_class: bool = Field(False, description="report the IoU of each class too, as iou/NAME")
    refine: RefinementConfig | None = Field(None, description="sharpen with promptable masks; null: patches alone")

    def __call__(self, features: EncoderFeatures, source: Source) -> Evaluation:
        """Records: id, pixels, right, iou, and pixels per label (``overlap.record``)."""
        encoder = features.encoder
        reader, vocabulary = self.reader(encoder), self.vocabulary(features, source)
        segmenter = None if self.refine is None else self.refine.segmenter(encoder)
        labels = 1 + len(vocabulary.names)
        modules = [encoder] if segmenter is None else [encoder, segmenter]

        def work(batch: list[Frame], size: tuple[int, int]) -> list[Row]:
            rows = []
            for frame, scores in zip(batch, vocabulary.scores(reader.maps(batch, size)), strict=True):
                found = decided(vocabulary, scores, frame.size)
                if segmenter is not None and self.refine is not None:
                    side = self.refine.size or segmenter.tower.native
                    pixels = frame.pixels(segmenter.preprocess, (side, side))[None].to(scores)
                    found = refined(
                        segmenter, pixels, scores, vocabulary, frame.size, settings=self.refine, coarse=found
                    )
                truth = vocabulary.truth(semantics_of(frame, source), ignore=IGNORE)
                _check(truth, labels, frame, source)
                rows.append(record(frame.sample.id, counts_of(confusion(found.cpu(), truth, labels=labels))))
            return rows

        with evaluating(*modules):
            rows, bad = each_batch(
                source,
                work,
                size_of=reader.size_of,
                batch_size=self.batch_size,
                title="segmenting",
                log=features.log,
            )
        return evaluation(rows, vocabulary.labels, per_class=self.per_class, skipped=bad.count)


def _check(truth: torch.Tensor, labels: int, frame: Frame, source: Source) -> None:
    """One line when masks hold labels that have no name."""
    from clipgraft.errors import InputError

    seen = truth[truth != IGNORE]
    if seen.numel() and int(seen.max()) >= labels:
        raise InputError(
            f"{source.name}: the mask of {frame.sample.id} holds label {int(seen.max())}, but there are names for "
            f"{labels - 1} classes; name them all in classes, or mark other pixels with {IGNORE}"
        )
