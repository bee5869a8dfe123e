"""Learning the two prompts: everything but them is frozen, and the pictures' features come from the store."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipgraft.config.schema import TrainConfig
from clipgraft.distributed import share_of_rows
from clipgraft.encoders.base import Encoder
from clipgraft.stage import TrainStage
from clipgraft.types import Batch, StepOutput
from clipgraft_anomaly.anomalyclip.prompts import AnomalyClip
from clipgraft_anomaly.feature_store import FeatureStore, Places
from clipgraft_anomaly.losses import map_loss
from clipgraft_anomaly.reading import Reader, Seen, layer_maps
from clipgraft_anomaly.scoring import probabilities


class PromptStage(TrainStage):
    """Trains ``head`` alone: cross entropy of whole pictures + ``local`` times focal and Dice of every layer's map.

    Pictures whose masks nobody gave count for the first part alone. Deviation: the tower takes no gradient at all; the
    official code lets gradients of the text tower pile up unused.
    """

    def __init__(
        self,
        name: str,
        *,
        train: TrainConfig,
        store: FeatureStore,
        encoder: Encoder,
        head: AnomalyClip,
        grid: tuple[int, int],
        local: float = 4.0,
    ) -> None:
        super().__init__(name, train=train, source=Places(store, size=encoder.preprocess.size))
        self.training_crop = None
        self.store, self.local = store, local
        self.encoder: Encoder = encoder
        self.freeze(encoder)
        self.head: AnomalyClip = head
        self.size = store.preprocess.size[0]
        self.grid = grid

    def forward(self, batch: Batch) -> StepOutput:
        """One batch of places -> loss."""
        rows = self.store(batch.extra["place"].tolist())
        with torch.autocast(rows["whole"].device.type, enabled=False):
            texts = self.head.embed(self.encoder).float()
            loss, terms = self.losses(rows, texts)
        return StepOutput(loss, terms, len(batch))

    def losses(self, rows: dict[str, Tensor], texts: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Features of B pictures and texts (2, D) -> scalar and its parts."""
        read = self.head.read
        local = {layer: rows[f"local.{layer}"] for layer in read.needed}
        seen = Seen(rows["whole"], local, self.grid)
        whole = F.nll_loss(probabilities(seen.whole, texts, tau=read.tau).log(), rows["label"])
        known, maps = rows["masked"], layer_maps(seen, texts, tau=read.tau, size=self.size)
        parts = [map_loss(m[known], rows["mask"][known]) for m in maps.values()] if known.any() else []
        share = share_of_rows(known.sum())  # of the pictures with masks: other processes have more or fewer of them
        local_loss = share * torch.stack(parts).sum() if parts else whole.new_zeros(())
        return whole + self.local * local_loss, {"whole": whole.detach(), "local": local_loss.detach()}

    def components(self) -> dict[str, nn.Module]:
        """The head, with its texts computed."""
        self.head.settle(self.encoder)
        return {"anomalyclip": self.head}

    def param_groups(self) -> list[dict[str, Any]]:
        """Context and deep tokens."""
        return [{"name": "prompts", "params": [p for p in self.head.parameters() if p.requires_grad]}]


def produce(reader: Reader) -> Any:
    """A ``FeatureStore``'s function over a reader: ``whole`` (b, D), ``local.<layer>`` (b, N, D)."""

    def features(pixels: Tensor) -> dict[str, Tensor]:
        seen: Seen = reader(pixels)
        return {"whole": seen.whole} | {f"local.{layer}": x for layer, x in seen.local.items()}

    return features
