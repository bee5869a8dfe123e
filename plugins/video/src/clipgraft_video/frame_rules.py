"""Which frames of a video are looked at: pure functions from a frame count n to T indices from 0, in order.

A video shorter than T gives some frames twice; every rule returns exactly T indices in [0, n). Training rules draw from
the generator they are given and from nothing else.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Generator

from clipgraft.errors import InputError

Rule = Literal["tsn", "ez-clip", "dense", "uniform", "dist", "fps", "prompt-switch"]
RULES: tuple[Rule, ...] = get_args(Rule)


def indices(
    rule: Rule,
    n: int,
    frames: int,
    *,
    rng: Generator | None = None,
    view: int = 0,
    views: int = 1,
    stride: int = 16,
    fps: float = 25.0,
) -> list[int]:
    """T = ``frames`` indices by ``rule``; with ``rng`` as in training, else view ``view`` of ``views`` as in a test.

    ``stride`` [frames] is of the rule dense, ``fps`` [1/s] the video's own rate, which the rule fps reads. Every test
    view is deterministic (Deviation: ViFi-CLIP's, X-CLIP's and ILA's code draws at random as soon as it takes several).
    """
    if n < 1 or frames < 1:
        raise InputError(f"frames can't be chosen: the video has {n}, {frames} were asked for; both must be 1 or more")
    if not 0 <= view < views:
        raise InputError(f"view {view} of {views} does not exist; views count from 0")
    if rule == "tsn":
        return tsn_train(n, frames, rng) if rng is not None else tsn_test(n, frames, view=view, views=views)
    if rule == "dense":
        return dense(n, frames, stride=stride, rng=rng, view=view, views=views)
    if rule == "dist":
        return dist_segments(n, frames, rng=rng, view=view, views=views)
    if views > 1:
        raise InputError(f"the rule {rule} has one view; set views to 1, or use tsn, dense or dist")
    if rule == "ez-clip":
        return tsn_train(n, frames, rng) if rng is not None else ez_clip_test(n, frames)
    if rule == "uniform":
        return uniform(n, frames)
    if rule == "fps":
        return per_second(n, frames, fps=fps)
    if rule == "prompt-switch":
        return prompt_switch(n, frames, rng=rng)
    raise InputError(f"unknown rule {rule!r}; known: {', '.join(RULES)}")


def tsn_test(n: int, frames: int, *, view: int = 0, views: int = 1) -> list[int]:
    """A point of each of T equal segments: floor(i n / T + (view + 1/2) n / (views T)); one view takes the centres."""
    return [(2 * i * views + 2 * view + 1) * n // (2 * views * frames) for i in range(frames)]


def tsn_train(n: int, frames: int, rng: Generator | None) -> list[int]:
    """One random frame of each of T segments of n // T frames; the n mod T frames behind them are never drawn.

    A video shorter than T has nothing to draw: round(i n / T), half to even, as in the official code.
    """
    length = n // frames
    if length == 0:
        return [min(round(i * n / frames), n - 1) for i in range(frames)]
    drawn = torch.randint(length, (frames,), generator=rng).tolist()
    return [i * length + k for i, k in enumerate(drawn)]


def ez_clip_test(n: int, frames: int) -> list[int]:
    """EZ-CLIP's centres, which differ from ``tsn_test`` by rounding; its files count from 1, this from 0."""
    if n <= frames:
        return [i * n // frames for i in range(frames)]
    return [int(i * n / frames + (n / frames - 1) / 2) for i in range(frames)]


def dense(
    n: int, frames: int, *, stride: int, rng: Generator | None = None, view: int = 0, views: int = 1
) -> list[int]:
    """T frames ``stride`` apart (SlowFast, FROSTER, M2-CLIP): a random start in training, evenly spaced ones in a test.

    One view is the middle of the video. The last frame is repeated where the window reaches beyond the end.
    """
    room = max(n - ((frames - 1) * stride + 1), 0)
    if rng is not None:
        start = int(torch.randint(room + 1, (), generator=rng))
    else:
        start = room // 2 if views == 1 else room * view // (views - 1)
    return [min(start + i * stride, n - 1) for i in range(frames)]


def uniform(n: int, frames: int) -> list[int]:
    """Middles of T intervals between rounded borders of the span n - 1 (Something-Something V2)."""
    span = (n - 1) / frames
    return [(round(span * i) + round(span * (i + 1))) // 2 for i in range(frames)]


def dist_segments(n: int, frames: int, *, rng: Generator | None = None, view: int = 0, views: int = 1) -> list[int]:
    """DiST: a random point of each of T segments, in a test the share (view + 1) / views of each, rounded.

    The last view sits on the segments' ends; one view therefore takes ends, not centres.
    """
    share = torch.rand(frames, generator=rng).tolist() if rng is not None else [(view + 1) / views] * frames
    return [min(max(round((i + s) * n / frames), 0), n - 1) for i, s in enumerate(share)]


def per_second(n: int, frames: int, *, fps: float) -> list[int]:
    """TempMe: one frame per second, thinned evenly when there are more than T; evenly over the video when fewer.

    Deviation: rates below one frame in two seconds take every frame, where the official stride becomes 0 and fails.
    """
    if not math.isfinite(fps) or fps <= 0:
        raise InputError(f"the video's frame rate is {fps}; choose a rule that needs none, such as tsn")
    at = list(range(0, n, max(round(fps), 1)))
    if len(at) == frames:
        return at
    if len(at) > frames:
        return [at[k] for k in _spread(len(at), frames)]
    return _spread(n, frames)


def _spread(n: int, count: int) -> list[int]:
    """``count`` whole numbers from 0 to n - 1, evenly spaced and cut, as numpy's linspace cast to int."""
    return [0] if count == 1 else [int((n - 1) * i / (count - 1)) for i in range(count)]


def prompt_switch(n: int, frames: int, *, rng: Generator | None = None, prompts: int = 6) -> list[int]:
    """Prompt Switch: k rounds over ``prompts`` intervals, ``frames`` = k prompts; round j is j + 1 of k + 1 steps in.

    The order is round after round, not that of time. In training a random point per interval of one round.
    """
    if frames % prompts:
        raise InputError(f"prompt-switch takes a multiple of {prompts} frames, got {frames}")
    rounds, found = frames // prompts, list[int]()
    for j in range(rounds):
        for i in range(prompts):
            low, high = i * n / prompts, (i + 1) * n / prompts
            if rng is not None:
                ahead = (high - low) * float(torch.rand((), generator=rng))
            else:
                ahead = (j + 1) * ((high - low) // (rounds + 1))
            found.append(min(int(low + ahead), n - 1))
    return found
