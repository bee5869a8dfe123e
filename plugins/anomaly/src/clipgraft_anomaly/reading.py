"""How a tower is read for inspection: which layers, at which size, with which norms; and what comes out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from clipgraft.config.schema import Config
from clipgraft.encoders.base import Encoder
from clipgraft.errors import InputError
from clipgraft_anomaly.dense import Dense, DenseTower, Resampling
from clipgraft_anomaly.detector import Detection
from clipgraft_anomaly.scoring import TAU, fused, gaussian, probabilities, upsampled


class ReadConfig(Config):
    """Null leaves a choice to the tower; ``resolved`` fills all of them in."""

    size: int | None = Field(None, gt=0, description="input side, a multiple of the patch; null: the tower's [pixels]")
    layers: tuple[int, ...] | None = Field(None, description="layers, from 1, whose patches are scored; null: the last")
    vv_start: int | Literal["none"] | None = Field(
        None, description="first layer of value attention; none: plain patches; null: a quarter of the depth"
    )
    ln_post_global: bool = Field(False, description="the last norm on the class token; the official code leaves it out")
    resampling: Resampling = Field("bilinear", description="of position embeddings for another size")
    tau: float = Field(TAU, gt=0, description="temperature of both softmaxes")
    sigma: float | None = Field(
        None, ge=0, description="smoothing of maps; null: 4 px at 518 px, in proportion [pixels]"
    )
    fuse: Literal["sum", "mean"] = Field("sum", description="how maps of several layers are put together")
    score_weight: float = Field(
        0.0, ge=0, le=1, description="share of the map's maximum in a picture's score; the official code has none"
    )

    def resolved(self, encoder: Encoder) -> ReadConfig:
        """Every choice made for this tower; raises when one doesn't fit it."""
        tower = DenseTower(encoder.image, size=self.size, resampling=self.resampling)
        size, depth = tower.size, tower.depth
        start = max(1, round(depth / 4)) if self.vv_start is None else self.vv_start
        sigma = 4 * size / 518 if self.sigma is None else self.sigma
        found = self.model_copy(
            update={"size": size, "layers": self.layers or (depth,), "vv_start": start, "sigma": sigma}
        )
        if problem := tower.layer_problem(found.needed, found.first):
            raise InputError(f"read: {problem}")
        return found

    @property
    def needed(self) -> tuple[int, ...]:
        """The layers of a resolved config."""
        if self.layers is None:
            raise ValueError("these settings are not resolved for a tower yet; call resolved(encoder)")
        return self.layers

    @property
    def first(self) -> int | None:
        """First layer of value attention; None for plain patches."""
        return None if self.vv_start is None or self.vv_start == "none" else self.vv_start


@dataclass(frozen=True, slots=True)
class Seen:
    """``whole`` (B, D) and ``local`` {layer: (B, N, D)}, projected, not normalised; ``grid`` (h, w)."""

    whole: Tensor
    local: Mapping[int, Tensor]
    grid: tuple[int, int]


class Reader(nn.Module):
    """Pixels (B, 3, S, S) in [0, 1] -> ``Seen``, by resolved settings. Text plays no part: outputs can be kept."""

    def __init__(self, encoder: Encoder, read: ReadConfig) -> None:
        super().__init__()
        self.encoder: Encoder = encoder
        self.read = read
        self.dense = DenseTower(encoder.image, size=read.size, resampling=read.resampling)
        self.grid = self.dense.grid
        self.size = self.dense.size

    def forward(self, pixels: Tensor) -> Seen:
        """As the class says."""
        return self.projected(self.features(pixels))

    def features(self, pixels: Tensor) -> Dense:
        """The tower's own features, unprojected."""
        found: Dense = self.dense(
            self.encoder.preprocess.normalize(pixels), layers=self.read.needed, vv_start=self.read.first
        )
        return found

    def projected(self, found: Dense) -> Seen:
        """Features -> the joint space."""
        whole = self.dense.project(found.cls, ln_post=self.read.ln_post_global)
        return Seen(whole, {layer: self.dense.project(x) for layer, x in found.local.items()}, found.grid)


def layer_maps(seen: Seen, texts: Tensor | Mapping[int, Tensor], *, tau: float, size: int) -> dict[int, Tensor]:
    """Probabilities {layer: (B, 2, S, S)} of normal and anomalous; ``texts`` (2, D), (B, 2, D), or one per layer."""
    found = {}
    for layer, local in seen.local.items():
        told = texts if isinstance(texts, Tensor) else texts[layer]
        found[layer] = upsampled(probabilities(local, told, tau=tau), seen.grid, size)
    return found


def detection(seen: Seen, texts: Tensor, read: ReadConfig, *, size: int) -> Detection:
    """Scores and the smoothed map, from texts (2, D) or (B, 2, D) [normal, anomalous].

    The official map adds (S_a + 1 - S_n) / 2 over layers, which is S_a, since the two sum to 1.
    """
    maps = layer_maps(seen, texts, tau=read.tau, size=size)
    raw = fused([m[:, 1] for m in maps.values()], mean=read.fuse == "mean")
    smooth = gaussian(raw, read.sigma or 0.0)
    whole = probabilities(seen.whole, texts, tau=read.tau)[:, 1]
    highest = smooth.flatten(1).amax(1) / (1 if read.fuse == "mean" else len(maps))
    return Detection((1 - read.score_weight) * whole + read.score_weight * highest, smooth)
