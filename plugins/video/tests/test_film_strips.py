"""Film strips and the attention of messages: what they show is what the model does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from clipgraft.checkpoint import write_export
from clipgraft.errors import ClipgraftError
from clipgraft.execution import run_recipe
from clipgraft.registry import current
from clipgraft.reporting import Section
from clipgraft.rundir import read_run
from clipgraft.testing.tiny import tiny_clip
from clipgraft_video.film_strips import MOMENTS, chosen, film_strips, over_time
from clipgraft_video.model import VideoModel
from clipgraft_video.xclip.attention import heard, message_attention
from clipgraft_video.xclip.graft import MessageBlock, XClipGraft


def model(frames: int = 4) -> VideoModel:
    torch.manual_seed(0)
    return VideoModel(XClipGraft(frames=frames).apply(tiny_clip(width=64, embed=64))).eval()


def clips(n: int = 2, frames: int = 4) -> torch.Tensor:
    return torch.rand(n, frames, 3, 32, 32, generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def test_the_last_moment_is_the_whole_video_and_the_first_a_still() -> None:
    video, texts, clip = model(), torch.randn(3, 64), clips(1)[0]
    moments, scores = over_time(video, clip, lambda seen: video.logits(seen, texts).softmax(-1))
    assert moments == [0, 1, 2, 3] and torch.allclose(scores.sum(-1), torch.ones(4))
    still = clip[[0, 0, 0, 0]]
    for row, frames in ((scores[-1], clip), (scores[0], still)):
        wanted = video.logits(video(frames[None]), texts).softmax(-1)[0]
        assert torch.allclose(row, wanted, atol=1e-5)


def test_long_videos_are_shown_at_eight_moments_the_end_among_them() -> None:
    moments, scores = over_time(model(20), clips(1, 20)[0], lambda video: video.unit())
    assert len(moments) == len(scores) == MOMENTS and moments[-1] == 19 and moments == sorted(set(moments))


def test_videos_made_right_left_wrong_made_wrong_and_left_right_take_turns() -> None:
    was = {"a": False, "b": False, "c": True, "d": True, "e": False, "f": False}
    now = {"a": True, "b": False, "c": False, "d": True, "e": True, "f": True}
    labels = {"a": 0, "b": 0, "c": 0, "d": 0, "e": 0, "f": 1}
    before = {name: {"top1": value} for name, value in was.items()}
    after = {name: {"top1": value, "label": labels[name]} for name, value in now.items()}
    assert chosen(before, after, most=9) == ["a", "b", "c", "d", "f", "e"]
    assert chosen(before, after, most=2) == ["a", "b"]


@torch.no_grad()
def test_attention_is_that_of_the_forward_pass_and_changes_nothing() -> None:
    video, x = model(), clips(3)
    blocks = [m for m in video.encoder.image.modules() if isinstance(m, MessageBlock)]
    for block in blocks:  # nearly uniform attention would hide a mistake
        block.message_attn.in_proj_weight.mul_(6)
    found, plain = heard(video, x), video(x).pooled
    assert found.shape == (len(blocks), 4, 4) and torch.allclose(found.sum(-1), torch.ones(len(blocks), 4).double())
    assert torch.equal(video(x).pooled, plain)
    sent = list[torch.Tensor]()
    handle = blocks[-1].message_ln.register_forward_hook(lambda module, given, output: sent.append(output))
    video(x)
    handle.remove()
    attention = blocks[-1].message_attn
    heads = attention.num_heads
    q, k, _ = (sent[0] @ attention.in_proj_weight.T + attention.in_proj_bias).chunk(3, -1)
    q, k = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q, k))
    wanted = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1).mean((0, 1))
    assert torch.allclose(found[-1].float(), wanted, atol=1e-5) and wanted.std() > 1e-3


@torch.no_grad()
def test_the_first_blocks_messages_hold_no_picture() -> None:
    first = heard(model(), clips(3))[0]
    assert torch.allclose(first, torch.full((4, 4), 0.25).double(), atol=1e-6)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, write_video: Callable[..., Path]) -> Callable[[str], Path]:
    """Runs of recipes on six videos of two classes, made when asked for."""
    root, rows = tmp_path_factory.mktemp("film-strips"), ["video,caption"]
    write_export(tiny_clip(width=64, embed=64), root / "clip")
    for word in ("cat", "dog"):
        (root / "videos" / word).mkdir(parents=True)
        for k in range(3):
            write_video(root / "videos" / word / f"{k}.mp4", 10)
            rows.append(f"{word}/{k}.mp4,a {word} number {k}")
    (root / "videos.csv").write_text("\n".join(rows))

    def run(recipe: str) -> Path:
        path, captions = root / recipe, recipe == "tempme"
        where = f"videos.csv?root={root}/videos&" if captions else "videos?"
        data = f"video:{root}/{where}frames=4&size=32"
        given = {"model.from": str(root / "clip"), "data.from": data, "evaluate.data": data}
        kind = "text-retrieval" if captions else "classification"
        given |= {"evaluate.retention": "none", "evaluate.on": [f"video/{kind}"]}
        method = {"frames": 4, "joins": [2, 2], "after": 0} if captions else {"frames": 4}
        given |= {"method": method, "train.steps": 1, "train.batch_size": 2, "train.warmup": 0}
        if not path.exists():
            run_recipe(f"video/{recipe}", overrides=given, out=path)
        return path

    return run


def test_a_run_of_x_clip_shows_strips_and_who_hears_whom(runs: Callable[[str], Path]) -> None:
    run = read_run(runs("x-clip"))
    (strips,) = film_strips(run, registry=current())
    assert isinstance(strips, Section) and len(strips.figures) == 6
    for figure in strips.figures:
        assert len(figure.pictures) == 4 and {p.tone for p in figure.pictures} <= {"right", "wrong"}
        label = figure.caption.partition(", ")[2].partition(".")[0]
        assert label in ("cat", "dog") and "Before the run the model said" in figure.caption
        assert all((p.tone == "right") == p.caption.startswith(label) for p in figure.pictures)
        assert figure.pictures[1].alt.startswith("frame 2 of 4 of ")
    said = {
        str(row["id"]): ("cat", "dog")[int(row["prediction"])] for row in run.samples("after", "video/classification")
    }
    for figure in strips.figures:  # the last frame's word is what the evaluation recorded
        assert figure.pictures[-1].caption.startswith(said[figure.caption.partition(", ")[0]])
    (attention,) = message_attention(run, registry=current())
    distances, *maps = attention.tables
    assert len(maps) == 2 and all(table.shaded and len(table.rows) == 4 for table in maps)
    assert all(sum(row[1:]) == pytest.approx(100) for table in maps for row in table.rows)  # type: ignore[arg-type]
    assert all(sum(row[1:]) == pytest.approx(100) for row in distances.rows)  # type: ignore[arg-type]


def test_a_run_for_captions_shows_ranks(runs: Callable[[str], Path]) -> None:
    run = read_run(runs("tempme"))
    (strips,) = film_strips(run, registry=current())
    ranks = {picture.caption for figure in strips.figures for picture in figure.pictures}
    assert len(strips.figures) == 6 and ranks <= {f"rank {k} of 6" for k in range(1, 7)}
    assert message_attention(run, registry=current()) == []


def test_other_runs_have_no_strips_and_a_lost_export_is_named(runs: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("model: {from: toyworld/clip}")
    assert film_strips(read_run(tmp_path), registry=current()) == []
    run = runs("x-clip")
    (run / "export").rename(run / "elsewhere")
    try:
        with pytest.raises(ClipgraftError, match="wrote no export"):
            film_strips(read_run(run), registry=current())
    finally:
        (run / "elsewhere").rename(run / "export")
