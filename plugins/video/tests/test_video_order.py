"""Whether a model reads the order of frames, measured on models that do, don't, and read it backwards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Tensor

from clipgraft.data.base import Sample
from clipgraft.errors import InputError
from clipgraft.evaluation.features import EncoderFeatures
from clipgraft.testing.tiny import tiny_clip
from clipgraft.types import ImageFeatures
from clipgraft_video.evaluator import Classification
from clipgraft_video.heads import VideoFeatures, VideoHead
from clipgraft_video.model import HEAD
from clipgraft_video.order import InOrder, Order, opposite_places

PAIRS = (("opening", "closing"),)


class Numbered:
    """Eight grey frames that grow brighter (``opening``) or darker (``closing``); ``still`` has no opposite."""

    name, fingerprint = "numbered", "numbered"
    classes: Sequence[str] = ("opening", "still", "closing")
    templates: Sequence[str] = ("{}",)
    attributes: Mapping[str, Sequence[str]] = {}

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Sample:
        label = index % 3
        steps = torch.arange(8) if label == 0 else torch.arange(8).flip(0) if label == 2 else torch.full((8,), 4)
        frames = (steps * 20 + 10).to(torch.uint8)[:, None, None, None].expand(8, 3, 32, 32)
        return Sample(str(index), frames[0], label=label, extra={"frames": frames})


class Trend(VideoHead):
    """Scores that look at the sign of the change over time alone, times ``sign``; blind to it at 0."""

    def __init__(self, sign: float) -> None:
        super().__init__()
        self.sign = sign

    def forward(self, image: ImageFeatures, frames: int) -> VideoFeatures:
        each = image.pooled.unflatten(0, (-1, frames))
        return VideoFeatures(self.sign * (each[:, -1] - each[:, 0]), each)

    def logits(self, video: VideoFeatures, texts: Tensor, scale: Tensor) -> Tensor:
        up = video.pooled[:, :1]
        return torch.cat([up, torch.full_like(up, -0.5), -up], 1)


class Brightness(torch.nn.Module):
    """An image tower whose embedding is the picture's mean."""

    def __init__(self, image: torch.nn.Module, head: VideoHead) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))
        setattr(self, HEAD, head)

    def forward(self, pixels: Tensor, want: object = None) -> ImageFeatures:
        return ImageFeatures(pixels.mean((1, 2, 3))[:, None].expand(-1, 16) * self.scale)


def measured(sign: float) -> dict[str, float]:
    encoder = tiny_clip()
    encoder.image = Brightness(encoder.image, Trend(sign))  # type: ignore[assignment]
    found = Order(opposites=PAIRS, batch_size=5)(EncoderFeatures(encoder), Numbered())
    assert len(found.samples) == 12 and found.counts["direction"][1] == 8 and found.counts["top1"][1] == 12
    return found.metrics


def test_a_model_that_reads_the_order() -> None:
    found = measured(1.0)
    assert found["direction"] == found["reversed"] == found["turned"] == 1 and found["top1"] == 8 / 12
    assert 0 <= found["shuffled_direction"] < 1 and found["shuffled_top1"] < found["top1"]


def test_a_model_that_reads_it_backwards_turns_too() -> None:
    found = measured(-1.0)
    assert found["direction"] == found["reversed"] == 0 and found["turned"] == 1


def test_a_model_without_a_preference_is_wrong_and_never_turns() -> None:
    found = measured(0.0)
    assert found["direction"] == found["reversed"] == found["turned"] == found["top1"] == 0


def test_a_mean_over_frames_never_turns_and_is_right_as_often_in_any_order() -> None:
    features = EncoderFeatures(tiny_clip())
    found = Order(opposites=PAIRS)(features, Numbered())
    assert found.metrics["turned"] == 0
    assert found.metrics["direction"] == found.metrics["shuffled_direction"] == 0.5
    assert found.metrics["reversed"] == 0.5  # one of the two is called so in either direction
    assert found.metrics["top1"] == Classification()(features, Numbered()).metrics["top1"]


def test_orders_of_frames() -> None:
    source = Numbered()
    plain = source[0].extra["frames"]
    assert torch.equal(InOrder(source, "forward")[0].image, plain)
    assert torch.equal(InOrder(source, "reversed")[0].image, plain.flip(0))
    mixed = InOrder(source, "shuffled")[0].image
    assert not torch.equal(mixed, plain) and torch.equal(mixed.sort(0).values, plain)
    assert torch.equal(mixed, InOrder(source, "shuffled")[0].image)


def test_opposites_are_pairs_of_classes() -> None:
    assert opposite_places(PAIRS, ["opening", "still", "closing"]).tolist() == [2, -1, 0]
    for wrong in (("openin", "closing"), ("closing", "openin")):
        with pytest.raises(InputError, match="openin"):
            opposite_places((wrong,), ["opening", "closing"])
    with pytest.raises(InputError, match="write every pair once"):
        opposite_places((*PAIRS, *PAIRS), ["opening", "closing"])
    with pytest.raises(InputError, match="another class"):
        opposite_places((("opening", "opening"),), ["opening", "closing"])
