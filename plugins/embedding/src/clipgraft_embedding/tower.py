"""One tower that turns batches into unit embeddings: its precision, what that costs in accuracy, and its identity.

Shape legend: b batch, D joint embedding, H x W' pixels, L text length.
"""

from __future__ import annotations

import hashlib
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipgraft.encoders.base import Encoder
from clipgraft.encoders.towers import VitImage
from clipgraft.files import tensors_digest
from clipgraft.performance import quick_products

Kind = Literal["images", "texts"]
Precision = Literal["fp32", "bf16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class Tower:
    """An encoder's image or text tower in eval mode; at ``bf16`` a copy whose weights are bf16 throughout.

    Not autocast, which converts the weights again on every call. ``encoder`` itself stays as it is.
    """

    encoder: Encoder
    kind: Kind = "images"
    precision: Precision = "fp32"
    module: nn.Module = field(init=False)

    def __post_init__(self) -> None:
        self.tokenizer = self.encoder.tokenizer if self.kind == "texts" else None  # refuses without a text tower
        module: nn.Module | None = self.encoder.image if self.kind == "images" else self.encoder.text
        assert module is not None
        self.module = module if self.precision == "fp32" else deepcopy(module).to(DTYPES[self.precision])

    @torch.no_grad()
    def __call__(self, batch: Tensor | list[str]) -> Tensor:
        """uint8 or [0, 1] pixels (b, 3, H, W'), or b texts -> (b, D) fp32 of length one on the CPU."""
        parameter = next(self.module.parameters())
        modes = {module: module.training for module in self.module.modules() if module.training}
        self.module.eval()
        try:
            if isinstance(batch, Tensor):
                pixels = batch.to(parameter.device)
                pixels = pixels.float().div(255) if pixels.dtype == torch.uint8 else pixels
                pixels = self.encoder.preprocess.normalize(pixels).to(parameter.dtype)
                short = not self.encoder.data.grafts and _pools_class_token(self.module)
                with quick_products(parameter.device):
                    pooled = _class_token_only(self.module, pixels) if short else self.module(pixels).pooled
            else:
                assert self.tokenizer is not None and self.encoder.text is not None
                ids = self.encoder.text.trim(self.tokenizer(batch))
                with quick_products(parameter.device):
                    pooled = self.module(ids.to(parameter.device)).pooled
        finally:
            for module in modes:
                module.training = True
        return F.normalize(pooled.float(), dim=-1).cpu()


def _class_token_only(module: Any, pixels: Tensor) -> Tensor:
    """(b, 3, H, W') -> (b, D) as ``module(pixels).pooled``, without work that no pooled embedding sees.

    When the class token is pooled, the last block needs keys and values of every token but the query and the MLP of
    that one alone: 10 of its 12 matrix products shrink to one row, 7 % of a tower of twelve blocks. The result is the
    same up to the order of float additions.
    """
    tower = module.tower
    *blocks, last = tower.transformer.resblocks
    x = tower._embeds(pixels)
    for block in blocks:
        x = block(x)
    y, x = last.ln_1(x), x[:, :1]  # (b, N, W), (b, 1, W)
    x = x + last.ls_1(last.attention(q_x=y[:, :1], k_x=y, v_x=y))
    x = x + last.ls_2(last.mlp(last.ln_2(x)))
    x = tower.ln_post(x[:, 0])
    pooled: Tensor = x if tower.proj is None else x @ tower.proj
    return pooled


def _pools_class_token(module: nn.Module) -> bool:
    """Whether this is open_clip's plain ViT, no part of which was replaced, parametrised or hooked."""
    from open_clip.transformer import ResidualAttentionBlock, Transformer, VisionTransformer

    if type(module) is not VitImage:
        return False
    tower: Any = module.tower
    if (type(tower), type(getattr(tower, "transformer", None))) != (VisionTransformer, Transformer):
        return False
    blocks = tower.transformer.resblocks
    return (
        tower.pool_type == "tok"
        and tower.attn_pool is None
        and tower.transformer.batch_first
        and all(type(b) is ResidualAttentionBlock and type(b.attn) is nn.MultiheadAttention for b in blocks)
        and not any(
            m._forward_hooks or m._forward_pre_hooks or hasattr(m, "parametrizations") for m in module.modules()
        )
        and not any({"forward", "attention"} & vars(m).keys() for m in module.modules())
    )


def usual_batch_size(encoder: Encoder) -> int:
    """32 on a CPU, whose caches larger activations leave; 256 on a GPU."""
    return 32 if next(encoder.image.parameters()).device.type == "cpu" else 256


def tower_sha256(encoder: Encoder, kind: Kind) -> str:
    """Digest of the names, shapes, types and values of a tower's tensors, and of the encoder's grafts."""
    module = encoder.image if kind == "images" else encoder.text
    if module is None:
        return ""
    digest = hashlib.sha256(repr([(g.name, g.config) for g in encoder.data.grafts]).encode())
    digest.update(tensors_digest(module.state_dict()).encode())
    return digest.hexdigest()
