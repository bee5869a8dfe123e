"""M2-CLIP's head: frames pass a temporal adapter, their mean is the video; beside it a classifier of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from clipgraft.errors import InputError
from clipgraft.types import ImageFeatures
from clipgraft_video.clock import Clock
from clipgraft_video.heads import VideoFeatures, VideoHead
from clipgraft_video.m2clip.adapters import TemporalAdapter

CLASS = "class"
"""Under this name the last block leaves its class tokens (B T, W), before the tower's last norm."""


@dataclass(frozen=True, slots=True)
class M2Features(VideoFeatures):
    """``summary`` (B, W): the norm of the mean class token, which the classifier reads; None without a classifier."""

    summary: Tensor | None = None


class M2Head(VideoHead):
    """``t_adapter`` over embeddings of frames, then their mean. ``classes``: names behind the rows of ``fc``.

    ``norm`` is the tower's own last norm, borrowed.
    """

    def __init__(
        self,
        dim: int,
        width: int,
        *,
        clock: Clock,
        norm: nn.Module,
        classes: Sequence[str] = (),
        kernel: int = 3,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        self.clock, self._norm, self.classes = clock, (norm,), tuple(classes)
        self.t_adapter = TemporalAdapter(dim, kernel)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(width, len(self.classes)) if self.classes else None
        if self.fc is not None:
            nn.init.normal_(self.fc.weight, std=0.02)
            nn.init.zeros_(self.fc.bias)

    def forward(self, image: ImageFeatures, frames: int) -> M2Features:
        """Frames (B T, D), and the class tokens that the last block left -> the video."""
        each = self.t_adapter(image.pooled.unflatten(0, (-1, frames)))
        left = self.clock.left.get(CLASS) if self.fc is not None else None
        summary = None if left is None else self._norm[0](left.unflatten(0, (-1, frames)).mean(1))
        return M2Features(each.mean(1), each, summary=summary)

    def classify(self, video: VideoFeatures) -> Tensor:
        """(B, K) scores of the classifier."""
        if self.fc is None or not isinstance(video, M2Features) or video.summary is None:
            raise InputError("this model has no classifier; it was trained with weights.classifier=0")
        return self.fc(self.dropout(video.summary))  # type: ignore[no-any-return]


class ByClassifier(VideoHead):
    """A head that scores by the classifier instead of texts; ``columns`` puts its classes in the data's order."""

    def __init__(self, head: M2Head, columns: Sequence[int]) -> None:
        super().__init__()
        self._head, self.columns = (head,), list(columns)

    def forward(self, image: ImageFeatures, frames: int) -> VideoFeatures:
        """As the head itself."""
        found: VideoFeatures = self._head[0](image, frames)
        return found

    def logits(self, video: VideoFeatures, texts: Tensor, scale: Tensor) -> Tensor:
        """(B, K); texts and scale play no part."""
        return self._head[0].classify(video)[:, self.columns]
