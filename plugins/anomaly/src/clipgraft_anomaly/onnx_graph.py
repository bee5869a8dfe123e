"""A detector as one pure function of pixels: the texts are constants, the text tower is gone.

B pictures, S side of the input in pixels, D joint embedding.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from clipgraft.encoders.base import ImageEncoder, Preprocess
from clipgraft.errors import InputError
from clipgraft_anomaly.anomalyclip.prompts import AnomalyClipDetector
from clipgraft_anomaly.dense import DenseTower
from clipgraft_anomaly.detector import Detector
from clipgraft_anomaly.genclip.branches import GenClipDetector
from clipgraft_anomaly.handwritten import PromptsDetector
from clipgraft_anomaly.reading import ReadConfig, Seen, detection


class Found(NamedTuple):
    """``score`` (B,) and ``map`` (B, S, S), as ``Detection``; a tuple, which graphs can return."""

    score: Tensor
    map: Tensor


class InspectionGraph(nn.Module):
    """Pixels (B, 3, S, S) in [0, 1] -> scores and maps. Normalisation and both texts (2, D) are inside.

    The image tower is a copy in fp32 whose position embeddings are those of this input size, once and for all.
    """

    def __init__(self, dense: DenseTower, *, texts: Tensor, read: ReadConfig, preprocess: Preprocess) -> None:
        super().__init__()
        self.dense, self.read, self.size = folded(dense), read, dense.size
        self.texts: Tensor
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("texts", texts.detach().float().cpu().clone())
        self.register_buffer("mean", torch.tensor(preprocess.mean)[:, None, None])
        self.register_buffer("std", torch.tensor(preprocess.std)[:, None, None])
        self.requires_grad_(False).eval()

    def forward(self, pixels: Tensor) -> Found:
        """As the class says."""
        seen = self.dense((pixels - self.mean) / self.std, layers=self.read.needed, vv_start=self.read.first)
        whole = self.dense.project(seen.cls, ln_post=self.read.ln_post_global)
        local = {layer: self.dense.project(x) for layer, x in seen.local.items()}
        found = detection(Seen(whole, local, seen.grid), self.texts, self.read, size=self.size)
        return Found(found.score, found.map)


def folded(dense: DenseTower) -> DenseTower:
    """A copy in fp32 on the CPU with the position embeddings of its own input size."""
    image: ImageEncoder = copy.deepcopy(dense.image).float().cpu()
    with torch.no_grad():
        positions = dense.positions().detach().float().cpu().clone()
    image.tower.positional_embedding = nn.Parameter(positions, requires_grad=False)
    image.tower.grid_size = dense.grid
    return DenseTower(image, size=dense.size, resampling=dense.resampling)


def baked(detector: Detector, *, name: str | None = None) -> InspectionGraph:
    """The graph of a detector; ``name`` is what prompts call the object, for those that name it."""
    if problem := why_not_baked(detector, name=name):
        raise InputError(problem)
    told: Any = detector
    texts = told.texts([name], device=torch.device("cpu"))[0] if isinstance(told, PromptsDetector) else told.texts
    return InspectionGraph(told.reader.dense, texts=texts, read=told.read, preprocess=told.encoder.preprocess)


def why_not_baked(detector: Detector, *, name: str | None = None) -> str:
    """Why a detector can't become a graph of pictures alone; empty when it can."""
    if isinstance(detector, PromptsDetector):
        told = "prompts name the object, and a graph has one pair of texts"
        return "" if name else f"{told}; give the name: 'MODEL?method=prompts&name=NAME'"
    if isinstance(detector, AnomalyClipDetector | GenClipDetector) and name is not None:
        return f"a graph of {detector.method} names no object, so it takes no name; leave it out"
    if isinstance(detector, AnomalyClipDetector) or (isinstance(detector, GenClipDetector) and detector.image_only):
        return ""
    if isinstance(detector, GenClipDetector) and detector.query_only().image_only:
        return "genclip writes texts for every picture; its other branch has a graph: 'MODEL?branch=query'"
    why = {"winclip": "it compares windows with remembered pictures", "genclip": "its texts name the object"}
    return (
        f"{detector.method} has no ONNX graph ({why.get(detector.method, 'not written')}); anomalyclip has one, and "
        "prompts about a named object"
    )
