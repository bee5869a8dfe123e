"""``video/dist``: train the networks beside two frozen towers; texts are read once."""

from __future__ import annotations

from clipgraft.recipe import StagePlan
from clipgraft.runner import Run
from clipgraft_video.config import VideoRunConfig
from clipgraft_video.distnet.graft import DistGraft, DistVit
from clipgraft_video.grafting import grafted, has_frames
from clipgraft_video.model import VideoModel
from clipgraft_video.setting import frames_of_data, problems_of, stage_of, standardised
from clipgraft_video.stage import VideoStage

NAME = "video/dist"


class DistConfig(VideoRunConfig):
    """Settings of ``video/dist``."""

    method: DistGraft = DistGraft()


class Dist:
    """One stage. Qing et al., ICCV 2023, arXiv 2309.07911."""

    def __init__(self, config: DistConfig) -> None:
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
        encoder = standardised(grafted(run, NAME, self.config.method), self.config.statistics).requires_grad_(False)
        assert isinstance(encoder.image, DistVit)
        encoder.image.network.requires_grad_(True)
        return stage_of(run, self.config, VideoModel(encoder))
