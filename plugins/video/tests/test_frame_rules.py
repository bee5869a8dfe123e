"""Rules of choosing frames, on the vectors that the papers' code gives."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clipgraft.errors import InputError
from clipgraft_video.frame_rules import (
    RULES,
    Rule,
    dense,
    dist_segments,
    ez_clip_test,
    indices,
    per_second,
    prompt_switch,
    tsn_test,
    tsn_train,
    uniform,
)


def test_tsn_takes_the_centres_of_segments() -> None:
    assert tsn_test(300, 8) == [18, 56, 93, 131, 168, 206, 243, 281]
    assert tsn_test(300, 16) == [9, 28, 46, 65, 84, 103, 121, 140, 159, 178, 196, 215, 234, 253, 271, 290]
    assert tsn_test(10, 16) == [0, 0, 1, 2, 2, 3, 4, 4, 5, 5, 6, 7, 7, 8, 9, 9]
    assert tsn_test(1, 8) == [0] * 8


def test_several_views_shift_the_centres_and_are_the_same_every_time() -> None:
    views = [tsn_test(300, 8, view=k, views=4) for k in range(4)]
    assert views[0] == [4, 42, 79, 117, 154, 192, 229, 267]  # (k + 1/2) / 4 of a segment of 37.5
    assert all(a < b < c < d for a, b, c, d in zip(*views, strict=True))


def test_tsn_in_training_draws_one_frame_per_segment_and_never_the_tail() -> None:
    rng = torch.Generator().manual_seed(0)
    drawn = [tsn_train(30, 8, rng) for _ in range(400)]
    assert all(3 * i <= row[i] < 3 * i + 3 for row in drawn for i in range(8))
    assert {row[7] for row in drawn} == {21, 22, 23}  # frames 24 to 29 are the tail
    assert tsn_train(5, 8, rng) == [0, 1, 1, 2, 2, 3, 4, 4]


def test_ez_clip_rounds_otherwise() -> None:
    assert ez_clip_test(300, 8) == [18, 55, 93, 130, 168, 205, 243, 280]
    assert ez_clip_test(4, 8) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_dense_windows_start_evenly_and_repeat_the_last_frame() -> None:
    assert dense(100, 4, stride=16) == [25, 41, 57, 73]
    assert [dense(100, 4, stride=16, view=k, views=3)[0] for k in range(3)] == [0, 25, 51]
    assert dense(20, 4, stride=16) == [0, 16, 19, 19]
    rng = torch.Generator().manual_seed(0)
    assert {dense(100, 4, stride=16, rng=rng)[0] for _ in range(800)} == set(range(52))


def test_uniform_and_dist() -> None:
    assert uniform(300, 8) == [18, 56, 93, 131, 168, 205, 243, 280]
    assert dist_segments(300, 4, view=1, views=2) == [75, 150, 225, 299]  # the last view sits on the segments' ends
    assert dist_segments(300, 4, view=0, views=2) == [38, 112, 188, 262]


def test_one_frame_per_second_is_thinned_or_spread() -> None:
    assert per_second(300, 12, fps=25) == list(range(0, 300, 25))
    assert per_second(600, 12, fps=25) == [0, 50, 100, 150, 200, 250, 300, 350, 400, 450, 500, 575]
    assert per_second(100, 12, fps=25) == [0, 9, 18, 27, 36, 45, 54, 63, 72, 81, 90, 99]
    assert per_second(30, 12, fps=0.4) == per_second(30, 12, fps=1.0)  # the official stride is 0 there
    with pytest.raises(InputError, match="choose a rule that needs none"):
        per_second(10, 4, fps=0.0)


def test_prompt_switch_goes_round_after_round() -> None:
    assert prompt_switch(300, 12) == [16, 66, 116, 166, 216, 266, 32, 82, 132, 182, 232, 282]
    with pytest.raises(InputError, match="multiple of 6"):
        prompt_switch(300, 8)


@given(st.sampled_from(RULES), st.integers(1, 700), st.integers(1, 6), st.booleans(), st.integers(0, 99))
def test_every_rule_stays_inside_any_video(rule: Rule, n: int, sixths: int, training: bool, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed) if training else None
    found = indices(rule, n, 6 * sixths, rng=rng, stride=4, fps=25.0)
    assert len(found) == 6 * sixths and all(0 <= k < n for k in found)
    assert rule == "prompt-switch" or found == sorted(found)


def test_what_can_not_be_chosen_is_said() -> None:
    with pytest.raises(InputError, match="the video has 0"):
        indices("tsn", 0, 8)
    with pytest.raises(InputError, match="has one view"):
        indices("uniform", 30, 8, views=3)
    with pytest.raises(InputError, match="view 3 of 3"):
        indices("tsn", 30, 8, view=3, views=3)
