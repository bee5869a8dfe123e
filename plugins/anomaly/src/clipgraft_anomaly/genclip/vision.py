"""How GenCLIP reads a tower: as AnomalyCLIP does, and one pooled feature of several layers for the vision prompts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from clipgraft.encoders.base import Encoder
from clipgraft.errors import InputError
from clipgraft_anomaly.dense import Dense, value_attention
from clipgraft_anomaly.reading import ReadConfig, Reader, Seen

Pooling = Literal["cls", "mean"]


class LayeredReadConfig(ReadConfig):
    """As ``ReadConfig``, with several layers, whose maps are averaged."""

    layers: tuple[int, ...] | None = Field(
        None, description="layers, from 1, that give maps and vision prompts; null: each quarter's last"
    )
    fuse: Literal["sum", "mean"] = Field("mean", description="how maps of several layers are put together")

    def resolved(self, encoder: Encoder) -> LayeredReadConfig:
        """Every choice made for this tower; raises when one doesn't fit it."""
        chosen = self.layers
        if chosen is not None and len(set(chosen)) < len(chosen):
            raise InputError(f"read.layers {list(chosen)} names a layer twice; name each once")
        if not chosen:
            depth = encoder.image.depth
            chosen = tuple(dict.fromkeys(max(1, round(depth * part / 4)) for part in (1, 2, 3, 4)))
        found = ReadConfig.resolved(self.model_copy(update={"layers": chosen}), encoder)
        return type(self).model_validate(found.model_dump())


@dataclass(frozen=True, slots=True)
class Looked:
    """``seen`` as every detector sees it; ``pooled`` {layer: (B, W)} of the ordinary path, for the same layers."""

    seen: Seen
    pooled: dict[int, Tensor]


class LayeredReader(nn.Module):
    """Pixels (B, 3, S, S) in [0, 1] -> ``Looked``, in one pass of the tower. Text plays no part."""

    def __init__(self, reader: Reader, *, pooling: Pooling) -> None:
        super().__init__()
        self.reader: Reader = reader
        self.pooling = pooling

    def forward(self, pixels: Tensor) -> Looked:
        """The loop is ``DenseTower``'s, with the ordinary stream pooled on its way."""
        reader, dense, first = self.reader, self.reader.dense, self.reader.read.first
        if tuple(pixels.shape[-2:]) != (dense.size, dense.size):
            raise InputError(
                f"got pixels of {tuple(pixels.shape[-2:])}, this detector takes {dense.size} x {dense.size}"
            )
        needed = reader.read.needed
        h, local = dense.embed(reader.encoder.preprocess.normalize(pixels)), None
        maps, pooled = dict[int, Tensor](), dict[int, Tensor]()
        for layer, block in enumerate(dense.tower.transformer.resblocks, start=1):
            if first is not None and first <= layer <= max(needed):
                local = (h if local is None else local) + block.ls_1(value_attention(block, block.ln_1(h)))
            h = block(h)
            if layer in needed:
                maps[layer] = (h if local is None else local)[:, 1:]
                pooled[layer] = h[:, 0] if self.pooling == "cls" else h[:, 1:].mean(1)
        return Looked(reader.projected(Dense(h[:, 0], maps, dense.grid)), {k: pooled[k] for k in needed})
