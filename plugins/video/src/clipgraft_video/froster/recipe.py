"""``video/froster``: fine-tune on videos with the frozen CLIP as a teacher, so that classes never seen are kept."""

from __future__ import annotations

from pydantic import Field

from clipgraft.config.schema import Config
from clipgraft.recipe import StagePlan
from clipgraft.runner import Run
from clipgraft_video.config import VideoRunConfig
from clipgraft_video.froster.distillation import ResidualDistillation
from clipgraft_video.froster.view import FrosterView
from clipgraft_video.grafting import grafted
from clipgraft_video.heads import Mean, Pool
from clipgraft_video.model import VideoModel
from clipgraft_video.setting import problems_of, stage_of, standardised
from clipgraft_video.stage import VideoStage
from clipgraft_video.vifi.recipe import choose

NAME = "video/neighbours"


class DistillationConfig(Config):
    """How close the student stays."""

    weight: float = Field(2.0, ge=0, description="of the distillation beside the classification; 0 is plain training")
    scale: float = Field(0.1, gt=0, description="of the residual branch of the projections")
    residual: bool = Field(True, description="compare projected features; false compares the features themselves")


class FrosterConfig(VideoRunConfig):
    """Settings of ``video/froster``."""

    distillation: DistillationConfig = DistillationConfig()
    neighbours: bool = Field(True, description="frames attend to their neighbours; false keeps the tower plain")
    pool: Pool = Field("mean_logits", description="mean_logits is the paper's")


class Froster:
    """One stage. Huang et al., ICLR 2024, arXiv 2402.03241."""

    def __init__(self, config: FrosterConfig) -> None:
        self.config = config

    def plan(self) -> list[StagePlan]:
        """One stage, ``videos``."""
        return [StagePlan("videos", self._build)]

    def check(self, run: Run) -> list[str]:
        """What can be seen before any work."""
        return problems_of(run, self.config)

    def _build(self, run: Run) -> VideoStage:
        c, d = self.config, self.config.distillation
        encoder = grafted(run, NAME, FrosterView()) if c.neighbours else run.encoder
        choose(standardised(encoder, c.statistics), "both")
        model = VideoModel(encoder, Mean(c.pool))
        if not d.weight:
            return stage_of(run, c, model)
        teacher = VideoModel(standardised(run.base_encoder(), c.statistics), Mean(c.pool))
        term = ResidualDistillation(teacher, encoder.image.embed_dim, scale=d.scale, residual=d.residual)
        stage = stage_of(run, c, model, terms={"distillation": (d.weight, term.to(run.device))})
        stage.freeze(teacher)
        return stage
