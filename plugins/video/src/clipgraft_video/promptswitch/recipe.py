"""``video/prompt-switch``: retrieval with a cube of prompts, and captions written from the frames in training."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from clipgraft.recipe import StagePlan
from clipgraft.runner import Run
from clipgraft_video.config import VideoRunConfig
from clipgraft_video.grafting import grafted
from clipgraft_video.heads import Mean, Pool
from clipgraft_video.model import VideoModel
from clipgraft_video.promptswitch.captioner import FREQUENT, Captioner
from clipgraft_video.promptswitch.graft import PromptSwitchGraft, SwitchVit
from clipgraft_video.setting import frames_of_data, problems_of, stage_of, standardised
from clipgraft_video.stage import VideoStage

NAME = "video/prompt-switch"
LARGEST_SCALE = 100.0


class PromptSwitchConfig(VideoRunConfig):
    """Settings of ``video/prompt-switch``."""

    objective: Literal["classes", "labels", "captions"] = Field("captions", description="captions is the paper's")
    method: PromptSwitchGraft = PromptSwitchGraft()
    pool: Pool = Field("mean_norm", description="mean_norm is the paper's")
    new_lr: float = Field(10.0, gt=0, description="of the cube, the aggregation and the captioner, times train.lr")
    caption: float = Field(0.5, ge=0, description="weight of writing the caption; 0 for none")
    caption_layers: int = Field(2, gt=0, description="of the captioner")
    frequent_weight: float = Field(0.25, ge=0, description="of the frequent words, the start and the end")
    frequent_words: tuple[str, ...] = Field(FREQUENT, description="words that count less when a caption is written")
    compat: Literal["fixed", "official"] = Field(
        "fixed", description="official trains the aggregation at CLIP's rate, as the official code's names have it"
    )


class PromptSwitch:
    """One stage. Deng et al., ICCV 2023, arXiv 2308.07648."""

    def __init__(self, config: PromptSwitchConfig) -> None:
        self.config = config

    def plan(self) -> list[StagePlan]:
        """One stage, ``videos``."""
        return [StagePlan("videos", self._build)]

    def check(self, run: Run) -> list[str]:
        """What can be seen before any work."""
        c = self.config
        problems = problems_of(run, c)
        if not problems:
            frames = frames_of_data(run.train_source())
            if frames is not None and frames % c.method.frames:
                problems.append(
                    f"{NAME}: data.from gives {frames} frames, no multiple of method.frames={c.method.frames}; change "
                    "one of them"
                )
        if c.caption and c.objective != "captions":
            problems.append(f"{NAME} writes captions, the objective {c.objective} has none; set caption=0")
        return problems

    def _build(self, run: Run) -> VideoStage:
        c = self.config
        encoder = standardised(grafted(run, NAME, c.method), c.statistics).requires_grad_(True)
        if encoder.logit_bias is not None:
            encoder.logit_bias.requires_grad_(False)
        terms: dict[str, tuple[float, Any]] = {}
        if c.caption:
            captioner = Captioner(
                encoder, layers=c.caption_layers, frequent_weight=c.frequent_weight, frequent=c.frequent_words
            )
            terms["caption"] = c.caption, captioner.to(next(encoder.parameters()).device)
        assert isinstance(encoder.image, SwitchVit)
        new = [encoder.image.cube] if c.compat == "official" else encoder.image.new_parameters()
        own = {id(p) for p in new}
        new += [p for _, module in terms.values() for p in module.parameters()]
        return stage_of(
            run,
            c,
            VideoModel(encoder, Mean(c.pool)),
            terms=terms,
            max_logit_scale=LARGEST_SCALE,
            groups=[
                {"name": "clip", "params": [p for p in encoder.parameters() if p.requires_grad and id(p) not in own]},
                {"name": "new", "params": new, "lr_scale": c.new_lr},
            ],
        )
