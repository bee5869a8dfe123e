"""From video files to an export, for every recipe: it trains, exports, is opened again and can be resumed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from clipgraft.checkpoint import write_export
from clipgraft.errors import InputError, Interrupted
from clipgraft.execution import run_recipe
from clipgraft.files import tensors_digest
from clipgraft.registry import current
from clipgraft.testing.tiny import tiny_clip
from clipgraft_video.heads import Mean
from clipgraft_video.model import open_video_model, stored_head
from clipgraft_video.xclip.head import XClipHead

WORDS = ("cat", "dog")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, write_video: Callable[..., Path]) -> Path:
    """A tiny CLIP, videos of two classes, and a list with captions."""
    root, rows = tmp_path_factory.mktemp("video-runs"), ["video,caption"]
    write_export(tiny_clip(width=64, embed=64, depth=3), root / "clip")
    for word in WORDS:
        (root / "videos" / word).mkdir(parents=True)
        for k in range(3):
            write_video(root / "videos" / word / f"{k}.mp4", 10)
            rows.append(f"{word}/{k}.mp4,a {word}")
    (root / "videos.csv").write_text("\n".join(rows))
    return root


def settings(place: Path, recipe: str) -> dict[str, object]:
    given: dict[str, object] = {
        "model.from": str(place / "clip"),
        "data.from": f"video:{place}/videos?frames=4&size=32",
        "train.steps": 4,
        "train.batch_size": 2,
        "train.lr": 1e-3,
        "train.warmup": 0,
        "evaluate.retention": "none",
        "evaluate.on": ["video/classification"],
        "evaluate.data": f"video:{place}/videos?frames=4&size=32",
    }
    if recipe in ("x-clip", "ez-clip"):
        given["method.frames"] = 4
    if recipe == "dist":
        given["method"] = {"frames": 4, "width": 64, "temporal_width": 8, "rounds": 1}
    if recipe in ("tempme", "prompt-switch"):
        method = {"joins": [2, 2], "after": 0} if recipe == "tempme" else {"prompts": 2}
        given |= {
            "method": {"frames": 4, **method},
            "data.from": f"video:{place}/videos.csv?root={place}/videos&frames=4&size=32",
            "evaluate.on": ["video/text-retrieval"],
            "evaluate.data": f"video:{place}/videos.csv?root={place}/videos&frames=4&size=32",
        }
    return given


@pytest.mark.parametrize("recipe", ["vifi-clip", "x-clip", "ez-clip", "froster", "tempme", "dist", "prompt-switch"])
def test_a_recipe_from_files_to_an_export(place: Path, tmp_path: Path, recipe: str) -> None:
    result = run_recipe(f"video/{recipe}", overrides=settings(place, recipe), out=tmp_path / "run")
    assert result.status == "done" and result.metrics
    model = open_video_model(str(tmp_path / "run"), registry=current())
    x = torch.rand(1, 4, 3, 32, 32)
    assert torch.isfinite(model(x).pooled).all()
    grafts = [g.name for g in model.encoder.data.grafts]
    assert grafts == {"vifi-clip": [], "froster": ["video/neighbours"]}.get(recipe, [f"video/{recipe}"])
    assert (tmp_path / "run/export/open_clip_config.json").exists() == (recipe == "vifi-clip")
    assert isinstance(model.pooling, XClipHead) == (recipe == "x-clip")


def test_a_run_is_measured_with_the_head_that_it_trained(place: Path, tmp_path: Path) -> None:
    given = settings(place, "froster") | {"pool": "mean_logits"}
    done = run_recipe("video/froster", overrides=given, out=tmp_path / "run")
    left = tmp_path / "run/stages/00-videos/result/encoder"
    for folder in (left, tmp_path / "run/export"):
        head = stored_head(folder, registry=current())
        assert isinstance(head, Mean) and head.pool == "mean_logits"
    assert done.metrics and stored_head(place / "clip", registry=current()) is None


def test_a_stopped_run_ends_as_if_it_had_not_been_stopped(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from clipgraft_video.stage import VideoStage

    given = settings(place, "vifi-clip") | {"evaluate.on": [], "mixing.mixup": 0.8}
    whole = run_recipe("vifi-clip", overrides=given, out=tmp_path / "whole")
    run_of: list[object] = []
    after = VideoStage.after_update

    def stop(self: VideoStage, step: int) -> None:
        after(self, step)
        if step == 1:
            import os
            import signal

            os.kill(os.getpid(), signal.SIGINT)
            run_of.append(step)

    monkeypatch.setattr(VideoStage, "after_update", stop)
    with pytest.raises(Interrupted):
        run_recipe("vifi-clip", overrides=given, out=tmp_path / "parts")
    monkeypatch.setattr(VideoStage, "after_update", after)
    assert run_of == [1]
    parts = run_recipe(resume=tmp_path / "parts")
    digests = [
        tensors_digest(open_video_model(str(r.run), registry=current()).encoder.state_dict()) for r in (whole, parts)
    ]
    assert digests[0] == digests[1]


@pytest.mark.parametrize(
    ("recipe", "change", "message"),
    [
        ("vifi-clip", {"data.from": "video:{}/videos?size=16"}, "write size=32 into data.from"),
        ("x-clip", {"method.frames": 8}, "the method has frames=8, data.from gives 4"),
        ("x-clip", {"objective": "captions"}, "set objective to classes"),
        ("tempme", {"data.from": "video:{}/videos?frames=4&size=32"}, "has no caption"),
        ("vifi-clip", {"data.from": "video:{}/videos.csv?root={}/videos&size=32"}, "names 0 classes"),
        ("dist", {"method.frames": 8}, "the method has frames=8, data.from gives 4"),
        ("prompt-switch", {"method.frames": 6}, "no multiple of method.frames=6"),
        ("prompt-switch", {"objective": "classes"}, "the objective classes has none; set caption=0"),
    ],
)
def test_what_can_be_seen_before_any_work_is_said(
    place: Path, tmp_path: Path, recipe: str, change: dict[str, object], message: str
) -> None:
    change = {k: v.replace("{}", str(place)) if isinstance(v, str) else v for k, v in change.items()}
    with pytest.raises(InputError, match=message):
        run_recipe(f"video/{recipe}", overrides=settings(place, recipe) | change, out=tmp_path / "run", dry_run=True)
