"""``video/ila``: train alignment, integration and prompts, and the tower at a lower rate; texts are frozen."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from clipgraft.config.schema import Config
from clipgraft.recipe import StagePlan
from clipgraft.runner import Run
from clipgraft_video.config import VideoRunConfig
from clipgraft_video.grafting import grafted, has_frames, unfit
from clipgraft_video.ila.alignment import Alignment
from clipgraft_video.ila.graft import AlignedBlock, IlaFeatures, IlaGraft, IlaHead
from clipgraft_video.model import HEAD, VideoModel
from clipgraft_video.setting import frames_of_data, problems_of, stage_of, standardised
from clipgraft_video.stage import Seen, VideoStage

NAME = "video/ila"


class IlaRates(Config):
    """Rates times train.lr, and weight decay, by part; what isn't named here takes train's."""

    message: float = Field(62.5, gt=0, description="of the alignment")
    temporal: float = Field(10.0, gt=0, description="of the two layers that add what it finds")
    integration: float = Field(50.0, gt=0, description="of the transformer over frames")
    prompts: float = Field(50.0, gt=0, description="of the prompts by videos")
    message_decay: float = Field(1e-2, ge=0, description="of the alignment")
    temporal_decay: float = Field(1e-3, ge=0, description="of the two layers")


class OffsetConfig(Config):
    """How the nine masks of training draw together."""

    start: float = Field(0.6, ge=0, le=1, description="share of the steps after which the offset halves")
    halvings: int = Field(20, ge=0, description="how often it halves until the end")


class IlaConfig(VideoRunConfig):
    """Settings of ``video/ila``."""

    method: IlaGraft = IlaGraft()
    alignment: float = Field(1.0, ge=0, description="weight of the distance between aligned frames")
    rates: IlaRates = IlaRates()
    offset: OffsetConfig = OffsetConfig()
    compat: Literal["paper", "official"] = Field(
        "paper",
        description="official: the tower and the prompts stay as they are, as the released optimizer leaves them",
    )


class Apart(nn.Module):
    """The distance between aligned frames, summed over blocks."""

    def forward(self, seen: Seen) -> dict[str, Tensor]:
        """Scalar loss."""
        assert isinstance(seen.video, IlaFeatures) and seen.video.apart is not None
        return {"loss": seen.video.apart}


class IlaStage(VideoStage):
    """A stage whose masks of training draw together: from ``start`` of the steps on the offset halves, evenly."""

    def __init__(self, *args: Any, offset: float, start: float, halvings: int, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.offset, self.start, self.halvings = offset, start, halvings

    def after_update(self, step: int) -> None:
        """Set the offset of the next step; it is part of the state, so a resumed run goes on with it."""
        super().after_update(step)
        value = offset_at((step + 1) / self.train_config.steps, self.offset, start=self.start, halvings=self.halvings)
        with torch.no_grad():
            for module in self.model.modules():
                if isinstance(module, Alignment):
                    module.offset.fill_(value)


def offset_at(done: float, offset: float, *, start: float, halvings: int) -> float:
    """The offset when the share ``done`` of the training is over: halved at once at ``start``, then evenly."""
    if done < start or start >= 1:
        return offset
    times = min(int((done - start) / (1 - start) * halvings + 1e-9) + 1, halvings)
    return float(offset * 0.5**times)


class Ila:
    """One stage. Tu et al., ICCV 2023, arXiv 2304.10465."""

    def __init__(self, config: IlaConfig) -> None:
        self.config = config

    def plan(self) -> list[StagePlan]:
        """One stage, ``videos``."""
        return [StagePlan("videos", self._build)]

    def check(self, run: Run) -> list[str]:
        """What can be seen before any work."""
        c = self.config
        problems = problems_of(run, c) or unfit(run, NAME, c.method)
        if not problems:
            found = frames_of_data(run.train_source())
            problems += has_frames(c.method.frames, found, what=NAME)
            if found is not None and found < 2:
                problems.append(f"{NAME} aligns neighbouring frames; write frames=8 into data.from")
        if c.objective != "classes":
            problems.append(f"{NAME} scores classes by prompts that videos write; set objective to classes")
        return problems

    def _build(self, run: Run) -> VideoStage:
        c = self.config
        encoder = standardised(grafted(run, NAME, c.method), c.statistics).requires_grad_(False)
        parts = groups(encoder.image, c.rates, official=c.compat == "official")
        for group in parts:
            for parameter in group["params"]:
                parameter.requires_grad_(True)
        return stage_of(
            run,
            c,
            VideoModel(encoder),
            kind=IlaStage,
            terms={"alignment": (c.alignment, Apart())} if c.alignment else {},
            groups=parts,
            offset=c.method.offset,
            start=c.offset.start,
            halvings=c.offset.halvings,
        )


def groups(image: Any, rates: IlaRates, *, official: bool) -> list[dict[str, Any]]:
    """Parts of an image tower with their rates. ``official``: without the tower and the prompts."""
    head: IlaHead = getattr(image, HEAD)
    message, temporal = [], []
    for block in image.modules():
        if isinstance(block, AlignedBlock):
            message += [p for m in (block.message_fc, block.message_ln, block.message_attn) for p in m.parameters()]
            temporal += [*block.temporal_skip_align_fc.parameters(), *block.temporal_skip_fc.parameters()]
    places = [head.mit.positional_embedding]
    own = {id(p) for p in (*message, *temporal, *head.parameters())}
    found: list[dict[str, Any]] = [
        {"name": "message", "params": message, "lr_scale": rates.message, "weight_decay": rates.message_decay},
        {"name": "temporal", "params": temporal, "lr_scale": rates.temporal, "weight_decay": rates.temporal_decay},
        {"name": "positions", "params": places, "lr_scale": rates.integration, "weight_decay": 0.0},
        {"name": "integration", "params": list(head.mit.resblocks.parameters()), "lr_scale": rates.integration},
    ]
    if official:
        return found
    of_mit = {id(p) for p in head.mit.parameters()}
    prompts = [p for p in head.parameters() if id(p) not in of_mit]
    tower = [p for p in image.parameters() if id(p) not in own]
    return [
        *found,
        {"name": "prompts", "params": prompts, "lr_scale": rates.prompts},
        {"name": "tower", "params": tower},
    ]
