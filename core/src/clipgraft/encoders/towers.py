"""open_clip's towers behind the encoder interface: features on request, gradients everywhere.

Every tower module is ``<encoder>.tower``, so tensor names are ``image.tower.<open_clip name>`` and
``text.tower.<open_clip name>``. ``parametrize.cached`` computes an adapted weight once per forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from clipgraft.encoders.base import DEFAULT_REQUEST, ImageEncoder, TextEncoder
from clipgraft.errors import InputError
from clipgraft.types import FeatureRequest, ImageFeatures, TextFeatures


def _absolute(layers: Sequence[int], depth: int) -> list[int]:
    """Block indices as asked -> indices from the front, in the order asked."""
    if bad := [i for i in layers if not -depth <= i < depth]:
        raise InputError(f"layer {bad[0]} was asked of a tower of {depth} blocks; ask for {-depth} to {depth - 1}")
    return [i % depth for i in layers]


def _flat(x: Tensor) -> Tensor:
    """(B, W, h, w) -> (B, h*w, W)."""
    return x.flatten(2).transpose(1, 2)


class VitImage(ImageEncoder):
    """open_clip's ``VisionTransformer``. ``layers`` are keyed by the index as it was asked for."""

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
        tower = self.tower
        if tuple(pixels.shape[-2:]) != tuple(tower.image_size):
            raise InputError(
                f"got pixels of {tuple(pixels.shape[-2:])}, this tower takes {tuple(tower.image_size)}; "
                "apply encoder.preprocess, or change the tower with the graft core/resize-positions"
            )
        with parametrize.cached():
            x, layers = tower._embeds(pixels), {}
            if want.layers:
                at = _absolute(want.layers, self.depth)
                x, taken = tower.transformer.forward_intermediates(x, indices=sorted(set(at)))
                layers = {i: taken[sorted(set(at)).index(k)][:, 1:] for i, k in zip(want.layers, at, strict=True)}
            else:
                x = tower.transformer(x)
            pooled, _ = tower._pool(x)
            pooled = pooled if tower.proj is None else pooled @ tower.proj
            if not want.tokens:
                return ImageFeatures(pooled, layers=layers)
            # an attentional pooler is normed after pooling: its patch tokens have no norm of their own
            x = x if tower.attn_pool is not None else tower.ln_post(x)
        # patch dropout leaves fewer tokens than the grid has
        grid = self.grid if x.shape[1] - 1 == self.grid[0] * self.grid[1] else None
        return ImageFeatures(pooled, tokens=x[:, 1:], cls=x[:, 0], grid=grid, layers=layers)


class ResNetImage(ImageEncoder):
    """open_clip's ``ModifiedResNet``: blocks are the stem and four stages; tokens are the last stage's map."""

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
        tower, maps = self.tower, []
        with parametrize.cached():
            x = pixels
            for block in (tower.stem, tower.layer1, tower.layer2, tower.layer3, tower.layer4):
                x = block(x)
                maps.append(x)
            pooled = tower.attnpool(x)
        at = _absolute(want.layers, self.depth)
        layers = {i: _flat(maps[k]) for i, k in zip(want.layers, at, strict=True)}
        if not want.tokens:
            return ImageFeatures(pooled, layers=layers)
        return ImageFeatures(pooled, tokens=_flat(x), grid=(x.shape[2], x.shape[3]), layers=layers)


class TimmImage(ImageEncoder):
    """open_clip's ``TimmModel`` around any timm trunk that has ``forward_features`` and ``forward_intermediates``."""

    def __init__(self, tower: Any, *, embed_dim: int) -> None:
        super().__init__()
        self.tower, self.embed_dim, trunk = tower, embed_dim, tower.trunk
        self.width = trunk.num_features
        self.depth = len(trunk.blocks) if hasattr(trunk, "blocks") else len(trunk.feature_info)
        self.prefix = getattr(trunk, "num_prefix_tokens", 0)
        self.channels_last = getattr(trunk, "output_fmt", "NCHW") == "NHWC"

    @property
    def grid(self) -> tuple[int, int] | None:  # type: ignore[override]
        """(h, w) patch tokens of a transformer trunk; other trunks know their grid only when they run."""
        if not hasattr(self.tower.trunk, "num_prefix_tokens"):
            return None
        h, w = self.tower.trunk.patch_embed.grid_size
        return h, w

    def forward(self, pixels: Tensor, want: FeatureRequest = DEFAULT_REQUEST) -> ImageFeatures:
        """Standardised pixels (B, 3, H, W') -> features; ``layers`` differ in N and W in convolutional trunks."""
        trunk, layers = self.tower.trunk, {}
        with parametrize.cached():
            if want.layers:
                at = _absolute(want.layers, self.depth)
                x, taken = trunk.forward_intermediates(pixels, indices=sorted(set(at)), norm=False, output_fmt="NCHW")
                layers = {i: _flat(taken[sorted(set(at)).index(k)]) for i, k in zip(want.layers, at, strict=True)}
            else:
                x = trunk.forward_features(pixels)
            pooled = self.tower.head(trunk.forward_head(x))
        if not want.tokens:
            return ImageFeatures(pooled, layers=layers)
        if x.ndim == 4:
            x = x.permute(0, 3, 1, 2) if self.channels_last else x
            return ImageFeatures(pooled, tokens=_flat(x), grid=(x.shape[2], x.shape[3]), layers=layers)
        cls = x[:, 0] if getattr(trunk, "cls_token", None) is not None else None
        tokens = x[:, self.prefix :]
        grid = self.grid if self.grid and self.grid[0] * self.grid[1] == tokens.shape[1] else None
        return ImageFeatures(pooled, tokens=tokens, cls=cls, grid=grid, layers=layers)


def _ids(tokens: Tensor, ids: Tensor | None) -> Tensor:
    """The token ids that pooling and masks need."""
    if ids is None and tokens.is_floating_point():
        raise InputError("token embeddings were given without their ids; call text(embeddings, ids=ids)")
    return tokens if ids is None else ids


class ClipText(TextEncoder):
    """open_clip's ``TextTransformer``, which is also the text side of a plain ``CLIP``."""

    def __init__(self, tower: Any, *, embed_dim: int) -> None:
        super().__init__()
        if tower.cls_emb is not None or tower.pool_type == "none":
            raise InputError("this text tower pools over an appended class token (CoCa) or not at all; use a CLIP tower")
        self.tower, self.embed_dim = tower, embed_dim
        self.width, self.context_length = tower.width, tower.context_length
        self.trim_exact = tower.attn_mask is not None and tower.pool_type in ("argmax", "eos")

    def embed(self, tokens: Tensor) -> Tensor:
        """(B, L) ids -> (B, L, W) token embeddings without positions."""
        embedded: Tensor = self.tower.token_embedding(tokens)
        return embedded

    def _end(self, ids: Tensor) -> Tensor:
        """(B,) position that is pooled."""
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
            raise InputError(
                f"got {length} tokens, this text tower takes {'at most' if self.trim_exact else 'exactly'} "
                f"{self.context_length}; use encoder.tokenizer"
            )
        with parametrize.cached():
            x = tokens if tokens.is_floating_point() else self.embed(tokens)
            x = x.to(tower.positional_embedding.dtype) + tower.positional_embedding[:length]
            mask = None if tower.attn_mask is None else tower.attn_mask[:length, :length]
            x = tower.ln_final(tower.transformer(x, attn_mask=mask))
            pooled = self._pool(x, ids)
            if isinstance(tower.text_projection, nn.Linear):
                pooled = tower.text_projection(pooled)
            elif tower.text_projection is not None:
                pooled = pooled @ tower.text_projection
        if not want.tokens:
            return TextFeatures(pooled)
        if self.tower.pool_type in ("argmax", "eos"):
            real = torch.arange(length, device=ids.device) <= self._end(ids)[:, None]
        else:
            real = ids != tower.pad_id
        return TextFeatures(pooled, tokens=x, mask=real)

    def _pool(self, x: Tensor, ids: Tensor) -> Tensor:
        """(B, L, W) -> (B, W)."""
        if self.tower.pool_type in ("first", "last"):
            return x[:, 0 if self.tower.pool_type == "first" else -1]
        return x[torch.arange(len(x), device=x.device), self._end(ids)]


class HuggingFaceText(TextEncoder):
    """open_clip's ``HFTextEncoder``: a transformers language model with open_clip's pooler and projection."""

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
        tower = self.tower
        mask = _ids(tokens, ids) != tower.config.pad_token_id
        name = "inputs_embeds" if tokens.is_floating_point() else "input_ids"
        with parametrize.cached():
            out = tower.transformer(**{name: tokens}, attention_mask=mask.long())
            pooled = tower.proj(tower.pooler(out, mask.long()))
        return TextFeatures(pooled, out.last_hidden_state, mask) if want.tokens else TextFeatures(pooled)
