"""``video/ez-clip``: train temporal prompts and adapters alone; both towers stay frozen."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from clipgraft.recipe import StagePlan
from clipgraft.runner import Run
from clipgraft_video.blocks import new_parameters
from clipgraft_video.config import VideoRunConfig
from clipgraft_video.ezclip.graft import AdaptedTextBlock, EzClipGraft, TemporalPromptBlock
from clipgraft_video.ezclip.motion import Motion
from clipgraft_video.grafting import grafted, has_frames
from clipgraft_video.heads import Mean, Pool
from clipgraft_video.model import VideoModel
from clipgraft_video.setting import frames_of_data, problems_of, stage_of, standardised
from clipgraft_video.stage import VideoStage

NAME = "video/ez-clip"


class EzClipConfig(VideoRunConfig):
    """Settings of ``video/ez-clip``."""

    objective: Literal["classes", "labels", "captions"] = Field("labels", description="labels is the paper's")
    method: EzClipGraft = EzClipGraft()
    motion: float = Field(1.0, ge=0, description="weight of the motion loss")
    pool: Pool = Field("mean_raw", description="mean_raw is the paper's")


class EzClip:
    """One stage. Ahmad et al., arXiv 2312.08010."""

    def __init__(self, config: EzClipConfig) -> None:
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
        encoder = standardised(grafted(run, NAME, c.method), c.statistics).requires_grad_(False)
        new = [*new_parameters(encoder, TemporalPromptBlock), *new_parameters(encoder, AdaptedTextBlock)]
        for parameter in new:
            parameter.requires_grad_(True)
        return stage_of(
            run,
            c,
            VideoModel(encoder, Mean(c.pool)),
            terms={"motion": (c.motion, Motion())} if c.motion else {},
            groups=[{"name": "new", "params": new}],
        )
