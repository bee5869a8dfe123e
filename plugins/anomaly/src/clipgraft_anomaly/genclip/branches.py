"""Two branches over the same patches: texts that the picture helped to write, and texts that are the same for all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from clipgraft.encoders.base import Encoder
from clipgraft.errors import InputError
from clipgraft.log import RunLog
from clipgraft_anomaly.detector import Detection, Detector
from clipgraft_anomaly.genclip.name_filter import NameFilter
from clipgraft_anomaly.genclip.prompts import BlendConfig, GenClip
from clipgraft_anomaly.genclip.vision import LayeredReader
from clipgraft_anomaly.handwritten import UNNAMED
from clipgraft_anomaly.reading import ReadConfig, Reader, Seen, detection, layer_maps
from clipgraft_anomaly.scoring import fused, gaussian, probabilities
from clipgraft_anomaly.text_path import why_not_prompted

Texts = Tensor | Mapping[int, Tensor]
"""(2, D) or (B, 2, D) for all layers, or (B, 2, D) for each."""


def whole_shares(whole: Tensor, texts: Texts, *, tau: float, blend: BlendConfig) -> Tensor:
    """Pictures (B, D) -> probabilities (B, 2) of normal and anomalous."""
    if isinstance(texts, Tensor):
        return probabilities(whole, texts, tau=tau)
    layers = [max(texts)] if blend.whole == "last" else sorted(texts)
    return torch.stack([probabilities(whole, texts[layer], tau=tau) for layer in layers]).mean(0)


def blended(
    seen: Seen,
    vision: Mapping[int, Tensor] | None,
    query: Tensor | None,
    read: ReadConfig,
    *,
    blend: BlendConfig,
    size: int,
) -> Detection:
    """M = a M_vision + (1 - a) M_query, smoothed; the score likewise with b. A branch without a share may be None."""
    branches = [(blend.a, blend.b, vision), (1 - blend.a, 1 - blend.b, query)]
    raw, whole = torch.zeros(()), torch.zeros(())
    for on_map, on_whole, texts in branches:
        if texts is None:
            if on_map or on_whole:
                raise ValueError("a branch that has a share needs its texts")
            continue
        maps = [m[:, 1] for m in layer_maps(seen, texts, tau=read.tau, size=size).values()]
        raw = raw.to(maps[0]) + on_map * fused(maps, mean=read.fuse == "mean")
        shares = whole_shares(seen.whole, texts, tau=read.tau, blend=blend)
        whole = whole.to(shares) + on_whole * shares[:, 1]
    smooth = gaussian(raw, read.sigma or 0.0)
    highest = smooth.flatten(1).amax(1) / (1 if read.fuse == "mean" else len(seen.local))
    return Detection((1 - read.score_weight) * whole + read.score_weight * highest, smooth)


class GenClipDetector(Detector):
    """Reader, both branches, blend; ``blend`` overrides what the head was trained with.

    With a = b = 0 and no names in the query-only branch it looks at pictures alone (``image_only``): ``texts`` (2, D)
    are constants, and the text tower is never run.
    """

    method: ClassVar[str] = "genclip"
    named: ClassVar[bool] = True

    def __init__(self, encoder: Encoder, head: GenClip, *, blend: BlendConfig | None = None) -> None:
        super().__init__()
        self.encoder, self.head, self.blend = encoder, head, head.blend if blend is None else blend
        if not self.image_only:
            if problem := why_not_prompted(encoder.text):
                raise InputError(f"genclip writes prompts for every picture: {problem}")
            text: Any = encoder.text
            if text.width != head.fits.text_width:
                raise InputError(
                    f"these prompts were trained for a text tower of width {head.fits.text_width}, the model's has "
                    f"{text.width}; give the model they were trained for"
                )
        self.reader = Reader(encoder, head.read)
        self.look = LayeredReader(self.reader, pooling=head.prompt.pooling)
        self.filter = NameFilter(encoder, head.filter, log=RunLog().info)
        self.trained_on = head.trained if head.trained.pictures else None
        self.size, self.read = self.reader.size, head.read
        self.texts: Tensor
        self.register_buffer("texts", head.texts.detach().clone())

    @property
    def image_only(self) -> bool:
        """Neither names nor a text tower play a part."""
        return self.blend.a == self.blend.b == 0 and self.head.prompt.named != "both"

    def query_only(self) -> GenClipDetector:
        """The same with a = b = 0; what can be exported as a graph."""
        return GenClipDetector(self.encoder, self.head, blend=self.blend.model_copy(update={"a": 0.0, "b": 0.0}))

    def forward(self, pixels: Tensor, names: Sequence[str] | None = None) -> Detection:
        """Pixels (B, 3, S, S) in [0, 1] and B names -> scores and maps."""
        if self.image_only:
            return detection(self.reader(pixels), self.texts, self.read, size=self.size)
        looked = self.look(pixels)
        told = [self.filter(name) for name in ([UNNAMED] * len(pixels) if names is None else names)]
        blend, vision, query = self.blend, None, None
        if blend.a or blend.b:
            vision = self.head.vision_texts(self.encoder, told, looked.pooled)
        if blend.a < 1 or blend.b < 1:
            query = self.head.query_texts(self.encoder, told) if self.head.prompt.named == "both" else self.texts
        return blended(looked.seen, vision, query, self.read, blend=blend, size=self.size)

    def header(self) -> dict[str, Any]:
        """Method, size and every setting; which names were doubted is in ``filter.doubted``."""
        prompt = self.head.prompt.model_dump(exclude={"chunk", "scale"})
        settings = {"prompt": prompt, "read": self.read.model_dump(), "blend": self.blend.model_dump()}
        names = {"mode": self.head.filter.mode} | self.head.filter.model_dump(exclude_defaults=True)
        return super().header() | {"reconstruction": True} | settings | {"filter": names}
