"""Operations are counted whole, and merging saves as many as its schedule says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch

from clipgraft.checkpoint import write_export
from clipgraft.config.schema import GraftNode
from clipgraft.data.base import Sample
from clipgraft.encoders import apply_grafts
from clipgraft.evaluation.features import EncoderFeatures
from clipgraft.registry import current
from clipgraft.testing.tiny import tiny_clip
from clipgraft_video.cost import Cost, operations
from clipgraft_video.model import VideoModel
from clipgraft_video.tempme.merging import Settings, schedule


def by_hand(tokens: int, width: int, depth: int, *, embed: int, patch: int = 8) -> int:
    """Of one picture: patches, qkv, scores and values, output, MLP of four times the width, projection."""
    stem = 2 * (tokens - 1) * 3 * patch**2 * width
    block = 2 * tokens * width * 12 * width + 4 * tokens**2 * width
    return stem + depth * block + 2 * width * embed


def test_a_plain_tower_costs_what_its_matrices_say() -> None:
    encoder = tiny_clip(width=64, embed=64, depth=3)
    side = encoder.preprocess.size[0] // encoder.image.tower.patch_size[0]
    expected = by_hand(side**2 + 1, 64, 3, embed=64, patch=encoder.image.tower.patch_size[0])
    model = VideoModel(encoder).eval()
    assert operations(model, torch.rand(2, 4, 3, 32, 32)) == 8 * expected
    assert torch.backends.mha.get_fastpath_enabled()


class Noise:
    """Two videos of eight frames."""

    name, fingerprint = "noise", "noise"
    classes: Sequence[str] = ()
    templates: Sequence[str] = ()
    attributes: Mapping[str, Sequence[str]] = {}

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Sample:
        frames = torch.randint(256, (8, 3, 32, 32), generator=torch.Generator().manual_seed(index)).to(torch.uint8)
        return Sample(str(index), frames[0], extra={"frames": frames})


def test_merging_saves_operations_and_no_merging_saves_none(tmp_path: Path) -> None:
    plain = tiny_clip(width=64, embed=64, depth=3)
    write_export(plain, tmp_path / "clip")
    saved = {}
    for joins, per_layer in (((2, 4), 2), ((), 0)):
        settings = {"frames": 8, "joins": joins, "per_layer": per_layer, "within": 0.1 if joins else 0, "after": 0}
        node = GraftNode(use="video/tempme", rank=0, **settings)
        merged = apply_grafts(tiny_clip(width=64, embed=64, depth=3), [node], current())
        found = Cost(beside=str(tmp_path / "clip"), videos=2, rounds=2)(EncoderFeatures(merged), Noise())
        saved[joins] = found.metrics["flops_saved"]
        assert found.metrics["gigaflops"] > 0 and found.metrics["milliseconds"] > 0
        assert found.lower == {"gigaflops", "milliseconds"} and found.metrics["time_saved"] < 1
    assert saved[()] == pytest.approx(0, abs=1e-9)
    tokens = sum(n * clips for n, clips in schedule(17, 8, 3, Settings(2, (2, 4), after=0))) / (3 * 17 * 8)
    assert 0.5 * (1 - tokens) < saved[(2, 4)] < 1.5 * (1 - tokens)
