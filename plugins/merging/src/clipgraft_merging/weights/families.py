"""What each tensor of a CLIP is, by a table over canonical names, and how fused projections come apart.

A canonical name is open_clip's with ``text.`` in front of the text tower's tensors, for plain CLIPs, those with a timm
or a Hugging Face tower, and Hugging Face's own ``CLIPModel`` and ``SiglipModel`` alike. Nothing is inferred from
modules: a bare parameter such as ``visual.proj`` is found as surely as the weight of a layer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from clipgraft.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

Kind = Literal["matrix", "fused_qkv", "vector", "embedding", "scalar", "skip"]

TABLE: tuple[tuple[str, Kind], ...] = (
    (r"(.*\.)?(position_ids|num_batches_tracked|attn_mask)", "skip"),
    (r"(.*\.)?logit_(scale|bias)", "scalar"),
    (r".*\.(in_proj_|attn\.qkv\.|attn_pool\.kv\.)(weight|bias)", "fused_qkv"),
    (r".*\.(token_embedding|embed_tokens|(word|position|token_type)_embeddings)\.weight", "embedding"),
    (r".*\.(positional_embedding|class_embedding|pos_embed|cls_token|reg_token|latent|cls_emb)", "embedding"),
    (r".*\.(conv1|patch_embed\.proj)\.weight", "embedding"),
    (r".*\.(ln_\w+|ln|norm\d?|\w*norm|LayerNorm|bn\d?|layer_norm\w*)\.(weight|bias|running_(mean|var))", "vector"),
    (r".*\.(bias|gamma|ls_\d\.gamma|q_bias|v_bias|running_mean|running_var)", "vector"),
    (r".*\.(proj|text_projection|query)", "matrix"),
)  # fmt: skip
"""First match wins. A ``weight`` that no row names is a matrix with two axes, a vector with one, else an embedding."""

_BLOCK = re.compile(r"(visual|text|image|.*?)\.(?:.*\.)?(?:resblocks|blocks|layers|layer|layer\d)\.(\d+)\.")


def kind_of(key: str, shape: Sequence[int]) -> Kind:
    """The kind of the canonical tensor ``key``; ``InputError`` for a name that no row of the table knows."""
    for pattern, kind in TABLE:
        if re.fullmatch(pattern, key):
            return kind
    if key.endswith(".weight"):
        return {1: "vector", 2: "matrix"}.get(len(shape), "embedding")  # type: ignore[return-value]
    raise InputError(
        f"no row of the table of weights knows the tensor {key!r}; merge it with a method that treats all alike"
    )


def parts_of(key: str) -> int:
    """How many projections are stacked along axis 0: 3 for q, k, v; 2 for k, v of a pooling attention; else 1."""
    if re.fullmatch(r".*\.attn_pool\.kv\.(weight|bias)", key):
        return 2
    return 3 if re.fullmatch(r".*\.(in_proj_|attn\.qkv\.)(weight|bias)", key) else 1


def split(key: str, tensor: Tensor) -> tuple[Tensor, ...]:
    """A fused (P D, ...) -> P views (D, ...) in the order q, k, v; any other tensor alone."""
    count = parts_of(key)
    if count > 1 and len(tensor) % count:
        raise InputError(f"{key} of shape {tuple(tensor.shape)} is no stack of {count} projections of equal height")
    return tensor.chunk(count) if count > 1 else (tensor,)


def fuse(key: str, parts: Sequence[Tensor]) -> Tensor:
    """The inverse of ``split``, exactly."""
    import torch

    if len(parts) != parts_of(key):
        raise InputError(f"{key} is a stack of {parts_of(key)} projections, {len(parts)} were given")
    return torch.cat(list(parts)) if len(parts) > 1 else parts[0]


def block_of(key: str) -> str:
    """The block of a canonical tensor: "visual.3", "text.0"; outside of one "visual", "text" or "scale"."""
    if found := _BLOCK.match(key):
        return f"{found[1]}.{found[2]}"
    head = key.partition(".")[0]
    return head if "." in key else "scale"
