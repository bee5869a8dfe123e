"""``video/m2-clip``: train adapters of both towers for four tasks at once; the CLIP itself stays frozen."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field
from torch import nn

from clipgraft.config.schema import Config
from clipgraft.encoders.base import Encoder
from clipgraft.errors import ClipgraftError
from clipgraft.recipe import StagePlan
from clipgraft.runner import Run
from clipgraft_video.blocks import new_parameters
from clipgraft_video.config import VideoRunConfig
from clipgraft_video.grafting import grafted, unfit
from clipgraft_video.m2clip.graft import M2ClipGraft, TedBlock, TextTedBlock
from clipgraft_video.m2clip.head import M2Head
from clipgraft_video.m2clip.masking import MaskedTexts
from clipgraft_video.m2clip.tasks import ByHead, ByTexts, Compat, MaskedWords
from clipgraft_video.model import HEAD, VideoModel
from clipgraft_video.setting import class_prompt_lists, problems_of, stage_of, standardised
from clipgraft_video.stage import VideoStage

NAME = "video/m2-clip"


class M2Weights(Config):
    """Weights of the tasks; 0 leaves one out, with what it alone needs."""

    contrast: float = Field(0.5, gt=0, description="of the contrast in the batch")
    classes: float = Field(0.5, ge=0, description="of the cross entropy over the texts of all classes")
    classifier: float = Field(1.0, ge=0, description="of the classifier's cross entropy")
    words: float = Field(0.1, ge=0, description="of the masked words")


class M2ClipConfig(VideoRunConfig):
    """Settings of ``video/m2-clip``."""

    objective: Literal["classes", "labels", "captions"] = Field("labels", description="labels; the other tasks join it")
    method: M2ClipGraft = M2ClipGraft()
    weights: M2Weights = M2Weights()
    masked: float = Field(0.2, gt=0, le=1, description="share of a text's words that are masked, one at least")
    text_lr: float = Field(0.5, gt=0, description="of adapters of texts, times train.lr")
    compat: Compat = Field("paper", description="official: the cross entropy over classes reads probabilities")


class M2Clip:
    """One stage. Wang et al., M2-CLIP, AAAI 2024, arXiv 2401.11649."""

    def __init__(self, config: M2ClipConfig) -> None:
        self.config = config

    def plan(self) -> list[StagePlan]:
        """One stage, ``videos``."""
        return [StagePlan("videos", self._build)]

    def check(self, run: Run) -> list[str]:
        """What can be seen before any work."""
        c = self.config
        problems = problems_of(run, c) or unfit(run, NAME, c.method)
        if c.objective != "labels":
            problems.append(f"{NAME} trains on classes by contrast and further tasks; set objective to labels")
        if problems:
            return problems
        source, encoder = run.train_source(), run.encoder
        known = getattr(getattr(encoder.image, HEAD, None), "classes", None)
        if c.weights.classifier and known is not None and list(known) != list(source.classes):
            problems.append(
                f"{c.model.from_} has a classifier of {len(known)} other classes than {source.name}; set "
                "weights.classifier=0, or start from a CLIP without one"
            )
        if c.weights.words:
            try:
                MaskedWords(encoder, self._texts(run, encoder), places=c.method.text_places, hidden=c.method.hidden)
            except ClipgraftError as error:
                problems.append(str(error))
        return problems

    def _texts(self, run: Run, encoder: Encoder) -> MaskedTexts:
        prompts = class_prompt_lists(run.train_source(), self.config.text)
        return MaskedTexts(encoder, [text for texts in prompts for text in texts], share=self.config.masked)

    def _build(self, run: Run) -> VideoStage:
        c, w = self.config, self.config.weights
        classes = tuple(run.train_source().classes) if w.classifier else c.method.classes
        method = c.method.model_copy(update={"classes": classes})
        encoder = standardised(grafted(run, NAME, method), c.statistics).requires_grad_(False)
        head: M2Head = getattr(encoder.image, HEAD)
        terms: dict[str, tuple[float, nn.Module]] = {}
        if w.classes:
            terms["classes"] = w.classes, ByTexts(encoder, twice=c.compat == "official")
        if w.classifier:
            terms["classifier"] = w.classifier, ByHead(head)
        if w.words:
            words = MaskedWords(encoder, self._texts(run, encoder), places=method.text_places, hidden=method.hidden)
            terms["words"] = w.words, words.to(run.device)
        return stage_of(
            run,
            c,
            VideoModel(encoder),
            weight=w.contrast,
            terms=terms,
            groups=groups(encoder, terms, text_lr=c.text_lr, classifier=bool(w.classifier)),
        )


def groups(
    encoder: Encoder, terms: dict[str, tuple[float, nn.Module]], *, text_lr: float, classifier: bool = True
) -> list[dict[str, Any]]:
    """What is new at the full rate, adapters of texts at ``text_lr`` of it; gradients are switched on for both."""
    head: M2Head = getattr(encoder.image, HEAD)
    new = [*new_parameters(encoder, TedBlock), *head.t_adapter.parameters()]
    if classifier and head.fc is not None:
        new += head.fc.parameters()
    texts = new_parameters(encoder, TextTedBlock)
    if "words" in terms:
        words = terms["words"][1]
        assert isinstance(words, MaskedWords)
        new += words.head.parameters()
        texts += words.block.adapters.parameters()
    for parameter in (*new, *texts):
        parameter.requires_grad_(True)
    found = [{"name": "new", "params": new}, {"name": "text-adapters", "params": texts, "lr_scale": text_lr}]
    return [group for group in found if group["params"]]
