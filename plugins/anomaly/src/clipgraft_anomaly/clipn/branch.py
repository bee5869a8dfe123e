"""CLIPN's "no" branch: a second text tower that says what a picture does not show (Wang et al., section 3.2).

B captions, L context, V text width, D joint embedding, O learnt offsets.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from clipgraft.config.schema import Config
from clipgraft.encoders.base import Encoder, TextEncoder
from clipgraft.encoders.towers import ClipText
from clipgraft.errors import ClipgraftError, InputError
from clipgraft_anomaly.clipn.negation import PAIRS, check_pairs
from clipgraft_anomaly.detector import Fits

Activation = Literal["gelu", "gelu-tanh", "quickgelu"]


def why_no_branch(text: TextEncoder | None) -> str:
    """Why this text tower can't get a "no" twin; empty when it can."""
    if text is None:
        return "CLIPN doubles the text tower, this model has none; choose a whole CLIP"
    if not isinstance(text, ClipText) or text.tower.attn_mask is None:
        return "CLIPN doubles open_clip's own causal text tower; SigLIP's and Hugging Face's are others, choose a CLIP"
    if text.tower.pool_type not in ("argmax", "eos"):
        return f"CLIPN reads the end token; this text tower pools by {text.tower.pool_type}, choose another CLIP"
    return ""


class NoConfig(Config):
    """What makes the second tower say no."""

    offsets: int = Field(
        16, ge=0, description="learnt additions to its input embeddings; 0: negations are written out, as in pairs"
    )
    pairs: tuple[tuple[str, str], ...] = Field(
        (), description="for offsets 0: [yes, no] templates around captions and names, {} once each; empty: built in"
    )

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if self.offsets and self.pairs:
            raise ValueError("pairs are for offsets: 0, where negations are written out; give one of them")
        check_pairs(self.pairs)
        return self

    @property
    def written(self) -> tuple[tuple[str, str], ...]:
        """The templates in use; none when offsets are learnt."""
        return () if self.offsets else self.pairs or PAIRS


class TextShape(Config):
    """What rebuilds an empty text tower."""

    vocabulary: int = Field(0, ge=0, description="token ids")
    context: int = Field(0, ge=0, description="tokens of a text")
    width: int = Field(0, ge=0, description="features")
    heads: int = Field(0, ge=0, description="attention heads")
    layers: int = Field(0, ge=0, description="blocks")
    mlp: int = Field(0, ge=0, description="hidden features of a block's MLP")
    activation: Activation = Field("gelu", description="of the MLP")
    eps: float = Field(1e-5, gt=0, description="of layer norms")
    layer_scale: bool = Field(False, description="whether blocks scale what they add")
    projection: Literal["none", "matrix", "linear"] = Field("matrix", description="to the joint embedding")
    pool: Literal["argmax", "eos"] = Field("argmax", description="how the end token is found")
    end_id: int = Field(2, ge=0, description="its id, for eos")

    @classmethod
    def of(cls, text: TextEncoder | None) -> Self:
        """A tower's; raises when it can't get a twin."""
        if problem := why_no_branch(text):
            raise InputError(problem)
        tower: Any = text.tower  # type: ignore[union-attr]
        block, projection = tower.transformer.resblocks[0], tower.text_projection
        gelu = block.mlp.gelu
        kind: Activation = "quickgelu" if type(gelu).__name__ == "QuickGELU" else "gelu"
        return cls(
            vocabulary=tower.token_embedding.num_embeddings,
            context=tower.positional_embedding.shape[0],
            width=tower.width,
            heads=tower.heads,
            layers=len(tower.transformer.resblocks),
            mlp=block.mlp.c_fc.out_features,
            activation="gelu-tanh" if getattr(gelu, "approximate", "none") == "tanh" else kind,
            eps=tower.ln_final.eps,
            layer_scale=hasattr(block.ls_1, "gamma"),
            projection="none" if projection is None else "linear" if isinstance(projection, nn.Linear) else "matrix",
            pool=tower.pool_type,
            end_id=tower.eos_id,
        )

    def build(self, *, embed_dim: int) -> ClipText:
        """A tower of this shape with random weights."""
        from open_clip.transformer import LayerNorm, QuickGELU, TextTransformer

        activations = {"quickgelu": QuickGELU, "gelu": nn.GELU, "gelu-tanh": partial(nn.GELU, approximate="tanh")}
        tower = TextTransformer(
            context_length=self.context,
            vocab_size=self.vocabulary,
            width=self.width,
            heads=self.heads,
            layers=self.layers,
            mlp_ratio=(self.mlp + 0.5) / self.width,  # open_clip rounds down
            ls_init_value=1.0 if self.layer_scale else None,
            output_dim=embed_dim,
            pool_type=self.pool,
            eos_id=self.end_id,
            proj_type="none" if self.projection == "none" else "linear",
            proj_bias=self.projection == "linear",
            act_layer=activations[self.activation],
            norm_layer=partial(LayerNorm, eps=self.eps),
        )
        return ClipText(tower, embed_dim=embed_dim)


class ClipnConfig(Config):
    """The head ``anomaly/clipn``: settings that were resolved for one tower."""

    no: NoConfig = NoConfig()
    scale: float = Field(100.0, gt=0, description="of cosines when judging")
    text: TextShape = TextShape()
    fits: Fits = Fits()


class NoBranch(nn.Module):
    """The twin ``text`` of a text tower and, unless negations are written out, ``prompt`` (O, L, V).

    One of the O rows, or their mean, is added to the twin's input embeddings at every position. It is a head to be
    exported beside the CLIP, which stays as it is.
    """

    def __init__(self, *, no: NoConfig, scale: float, text: TextShape, fits: Fits) -> None:
        super().__init__()
        if not text.width or not fits.embed_dim:
            raise InputError("the head anomaly/clipn is made by the recipe clipn; run it, then give its run")
        self.no, self.scale, self.fits = no, scale, fits
        self.registered = ("anomaly/clipn", {"no": no.model_dump(mode="json"), "scale": scale,
                                             "text": text.model_dump(), "fits": fits.model_dump()})  # fmt: skip
        self.text = text.build(embed_dim=fits.embed_dim)
        self.prompt = nn.Parameter(torch.zeros(no.offsets, text.context, text.width)) if no.offsets else None

    @classmethod
    def copy_of(cls, encoder: Encoder, *, no: NoConfig, scale: float = 100.0) -> Self:
        """A branch that starts as ``encoder``'s text tower and says the same; trained from there."""
        branch = cls(no=no, scale=scale, text=TextShape.of(encoder.text), fits=Fits.of(encoder))
        original: Any = encoder.text
        mine, theirs = branch.text.state_dict(), original.state_dict()
        odd = sorted(mine.keys() ^ theirs.keys()) or [k for k in mine if mine[k].shape != theirs[k].shape]
        if odd:
            raise InputError(f"CLIPN can't double this text tower: it has {odd[0]}, which a plain CLIP's doesn't have")
        branch.text.load_state_dict(theirs)
        branch.to(next(original.parameters()).device)
        ids = encoder.tokenizer(["a photo"]).to(next(original.parameters()).device)
        with torch.no_grad():
            if not torch.allclose(branch.eval()(ids), original(original.trim(ids)).pooled, atol=1e-5):
                raise ClipgraftError("the copied text tower says something else than the original; report this model")
        return branch

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids (B, L) -> (B, D), not normalised; training draws an offset per caption, else it is the mean."""
        ids = self.text.trim(ids)
        x = self.text.embed(ids)  # (B, L', V)
        if self.prompt is not None:
            offset = self.drawn(len(ids)) if self.training else self.prompt.mean(0)
            x = x + offset[..., : ids.shape[1], :].to(x.dtype)
        pooled: Tensor = self.text(x, ids=ids).pooled
        return pooled

    def drawn(self, count: int) -> Tensor:
        """One of O offsets or of their mean for each of ``count`` captions, all equally likely: (count, L, V)."""
        assert self.prompt is not None
        choice = torch.randint(len(self.prompt) + 1, (count,)).to(self.prompt.device)
        return torch.cat([self.prompt, self.prompt.mean(0, keepdim=True)])[choice]
