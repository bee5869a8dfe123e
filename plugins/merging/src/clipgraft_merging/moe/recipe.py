"""CLIP-MoE: cluster, train an expert inside the clusters, again; then put all experts under trained gates.

Zhang et al., CLIP-MoE: Towards Building Mixture of Experts for CLIP with Diversified Multiplet Upcycling, EMNLP 2025,
arXiv 2409.19291.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Generator, Tensor, nn

from clipgraft import distributed
from clipgraft.config.schema import GraftNode
from clipgraft.data.base import BadSample, Drawn, Source, entry_of
from clipgraft.encoders import apply_grafts
from clipgraft.encoders.base import Encoder
from clipgraft.errors import InputError
from clipgraft.evaluation.features import EncoderFeatures
from clipgraft.recipe import StagePlan
from clipgraft.runner import Run
from clipgraft.stage import JobStage, Stage, StageResult
from clipgraft_merging.feed_forwards import FeedForward, feed_forwards, parameters
from clipgraft_merging.moe.accumulate import UNKNOWN, OneClusterAtATime, accumulated, joint, pair_labels
from clipgraft_merging.moe.collapse import GRAFT, collapse
from clipgraft_merging.moe.config import ClipMoeConfig
from clipgraft_merging.moe.kmeans import kmeans
from clipgraft_merging.moe.mixture import Mixture
from clipgraft_merging.moe.stages import PartlyTrained, RouterStage, experts, gates, set_scale


class Labels(nn.Module):
    """(n,) accumulated cluster of every sample, kept between stages."""

    labels: Tensor

    def __init__(self, labels: Tensor) -> None:
        super().__init__()
        self.register_buffer("labels", labels.int())


class ClipMoe:
    """``clusters-j`` and ``experts-j`` for each expert, then ``router``, then maybe ``collapse``."""

    def __init__(self, config: ClipMoeConfig) -> None:
        self.config = config

    def plan(self) -> list[StagePlan]:
        """All stages; with ``init: copies`` only the last ones."""
        plans = []
        if self.config.init == "extracted":
            for j in range(1, self.config.experts.stages + 1):
                plans.append(StagePlan(f"clusters-{j}", partial(self._clusters, stage=j)))
                plans.append(StagePlan(f"experts-{j}", partial(self._experts, stage=j)))
        plans.append(StagePlan("router", self._router))
        if self.config.export == "dense":
            plans.append(StagePlan("collapse", lambda run: JobStage("collapse", _collapse)))
        return plans

    def check(self, run: Run) -> list[str]:
        """Settings that exclude each other."""
        config, found = self.config, []
        if any(node.use.rpartition("/")[2] in ("lora", "moe") for node in config.grafts):
            found.append("clip-moe puts its own experts into the model; remove lora and moe from grafts")
        if config.init == "copies" and config.router.tune == "gates":
            found.append("gates over equal copies learn nothing; set router.tune=experts, or init=extracted")
        if config.init == "extracted" and (config.data.balance != "none" or config.data.batches != "random"):
            found.append("clusters decide which samples share a batch; set data.balance=none and data.batches=random")
        return found

    def _start(self, run: Run) -> Encoder:
        """The model as the run found it, with the config's grafts."""
        encoder = apply_grafts(run.base_encoder(), run.config.grafts, run.registry)
        return set_scale(encoder, self.config.router.logit_scale).eval()

    # -- experts -------------------------------------------------------------------------------------------------

    def _clusters(self, run: Run, *, stage: int) -> Stage:
        return JobStage(f"clusters-{stage}", partial(self._cluster, stage=stage))

    def _cluster(self, run: Run, *, stage: int) -> StageResult:
        """Embed the training data with the model of the stage before, cluster both sides, accumulate."""
        config, source = self.config.experts, run.train_source()
        if isinstance(source, Drawn):
            raise InputError(f"{source.name} is a mix, whose shares clip-moe's clusters would undo; name one source")
        encoder = run.encoder
        features = EncoderFeatures(
            encoder, batch_size=run.config.evaluate.batch_size, log=run.log, workers=run.config.data.workers
        )
        images, samples = features.images(source), features.samples(source)
        if bare := [s.id for s in samples if not s.captions]:
            raise InputError(f"{source.name}: {bare[0]} has no caption; clip-moe needs a csv: with a caption column")
        texts = _mean_texts(features, [s.captions for s in samples])
        rows = _rows(source, [s.id for s in samples])
        new = self._combined(run, images, texts, stage)
        parent = None
        if stage > 1:
            parent = run.component(f"clusters-{stage - 1}", "labels")["labels"].long()[rows]
            if bool((parent == UNKNOWN).any()):
                raise InputError(f"{source.name} changed since the stage before; start the run again")
        labels, minimum = torch.full((len(source),), UNKNOWN), config.train.batch_size
        if len(rows) < minimum:
            raise InputError(
                f"{source.name} has {len(rows)} readable samples, fewer than one batch of {minimum}; add samples or "
                f"set experts.train.batch_size to {len(rows)} or less"
            )
        labels[rows] = accumulated(parent, new, minimum=minimum, features=joint(images, texts))
        labels = distributed.to_all(labels if run.is_main else None)[0]  # one opinion for all ranks
        sizes = labels[labels >= 0].bincount()
        run.log.info(f"clusters-{stage}: {len(sizes)} clusters of {int(sizes.min())} to {int(sizes.max())} samples")
        metrics = {"clusters": float(len(sizes)), "smallest": float(sizes.min()), "largest": float(sizes.max())}
        return StageResult(components={"labels": Labels(labels)}, metrics=metrics)

    def _combined(self, run: Run, images: Tensor, texts: Tensor, stage: int) -> Tensor:
        """(n,) cluster of the image and of the text as one label."""
        config = self.config.experts
        found = []
        for number, x in enumerate((images, texts)):
            seed = run.seed * 1009 + 2 * stage + number
            found.append(
                kmeans(
                    x,
                    k=config.clusters,
                    seed=seed,
                    max_iter=config.max_iter,
                    tol=config.tol,
                    engine=config.engine,
                    log=run.log,
                ).labels
            )
        labels = pair_labels(*found, clusters=config.clusters)
        if config.by == "random":  # the same sizes, no meaning
            labels = labels[torch.randperm(len(labels), generator=Generator().manual_seed(run.seed * 1009 + stage))]
        return labels

    def _experts(self, run: Run, *, stage: int) -> Stage:
        """Train the feed-forward networks inside the clusters, from the first model or from the one before."""
        config = self.config.experts
        encoder = self._start(run) if config.restart == "base" else run.encoder
        labels = run.component(f"clusters-{stage}", "labels")["labels"].long()
        source = OneClusterAtATime(run.train_source(), labels, size=config.train.batch_size)
        if source.left_out:
            run.log.info(f"experts-{stage}: {source.left_out} samples are in clusters smaller than a batch")
        return PartlyTrained(
            f"experts-{stage}",
            train=config.train,
            source=source,
            encoder=encoder,
            trained=parameters(self._places(encoder)),
            smoothing=config.label_smoothing,
        )

    def _places(self, encoder: Encoder) -> list[FeedForward]:
        router = self.config.router
        return feed_forwards(encoder, towers=router.towers, last=router.last)

    # -- mixture -------------------------------------------------------------------------------------------------

    def _router(self, run: Run) -> Stage:
        """The mixture with every stage's networks in its places, and what of it is trained."""
        config, router = self.config, self.config.router
        encoder = self._start(run)
        settings = {"experts": config.experts.stages + 1, "top_k": router.top_k, "towers": router.towers}
        settings |= {"last": router.last, "dropout": router.dropout, "seed": run.seed}
        encoder = apply_grafts(encoder, [GraftNode(use=GRAFT, **settings)], run.registry)
        if config.init == "extracted":
            for j in range(1, config.experts.stages + 1):
                folder = run.stage_folder(f"experts-{j}") / "result" / "encoder"
                fill(encoder, run.open_encoder(str(folder)), number=j)
        encoder.to(run.device)
        trained = gates(encoder) + (experts(encoder) if router.tune == "experts" else [])
        return RouterStage(
            "router",
            train=router.train,
            source=run.train_source(),
            encoder=encoder,
            trained=trained,
            smoothing=router.label_smoothing,
            weight=router.balance,
            compat=router.compat,
        )


@torch.no_grad()
def fill(mixed: Encoder, dense: Encoder, *, number: int) -> None:
    """Copy the networks of ``dense`` into expert ``number`` of the mixtures at the same places."""
    theirs = {place.name: place.module for place in feed_forwards(dense)}
    for place in feed_forwards(mixed):
        if isinstance(place.module, Mixture):
            place.module.experts[number].load_state_dict(theirs[place.name].state_dict())


def _collapse(run: Run) -> StageResult:
    return StageResult(collapse(run.encoder))


def _mean_texts(features: EncoderFeatures, captions: list[tuple[str, ...]]) -> Tensor:
    """(n, D): the mean of every sample's unit caption embeddings."""
    flat = [caption for of_one in captions for caption in of_one]
    x, owner = features.texts(flat), torch.arange(len(captions)).repeat_interleave(torch.tensor([*map(len, captions)]))
    return torch.nn.functional.normalize(torch.zeros(len(captions), x.shape[1]).index_add_(0, owner, x), dim=-1)


def _rows(source: Source, ids: list[str]) -> Tensor:
    """Places in ``source`` of the samples that could be read."""
    if len(ids) == len(source):
        return torch.arange(len(source))
    known, rows = set(ids), []
    for index in range(len(source)):
        try:
            name = entry_of(source, index).id
        except BadSample:
            continue
        rows += [index] if name in known else []
    return torch.tensor(rows)
