"""``video/tempme``: text-video retrieval, or classification, with a tower that merges tokens over frames."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from clipgraft.recipe import StagePlan
from clipgraft.runner import Run
from clipgraft_video.blocks import new_parameters
from clipgraft_video.config import VideoRunConfig
from clipgraft_video.grafting import grafted, has_frames
from clipgraft_video.heads import Mean, Pool
from clipgraft_video.model import VideoModel
from clipgraft_video.setting import frames_of_data, problems_of, stage_of, standardised
from clipgraft_video.stage import VideoStage
from clipgraft_video.tempme.graft import MergingBlock, TempMeGraft, TextLowRankBlock
from clipgraft_video.tempme.merging import schedule

NAME = "video/tempme"


class TempMeConfig(VideoRunConfig):
    """Settings of ``video/tempme``."""

    objective: Literal["classes", "labels", "captions"] = Field("captions", description="captions is the paper's")
    method: TempMeGraft = TempMeGraft()
    pool: Pool = Field("mean_norm", description="mean_norm is the paper's")
    trained: Literal["updates", "all"] = Field("updates", description="low-rank updates and positions, or both towers")


class TempMe:
    """One stage. Shen et al., ICLR 2025, arXiv 2409.01156."""

    def __init__(self, config: TempMeConfig) -> None:
        self.config = config

    def plan(self) -> list[StagePlan]:
        """One stage, ``videos``."""
        return [StagePlan("videos", self._build)]

    def check(self, run: Run) -> list[str]:
        """What can be seen before any work."""
        problems = problems_of(run, self.config)
        if not problems:
            problems += has_frames(self.config.method.frames, frames_of_data(run.train_source()), what=NAME)
        return problems

    def _build(self, run: Run) -> VideoStage:
        c = self.config
        encoder = standardised(grafted(run, NAME, c.method), c.statistics).requires_grad_(c.trained == "all")
        encoder.logit_scale.requires_grad_(False)
        if encoder.logit_bias is not None:
            encoder.logit_bias.requires_grad_(False)
        new = [*new_parameters(encoder, MergingBlock), *new_parameters(encoder, TextLowRankBlock)]
        for parameter in new:
            parameter.requires_grad_(True)
        side = encoder.preprocess.size[0] // encoder.image.tower.patch_size[0]
        counts = schedule(side**2 + 1, c.method.frames, encoder.image.depth, c.method.settings)
        whole = (side**2 + 1) * c.method.frames
        run.log.info(f"tokens per video behind each block: {', '.join(str(n * k) for n, k in counts)}, of {whole}")
        return stage_of(run, c, VideoModel(encoder, Mean(c.pool)))
