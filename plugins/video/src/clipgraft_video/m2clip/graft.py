"""M2-CLIP's towers: adapters over frames in the blocks of an image tower, plain ones in the last text blocks."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator
from torch import Tensor, nn

from clipgraft.config.schema import Config
from clipgraft.encoders.base import Encoder
from clipgraft.encoders.towers import ClipText
from clipgraft.errors import InputError
from clipgraft_video.blocks import FrameBlock, plain_blocks, plain_tower, replace_blocks
from clipgraft_video.clock import Clock
from clipgraft_video.m2clip.adapters import TedAdapter, TextAdapter
from clipgraft_video.m2clip.head import CLASS, M2Head
from clipgraft_video.model import HEAD

Place = Literal["attention", "mlp"]


class TedBlock(FrameBlock):
    """A block with a ``TedAdapter`` before the parts named in ``places``; the last one leaves its class tokens."""

    def __init__(
        self, block: Any, clock: Clock, *, places: tuple[Place, ...], last: bool, hidden: int, **settings: Any
    ) -> None:
        super().__init__(block, clock)
        self.last = last
        self.adapters = nn.ModuleDict({place: TedAdapter(self.width, hidden, **settings) for place in places})

    def mix(self, x: Tensor) -> Tensor:
        """(B T, L, W) -> the same."""
        x = self._adapted("attention", x)
        seen = self.ln_1(x)
        x = self._adapted("mlp", x + self.ls_1(self.attend(seen, seen)))
        x = self.feed_forward(x)
        if self.last:
            self.clock.leave(CLASS, x[:, 0])
        return x

    def _adapted(self, place: Place, x: Tensor) -> Tensor:
        return self.adapters[place](self.clock.videos(x)).flatten(0, 1) if place in self.adapters else x  # type: ignore[no-any-return]


class TextTedBlock(FrameBlock):
    """A text block with a ``TextAdapter`` before the parts named in ``places``."""

    def __init__(self, block: Any, *, places: tuple[Place, ...], hidden: int) -> None:
        super().__init__(block, Clock())
        self.adapters = nn.ModuleDict({place: TextAdapter(self.width, hidden) for place in places})

    def forward(
        self, q_x: Tensor, k_x: Tensor | None = None, v_x: Tensor | None = None, attn_mask: Tensor | None = None
    ) -> Tensor:
        """As open_clip calls a text block, with a causal mask; ``k_x`` (B, M, W): look at these instead."""
        x = self.adapters["attention"](q_x) if "attention" in self.adapters else q_x
        seen = self.ln_1(x)
        keys = seen if k_x is None else self.ln_1(k_x)
        mask = None if attn_mask is None else attn_mask.to(x.dtype)
        x = x + self.ls_1(self.attn(seen, keys, keys, need_weights=False, attn_mask=mask)[0])
        return self.feed_forward(self.adapters["mlp"](x) if "mlp" in self.adapters else x)


class M2ClipGraft(Config):
    """``video/m2-clip``: adapters over frames in the image tower, plain ones in the text tower, a classifier."""

    portable: ClassVar[bool] = False

    places: tuple[Place, ...] = Field(("mlp",), description="parts of an image block that an adapter comes before")
    hidden: int = Field(384, gt=0, description="channels of the adapters")
    kernel: int = Field(3, gt=0, description="frames that the adapters see at once, odd; 1 for each alone")
    difference: bool = Field(True, description="adapters see what changed since the frame before")
    text_layers: int = Field(1, ge=0, description="last blocks of the text tower with an adapter")
    text_places: tuple[Place, ...] = Field(("mlp",), description="parts of a text block that an adapter comes before")
    classes: tuple[str, ...] = Field((), description="classes of the classifier; a recipe takes those of the data")
    dropout: float = Field(0.5, ge=0, lt=1, description="before the classifier")

    @field_validator("kernel")
    @classmethod
    def _odd(cls, value: int) -> int:
        if value % 2 == 0:
            raise ValueError(f"kernel is odd, such as 3, not {value}")
        return value

    def fits(self, encoder: Encoder) -> None:
        """``InputError`` with the fix when it doesn't suit the encoder."""
        text, uri, what = encoder.text, encoder.data.origin.uri, "video/m2-clip"
        plain_tower(encoder, what=what)
        blocks: Any = text.tower.transformer.resblocks if isinstance(text, ClipText) else []
        if self.text_layers > len(blocks):
            has = f"a text tower of {len(blocks)} blocks" if blocks else "another kind of text tower"
            raise InputError(
                f"{what} adapts the last {self.text_layers} blocks of open_clip's text tower, {uri} has {has}; set "
                f"text_layers to {len(blocks)} or less"
            )
        plain_blocks(blocks[len(blocks) - self.text_layers :], what=what, uri=uri)

    def apply(self, encoder: Encoder) -> Encoder:
        """Change both towers; pictures give the features of before, texts others, because of how adapters start."""
        self.fits(encoder)
        text, device = encoder.text, next(encoder.parameters()).device
        blocks: Any = text.tower.transformer.resblocks if isinstance(text, ClipText) else []
        image: Any = encoder.image
        clock = replace_blocks(
            encoder,
            lambda index, block, clock: TedBlock(
                block,
                clock,
                places=self.places,
                last=index == image.depth - 1,
                hidden=self.hidden,
                grid=image.grid,
                kernel=self.kernel,
                difference=self.difference,
            ),
            what="video/m2-clip",
        )
        head = M2Head(
            image.embed_dim,
            image.width,
            clock=clock,
            norm=image.tower.ln_post,
            classes=self.classes,
            kernel=self.kernel,
            dropout=self.dropout,
        )
        setattr(image, HEAD, head)
        for index in range(len(blocks) - self.text_layers, len(blocks)):
            blocks[index] = TextTedBlock(blocks[index], places=self.text_places, hidden=self.hidden)
        return encoder.to(device)

    def merge(self, encoder: Encoder) -> Encoder:
        """Adapters over frames can't be folded into a plain tower."""
        return encoder
