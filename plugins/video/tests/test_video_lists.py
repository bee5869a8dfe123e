"""Lists, class names and protocols in the forms that the papers' repositories ship."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipgraft.errors import InputError
from clipgraft_video.class_lists import read_classes
from clipgraft_video.flips import may_flip, mirrored_places
from clipgraft_video.protocols import few_shot, halves, harmonic_mean, refuse_leak, within
from clipgraft_video.video_lists import Listing, read_list


def listed(tmp_path: Path, name: str, text: str) -> list[Listing]:
    file = tmp_path / name
    file.write_text(text, encoding="utf-8")
    return read_list(file, where=name)


def test_path_and_label_where_the_path_holds_blanks(tmp_path: Path) -> None:
    rows = listed(tmp_path, "a.txt", "brush hair/April 09.avi 0\nsub/(1) x.mp4 12\n\n")
    assert rows == [Listing("brush hair/April 09.avi", "0"), Listing("sub/(1) x.mp4", "12")]


def test_folder_frames_label_and_path_x_label(tmp_path: Path) -> None:
    assert listed(tmp_path, "a.txt", "some dir/v_1 120 3\n") == [Listing("some dir/v_1", "3")]
    assert listed(tmp_path, "b.txt", "74225 37 101\n") == [Listing("74225", "101")]
    assert listed(tmp_path, "c.txt", "clip 2.mp4 7\n") == [Listing("clip 2.mp4", "7")]


def test_csv_with_and_without_a_header(tmp_path: Path) -> None:
    assert listed(tmp_path, "a.csv", "k400/a,b.mp4,5\n") == [Listing("k400/a,b.mp4", "5")]
    assert listed(tmp_path, "a.txt", "k400/a.mp4,5\n") == [Listing("k400/a.mp4", "5")]
    rows = listed(tmp_path, "b.csv", 'video,caption\nx.mp4,"a dog, running"\nx.mp4,a run\ny.mp4,a cat\n')
    assert rows == [Listing("x.mp4", None, ("a dog, running", "a run")), Listing("y.mp4", None, ("a cat",))]


def test_official_splits_without_labels(tmp_path: Path) -> None:
    assert listed(tmp_path, "testlist01.txt", "Archery/v_1.avi\n") == [Listing("Archery/v_1.avi", None)]
    assert listed(tmp_path, "trainlist01.txt", "Archery/v_1.avi 3\n") == [Listing("Archery/v_1.avi", "3")]


def test_json_lists(tmp_path: Path) -> None:
    assert listed(tmp_path, "a.json", '{"a.mp4": 3}') == [Listing("a.mp4", "3")]
    text = json.dumps([{"id": "7", "template": "Pushing [something]"}, {"id": "8", "template": "Opening"}])
    assert listed(tmp_path, "b.json", text) == [Listing("7", "Pushing [something]"), Listing("8", "Opening")]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "no label here\n", "line 1: expected a path and a whole number"),
        ("a.txt", "", "lists no video"),
        ("a.txt", "a.mp4 1\nb.mp4\n", "b.mp4 has no label but others have one"),
        ("a.csv", "video,label\na.mp4,1\na.mp4,2\n", "a.mp4 has two labels"),
        ("a.csv", "video,caption\na.mp4,one, two\n", "quote texts with commas"),
        ("a.csv", "name,x\na.mp4,y\n", "expected path,label"),
        ("a.json", "{", "no JSON"),
        ("a.json", "[1]", "entry 1: expected an object"),
    ],
)
def test_a_list_that_can_not_be_understood_names_the_place(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        listed(tmp_path, name, text)


def test_class_lists_of_every_form(tmp_path: Path) -> None:
    def of(name: str, text: str) -> tuple[tuple[str, ...], dict[str, int], dict[str, str]]:
        (tmp_path / name).write_text(text, encoding="utf-8")
        found = read_classes(tmp_path / name)
        return found.names, dict(found.places), dict(found.descriptions)

    assert of("a.csv", "id,name\n0,brush hair\n1,cartwheel\n")[0] == ("brush hair", "cartwheel")
    assert of("classInd.txt", "1 Archery\n2 Bowling\n")[:2] == (("Archery", "Bowling"), {"1": 0, "2": 1})
    assert of("lines.txt", "run fast\nwalk\n")[0] == ("run fast", "walk")
    assert of("a.json", '{"0": "Run: to move fast", "1": "Walk"}')[::2] == (("Run", "Walk"), {"Run": "to move fast"})
    assert of("b.json", '{"Opening": "1", "Closing": "0"}')[0] == ("Closing", "Opening")
    text = 'SNo,Class Name,description\n0,Run,"Two lines\nof text"\n'
    assert of("c.csv", text)[2] == {"Run": "Two lines\nof text"}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "number,what\n1,2\n", "header id,name"),
        ("a.csv", "id,name\n0,a\n0,b\n", "id 0 is given twice"),
        ("a.txt", "a\na\n", "class a is given twice"),
        ("a.json", "3", "expected"),
        ("a.txt", "", "names no class"),
    ],
)
def test_class_lists_with_errors(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        read_classes(tmp_path / name)
    with pytest.raises(InputError, match="no such file"):
        read_classes(tmp_path / "absent.csv")


def test_few_shots_are_exact_and_stay_the_same() -> None:
    labels = [k % 3 for k in range(30)]
    found = few_shot(labels, 4, seed=1)
    assert sorted(labels[i] for i in found) == [0] * 4 + [1] * 4 + [2] * 4 and found == few_shot(labels, 4, seed=1)
    assert found != few_shot(labels, 4, seed=2)
    with pytest.raises(InputError, match="class 0 has 10 videos, fewer than the 11"):
        few_shot(labels, 11, seed=0)


def test_halves_cut_51_classes_into_26_and_25_and_count_anew() -> None:
    found = halves(51)
    assert (len(found.base), len(found.novel)) == (26, 25) and not set(found.base) & set(found.novel)
    kept, new = within({old: k for k, old in enumerate(found.novel)}, [0, 26, 50, 3, 27])
    assert (kept, new) == ([1, 2, 4], [0, 24, 1])


@given(st.floats(0, 1), st.floats(0, 1))
def test_the_harmonic_mean_lies_below_the_mean(base: float, novel: float) -> None:
    assert min(base, novel) - 1e-9 <= harmonic_mean(base, novel) <= (base + novel) / 2 + 1e-9


def test_a_video_may_not_be_trained_and_tested_on() -> None:
    refuse_leak(["a", "b"], ["c"])
    with pytest.raises(InputError, match="1 of 2 test videos were trained on, such as b"):
        refuse_leak(["a", "b"], ["b", "c"])


def test_classes_that_say_left_or_right_are_not_mirrored() -> None:
    assert may_flip(["brightness", "leftovers", "run"]) and may_flip([])
    assert not may_flip(["run", "pushing something from left to right"])
    assert not may_flip(["TurnLeft"]) and not may_flip(["turn_right"])


def test_a_mirror_exchanges_left_and_right_in_a_class() -> None:
    names = ["push from left to right", "run", "push from right to left", "TurnLeft", "turn_right", "leftovers"]
    assert mirrored_places(names) == [2, 1, 0, 4, 3, 5]
    with pytest.raises(InputError, match="'wave left hand' has no mirror image 'wave right hand'"):
        mirrored_places(["wave left hand", "run"])
