"""``video/vifi-clip``: fine-tune a CLIP on videos, whose embedding is the mean over frames."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import nn

from clipgraft.encoders.base import Encoder
from clipgraft.recipe import StagePlan
from clipgraft.runner import Run
from clipgraft_video.config import VideoRunConfig
from clipgraft_video.heads import Mean, Pool
from clipgraft_video.model import VideoModel
from clipgraft_video.setting import problems_of, stage_of, standardised
from clipgraft_video.stage import VideoStage

Trained = Literal["both", "image", "text"]


class VifiConfig(VideoRunConfig):
    """Settings of ``video/vifi-clip``."""

    pool: Pool = Field("mean_raw", description="how frames become a video; mean_raw is the paper's")
    trained: Trained = Field("both", description="towers that are trained; the token embedding never is")


class ViFiClip:
    """One stage. Rasheed et al., Fine-tuned CLIP Models are Efficient Video Learners, CVPR 2023, arXiv 2212.03640."""

    def __init__(self, config: VifiConfig) -> None:
        self.config = config

    def plan(self) -> list[StagePlan]:
        """One stage, ``videos``."""
        return [StagePlan("videos", self._build)]

    def check(self, run: Run) -> list[str]:
        """What can be seen before any work."""
        return problems_of(run, self.config)

    def _build(self, run: Run) -> VideoStage:
        encoder = choose(standardised(run.encoder, self.config.statistics), self.config.trained)
        return stage_of(run, self.config, VideoModel(encoder, Mean(self.config.pool)))


def choose(encoder: Encoder, trained: Trained) -> Encoder:
    """Gradients as the paper's ``use`` sets them: both towers and the scale, or one tower; no token embedding ever."""
    encoder.requires_grad_(True)
    if encoder.logit_bias is not None:
        encoder.logit_bias.requires_grad_(False)  # no objective here reads it
    if trained != "both":
        encoder.logit_scale.requires_grad_(False)
        other: nn.Module | None = encoder.text if trained == "image" else encoder.image
        if other is not None:
            other.requires_grad_(False)
    embedding = getattr(getattr(encoder.text, "tower", None), "token_embedding", None)
    if embedding is not None:
        embedding.requires_grad_(False)
    return encoder
