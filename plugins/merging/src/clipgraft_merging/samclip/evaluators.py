"""One name for what one model and two models do, so that a run can be compared before and after, and with a control."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from clipgraft.config.schema import Config
from clipgraft.data.base import Source
from clipgraft.evaluation.base import Evaluation
from clipgraft.evaluation.features import EncoderFeatures
from clipgraft_merging.sam.segmenter import segmenter_of
from clipgraft_merging.samclip.image import SamImage
from clipgraft_merging.segmentation.pipeline import MaskedZeroShotSegmentation, Naming
from clipgraft_merging.segmentation.prompted import Prompt, PromptedMasks
from clipgraft_merging.segmentation.refinement import RefinementConfig
from clipgraft_merging.segmentation.zero_shot import ZeroShotSegmentation


class WordSegments(Config):
    """Zero-shot segmentation by whichever way, as ``merging/word-segments.miou``.

    ``patches``: every patch against the texts; a SAM-CLIP reads its own patches, any other ViT its value path, the
    better of its two. ``refined``: that, sharpened by the model's own masks. ``pipeline``: masks of ``sam``, each named
    by the model from its crop or its patches.
    """

    way: Literal["patches", "refined", "pipeline"] = Field("patches", description="how pixels get their words")
    sam: str | None = Field(None, description="for refined and pipeline: a SAM; null: the model's own masks")
    naming: Naming = Field("crop", description="for pipeline: what of a mask the model sees")
    size: int | None = Field(None, gt=0, description="side at which pictures are read [pixels]; null: the tower's own")
    batch_size: int = Field(16, gt=0, description="pictures per forward pass")

    def __call__(self, features: EncoderFeatures, source: Source) -> Evaluation:
        """As ``merging/zero-shot-seg`` and ``merging/masked-zero-shot-seg``."""
        own = isinstance(features.encoder.image, SamImage)
        read = {"size": self.size, "batch_size": self.batch_size, "dense": "last" if own else "value"}
        if self.way == "pipeline":
            return MaskedZeroShotSegmentation(sam=self.sam, naming=self.naming, **read)(features, source)
        refine = RefinementConfig(sam=self.sam) if self.way == "refined" else None
        return ZeroShotSegmentation(refine=refine, **read)(features, source)


class KeptMasks(Config):
    """Mean IoU of prompted masks: of the model's own, or of ``teacher`` for a model that has none yet."""

    teacher: str = Field(description="the SAM that the model learns from")
    prompt: Prompt = Field("box", description="point: the pixel farthest from the object's border; box: its bounds")
    batch_size: int = Field(8, gt=0, description="pictures per forward pass")

    def __call__(self, features: EncoderFeatures, source: Source) -> Evaluation:
        """As ``merging/prompted-masks``."""
        sam = self.teacher if segmenter_of(features.encoder) is None else None
        measured = PromptedMasks(prompt=self.prompt, sam=sam, batch_size=self.batch_size)
        return measured(features, source)
