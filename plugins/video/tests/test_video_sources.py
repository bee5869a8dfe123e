"""Videos as samples: from folders and lists, in tests and in training, with broken files counted."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import Tensor

from clipgraft.data import open_source
from clipgraft.data.base import BadSample
from clipgraft.data.loader import TrainLoader
from clipgraft.encoders.base import Preprocess
from clipgraft.errors import InputError
from clipgraft_video.frame_rules import tsn_test
from clipgraft_video.sources import Videos

PREPROCESS = Preprocess(size=(32, 32), mean=(0.5,) * 3, std=(0.5,) * 3)


def opened(ref: str) -> Videos:
    found = open_source(ref)
    assert isinstance(found, Videos)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, write_video: Callable[..., Path]) -> Path:
    """Two classes with three videos each, one of them a path with blanks."""
    root = tmp_path_factory.mktemp("videos")
    for name in ("run fast", "walk"):
        (root / name).mkdir()
        for k in range(3):
            write_video(root / name / f"clip {k}.mp4", 30 + k)
    return root


def test_a_folder_per_class(folder: Path) -> None:
    source = opened(f"video:{folder}?frames=4&size=32")
    assert list(source.classes) == ["run fast", "walk"] and len(source) == 6
    sample = source[4]
    assert (sample.id, sample.label) == ("walk/clip 1.mp4", 1)
    assert sample.extra["frames"].shape == (4, 3, 32, 32) and torch.equal(sample.image, sample.extra["frames"][2])
    assert source.entry(4).label == 1 and source.content(4)[4:8] == b"ftyp"


def test_the_frames_are_those_of_the_rule(folder: Path, numbers: Callable[[Tensor], list[int]]) -> None:
    from clipgraft_video.media import frames_of

    source = opened(f"video:{folder}?frames=4&size=32")
    at = tsn_test(31, 4)
    assert numbers(frames_of(source.files[1].path, at).pixels) == at
    first, last, again = (source.view(1, view=k, views=2, crops=3) for k in (0, 1, 0))
    assert torch.equal(first, again) and not torch.equal(first, last)
    left, right = source.view(1, crop=0, crops=3), source.view(1, crop=1, crops=3)
    assert left.shape == right.shape == (4, 3, 32, 32) and not torch.equal(left, right)


def test_training_draws_frames_and_crops_by_its_generator(folder: Path) -> None:
    source = opened(f"video:{folder}?frames=4&size=32")
    rngs = [torch.Generator().manual_seed(k) for k in (0, 1, 0)]
    first, other, again = (source.varied(0, rng).extra["frames"] for rng in rngs)
    assert torch.equal(first, again) and not torch.equal(first, other) and first.dtype == torch.uint8


def test_a_mirrored_video_has_the_class_of_its_mirror_image(tmp_path: Path, write_video: Callable[..., Path]) -> None:
    for name in ("move left", "move right", "stand"):
        (tmp_path / name).mkdir()
        write_video(tmp_path / name / "a.mp4", 8)
    plain, swap = (opened(f"video:{tmp_path}?frames=2&size=32&flip={flip}") for flip in ("off", "swap"))
    assert plain.augment.flip == 0.0 and swap.augment.flip == 0.5
    for index, mirror in ((0, 1), (1, 0), (2, 2)):
        labels = {swap.varied(index, torch.Generator().manual_seed(k)).label for k in range(12)}
        assert labels == {index, mirror}
        assert swap[index].label == index  # a test mirrors nothing
    with pytest.raises(InputError, match="flip=swap exchanges classes, and it names none"):
        opened(f"video:{tmp_path / 'stand'}?flip=swap")


def test_lists_with_roots_classes_shots_and_halves(folder: Path, tmp_path: Path) -> None:
    rows = [f"{name}/clip {k}.mp4 {label}" for label, name in ((7, "run fast"), (9, "walk")) for k in range(3)]
    (tmp_path / "list.txt").write_text("\n".join(rows))
    (tmp_path / "classes.csv").write_text("id,name\n7,running\n8,jumping\n9,walking\n")
    ref = f"video:{tmp_path}/list.txt?root={folder}&classes={tmp_path}/classes.csv&size=32"
    source = opened(ref)
    assert list(source.classes) == ["running", "jumping", "walking"] and source.files[5].label == 2
    few = opened(f"{ref}&shots=2")
    assert [f.label for f in few.files] == [0, 0, 2, 2] and few.fingerprint != source.fingerprint
    novel = opened(f"{ref}&half=novel")
    assert list(novel.classes) == ["walking"] and [f.label for f in novel.files] == [0, 0, 0]


def test_labels_that_match_no_class_are_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("walk/clip 0.mp4 3\n")
    (tmp_path / "classes.csv").write_text("id,name\n0,a\n1,b\n")
    with pytest.raises(InputError, match="the label 3 is none of the 2 classes"):
        open_source(f"video:{tmp_path}/list.txt?root={folder}&classes={tmp_path}/classes.csv")
    with pytest.raises(InputError, match="no such folder or list"):
        open_source(f"video:{tmp_path}/absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no video found"):
        open_source(f"video:{tmp_path}/empty")


def test_a_path_that_leaves_the_root_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("../secret.mp4 0\nwalk/absent.mp4 1\n")
    source = opened(f"video:{tmp_path}/list.txt?root={folder}")
    with pytest.raises(BadSample, match="leaves the data folder"):
        source[0]
    with pytest.raises(BadSample, match="missing file"):
        source[1]


def test_broken_files_are_counted_and_replaced_in_workers(tmp_path: Path, write_video: Callable[..., Path]) -> None:
    for k in range(7):
        write_video(tmp_path / f"{k}.mp4", 12)
    (tmp_path / "7.mp4").write_bytes(b"broken")
    source = opened(f"video:{tmp_path}?frames=2&size=32")
    options = {"preprocess": PREPROCESS, "batch_size": 4, "seed": 0, "crop": None, "max_bad": 0.2}
    here, beside = (TrainLoader(source, workers=w, **options) for w in (0, 2))  # type: ignore[arg-type]
    for one, two in islice(zip(here.iterate(), beside.iterate(), strict=False), 4):
        assert one.ids == two.ids and torch.equal(one.extra["frames"], two.extra["frames"])
    assert here.bad.count == beside.bad.count == 1 and "7.mp4" in str(here.bad)
    with pytest.raises(InputError, match="1 of 8 samples can't be read"):
        list(islice(TrainLoader(source, **{**options, "max_bad": 0.0}).iterate(), 4))  # type: ignore[arg-type]


def test_a_damaged_tail_is_bounded(tmp_path: Path, write_video: Callable[..., Path]) -> None:
    whole = write_video(tmp_path / "whole.avi", 60, codec="mpeg4")
    folder = tmp_path / "cut"
    folder.mkdir()
    (folder / "a.avi").write_bytes(whole.read_bytes()[: whole.stat().st_size * 4 // 5])
    assert opened(f"video:{folder}?size=32&rule=uniform&frames=6")[0].extra["frames"].shape[0] == 6


def test_shorter_videos_than_clips_repeat_frames(tmp_path: Path, write_video: Callable[..., Path]) -> None:
    write_video(tmp_path / "short.mp4", 3)
    assert opened(f"video:{tmp_path}?frames=8&size=32")[0].extra["frames"].shape[0] == 8


@pytest.fixture
def msrvtt(tmp_path: Path, write_video: Callable[..., Path]) -> Path:
    """Six videos in MSR-VTT's layout."""
    (tmp_path / "videos").mkdir()
    for k in range(6):
        write_video(tmp_path / "videos" / f"video{k}.mp4", 8)
    sentences = [
        {"video_id": f"video{k}", "caption": f"caption {k} {j}", "sen_id": j} for k in range(6) for j in (0, 1)
    ]
    (tmp_path / "MSRVTT_data.json").write_text(json.dumps({"videos": [], "sentences": sentences}))
    (tmp_path / "MSRVTT_train.9k.csv").write_text("video_id\n" + "\n".join(f"video{k}" for k in range(4)))
    rows = "\n".join(f"ret{k},msr{k},video{k},one sentence {k}" for k in (4, 5))
    (tmp_path / "MSRVTT_JSFUSION_test.csv").write_text("key,vid_key,video_id,sentence\n" + rows)
    return tmp_path


def test_msrvtt_in_its_published_layout(msrvtt: Path) -> None:
    test = opened(f"msrvtt:{msrvtt}?size=32&frames=2")
    assert [f.captions for f in test.files] == [("one sentence 4",), ("one sentence 5",)]
    assert test[1].extra["frames"].shape == (2, 3, 32, 32)
    assert test.augment.flip == 0.0  # a caption may say left
    assert opened(f"msrvtt:{msrvtt}?flip=on").augment.flip == 0.5
    train = opened(f"msrvtt:{msrvtt}?split=train-9k&held_out=1")
    tune = opened(f"msrvtt:{msrvtt}?split=train-9k&held_out=1&tune=true")
    assert [f.id for f in train.files] == ["video0", "video1", "video2"] and [f.id for f in tune.files] == ["video3"]
    assert train.files[0].captions == ("caption 0 0", "caption 0 1")


def test_msrvtt_says_what_is_missing(msrvtt: Path) -> None:
    with pytest.raises(InputError, match=r"no MSRVTT_train\.7k\.csv"):
        open_source(f"msrvtt:{msrvtt}?split=train-7k")
    with pytest.raises(InputError, match="the test is not chosen on"):
        open_source(f"msrvtt:{msrvtt}?tune=true")
    (msrvtt / "MSRVTT_data.json").write_text("{}")
    with pytest.raises(InputError, match="is damaged"):
        open_source(f"msrvtt:{msrvtt}?split=train-9k")
