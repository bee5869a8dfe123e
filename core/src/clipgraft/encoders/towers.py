"""open_clip's towers behind the encoder interface: features on request, gradients everywhere.

Tensors are named ``image.tower.<open_clip's name>`` and ``text.tower.<open_clip's name>``.
``parametrize.cached`` computes an adapted weight once per forward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from clipgraft.encoders.base import DEFAULT_REQUEST, ImageEncoder, TextEncoder
from clipgraft.errors import InputError
from clipgraft.types import FeatureRequest, ImageFeatures, TextFeatures


def _blocks(want: FeatureRequest, depth: int) -> dict[int, int]:
    """Block indices as asked, negative from the end -> indices from the front."""
    if bad := [i for i in want.layers if not -depth <= i < depth]:
        raise InputError(f"layer {bad[0]} was asked of a tower of {depth} blocks; ask for {-depth} to {depth - 1}")
    return {i: i % depth for i in want.layers}


def _flat(x: Tensor) -> Tensor:
    """(B, W, h, w) -> (B, h*w, W)."""
    return x.flatten(2).transpose(1, 2)


class VitImage(ImageEncoder):
    """open_clip's ``VisionTransformer``. ``layers`` are keyed by the index as it was asked for."""

    tower: Any

    def __init__(self, tower: Any, *, embed_dim: int) -> None:
        super().__init__()
        if tower.pool_type == "none":
            raise InputError("this image tower has no pooled embedding (pool_type none); use pool_type tok or avg")
        self.tower, self.embed_dim = tower, embed_dim
        self.width, self.depth = tower.transformer.width, len(tower.transformer.resblocks)

    @property
    def grid(self) -> tuple[int, int]:  # type: ignore[override]
        """(h, w) patch tokens."""
        h, w = self.tower.grid_size
        return h, w

    def forward(self, pixels: Tensor, want: FeatureRequest = DEFAULT_REQUEST) -> ImageFeatures:
        """Standardised pixels (B, 3, H, W') -> features."""
        tower, at, taken = self.tower, _blocks(want, self.depth), []
        if tuple(pixels.shape[-2:]) != tuple(tower.image_size):
            raise InputError(
                f"got pixels of {tuple(pixels.shape[-2:])}, this tower takes {tuple(tower.image_size)}; "
                "apply encoder.preprocess, or change the tower with the graft core/resize-positions"
            )
        order = sorted(set(at.values()))
        with parametrize.cached():
            x = tower._embeds(pixels)
            if at:
                x, taken = tower.transformer.forward_intermediates(x, indices=order)
            else:
                x = tower.transformer(x)
            pooled, _ = tower._pool(x)
            pooled = pooled if tower.proj is None else pooled @ tower.proj
            if want.tokens and tower.attn_pool is None:  # else the last norm belongs to the pooled tokens
                x = tower.ln_post(x)
        layers = {i: taken[order.index(k)][:, 1:] for i, k in at.items()}
        if not want.tokens:
            return ImageFeatures(pooled, layers=layers)
        grid = self.grid if x.shape[1] - 1 == self.grid[0] * self.grid[1] else None  # patch dropout leaves fewer
        return ImageFeatures(pooled, tokens=x[:, 1:], cls=x[:, 0], grid=grid, layers=layers)


class ResNetImage(ImageEncoder):
    """open_clip's ``ModifiedResNet``: blocks are the stem and four stages; tokens are the last stage's map."""

    tower: Any

    def __init__(self, tower: Any, *, embed_dim: int) -> None:
        super().__init__()
        self.tower, self.embed_dim, self.depth = tower, embed_dim, 5
        self.width = tower.attnpool.c_proj.in_features

    @property
    def grid(self) -> tuple[int, int]:  # type: ignore[override]
        """(h, w) positions of the last stage."""
        side = round((self.tower.attnpool.positional_embedding.shape[0] - 1) ** 0.5)
        return side, side

    def forward(self, pixels: Tensor, want: FeatureRequest = DEFAULT_REQUEST) -> ImageFeatures:
        """Standardised pixels (B, 3, H, W') -> features; ``layers`` differ in N and W per stage."""
        tower, at, x, maps = self.tower, _blocks(want, self.depth), pixels, []
        with parametrize.cached():
            for block in (tower.stem, tower.layer1, tower.layer2, tower.layer3, tower.layer4):
                maps.append(x := block(x))
            pooled = tower.attnpool(x)
        layers = {i: _flat(maps[k]) for i, k in at.items()}
        if not want.tokens:
            return ImageFeatures(pooled, layers=layers)
        return ImageFeatures(pooled, tokens=_flat(x), grid=(x.shape[2], x.shape[3]), layers=layers)


class TimmImage(ImageEncoder):
    """open_clip's ``TimmModel`` around any timm trunk that has ``forward_features`` and ``forward_intermediates``."""

    tower: Any

    def __init__(self, tower: Any, *, embed_dim: int) -> None:
        super().__init__()
        self.tower, self.embed_dim, trunk = tower, embed_dim, tower.trunk
        self.width = trunk.num_features
        self.depth = len(trunk.blocks) if hasattr(trunk, "blocks") else len(trunk.feature_info)

    @property
    def grid(self) -> tuple[int, int] | None:  # type: ignore[override]
        """(h, w) patch tokens of a transformer trunk; other trunks know their grid only when they run."""
        grid = getattr(getattr(self.tower.trunk, "patch_embed", None), "grid_size", None)
        return (grid[0], grid[1]) if grid and hasattr(self.tower.trunk, "num_prefix_tokens") else None

    def forward(self, pixels: Tensor, want: FeatureRequest = DEFAULT_REQUEST) -> ImageFeatures:
        """Standardised pixels (B, 3, H, W') -> features; ``layers`` differ in N and W in convolutional trunks."""
        trunk, at, taken = self.tower.trunk, _blocks(want, self.depth), []
        order = sorted(set(at.values()))
        with parametrize.cached():
            if at:
                x, taken = trunk.forward_intermediates(pixels, indices=order, norm=False, output_fmt="NCHW")
            else:
                x = trunk.forward_features(pixels)
            pooled = self.tower.head(trunk.forward_head(x))
        layers = {i: _flat(taken[order.index(k)]) for i, k in at.items()}
        if not want.tokens:
            return ImageFeatures(pooled, layers=layers)
        if x.ndim == 4:
            x = x.permute(0, 3, 1, 2) if getattr(trunk, "output_fmt", "NCHW") == "NHWC" else x
            return ImageFeatures(pooled, tokens=_flat(x), grid=(x.shape[2], x.shape[3]), layers=layers)
        tokens, grid = x[:, getattr(trunk, "num_prefix_tokens", 0) :], self.grid
        cls = x[:, 0] if getattr(trunk, "cls_token", None) is not None else None
        grid = grid if grid and grid[0] * grid[1] == tokens.shape[1] else None
        return ImageFeatures(pooled, tokens=tokens, cls=cls, grid=grid, layers=layers)


def _ids(tokens: Tensor, ids: Tensor | None) -> Tensor:
    """The token ids that pooling and masks need."""
    if ids is None and tokens.is_floating_point():
        raise InputError("token embeddings were given without their ids; call text(embeddings, ids=ids)")
    return tokens if ids is None else ids


class ClipText(TextEncoder):
    """open_clip's ``TextTransformer``, which is also the text side of a plain ``CLIP``."""

    tower: Any

    def __init__(self, tower: Any, *, embed_dim: int) -> None:
        super().__init__()
        if tower.cls_emb is not None or tower.pool_type == "none":
            raise InputError("this text tower pools over an appended class token (CoCa) or not at all; use a CLIP's")
        self.tower, self.embed_dim = tower, embed_dim
        self.width, self.context_length = tower.width, tower.context_length
        self.trim_exact = tower.attn_mask is not None and tower.pool_type in ("argmax", "eos")

    def embed(self, tokens: Tensor) -> Tensor:
        """(B, L) ids -> (B, L, W) token embeddings without positions."""
        embedded: Tensor = self.tower.token_embedding(tokens)
        return embedded

    def _end(self, ids: Tensor) -> Tensor:
        """(B,) position of the end token, for the two pool types that read it."""
        return ids.argmax(-1) if self.tower.pool_type == "argmax" else (ids == self.tower.eos_id).int().argmax(-1)

    def trim(self, tokens: Tensor) -> Tensor:
        """(B, L) ids -> (B, L') without the columns behind every row's end token, where that is exact."""
        return tokens[:, : int(self._end(tokens).max()) + 1] if self.trim_exact else tokens

    def forward(
        self, tokens: Tensor, want: FeatureRequest = DEFAULT_REQUEST, *, ids: Tensor | None = None
    ) -> TextFeatures:
        """Ids (B, L), or embeddings (B, L, W) with their ``ids`` (B, L) -> features."""
        tower, ids, length = self.tower, _ids(tokens, ids), tokens.shape[1]
        if length > self.context_length or (length < self.context_length and not self.trim_exact):
            kind = "at most" if self.trim_exact else "exactly"
            raise InputError(
                f"got {length} tokens, this text tower takes {kind} {self.context_length}; use encoder.tokenizer"
            )
        reads_end = tower.pool_type in ("argmax", "eos")
        with parametrize.cached():
            x = tokens if tokens.is_floating_point() else self.embed(tokens)
            x = x.to(tower.positional_embedding.dtype) + tower.positional_embedding[:length]
            mask = None if tower.attn_mask is None else tower.attn_mask[:length, :length]
            x = tower.ln_final(tower.transformer(x, attn_mask=mask))
            at = self._end(ids) if reads_end else 0 if tower.pool_type == "first" else -1
            pooled = x[torch.arange(x.shape[0], device=x.device), at]  # len() would fix the batch of an exported graph
            if isinstance(tower.text_projection, nn.Linear):
                pooled = tower.text_projection(pooled)
            elif tower.text_projection is not None:
                pooled = pooled @ tower.text_projection
        if not want.tokens:
            return TextFeatures(pooled)
        positions = torch.arange(length, device=ids.device)
        return TextFeatures(pooled, x, positions <= self._end(ids)[:, None] if reads_end else ids != tower.pad_id)


class HuggingFaceText(TextEncoder):
    """open_clip's ``HFTextEncoder``: a transformers language model with open_clip's pooler and projection."""

    tower: Any
    trim_exact = False

    def __init__(self, tower: Any, *, embed_dim: int, context_length: int) -> None:
        super().__init__()
        self.tower, self.embed_dim, self.context_length = tower, embed_dim, context_length
        self.width = tower.transformer.get_input_embeddings().embedding_dim

    def embed(self, tokens: Tensor) -> Tensor:
        """(B, L) ids -> (B, L, W) token embeddings without positions."""
        embedded: Tensor = self.tower.transformer.get_input_embeddings()(tokens)
        return embedded

    def forward(
        self, tokens: Tensor, want: FeatureRequest = DEFAULT_REQUEST, *, ids: Tensor | None = None
    ) -> TextFeatures:
        """Ids (B, L), or embeddings (B, L, W) with their ``ids`` (B, L) -> features."""
        tower, mask = self.tower, _ids(tokens, ids) != self.tower.config.pad_token_id
        name = "inputs_embeds" if tokens.is_floating_point() else "input_ids"
        with parametrize.cached():
            out = tower.transformer(**{name: tokens}, attention_mask=mask.long())
            pooled = tower.proj(tower.pooler(out, mask.long()))
        return TextFeatures(pooled, out.last_hidden_state, mask) if want.tokens else TextFeatures(pooled)
