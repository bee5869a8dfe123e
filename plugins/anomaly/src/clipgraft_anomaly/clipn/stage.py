"""Teaching the second text tower to say no: the CLIP is frozen, with its scale."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from clipgraft.config.schema import TrainConfig
from clipgraft.data.base import Source
from clipgraft.encoders.base import Encoder
from clipgraft.losses.base import gathered_unit
from clipgraft.stage import ContrastiveStage
from clipgraft.types import Batch, StepOutput, widened
from clipgraft_anomaly.clipn.branch import NoBranch
from clipgraft_anomaly.clipn.config import LossWeights
from clipgraft_anomaly.clipn.negation import Filled
from clipgraft_anomaly.clipn.objective import opposite


class NoStage(ContrastiveStage):
    """Trains ``branch`` alone, on pictures with captions; the batch of all ranks is contrasted."""

    wants_text = True

    def __init__(
        self,
        name: str,
        *,
        train: TrainConfig,
        source: Source,
        encoder: Encoder,
        branch: NoBranch,
        loss: LossWeights,
        shuffled: bool = False,
    ) -> None:
        super().__init__(name, train=train, source=source)
        self.encoder: Encoder = encoder
        self.freeze(encoder)
        self.branch: NoBranch = branch
        self.loss, self.shuffled = loss, shuffled
        written = branch.no.written
        self.filled = tuple(Filled(encoder, side) for side in zip(*written, strict=True)) if written else ()

    def encode(self, batch: Batch) -> tuple[Tensor, ...]:
        """Pictures, captions and what the second tower makes of the captions: (b, D) each, not normalised."""
        ids, tower = batch.text, self.encoder.text
        assert ids is not None and tower is not None  # wants_text; a branch needs a text tower
        ids = ids.roll(1, 0) if self.shuffled else ids
        yes, no = self.sides(ids)
        with torch.no_grad():
            image, text = self.encoder(self.encoder.preprocess.normalize(batch.pixels), tower.trim(yes))
        return widened(image.pooled), widened(text.pooled), widened(self.branch(no))

    def sides(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Captions (b, L) for either tower: themselves, or in a template and in its negation, drawn per caption."""
        if not self.filled:
            return ids, ids
        choice = torch.randint(len(self.branch.no.written), (len(ids),)).tolist()
        return self.filled[0](ids, choice), self.filled[1](ids, choice)

    def loss_from(self, features: tuple[Tensor, ...], batch: Batch) -> StepOutput:
        """Weighted losses over the global batch, alike on every rank."""
        with torch.autocast(features[0].device.type, enabled=False):
            image, text, no = (gathered_unit(x) for x in features)
            found = opposite(image, text, no, scale=self.encoder.logit_scale.detach().exp())
            loss = self.loss.binary * (found.match + found.mismatch) + self.loss.semantic * found.semantic
        terms = {"match": found.match, "mismatch": found.mismatch, "semantic": found.semantic}
        return StepOutput(loss, terms, len(batch))

    def components(self) -> dict[str, nn.Module]:
        """The branch."""
        return {"clipn": self.branch}

    def param_groups(self) -> list[dict[str, Any]]:
        """The twin tower and the offsets."""
        return [{"name": "no", "params": list(self.branch.parameters())}]
