"""ViFi-CLIP's second step, bridge and prompt: learnt tokens in both towers, in the input and in the blocks behind it.

Rasheed et al., Fine-tuned CLIP Models are Efficient Video Learners, CVPR 2023, arXiv 2212.03640, section 4. With
``depth`` d there are d sets of tokens per tower: one in the input, one that takes its places in each of the next d - 1
blocks.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from clipgraft.config.schema import Config
from clipgraft.encoders.base import DEFAULT_REQUEST, Encoder
from clipgraft.encoders.towers import ClipText, VitImage
from clipgraft.errors import InputError
from clipgraft.types import FeatureRequest, ImageFeatures, TextFeatures
from clipgraft_video.blocks import FrameBlock, new_parameters, plain_blocks, plain_tower
from clipgraft_video.clock import Clock


def prompt(tokens: int, width: int) -> nn.Parameter:
    """A set of tokens (n, W) from N(0, 0.02 squared)."""
    return nn.Parameter(0.02 * torch.randn(tokens, width))


class PromptedBlock(FrameBlock):
    """A block of the image tower with a set of its own (``learns``) in the place of the last ``tokens`` tokens.

    The first block appends its set, normed by the tower's ``ln_pre``; the ``last`` one drops what is left.
    """

    def __init__(self, block: Any, *, tokens: int, learns: bool, first: nn.Module | None, last: bool) -> None:
        super().__init__(block, Clock())
        self.tokens, self.last = tokens, last
        self._first = (first,)  # the tower's own, without a second name
        self.prompt = prompt(tokens, self.width) if learns else None

    def mix(self, x: Tensor) -> Tensor:
        """(N, L or L + n, W) -> (N, L + n or L, W); the class token stays the first."""
        if self.prompt is not None:
            told, norm = self.prompt.to(x.dtype).expand(len(x), -1, -1), self._first[0]
            x = torch.cat([x, norm(told)], 1) if norm is not None else torch.cat([x[:, : -self.tokens], told], 1)
        seen = self.ln_1(x)
        x = self.feed_forward(x + self.ls_1(self.attend(seen, seen)))
        return x[:, : -self.tokens] if self.last else x


class PromptedVit(VitImage):
    """An open_clip ViT with sets of tokens behind its patches. Features on request are those of patches alone."""

    def __init__(self, image: VitImage, *, tokens: int, depth: int) -> None:
        super().__init__(image.tower, embed_dim=image.embed_dim)
        blocks = self.tower.transformer.resblocks
        for index, block in enumerate(blocks):
            blocks[index] = PromptedBlock(
                block,
                tokens=tokens,
                learns=index < depth,
                first=self.tower.ln_pre if index == 0 else None,
                last=index == len(blocks) - 1,
            )

    def forward(self, pixels: Tensor, want: FeatureRequest = DEFAULT_REQUEST) -> ImageFeatures:
        """Standardised pixels (B, 3, H, W') -> features."""
        found = super().forward(pixels, want)
        patches = self.grid[0] * self.grid[1]
        layers = {index: x[:, :patches] for index, x in found.layers.items()}
        return ImageFeatures(found.pooled, tokens=found.tokens, cls=found.cls, grid=found.grid, layers=layers)


class PromptedTextBlock(FrameBlock):
    """A block of the text tower whose slots 1 to n hold its own set, without positions."""

    def __init__(self, block: Any, *, tokens: int) -> None:
        super().__init__(block, Clock())
        self.prompt = prompt(tokens, self.width)

    def forward(
        self, q_x: Tensor, k_x: Tensor | None = None, v_x: Tensor | None = None, attn_mask: Tensor | None = None
    ) -> Tensor:
        """As open_clip calls a text block: with a causal mask."""
        told = self.prompt.to(q_x.dtype)
        x = torch.cat([q_x[:, :1], told.expand(len(q_x), -1, -1), q_x[:, 1 + len(told) :]], 1)
        seen = self.ln_1(x)
        mask = None if attn_mask is None else attn_mask.to(x.dtype)
        x = x + self.ls_1(self.attn(seen, seen, seen, need_weights=False, attn_mask=mask)[0])
        return self.feed_forward(x)


class PromptedText(ClipText):
    """A text tower that puts n learnt tokens between the start and the words; a text loses what no longer fits."""

    def __init__(self, text: ClipText, *, tokens: int, depth: int) -> None:
        super().__init__(text.tower, embed_dim=text.embed_dim)
        self.prompt = prompt(tokens, self.width)
        blocks: Any = self.tower.transformer.resblocks
        for index in range(1, depth):
            blocks[index] = PromptedTextBlock(blocks[index], tokens=tokens)

    def forward(
        self, tokens: Tensor, want: FeatureRequest = DEFAULT_REQUEST, *, ids: Tensor | None = None
    ) -> TextFeatures:
        """Ids (B, L), or embeddings (B, L, W) with their ``ids`` -> features; the end moves n places on."""
        if ids is None and tokens.is_floating_point():
            return super().forward(tokens, want)  # which says what is missing
        told, x = self.prompt, tokens if tokens.is_floating_point() else self.embed(tokens)
        ids = tokens if ids is None else ids
        x = torch.cat([x[:, :1], told.to(x.dtype).expand(len(x), -1, -1), x[:, 1:]], 1)
        ids = torch.cat([ids[:, :1].expand(-1, 1 + len(told)), ids[:, 1:]], 1)  # a slot counts as a start
        if ids.shape[1] > self.context_length:
            at = torch.arange(self.context_length, device=ids.device).repeat(len(ids), 1)
            at[:, -1] = self._end(ids).clamp(min=self.context_length - 1)  # the end stays, words before it go
            ids, x = ids.gather(1, at), x.gather(1, at[..., None].expand(-1, -1, x.shape[2]))
        return super().forward(x, want, ids=ids)


class VifiPromptsGraft(Config):
    """``video/vifi-prompts``: learnt tokens in both towers; frames stay apart, so pictures pass as in videos."""

    portable: ClassVar[bool] = False

    image_tokens: int = Field(16, gt=0, description="learnt tokens per set in the image tower")
    image_depth: int = Field(9, ge=0, description="sets in the image tower, the input's among them; 0 for none")
    text_tokens: int = Field(16, gt=0, description="learnt tokens per set in the text tower")
    text_depth: int = Field(9, ge=0, description="sets in the text tower, the input's among them; 0 for none")
    words: str = Field("", description="words that the text input's tokens start from, as many tokens as text_tokens")

    def fits(self, encoder: Encoder) -> None:
        """``InputError`` with the fix when it doesn't suit the encoder."""
        text, uri, what = encoder.text, encoder.data.origin.uri, "video/vifi-prompts"
        plain_tower(encoder, what=what)
        towers: list[tuple[Any, int, str]] = [(encoder.image, self.image_depth, "image")]
        if self.text_depth:
            if not isinstance(text, ClipText) or not text.trim_exact:
                raise InputError(f"{uri} has no causal open_clip text tower to put prompts into; set text_depth=0")
            if text.context_length < self.text_tokens + 3:
                raise InputError(
                    f"text_tokens={self.text_tokens} leave no room for words in {text.context_length} tokens; set "
                    f"text_tokens={text.context_length - 3} or less"
                )
            plain_blocks(text.tower.transformer.resblocks, what=what, uri=uri)
            towers.append((text, self.text_depth, "text"))
            self._words(encoder)
        for tower, depth, where in towers:
            if depth > (blocks := len(tower.tower.transformer.resblocks)):
                raise InputError(
                    f"{what}: {depth} sets don't fit into {blocks} blocks; set {where}_depth={blocks} or less"
                )

    def apply(self, encoder: Encoder) -> Encoder:
        """Change both towers; all sets are random at first, but for ``words``."""
        self.fits(encoder)
        image, text, device = encoder.image, encoder.text, next(encoder.parameters()).device
        words = self._words(encoder) if self.text_depth else None
        if self.image_depth:
            assert isinstance(image, VitImage)
            encoder.image = PromptedVit(image, tokens=self.image_tokens, depth=self.image_depth)
        if self.text_depth:
            assert isinstance(text, ClipText)
            encoder.text = PromptedText(text, tokens=self.text_tokens, depth=self.text_depth)
            if words is not None:
                encoder.text.prompt.data.copy_(words)
        return encoder.to(device)

    @torch.no_grad()
    def _words(self, encoder: Encoder) -> Tensor | None:
        """(n, W) embeddings of ``words``; None without any."""
        if not self.words:
            return None
        text = encoder.text
        assert isinstance(text, ClipText)
        ids = text.trim(encoder.tokenizer([self.words]))[:, 1:-1]
        if ids.shape[1] != self.text_tokens:
            raise InputError(
                f"words={self.words!r} are {ids.shape[1]} tokens, text_tokens is {self.text_tokens}; make them equal"
            )
        return text.embed(ids.to(next(text.parameters()).device))[0]

    def merge(self, encoder: Encoder) -> Encoder:
        """Learnt tokens in blocks can't be folded into a plain tower."""
        return encoder


def prompt_parameters(encoder: Encoder) -> list[nn.Parameter]:
    """Every set of both towers."""
    found = [*new_parameters(encoder, PromptedBlock), *new_parameters(encoder, PromptedTextBlock)]
    return [*found, encoder.text.prompt] if isinstance(encoder.text, PromptedText) else found
