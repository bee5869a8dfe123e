"""GenCLIP's prompts, a reconstruction: query tokens that all pictures share, and a token per layer from the picture.

P prompts, R rows (a picture's layer, or a name), V text width, D joint embedding. Source: arXiv 2504.14919 for the two
kinds of prompt and the two branches; no official code and none of its constants were known, so they are all settings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from clipgraft.config.schema import Config
from clipgraft.encoders.base import Encoder
from clipgraft.errors import InputError
from clipgraft_anomaly.detector import DetectorHead, Fits
from clipgraft_anomaly.genclip.name_filter import FilterConfig, Told
from clipgraft_anomaly.genclip.vision import LayeredReadConfig, Pooling
from clipgraft_anomaly.handwritten import UNNAMED
from clipgraft_anomaly.same_data import DataRecord
from clipgraft_anomaly.text_path import encode_embeddings, why_not_prompted

if TYPE_CHECKING:
    from clipgraft_anomaly.genclip.branches import GenClipDetector


class QueryConfig(Config):
    """What is learnt, and the words behind it: [start, query, picture's token, words, end]."""

    query: int = Field(12, gt=0, description="learnt tokens of the general query prompt, for both branches the same")
    per_state: bool = Field(False, description="query tokens of their own for the normal and the anomalous prompt")
    pooling: Pooling = Field("mean", description="what a layer gives: the mean of its patches, or its class token")
    scale: float = Field(0.02, ge=0, description="standard deviation of fresh query tokens and vision tokens")
    deep_tokens: int = Field(0, ge=0, description="learnt tokens that overwrite hidden states, as in AnomalyCLIP")
    deep_layers: int | None = Field(
        None, ge=0, description="how many text layers, from the second on, get such tokens; null: 8, or what there is"
    )
    normal: str = Field("{}.", description="words of the normal prompt, {} standing for the object's name")
    anomalous: str = Field("damaged {}.", description="words of the anomalous prompt")
    named: Literal["vision", "both", "none"] = Field(
        "vision", description="which branches say the object's name; the others say object"
    )
    chunk: int = Field(
        256, gt=0, description="prompts per pass of the text tower; with more, training computes passes twice"
    )

    @field_validator("normal", "anomalous")
    @classmethod
    def _one_place(cls, value: str) -> str:
        if value.count("{}") != 1:
            raise ValueError(f"{value!r} must hold {{}} once, where the object's name goes")
        return value

    def resolved(self, encoder: Encoder) -> QueryConfig:
        """The number of layers chosen for this text tower; raises when the prompts don't fit it."""
        if problem := why_not_prompted(encoder.text):
            raise InputError(f"prompt: {problem}")
        text: Any = encoder.text
        depth = len(text.tower.transformer.resblocks)
        layers = min(8, max(depth - 2, 0)) if self.deep_layers is None else self.deep_layers
        layers = layers if self.deep_tokens else 0
        if layers >= depth:
            raise InputError(f"prompt.deep_layers {layers} must be below the {depth} layers of this text tower")
        if layers and self.deep_tokens > self.query:
            raise InputError(f"prompt.deep_tokens {self.deep_tokens} exceeds prompt.query {self.query}; lower it")
        longest = int(self.ids(encoder, [UNNAMED]).argmax(-1).max()) + 1
        if longest + self.query + 1 > text.context_length:
            raise InputError(
                f"prompt.query {self.query}, the picture's token and the words take {longest + self.query + 1} tokens, "
                f"this text tower has {text.context_length}; set prompt.query to "
                f"{max(text.context_length - longest - 1, 1)} or less"
            )
        return self.model_copy(update={"deep_layers": layers})

    def ids(self, encoder: Encoder, names: Sequence[str]) -> Tensor:
        """Ids (R, 2, L) of the words about R names; L is what the longest needs."""
        told = [words.replace("{}", name) for name in names for words in (self.normal, self.anomalous)]
        ids: Tensor = encoder.tokenizer(told)
        length = int(ids.argmax(-1).max()) + 1  # the end token has the highest id
        return ids[:, :length].reshape(-1, 2, length)


class BlendConfig(Config):
    """How the two branches are put together."""

    a: float = Field(0.5, ge=0, le=1, description="share of the vision-enhanced branch in the map")
    b: float = Field(0.5, ge=0, le=1, description="share of the vision-enhanced branch in the picture's score")
    whole: Literal["mean", "last"] = Field(
        "mean", description="whose texts judge the whole picture in that branch: all layers', averaged, or the last's"
    )


class GenClipConfig(Config):
    """The head ``anomaly/genclip``: settings that were resolved for one tower."""

    prompt: QueryConfig = QueryConfig()
    read: LayeredReadConfig = LayeredReadConfig()
    blend: BlendConfig = BlendConfig()
    filter: FilterConfig = FilterConfig()
    fits: Fits = Fits()
    trained: DataRecord = DataRecord()


class GenClip(DetectorHead):
    """Learnt: ``query`` (1 or 2, n, V), ``deep`` (layers, m, V), and a linear map W -> V per layer, behind a norm.

    Kept beside them: ``texts`` (2, D), the query-only branch's about "object", which a part of a program that looks at
    nothing but pictures can do with.
    """

    texts: Tensor

    def __init__(
        self,
        *,
        prompt: QueryConfig,
        read: LayeredReadConfig,
        blend: BlendConfig,
        filter: FilterConfig,
        fits: Fits,
        trained: DataRecord | None = None,
    ) -> None:
        super().__init__()
        self.prompt, self.read, self.blend, self.filter = prompt, read, blend, filter
        self.fits, self.trained = fits, trained or DataRecord()
        if prompt.deep_layers is None or read.layers is None or not fits.text_width:
            raise InputError("the head anomaly/genclip is made by the recipe genclip; run it, then give its run")
        settings = GenClipConfig(prompt=prompt, read=read, blend=blend, filter=filter, fits=fits, trained=self.trained)
        self.registered = ("anomaly/genclip", settings.model_dump(mode="json"))
        width, text_width = fits.width, fits.text_width
        self.query = nn.Parameter(prompt.scale * torch.randn(1 + prompt.per_state, prompt.query, text_width))
        self.deep = nn.Parameter(
            prompt.scale * torch.randn(prompt.deep_layers, prompt.deep_tokens, text_width),
            requires_grad=prompt.deep_layers > 0,
        )
        linears = {str(layer): nn.Linear(width, text_width) for layer in sorted(read.needed)}
        for linear in linears.values():
            nn.init.normal_(linear.weight, std=prompt.scale / width**0.5)  # of a normed feature: ``scale`` per token
            nn.init.zeros_(linear.bias)
        self.vision = nn.ModuleDict(linears)
        self.register_buffer("texts", torch.zeros(2, fits.embed_dim))

    def query_texts(self, encoder: Encoder, told: Sequence[Told] | None = None) -> Tensor:
        """Texts (R, 2, D) of the query-only branch about R names, of unit length; (1, 2, D) about "object" for None."""
        given = [Told(UNNAMED)] if told is None else told
        different = list(dict.fromkeys(given))
        found = self._mixed(encoder, different, None)
        return found[[different.index(one) for one in given]]

    def vision_texts(self, encoder: Encoder, told: Sequence[Told], pooled: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """Pooled features {layer: (B, W)} and B names -> texts {layer: (B, 2, D)} of unit length, in one pass."""
        told = [Told(UNNAMED)] * len(told) if self.prompt.named == "none" else told
        tokens = [self.vision[str(k)](F.layer_norm(f.float(), f.shape[-1:])) for k, f in pooled.items()]
        found = self._mixed(encoder, list(told) * len(tokens), torch.cat(tokens))
        return dict(zip(pooled, found.chunk(len(tokens)), strict=True))

    def _mixed(self, encoder: Encoder, told: Sequence[Told], tokens: Tensor | None) -> Tensor:
        """R names and tokens (R, V) -> (R, 2, D); a doubted name is mixed with "object"."""
        parts = [
            (row, name, weight)
            for row, one in enumerate(told)
            for name, weight in ((one.name, one.weight), (UNNAMED, 1 - one.weight))
            if weight
        ]
        rows = torch.tensor([row for row, _, _ in parts], device=self.query.device)
        weights = torch.tensor([weight for _, _, weight in parts], device=self.query.device)
        found = self.embed(encoder, [name for _, name, _ in parts], None if tokens is None else tokens[rows])
        unit = F.normalize(found.float(), dim=-1) * weights[:, None, None]
        mixed = unit.new_zeros(len(told), *unit.shape[1:]).index_add(0, rows, unit)
        return F.normalize(mixed, dim=-1)

    def embed(self, encoder: Encoder, names: Sequence[str], tokens: Tensor | None = None) -> Tensor:
        """R names and, for the vision-enhanced branch, a token (R, V) each -> texts (R, 2, D), not normalised.

        Tokens are [start, query, picture's, words, end]; nothing behind the end is computed, as the tower is causal.
        """
        text: Any = encoder.text
        different = list(dict.fromkeys(names))
        ids = self.prompt.ids(encoder, different).to(self.query.device)
        added = self.prompt.query + (tokens is not None)
        if ids.shape[-1] + added > text.context_length:
            longest = max(different, key=len)
            raise InputError(
                f"the name {longest!r} makes prompts of {ids.shape[-1] + added} tokens, this text tower has "
                f"{text.context_length}; call the part by a shorter name, or object"
            )
        ids = ids[[different.index(name) for name in names]].flatten(0, 1)  # (2 R, L), normal and anomalous in turn
        words = text.embed(ids).detach()
        query = self.query.to(words.dtype).expand(2, -1, -1).repeat(len(names), 1, 1)
        seen = [] if tokens is None else [tokens.to(words.dtype).repeat_interleave(2, 0)[:, None]]
        embedded = torch.cat([words[:, :1], query, *seen, words[:, 1:]], 1)
        found = self._encoded(text, embedded, ids.argmax(-1) + added)
        return found.reshape(len(names), 2, -1)

    def _encoded(self, text: Any, embedded: Tensor, end: Tensor) -> Tensor:
        """The text tower over (P, L, V), ``chunk`` prompts at a time; what gradients need is held for one chunk."""

        def encode(x: Tensor, last: Tensor) -> Tensor:
            return encode_embeddings(text, x, last, deep=list(self.deep))

        chunk = self.prompt.chunk
        if len(embedded) <= chunk:
            return encode(embedded, end)
        again = torch.is_grad_enabled() and embedded.requires_grad
        return torch.cat(
            [
                checkpoint(encode, x, last, use_reentrant=False) if again else encode(x, last)
                for x, last in zip(torch.split(embedded, chunk), torch.split(end, chunk), strict=True)
            ]
        )

    @torch.no_grad()
    def settle(self, encoder: Encoder) -> None:
        """Compute ``texts`` from what was learnt."""
        self.texts.copy_(self.query_texts(encoder)[0])

    def detector(self, encoder: Encoder) -> GenClipDetector:
        """The detector over ``encoder``, whose text tower the vision-enhanced branch needs."""
        from clipgraft_anomaly.genclip.branches import GenClipDetector

        return GenClipDetector(encoder, self)
