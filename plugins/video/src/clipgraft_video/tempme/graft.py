"""TempMe's tower: patches of a frame merge early, neighbouring clips are joined and merge late; low-rank updates learn.

Shen et al., TempMe: Video Temporal Token Merging for Efficient Text-Video Retrieval, ICLR 2025, arXiv 2409.01156.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from clipgraft.config.schema import Config
from clipgraft.encoders.base import DEFAULT_REQUEST, Encoder, ImageEncoder
from clipgraft.encoders.towers import ClipText, VitImage
from clipgraft.errors import InputError
from clipgraft.types import FeatureRequest, ImageFeatures
from clipgraft_video.blocks import FrameBlock, replace_blocks
from clipgraft_video.clock import Clock
from clipgraft_video.model import CLOCK
from clipgraft_video.tempme.merging import Settings, join, match, merge, removable


class LowRankBlock(FrameBlock):
    """A block whose fused q, k, v weight has an update B A of rank r, unscaled, B zero at first; none at rank 0."""

    def __init__(self, block: Any, clock: Clock, *, rank: int) -> None:
        super().__init__(block, clock)
        self.rank = rank
        if rank:
            self.lora_a = nn.Parameter(torch.empty(rank, self.width))
            self.lora_b = nn.Parameter(torch.zeros(3 * self.width, rank))
            nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised (N, L, W) -> queries, keys, values (N, L, W)."""
        weight = self.attn.in_proj_weight + self.lora_b @ self.lora_a if self.rank else self.attn.in_proj_weight
        q, k, v = F.linear(x, weight, self.attn.in_proj_bias).chunk(3, -1)
        return q, k, v


class TextLowRankBlock(LowRankBlock):
    """The same in a text tower, whose blocks have a causal mask."""

    def forward(
        self, q_x: Tensor, k_x: Tensor | None = None, v_x: Tensor | None = None, attn_mask: Tensor | None = None
    ) -> Tensor:
        """(N, L, W) -> the same."""
        mask = None if attn_mask is None else attn_mask.to(q_x.dtype)
        x = q_x + self.ls_1(self.scores(*self.project(self.ln_1(q_x)), bias=mask))
        return self.feed_forward(x)


class Flow:
    """What travels through the blocks of one forward beside the tokens: sizes (N, n), class tokens per clip c."""

    def __init__(self) -> None:
        self.sizes = torch.empty(0)
        self.classes = 1
        self.counts: list[tuple[int, int]] = []

    def start(self, x: Tensor) -> None:
        """One clip per frame, every token stands for itself."""
        self.sizes, self.classes, self.counts = x.new_ones(x.shape[:2]), 1, []


class MergingBlock(LowRankBlock):
    """Block ``index`` of ``depth``: attention weighted by sizes, a merge behind it, and maybe a join before it."""

    def __init__(
        self,
        block: Any,
        clock: Clock,
        *,
        rank: int,
        flow: Flow,
        index: int,
        depth: int,
        settings: Settings,
        frames: int,
    ) -> None:
        super().__init__(block, clock, rank=rank)
        self.flow, self.index, self.settings = flow, index, settings
        at = index - settings.first_join(depth)
        self.early, self.joins = at < 0, settings.joins[at] if 0 <= at < len(settings.joins) else 1
        if self.joins > 1:  # one position per clip that arrives here
            arriving = frames // math.prod(settings.joins[:at])
            self.frame_pos = nn.Parameter(torch.zeros(arriving, self.width))

    def mix(self, x: Tensor) -> Tensor:
        """(N, n, W) -> (N / joins, n', W)."""
        flow = self.flow
        if self.index == 0:
            flow.start(x)
        if self.joins > 1 and self.clock.frames > 1:
            x = self._joined(x)
        bias = flow.sizes.log()[:, None, None]
        q, k, v = self.project(self.ln_1(x))
        x = x + self.ls_1(self.scores(q, k, v, bias=None if self.index == 0 else bias.to(x.dtype)))
        patches = x.shape[1] - flow.classes
        wanted = self.settings.per_layer if self.early else math.floor(self.settings.within * x.shape[1])
        if remove := removable(patches, wanted):
            keys = k.unflatten(-1, (self.heads, -1)).mean(2)[:, flow.classes :]
            x, flow.sizes = merge(x, flow.sizes, match(keys, remove), flow.classes)
        flow.counts.append((x.shape[1], len(x)))
        return self.feed_forward(x)

    def _joined(self, x: Tensor) -> Tensor:
        """Neighbouring clips as one, thinned by what their tokens look like; positions tell which clip one was in."""
        flow, k = self.flow, self.joins
        metric = join(x, k, flow.classes)
        placed = x + self.frame_pos.repeat(len(x) // len(self.frame_pos), 1)[:, None].to(x.dtype)
        sizes, classes = join(flow.sizes, k, flow.classes), flow.classes * k
        remove = removable(metric.shape[1] - classes, math.floor(self.settings.between * metric.shape[1]))
        x = join(placed if remove else x, k, flow.classes)
        if remove:
            x, sizes = merge(x, sizes, match(metric[:, classes:], remove), classes)
        flow.sizes, flow.classes = sizes, classes
        return x


class MergingVit(ImageEncoder):
    """An open_clip ViT with ``MergingBlock``s: the class tokens of all frames come out of one clip.

    ``flow.counts`` (tokens per clip, clips) behind every block of the last forward.
    """

    def __init__(self, image: VitImage, flow: Flow, *, frames: int, settings: Settings) -> None:
        super().__init__()
        self.tower, self.embed_dim, self.width = image.tower, image.embed_dim, image.width
        self.depth, self.flow, self.frames, self.settings = image.depth, flow, frames, settings

    @property
    def grid(self) -> None:  # type: ignore[override]
        """Merged patches lie on no grid."""
        return None

    def forward(self, pixels: Tensor, want: FeatureRequest = DEFAULT_REQUEST) -> ImageFeatures:
        """Standardised pixels (B T, 3, H, W') -> pooled (B T, D), one per frame."""
        if want.tokens or want.layers:
            raise InputError("a tower that merges tokens has no patch tokens to give; ask for the pooled embedding")
        clock: Clock = getattr(self, CLOCK)
        if clock.frames not in (1, self.frames):
            raise InputError(f"this model merges clips of {self.frames} frames, got {clock.frames}; set frames so")
        tower = self.tower
        x = tower.transformer(tower._embeds(pixels))
        pooled = tower.ln_post(x[:, : self.flow.classes].flatten(0, 1))
        return ImageFeatures(pooled if tower.proj is None else pooled @ tower.proj)


class TempMeGraft(Config):
    """``video/tempme``: token merging over frames in the image tower, low-rank updates of both towers."""

    portable: ClassVar[bool] = False

    frames: int = Field(12, gt=1, description="frames per video; a multiple of the product of joins")
    rank: int = Field(8, ge=0, description="of the updates; 0 for none")
    per_layer: int = Field(2, ge=0, description="patches of a frame that leave in each early block")
    joins: tuple[int, ...] = Field((2, 2, 3), description="clips that each late block puts together; empty for none")
    between: float = Field(0.3, ge=0, lt=1, description="share of the joined tokens that leaves at a join")
    within: float = Field(0.1, ge=0, lt=1, description="share of the tokens that leaves behind late attention")
    after: int = Field(1, ge=0, description="blocks behind the last join")

    @property
    def settings(self) -> Settings:
        """For the modules."""
        return Settings(self.per_layer, self.joins, self.between, self.within, self.after)

    def apply(self, encoder: Encoder) -> Encoder:
        """Change both towers; without merging and at rank 0 they compute what they did."""
        settings, image = self.settings, encoder.image
        if self.joins and self.frames != settings.whole:
            raise InputError(
                f"video/tempme joins {' x '.join(map(str, self.joins))} = {settings.whole} frames, got frames "
                f"{self.frames}; make them equal"
            )
        if not isinstance(image, VitImage) or image.tower.attn_pool is not None or image.tower.pool_type != "tok":
            raise InputError(
                f"video/tempme needs an open_clip ViT with a class token; {encoder.data.origin.uri} has none"
            )
        if settings.first_join(image.depth) < 0:
            raise InputError(f"video/tempme: {len(self.joins)} joins don't fit into a tower of {image.depth} blocks")
        device, flow = next(image.parameters()).device, Flow()

        def make(index: int, block: Any, clock: Clock) -> nn.Module:
            return MergingBlock(
                block,
                clock,
                rank=self.rank,
                flow=flow,
                index=index,
                depth=image.depth,
                settings=settings,
                frames=self.frames,
            )

        clock = replace_blocks(encoder, make, what="video/tempme")
        encoder.image = MergingVit(image, flow, frames=self.frames, settings=settings)
        setattr(encoder.image, CLOCK, clock)
        if self.rank and isinstance(encoder.text, ClipText):
            blocks: Any = encoder.text.tower.transformer.resblocks
            for index, block in enumerate(blocks):
                blocks[index] = TextLowRankBlock(block, Clock(), rank=self.rank)
        return encoder.to(device)

    def merge(self, encoder: Encoder) -> Encoder:
        """Merging is no weight."""
        return encoder
