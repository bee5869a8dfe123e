"""Low-rank adapters on any weight of a tower, also inside ``nn.MultiheadAttention`` (Hu et al. 2021, 2106.09685).

An adapter is laid over the weight itself (``torch.nn.utils.parametrize``), because multi-head attention reads
``in_proj_weight`` and ``out_proj.weight`` without calling a module: adapters that replace modules stay without effect
there. Deviation: dropout masks input features once per forward, for all samples and tokens alike.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from clipgraft.config.schema import Config
from clipgraft.encoders.grafts import is_adapter
from clipgraft.errors import InputError

if TYPE_CHECKING:
    from clipgraft.encoders.base import Encoder

Target = Literal["q", "k", "v", "o", "mlp", "projection"]

SITES: dict[str, tuple[Target, ...]] = {
    "attn.in_proj_weight": ("q", "k", "v"), "attn.qkv.weight": ("q", "k", "v"), "attn_pool.kv.weight": ("k", "v"),
    "q_proj.weight": ("q",), "k_proj.weight": ("k",), "v_proj.weight": ("v",), "attn_pool.q.weight": ("q",),
    "query.weight": ("q",), "key.weight": ("k",), "value.weight": ("v",), "attn_pool.proj.weight": ("o",),
    "attn.out_proj.weight": ("o",), "attn.proj.weight": ("o",), "attention.output.dense.weight": ("o",),
    "mlp.c_fc.weight": ("mlp",), "mlp.c_proj.weight": ("mlp",), "mlp.fc1.weight": ("mlp",), "mlp.fc2.weight": ("mlp",),
    "intermediate.dense.weight": ("mlp",), "output.dense.weight": ("mlp",), "attnpool.c_proj.weight": ("projection",),
    "tower.proj": ("projection",), "head.proj.weight": ("projection",), "tower.text_projection": ("projection",),
    "text_projection.weight": ("projection",),
}  # fmt: skip
"""How a weight's name ends -> what its rows are, in equal parts. The first match counts."""


class LowRank(nn.Module):
    """weight (P*R, I) -> weight + alpha/rank * B A on the chosen ones of its P equal row blocks."""

    rows: Tensor

    def __init__(
        self, weight: Tensor, *, parts: int, chosen: list[int], rank: int, alpha: float, dropout: float
    ) -> None:
        super().__init__()
        self.a = nn.Parameter(weight.new_empty(len(chosen), rank, weight.shape[1]))
        self.b = nn.Parameter(weight.new_zeros(len(chosen), weight.shape[0] // parts, rank))
        self.register_buffer("rows", torch.tensor(chosen, device=weight.device), persistent=False)
        self.parts, self.scale, self.dropout = parts, alpha / rank, dropout
        bound = math.sqrt(1 / weight.shape[1])  # as nn.Linear draws its weights
        nn.init.uniform_(self.a, -bound, bound)

    def forward(self, weight: Tensor) -> Tensor:
        """(P*R, I) -> (P*R, I)."""
        features = F.dropout(torch.ones_like(self.a[:, :1]), self.dropout, self.training)
        delta: Tensor = (self.scale * (self.b @ (self.a * features))).to(weight.dtype)
        return weight.reshape(self.parts, -1, weight.shape[1]).index_add(0, self.rows, delta).flatten(0, 1)


class Lora(Config):
    """Freeze towers and train low-rank adapters in them; at export they become plain weights."""

    rank: int = Field(8, gt=0, description="columns of A and B")
    alpha: float = Field(16, gt=0, description="the update is scaled by alpha / rank")
    dropout: float = Field(0, ge=0, lt=1, description="share of an adapter's input features dropped per forward")
    towers: tuple[Literal["image", "text"], ...] = Field(("image", "text"), description="the others stay as they are")
    targets: tuple[Target, ...] = Field(("q", "k", "v", "o"), description="weights to adapt")
    biases: bool = Field(False, description="train the biases beside the adapted weights as well")

    def apply(self, encoder: Encoder) -> Encoder:
        """Lay the adapters over the weights; the encoder computes what it computed before."""
        for tower_name in self.towers:
            tower, reached = getattr(encoder, tower_name), set[str]()
            weights = [(n, p) for n, p in tower.named_parameters() if not is_adapter(n)] if tower is not None else []
            for _, weight in weights:
                weight.requires_grad_(False)
            for name, weight in weights:
                plain = name.replace("parametrizations.", "").removesuffix(".original")
                sites = next((parts for end, parts in SITES.items() if plain.endswith(end)), ())
                if chosen := [i for i, part in enumerate(sites) if part in self.targets]:
                    reached |= {sites[i] for i in chosen}
                    self._adapt(tower, plain, weight, parts=len(sites), chosen=chosen)
            if missing := [t for t in self.targets if t not in reached]:
                raise InputError(f"core/lora: the {tower_name} tower has no {missing[0]!r}; change targets or towers")
        return encoder

    def _adapt(self, tower: nn.Module, name: str, weight: Tensor, *, parts: int, chosen: list[int]) -> None:
        owner_name, _, attribute = name.rpartition(".")
        owner, update = tower.get_submodule(owner_name), {"alpha": self.alpha, "dropout": self.dropout}
        adapter = LowRank(weight, parts=parts, chosen=chosen, rank=self.rank, **update)
        parametrize.register_parametrization(owner, attribute, adapter.train(owner.training))
        bias = getattr(owner, attribute.replace("weight", "bias"), None) if "weight" in attribute else None
        if self.biases and isinstance(bias, nn.Parameter):
            bias.requires_grad_(True)

    def merge(self, encoder: Encoder) -> Encoder:
        """Replace every adapted weight by its value, under its plain name."""
        for module in list(encoder.modules()):
            if not parametrize.is_parametrized(module):
                continue
            # a deep copy shares its class with the original, and removal takes the property off that class
            cls = type(module)
            own = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}
            module.__class__ = type(cls.__name__, cls.__bases__, own)
            for name, adapters in list(module.parametrizations.items()):  # type: ignore[union-attr, operator]
                if any(isinstance(a, LowRank) for a in adapters):
                    adapters.eval()
                    parametrize.remove_parametrizations(module, name, leave_parametrized=True)
        return encoder
