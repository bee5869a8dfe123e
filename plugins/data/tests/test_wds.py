"""Tar shards: what they hold, by index and offset, and every way in which they can be wrong."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from clipgraft.data import open_source
from clipgraft.data.base import BadSample, Source
from clipgraft.data.loader import TrainLoader
from clipgraft.encoders.base import Preprocess
from clipgraft.errors import InputError


def png(value: int, size: tuple[int, int] = (12, 10), kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, (value, 0, 0)).save(out, kind)
    return out.getvalue()


def add(tar: tarfile.TarFile, name: str, content: bytes | str) -> None:
    content = content.encode() if isinstance(content, str) else content
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def shard(path: Path, members: Sequence[tuple[str, bytes | str]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            add(tar, name, content)
    return path


def pairs(first: int, n: int) -> list[tuple[str, bytes | str]]:
    """n samples of a .png and a .txt whose caption is the red of the image."""
    rows = range(first, first + n)
    return [row for i in rows for row in ((f"{i:04d}.png", png(i)), (f"{i:04d}.txt", f"{i} {i}\n"))]


def jsons(values: Sequence[Mapping[str, Any]]) -> list[tuple[str, bytes | str]]:
    return [
        row for i, v in enumerate(values) for row in ((f"{i}.jpg", png(i, kind="JPEG")), (f"{i}.json", json.dumps(v)))
    ]


def line(ref: str) -> str:
    with pytest.raises(InputError) as caught:
        open_source(ref)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- what shards hold --------------------------------------------------------------------------------------------------


def test_samples_come_in_shard_order_and_by_any_index(tmp_path: Path) -> None:
    for k in range(3):
        shard(tmp_path / f"s-{k:03d}.tar", pairs(10 * k, 4))
    source = open_source(f"wds:{tmp_path}/s-{{000..002}}.tar")
    assert isinstance(source, Source) and len(source) == 12
    for i in (11, 0, 5, 11):
        sample, value = source[i], 10 * (i // 4) + i % 4
        assert (sample.id, sample.captions, sample.label) == (
            f"s-{i // 4:03d}/{value:04d}",
            (f"{value} {value}",),
            None,
        )
        assert np.asarray(sample.image)[0, 0, 0] == value and source.content(i) == png(value)
        assert source.entry(i).file == f"{sample.id}.png" and source.entry(i).captions == sample.captions
    assert [open_source(f"wds:{tmp_path}")[i].id for i in range(12)] == [source[i].id for i in range(12)]
    one = open_source(f"wds:{tmp_path}/s-001.tar")
    assert [one[i].id for i in range(4)] == [f"s-001/{v:04d}" for v in range(10, 14)]
    again = pickle.loads(pickle.dumps(source))
    assert again[7].id == source[7].id and again.fingerprint == source.fingerprint


def test_it_reads_what_webdataset_writes_as_webdataset_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import webdataset

    monkeypatch.setattr(webdataset.utils, "enforce_security", False)  # with it webdataset opens no file at all
    path = tmp_path / "w.tar"
    with webdataset.TarWriter(str(path)) as writer:
        for i in range(5):
            writer.write({"__key__": f"part/x{i}", "png": png(i), "json": {"caption": f"c{i}"}, "cls": i % 2})
    source = open_source(f"wds:{path}")
    monkeypatch.setattr(webdataset.utils, "enforce_security", False)
    theirs = list(webdataset.WebDataset(str(path), shardshuffle=False))
    assert [f"w/{row['__key__']}" for row in theirs] == [source[i].id for i in range(5)]
    assert [json.loads(row["json"])["caption"] for row in theirs] == [source[i].captions[0] for i in range(5)]
    assert [int(row["cls"]) for row in theirs] == [source[i].label for i in range(5)]
    assert [row["png"] for row in theirs] == [source.content(i) for i in range(5)]


def test_json_captions_may_be_lists_weighted_and_of_several_fields(tmp_path: Path) -> None:
    rows = [
        {"caption": ["a", "b"], "caption_weights": [3, 1], "negatives": ["not a"], "group": "g"},
        {"raw": "r", "synthetic": ["s", "t"], "caption": "c"},
        {"raw": None, "synthetic": "s", "caption": ""},
        {"caption": ["a", "b"], "caption_weights": [1]},
    ]
    path = shard(tmp_path / "j.tar", jsons(rows))
    plain = open_source(f"wds:{path}")
    first = plain[0]
    assert (first.captions, first.caption_weights) == (("a", "b"), (3.0, 1.0))
    assert (first.negatives, first.group) == (("not a",), "g")
    assert plain[1].captions == ("c",)
    with pytest.raises(BadSample, match="j/2: empty caption"):
        plain[2]
    with pytest.raises(BadSample, match="1 caption_weights for 2 captions"):
        plain[3]
    both = open_source(f"wds:{path}?captions=raw:0.3,synthetic:0.7")
    assert both[1].captions == ("r", "s", "t") and both[1].caption_weights == pytest.approx((0.3, 0.35, 0.35))
    assert both[2].captions == ("s",)
    with pytest.raises(BadSample, match="empty caption"):
        both[0]
    assert both.fingerprint != plain.fingerprint
    assert "names no captions" in line(f"wds:{path}?captions=raw:x")
    assert "all caption weights are zero" in line(f"wds:{path}?captions=raw:0")


def test_classes_are_numbers_or_the_names_beside_the_shards(tmp_path: Path) -> None:
    rows = [row for i in range(4) for row in ((f"{i}.webp", png(i, kind="WEBP")), (f"{i}.cls", str(i % 2 * 2)))]
    path = shard(tmp_path / "test" / "0.tar", rows)
    source = open_source(f"wds:{path}")
    assert [*source.classes] == ["0", "2"] and [source[i].label for i in range(4)] == [0, 1, 0, 1]
    (tmp_path / "classnames.txt").write_text("cat\ndog\nowl\n")
    (tmp_path / "zeroshot_classification_templates.txt").write_text("a {c}.\n")
    named = open_source(f"wds:{path}")
    assert [*named.classes] == ["cat", "dog", "owl"] and [named.entry(i).label for i in range(4)] == [0, 2, 0, 2]
    assert [*named.templates] == ["a {}."] and named.fingerprint != source.fingerprint
    (tmp_path / "classnames.txt").write_text("cat\ndog\n")
    assert "class '2' is none of the 2 in classnames.txt" in line(f"wds:{path}")
    shard(path, [*rows, ("9.webp", png(9))])
    (tmp_path / "classnames.txt").unlink()
    assert "0/9 has no .cls but others have one" in line(f"wds:{path}")


def test_lines_of_a_text_are_captions_when_asked_for(tmp_path: Path) -> None:
    path = shard(tmp_path / "t.tar", [("a.b.c/0.jpg", png(0)), ("a.b.c/0.txt", "one\n\ntwo\n")])
    assert open_source(f"wds:{path}?lines=true")[0].captions == ("one", "two")
    assert open_source(f"wds:{path}")[0].captions == ("one\n\ntwo",)


def test_the_fingerprint_follows_names_sizes_and_times(tmp_path: Path) -> None:
    import os

    path = shard(tmp_path / "a.tar", pairs(0, 2))
    os.utime(path, ns=(10**18, 10**18))
    first = open_source(f"wds:{path}").fingerprint
    assert open_source(f"wds:{path}").fingerprint == first
    os.utime(path, ns=(10**18, 10**18 + 1))
    assert open_source(f"wds:{path}").fingerprint != first


# -- training ----------------------------------------------------------------------------------------------------------


class Numbers:
    """Texts "17 17" to ids."""

    context_length, pad_id = 2, 0

    def __call__(self, texts: Sequence[str]) -> Tensor:
        return torch.tensor([[int(word) for word in text.split()] for text in texts])

    def save(self, folder: str) -> None:
        """Nothing."""


@pytest.mark.parametrize("workers", [0, 2])
def test_training_on_shards_resumes_exactly_whatever_the_workers(tmp_path: Path, workers: int) -> None:
    for k in range(3):
        shard(tmp_path / f"{k}.tar", pairs(8 * k, 8))
    shard(tmp_path / "3.tar", [("0024.png", png(24)[:40]), ("0024.txt", "24 24")])

    def loader(workers: int = 0) -> TrainLoader:
        preprocess = Preprocess(size=(8, 8), mean=(0.5,) * 3, std=(0.5,) * 3)
        source = open_source(f"wds:{tmp_path}")
        settings = {"batch_size": 4, "seed": 2, "max_bad": 0.1, "workers": workers, "tokenizer": Numbers()}
        return TrainLoader(source, preprocess=preprocess, **settings)  # type: ignore[arg-type]

    whole = list(islice(loader().iterate(), 15))
    first = loader(workers)
    begun = list(islice(first.iterate(), 7))
    second = loader(workers)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    rest = list(islice(second.iterate(7), 8))
    for expected, found in zip(whole, [*begun, *rest], strict=True):
        assert found.ids == expected.ids and torch.equal(found.pixels, expected.pixels)
        assert torch.equal(found.text, expected.text)
        assert torch.allclose(found.pixels[:, 0].amax((1, 2)) * 255, found.text[:, 0].float(), atol=0.01)
    assert second.bad.indices == {24} and second.bad.first[0].startswith("3/0024: ")


# -- what is wrong with them -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("member", "kind", "expected"),
    [
        ("../evil.png", tarfile.REGTYPE, "refused, member '../evil.png' leaves the archive"),
        ("a/../../evil.png", tarfile.REGTYPE, "leaves the archive"),
        ("/etc/evil.png", tarfile.REGTYPE, "leaves the archive"),
        ("..\\evil.png", tarfile.REGTYPE, "leaves the archive"),
        ("../folder", tarfile.DIRTYPE, "leaves the archive"),
        ("link.png", tarfile.SYMTYPE, "is no plain file"),
        ("link.png", tarfile.LNKTYPE, "is no plain file"),
        ("device.png", tarfile.CHRTYPE, "is no plain file"),
        ("pipe.png", tarfile.FIFOTYPE, "is no plain file"),
    ],
)
def test_members_that_attack_are_refused(tmp_path: Path, member: str, kind: bytes, expected: str) -> None:
    path = shard(tmp_path / "x.tar", pairs(0, 1))
    with tarfile.open(path, "a") as tar:
        info = tarfile.TarInfo(member)
        info.type, info.linkname = kind, "/etc/passwd"
        tar.addfile(info)
    assert expected in line(f"wds:{path}") and "x.tar" in line(f"wds:{path}")


def test_commands_and_addresses_are_never_opened(tmp_path: Path) -> None:
    import webdataset.utils

    ran = tmp_path / "ran"
    for path in (f"pipe:touch {ran}", "http://example.org/x.tar", f"{tmp_path}/0.tar::pipe:touch {ran}"):
        line(f"wds:{path}")
    assert not ran.exists() and webdataset.utils.enforce_security


def test_pickled_members_stay_bytes(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "ran",))

    evil = pickle.dumps(Evil())
    path = shard(tmp_path / "p.tar", [*pairs(0, 1), ("0000.pyd", evil), ("0000.pth", evil), ("0000.pickle", evil)])
    assert open_source(f"wds:{path}")[0].captions == ("0 0",)
    assert not (tmp_path / "ran").exists()


def test_a_cut_shard_says_how_many_samples_are_whole(tmp_path: Path) -> None:
    path = shard(tmp_path / "cut.tar", pairs(0, 5))
    content = path.read_bytes()
    with tarfile.open(path) as tar:
        members = tar.getmembers()
    inside, header, between = members[6].offset_data + 20, members[6].offset + 100, members[7].offset
    for stop, how in ((inside, "cut off inside 0003.png"), (header, "cut off"), (between, "cut off")):
        path.write_bytes(content[:stop])
        assert f"cut.tar is {how}" in line(f"wds:{path}") and "3 samples before that are whole" in line(f"wds:{path}")
        kept = open_source(f"wds:{path}?truncated=keep")
        assert [kept[i].captions[0] for i in range(len(kept))] == ["0 0", "1 1", "2 2"]
    end = members[-1].offset_data + 512
    path.write_bytes(content[:end])
    assert "it has no end mark" in line(f"wds:{path}") and len(open_source(f"wds:{path}?truncated=keep")) == 5
    broken = bytearray(content)
    broken[members[6].offset : members[6].offset + 512] = b"\7" * 512
    path.write_bytes(broken)
    assert f"damaged at byte {members[6].offset}; 3 samples" in line(f"wds:{path}")


def test_shards_that_do_not_follow_the_format_are_one_clear_line(tmp_path: Path) -> None:
    apart = [("a.png", png(1)), ("b.png", png(2)), ("a.txt", "late")]
    assert "the files of sample 'a' are apart" in line(f"wds:{shard(tmp_path / '1.tar', apart)}")
    twice = [("a.png", png(1)), ("a.PNG", png(2))]
    assert "sample 'a' has two .png files" in line(f"wds:{shard(tmp_path / '2.tar', twice)}")
    texts = [("a.txt", "one"), ("b.txt", "two")]
    assert "2 samples but no image" in line(f"wds:{shard(tmp_path / '3.tar', texts)}")
    two = shard(tmp_path / "4.tar", pairs(0, 2)).read_bytes() * 2
    (tmp_path / "4.tar").write_bytes(two)
    assert "several archives in a row" in line(f"wds:{tmp_path}/4.tar")
    (tmp_path / "5.tar").write_bytes(b"\x1f\x8b no tar at all" * 100)
    assert "is no plain tar file" in line(f"wds:{tmp_path}/5.tar")
    assert f"there is no 7.tar in {tmp_path.name}; 3 shards are named" in line(f"wds:{tmp_path}/{{1,7,2}}.tar")
    assert "names a shard twice" in line(f"wds:{tmp_path}/{{1,1}}.tar")
    (tmp_path / "empty").mkdir()
    assert "no .tar file in this folder" in line(f"wds:{tmp_path}/empty")
    assert "truncated" in line(f"wds:{tmp_path}/1.tar?truncated=maybe")


def test_samples_that_cannot_be_used_are_bad_samples(tmp_path: Path) -> None:
    rows = [*pairs(0, 1), ("1.txt", "alone"), ("2.png", b"<html>"), ("2.txt", "x"), ("3.png", png(3)), ("3.txt", " ")]
    rows += [
        ("4.png", png(4)),
        ("4.txt", b"\xff"),
        ("5.png", png(5)),
        ("5.json", "{"),
        ("6.png", png(6)),
        ("6.json", "[]"),
    ]
    source = open_source(f"wds:{shard(tmp_path / 's.tar', rows)}")
    found = []
    for i in range(1, len(source)):
        with pytest.raises(BadSample) as caught:
            source[i]
        assert caught.value.sample_id == f"s/{i}"
        found.append(caught.value.reason.partition(":")[0])
    assert found == [
        "a caption without an image",
        "not an image that can be read",
        "empty caption",
        "the caption is not UTF-8",
        "the .json member can't be read",
        "the .json member holds no object",
    ]
    big = open_source(f"wds:{tmp_path}/s.tar", max_pixels=100)
    with pytest.raises(BadSample, match=r"exceed data\.max_pixels 100"):
        big[0]


def test_a_shard_that_changes_while_it_is_open_is_noticed(tmp_path: Path) -> None:
    path = shard(tmp_path / "s.tar", pairs(0, 3))
    source = open_source(f"wds:{path}")
    shard(path, pairs(5, 4))
    with pytest.raises(InputError, match=r"s\.tar changed since it was opened"):
        source[0]
