"""Videos: no single frame tells the class."""

from __future__ import annotations

import pytest
import torch

from clipgraft.errors import InputError
from clipgraft_toyworld.captions import MOTIONS
from clipgraft_toyworld.motion import STATIC, phases, videos
from clipgraft_toyworld.task_sources import Videos


def test_one_quantity_moves_and_opposites_are_each_other_backwards() -> None:
    label = torch.arange(len(MOTIONS))
    start, step = torch.rand(10, len(STATIC)), torch.full((10,), 0.07)
    path = phases(label, start, step, frames=8)
    moving = (path - path[:, :1]).abs().amax(1) > 1e-4
    assert torch.equal(moving.nonzero()[:, 1], label // 2)
    backwards = phases(label, path[:, -1], -step, frames=8)
    gap = (backwards.flip(1) - path).abs()
    assert torch.minimum(gap, 1 - gap).max() < 1e-5


def test_a_frame_has_the_same_law_in_every_class() -> None:
    n = 20_000
    start = torch.rand(n, len(STATIC), generator=torch.Generator().manual_seed(0))
    step = torch.full((n,), 0.08)
    for t in (0, 3, 7):
        quantiles = []
        for label in range(len(MOTIONS)):
            path = phases(torch.full((n,), label), start, step, frames=8)[:, t]
            quantiles.append(path.quantile(torch.tensor([0.1, 0.5, 0.9]), dim=0))
        spread = torch.stack(quantiles)
        assert (spread - torch.tensor([0.1, 0.5, 0.9])[:, None]).abs().max() < 0.02


def test_neither_a_frame_nor_the_mean_frame_tells_the_direction() -> None:
    data, exam = videos("train", n=640, size=32), videos("tune", n=640, size=32)

    def accuracy(features: torch.Tensor, other: torch.Tensor) -> float:
        mean = features.mean(0)
        basis = torch.linalg.svd(features - mean, full_matrices=False)[2][:40]
        low, high = (features - mean) @ basis.T, (other - mean) @ basis.T
        target = (data.label % 2).float() * 2 - 1
        weights = torch.linalg.solve(low.T @ low + torch.eye(40) * len(low) * 0.01, low.T @ target)
        return ((high @ weights > 0) == (exam.label % 2 == 1)).float().mean().item()

    frames, others = data.frames.float() / 255, exam.frames.float() / 255
    assert abs(accuracy(frames[:, 0].flatten(1), others[:, 0].flatten(1)) - 0.5) < 0.06
    assert abs(accuracy(frames.mean(1).flatten(1), others.mean(1).flatten(1)) - 0.5) < 0.06


def test_videos_repeat_and_extend() -> None:
    few, many = videos("test", n=3, size=32), videos("test", n=70, size=32)
    assert torch.equal(few.frames, many.frames[:3]) and torch.equal(few.label, many.label[:3])


def test_a_choice_of_shapes_leaves_videos_out_and_changes_none() -> None:
    every, some = videos("tune", n=128, size=32), videos("tune", n=6, size=32, shapes=[0, 3])
    assert set(some.scene.shape.tolist()) <= {0, 3} and len(some.frames) == 6
    assert torch.equal(some.frames, every.frames[some.number]) and torch.equal(some.label, every.label[some.number])


def test_classes_may_be_objects_with_motions() -> None:
    source = Videos(split="tune", n=20, shapes=("moon", "tee"), label="object-motion")
    assert len(source.classes) == 20 and source.classes[10] == "tee moving left"
    for k in range(20):
        sample = source[k]
        assert sample.label is not None and sample.captions[0].endswith(source.classes[sample.label])
    assert source.fingerprint != Videos(split="tune", n=20).fingerprint


def test_shuffled_videos_hold_the_same_frames_in_an_order_of_their_own() -> None:
    forward, mixed = Videos(split="tune", n=40), Videos(split="tune", n=40, order="shuffled")
    orders = set()
    for k in range(40):
        one, other = forward[k].extra["frames"], mixed[k].extra["frames"]
        where = [next(t for t in range(8) if torch.equal(one[t], frame)) for frame in other]
        assert sorted(where) == list(range(8)) and torch.equal(mixed[k].image, other[0])
        orders.add(tuple(where))
    assert len(orders) > 35 and mixed.fingerprint != forward.fingerprint
    assert torch.equal(mixed[3].extra["frames"], Videos(split="tune", n=4, order="shuffled")[3].extra["frames"])


def test_a_choice_of_motions_is_a_choice_of_classes() -> None:
    source = Videos(split="tune", n=24, motions=("growing", "moving left"))
    assert source.classes == ("growing", "moving left") and len(source) == 24
    for k in range(24):
        assert source[k].captions[0].endswith(source.classes[source[k].label or 0])
    every = Videos(split="tune", n=256)
    known = {every[k].id: k for k in range(256)}
    assert torch.equal(source[5].extra["frames"], every[known[source[5].id]].extra["frames"])
    with pytest.raises(InputError, match="flying"):
        Videos(split="tune", n=4, motions=("flying",))


def test_in_calm_videos_only_the_named_property_leaves_the_picture() -> None:
    wild, calm = videos("tune", n=256, size=32), videos("tune", n=256, size=32, calm=True)
    assert torch.equal(wild.label, calm.label) and not torch.equal(wild.frames, calm.frames)
    shown = (calm.frames.float().std((2, 3, 4)) > 8).float().mean(1)  # an object of full opacity is seen in every frame
    assert shown[calm.label < 8].mean() > 0.98
    spread = calm.frames.float().std(1).mean((1, 2, 3))  # everything that moves does so
    assert all(spread[calm.label == k].mean() > 3 for k in range(10))
    assert Videos(n=8).fingerprint != Videos(n=8, calm=True).fingerprint


def test_a_stride_takes_every_second_frame_of_the_same_videos() -> None:
    every, second = Videos(split="tune", n=6, frames=8), Videos(split="tune", n=6, frames=4, stride=2)
    assert all(torch.equal(second[k].extra["frames"], every[k].extra["frames"][::2]) for k in range(6))
    assert second.fingerprint != Videos(split="tune", n=6, frames=4).fingerprint


def test_either_half_of_the_combinations_shows_every_shape_and_motion() -> None:
    half = {
        way: Videos(split="tune", n=200, motions=MOTIONS[::2], combinations=way, label="object-motion")
        for way in ("even", "odd", "all")
    }
    even, odd = set(half["even"].classes), set(half["odd"].classes)
    assert len(even) == len(odd) == 20 and not even & odd and even | odd == set(half["all"].classes)
    for source in half.values():
        assert len({name.split()[0] for name in source.classes}) == 8
        assert {sample.label for sample in map(source.__getitem__, range(200))} == set(range(len(source.classes)))
        for k in range(20):
            assert source[k].captions[0].endswith(source.classes[source[k].label or 0])
    assert half["even"].fingerprint != half["odd"].fingerprint
