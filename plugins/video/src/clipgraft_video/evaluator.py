"""``video/classification`` and ``video/text-retrieval``: video models in runs, claims and ``clipgraft eval``."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from clipgraft.config.schema import Config
from clipgraft.data.base import PairSource, Source
from clipgraft.errors import InputError
from clipgraft.evaluation.base import Evaluation
from clipgraft.evaluation.features import EncoderFeatures
from clipgraft.registry import current
from clipgraft_video.evaluate import Views, classify, retrieve
from clipgraft_video.heads import Mean, Pool, VideoHead
from clipgraft_video.model import VideoModel, stored_head


def model_of(features: EncoderFeatures, pool: Pool | None) -> VideoModel:
    """The encoder at hand with the head on its tower, that of its export, or the mean over frames by ``pool``."""
    encoder = features.encoder
    own: VideoHead | None = None if pool is None else Mean(pool)
    model = VideoModel(encoder, own or stored_head(Path(encoder.data.origin.uri), registry=current()))
    return model.to(next(encoder.parameters()).device)


def videos_of(source: Source | PairSource) -> Source:
    """Single videos."""
    if not isinstance(source, Source):
        raise InputError(f"{source.name} holds minimal pairs; this needs videos")
    return source


class Classification(Config):
    """Top-1 and top-5 of videos by their classes' texts, with the mean over several deterministic views."""

    templates: tuple[str, ...] = Field((), description="prompts with one {}; empty takes the data's, or bare names")
    views: int = Field(1, gt=0, description="clips per video, spread over time")
    crops: Literal[1, 3] = Field(1, description="squares per clip: the centre, or left, right and middle")
    pool: Pool | None = Field(None, description="mean over frames in this way, whatever head the model has")
    batch_size: int = Field(8, gt=0, description="videos per forward pass")

    def __call__(self, features: EncoderFeatures, source: Source | PairSource) -> Evaluation:
        """Records: id, label, prediction, top1, top5."""
        return classify(
            model_of(features, self.pool),
            videos_of(source),
            templates=self.templates,
            views=Views(self.views, self.crops),
            batch_size=self.batch_size,
            workers=features.workers,
            log=features.log,
        )


class VideoRetrieval(Config):
    """Recall of captions by videos and of videos by captions."""

    pool: Pool | None = Field(None, description="mean over frames in this way, whatever head the model has")
    batch_size: int = Field(8, gt=0, description="videos per forward pass")

    def __call__(self, features: EncoderFeatures, source: Source | PairSource) -> Evaluation:
        """Records: id, captions and per metric whether or how often they are found."""
        return retrieve(
            model_of(features, self.pool),
            videos_of(source),
            batch_size=self.batch_size,
            workers=features.workers,
            log=features.log,
        )
