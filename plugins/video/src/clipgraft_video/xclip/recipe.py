"""``video/x-clip``: train the tower with messages, the integration and the prompts; texts are frozen and read once."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from clipgraft.recipe import StagePlan
from clipgraft.runner import Run
from clipgraft_video.blocks import new_parameters
from clipgraft_video.config import VideoRunConfig
from clipgraft_video.grafting import grafted, has_frames
from clipgraft_video.model import HEAD, VideoModel
from clipgraft_video.setting import frames_of_data, problems_of, stage_of, standardised
from clipgraft_video.stage import VideoStage
from clipgraft_video.xclip.graft import MessageBlock, XClipGraft

NAME = "video/x-clip"


class XClipConfig(VideoRunConfig):
    """Settings of ``video/x-clip``."""

    method: XClipGraft = XClipGraft()
    new_lr: float = Field(10.0, gt=0, description="of messages, integration and prompts, times train.lr")


class XClip:
    """One stage. Ni et al., ECCV 2022, arXiv 2208.02816."""

    def __init__(self, config: XClipConfig) -> None:
        self.config = config

    def plan(self) -> list[StagePlan]:
        """One stage, ``videos``."""
        return [StagePlan("videos", self._build)]

    def check(self, run: Run) -> list[str]:
        """What can be seen before any work."""
        c = self.config
        problems = problems_of(run, c)
        if not problems:
            problems += has_frames(c.method.frames, frames_of_data(run.train_source()), what=NAME)
        if c.objective != "classes":
            problems.append(f"{NAME} scores classes by prompts that videos write; set objective to classes")
        return problems

    def _build(self, run: Run) -> VideoStage:
        encoder = standardised(grafted(run, NAME, self.config.method), self.config.statistics).requires_grad_(False)
        encoder.image.requires_grad_(True)
        return stage_of(run, self.config, VideoModel(encoder), groups=groups(encoder.image, new_lr=self.config.new_lr))


def groups(image: Any, *, new_lr: float) -> list[dict[str, Any]]:
    """The pretrained tower, and what is new at a higher rate; by module, not by a part of a name."""
    new = [*new_parameters(image, MessageBlock), *getattr(image, HEAD).parameters()]
    own = {id(p) for p in new}
    return [
        {"name": "tower", "params": [p for p in image.parameters() if id(p) not in own]},
        {"name": "new", "params": new, "lr_scale": new_lr},
    ]
