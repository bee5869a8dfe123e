"""Learning query tokens and vision tokens together: the towers are frozen, pictures' features come from the store."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from clipgraft.config.schema import TrainConfig
from clipgraft.distributed import share_of_rows
from clipgraft.encoders.base import Encoder
from clipgraft.stage import TrainStage
from clipgraft.types import Batch, StepOutput
from clipgraft_anomaly.feature_store import FeatureStore, Places
from clipgraft_anomaly.genclip.branches import Texts, whole_shares
from clipgraft_anomaly.genclip.config import LossConfig
from clipgraft_anomaly.genclip.name_filter import Told
from clipgraft_anomaly.genclip.prompts import GenClip
from clipgraft_anomaly.genclip.vision import LayeredReader, Looked
from clipgraft_anomaly.losses import map_loss
from clipgraft_anomaly.reading import Seen, layer_maps


class BranchesStage(TrainStage):
    """Trains ``head`` alone, by both branches' losses; ``told`` says what prompts call the store's pictures.

    Query tokens get gradients from both branches, the linear maps from the vision-enhanced one. Pictures whose masks
    nobody gave count for the cross entropies alone.
    """

    def __init__(
        self,
        name: str,
        *,
        train: TrainConfig,
        store: FeatureStore,
        encoder: Encoder,
        head: GenClip,
        grid: tuple[int, int],
        told: Sequence[Told],
        loss: LossConfig,
    ) -> None:
        super().__init__(name, train=train, source=Places(store, size=encoder.preprocess.size))
        self.training_crop = None
        self.store, self.told, self.loss = store, told, loss
        self.encoder: Encoder = encoder
        self.freeze(encoder)
        self.head: GenClip = head
        if not loss.vision:
            self.freeze(head.vision)
        self.size = store.preprocess.size[0]
        self.grid = grid

    def forward(self, batch: Batch) -> StepOutput:
        """One batch of places -> loss."""
        places = batch.extra["place"].tolist()
        rows = self.store(places)
        with torch.autocast(rows["whole"].device.type, enabled=False):
            loss, terms = self.losses(rows, [self.told[place] for place in places])
        return StepOutput(loss, terms, len(batch))

    def losses(self, rows: dict[str, Tensor], told: Sequence[Told]) -> tuple[Tensor, dict[str, Tensor]]:
        """Features of B pictures and what to call them -> scalar and its parts."""
        head, layers = self.head, self.head.read.needed
        seen = Seen(rows["whole"], {layer: rows[f"local.{layer}"] for layer in layers}, self.grid)
        total, terms = rows["whole"].new_zeros(()), dict[str, Tensor]()
        if self.loss.vision:
            texts = head.vision_texts(self.encoder, told, {layer: rows[f"pooled.{layer}"] for layer in layers})
            found, terms["vision"] = self._branch(seen, texts, rows)
            total = total + self.loss.vision * found
        if self.loss.query:
            both = head.prompt.named == "both"
            query = head.query_texts(self.encoder, told) if both else head.query_texts(self.encoder)[0]
            found, terms["query"] = self._branch(seen, query, rows)
            total = total + self.loss.query * found
        return total, terms

    def _branch(self, seen: Seen, texts: Texts, rows: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """One branch's loss, and the same without gradient."""
        tau, known = self.head.read.tau, rows["masked"]
        shares = whole_shares(seen.whole, texts, tau=tau, blend=self.head.blend)
        loss = -shares.gather(1, rows["label"][:, None]).log().mean()
        share = share_of_rows(known.sum())  # of the pictures with masks: other processes have more or fewer of them
        if known.any():
            maps = layer_maps(seen, texts, tau=tau, size=self.size)
            local = torch.stack([map_loss(m[known], rows["mask"][known]) for m in maps.values()])
            loss = loss + self.loss.local * share * local.sum()
        return loss, loss.detach()

    def components(self) -> dict[str, nn.Module]:
        """The head, with its texts computed."""
        self.head.settle(self.encoder)
        return {"genclip": self.head}

    def param_groups(self) -> list[dict[str, Any]]:
        """Query and deep tokens, and the linear maps."""
        prompts = [p for p in (self.head.query, self.head.deep) if p.requires_grad]
        vision = [p for p in self.head.vision.parameters() if p.requires_grad]
        groups = ({"name": "prompts", "params": prompts}, {"name": "vision", "params": vision})
        return [group for group in groups if group["params"]]


def produce(look: LayeredReader) -> Callable[[Tensor], dict[str, Tensor]]:
    """A ``FeatureStore``'s function: ``whole`` (b, D), ``local.<layer>`` (b, N, D), ``pooled.<layer>`` (b, W)."""

    def features(pixels: Tensor) -> dict[str, Tensor]:
        found: Looked = look(pixels)
        local = {f"local.{layer}": x for layer, x in found.seen.local.items()}
        return {"whole": found.seen.whole} | local | {f"pooled.{layer}": x for layer, x in found.pooled.items()}

    return features
