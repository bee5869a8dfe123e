"""``video/vifi-clip-prompts``: bridge and prompt. A fine-tuned CLIP stays frozen, learnt tokens adapt it."""

from __future__ import annotations

from pydantic import Field

from clipgraft.recipe import StagePlan
from clipgraft.runner import Run
from clipgraft_video.config import VideoRunConfig
from clipgraft_video.grafting import grafted, unfit
from clipgraft_video.heads import Mean, Pool
from clipgraft_video.model import VideoModel
from clipgraft_video.setting import problems_of, stage_of, standardised
from clipgraft_video.stage import VideoStage
from clipgraft_video.vifi.prompts import VifiPromptsGraft, prompt_parameters

NAME = "video/vifi-prompts"


class VifiPromptsConfig(VideoRunConfig):
    """Settings of ``video/vifi-clip-prompts``; model.from is the run or export of the first step, vifi-clip."""

    method: VifiPromptsGraft = VifiPromptsGraft()
    pool: Pool = Field("mean_raw", description="how frames become a video; mean_raw is the paper's")


class ViFiClipPrompts:
    """One stage. Rasheed et al., CVPR 2023, arXiv 2212.03640, section 4."""

    def __init__(self, config: VifiPromptsConfig) -> None:
        self.config = config

    def plan(self) -> list[StagePlan]:
        """One stage, ``videos``."""
        return [StagePlan("videos", self._build)]

    def check(self, run: Run) -> list[str]:
        """What can be seen before any work."""
        c = self.config
        problems = problems_of(run, c) or unfit(run, NAME, c.method)
        if not (c.method.image_depth or c.method.text_depth):
            problems.append(f"{NAME} has nothing to learn; set method.image_depth or method.text_depth above 0")
        return problems

    def _build(self, run: Run) -> VideoStage:
        c = self.config
        encoder = standardised(grafted(run, NAME, c.method), c.statistics).requires_grad_(False)
        learnt = prompt_parameters(encoder)
        for parameter in learnt:
            parameter.requires_grad_(True)
        groups = [{"name": "prompts", "params": learnt}]
        return stage_of(run, c, VideoModel(encoder, Mean(c.pool)), groups=groups)
