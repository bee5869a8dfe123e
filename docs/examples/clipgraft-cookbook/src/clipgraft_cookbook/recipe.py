"""Learn a linear change of image embeddings from labelled pictures, then fold it into the model: an ordinary CLIP."""

from functools import partial

import torch
from torch import nn

from clipgraft.config.schema import RunConfig, TrainConfig
from clipgraft.encoders.towers import VitImage
from clipgraft.evaluation.features import EncoderFeatures
from clipgraft.recipe import StagePlan
from clipgraft.stage import JobStage, StageResult, TrainStage
from clipgraft.types import StepOutput


class FoldConfig(RunConfig):
    """Settings of the recipe, beside those of every run."""

    train: TrainConfig


class Fold:
    def __init__(self, config):
        self.config = config

    def plan(self):
        """Two stages. The first is trained, the second is a job."""
        head = partial(HeadStage, self.config.train)
        return [StagePlan("head", head), StagePlan("fold", lambda run: JobStage("fold", fold))]

    def check(self, run):
        """What can be seen before any work, one line each."""
        fits = isinstance(run.encoder.image, VitImage) and run.encoder.image.tower.proj is not None
        return [] if fits else ["cookbook/fold needs an open_clip ViT with a projection; use another model"]


class HeadStage(TrainStage):
    def __init__(self, train, run):
        super().__init__("head", train=train, source=run.train_source())
        encoder = self.encoder = self.freeze(run.encoder)  # no gradient, eval mode, not in the resume state
        self.residual = run.registry.build("head", "cookbook/residual", {"dim": encoder.image.embed_dim})
        classes = EncoderFeatures(encoder).classifier(self.source.classes, self.source.templates)  # (K, D)
        self.register_buffer("classes", classes.to(run.device), persistent=False)

    def forward(self, batch):
        with torch.no_grad():
            x = self.encoder.image(self.encoder.preprocess.normalize(batch.pixels)).pooled
        logits = 100 * nn.functional.normalize(self.residual(x.float()), dim=-1) @ self.classes.T
        return StepOutput(nn.functional.cross_entropy(logits, batch.labels), {}, len(batch))

    def components(self):
        return {"residual": self.residual}


def fold(run):
    """y = x @ proj became y + y @ change.T, which is x @ (proj + proj @ change.T)."""
    encoder, change = run.encoder, run.component("head", "residual")["change.weight"].to(run.device)
    encoder.image.tower.proj.data += encoder.image.tower.proj.data @ change.T
    return StageResult(encoder=encoder)
