"""``video/classifier``: videos by the classifier that M2-CLIP trains beside its texts."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from clipgraft.config.schema import Config
from clipgraft.data.base import PairSource, Source
from clipgraft.errors import InputError
from clipgraft.evaluation.base import Evaluation
from clipgraft.evaluation.features import EncoderFeatures
from clipgraft_video.evaluate import Views, classify
from clipgraft_video.evaluator import videos_of
from clipgraft_video.m2clip.head import ByClassifier, M2Head
from clipgraft_video.model import HEAD, VideoModel


class TrainedClassifier(Config):
    """Top-1 and top-5 of videos by a model's own classifier, for the classes that it was trained on or some of them."""

    views: int = Field(1, gt=0, description="clips per video, spread over time")
    crops: Literal[1, 3] = Field(1, description="squares per clip: the centre, or left, right and middle")
    batch_size: int = Field(8, gt=0, description="videos per forward pass")

    def __call__(self, features: EncoderFeatures, source: Source | PairSource) -> Evaluation:
        """Records: id, label, prediction, top1, top5."""
        encoder, videos = features.encoder, videos_of(source)
        head = getattr(encoder.image, HEAD, None)
        if not isinstance(head, M2Head) or not head.classes:
            raise InputError(
                f"{encoder.data.origin.uri} has no classifier of its own; use video/classification, or a run of m2-clip"
            )
        if unknown := [name for name in videos.classes if name not in head.classes]:
            raise InputError(
                f"the classifier knows {len(head.classes)} classes, {unknown[0]!r} of {videos.name} is none of them; "
                "use video/classification, which goes by texts"
            )
        columns = [head.classes.index(name) for name in videos.classes]
        return classify(
            VideoModel(encoder, ByClassifier(head, columns)).to(next(encoder.parameters()).device),
            videos,
            templates=("{}",),
            views=Views(self.views, self.crops),
            batch_size=self.batch_size,
            workers=features.workers,
            log=features.log,
        )
