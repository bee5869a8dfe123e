"""``mmvp:DIR``: the published layout in its three spellings, and one line for everything that is wrong with it."""

from __future__ import annotations

import csv
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image

from clipgraft.data import open_source
from clipgraft.data.base import BadSample, PairSource
from clipgraft.errors import InputError
from clipgraft.evaluation import evaluate, statistics
from clipgraft.testing.tiny import tiny_clip
from clipgraft_evaluation.mmvp import IMAGE_FOLDERS, open_mmvp

PATTERNS = ("Orientation", "State", "Camera Perspective")
Row = tuple[int, str, str]


def rows(per_pattern: int = 2) -> list[Row]:
    found: list[Row] = []
    for pattern in PATTERNS:
        for _ in range(2 * per_pattern):
            number = len(found) + 1
            found.append((number, pattern, f"a {'red' if number % 2 else 'blue'} square number {number}"))
    return found


def write(root: Path, table: Sequence[Row], *, folder: str = IMAGE_FOLDERS[0], space: str = " ") -> str:
    """Questions.csv and one random image per row; the path."""
    root.mkdir(parents=True, exist_ok=True)
    with (root / "Questions.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("Question ID", "Type", "Statement"), *table])
    for number, pattern, _ in table:
        image = root / folder / pattern.replace(" ", space) / f"{number}.jpg"
        image.parent.mkdir(parents=True, exist_ok=True)
        Image.frombytes("RGB", (24, 20), random.Random(number).randbytes(24 * 20 * 3)).save(image)
    return str(root)


def refused(path: str | Path, **settings: str) -> str:
    with pytest.raises(InputError) as error:
        open_mmvp(path=str(path), **settings)
    assert "\n" not in str(error.value) and str(error.value).startswith(f"mmvp:{path}")
    return str(error.value)


@pytest.mark.parametrize("folder", IMAGE_FOLDERS)
@pytest.mark.parametrize("space", [" ", "_"])
def test_three_spellings(tmp_path: Path, folder: str, space: str) -> None:
    source = open_mmvp(path=write(tmp_path, rows(), folder=folder, space=space))
    assert isinstance(source, PairSource) and len(source) == 6 and source.patterns == PATTERNS
    pair = source[4]
    assert (pair.id, pair.pattern) == ("9-10", "Camera Perspective")
    assert pair.texts == ("a photo of a red square number 9", "a photo of a blue square number 10")
    for image, number in zip(pair.images, (9, 10), strict=True):
        with Image.open(tmp_path / folder / f"Camera{space}Perspective" / f"{number}.jpg") as expected:
            assert image.tobytes() == expected.tobytes()


def test_opened_by_its_scheme_and_measured_by_pairs(tmp_path: Path) -> None:
    encoder, ref = tiny_clip(), f"mmvp:{write(tmp_path, rows())}"
    found = evaluate(encoder, ["core/pairs"], default_data=ref)["core/pairs"]
    plain = open_source(ref + "?prompt='{}'")
    assert plain[0].texts == ("a red square number 1", "a blue square number 2")
    expected, source = [], open_source(ref)
    with torch.no_grad():
        for pair in (source[k] for k in range(len(source))):
            from clipgraft.data.transforms import evaluation_transform

            pixels = torch.stack([evaluation_transform(encoder.preprocess)(image) for image in pair.images])
            image, text = encoder(encoder.preprocess.normalize(pixels), encoder.tokenizer(pair.texts))
            scores = text.unit() @ image.unit().T
            expected.append(bool(scores[0, 0] > scores[0, 1] and scores[1, 1] > scores[1, 0]))
    assert [row["correct"] for row in found.samples] == expected and len(expected) == 6


def test_order_of_rows_does_not_matter(tmp_path: Path) -> None:
    """Fact E3: the pairs, their ids and their patterns follow from ids and types."""
    table = rows()
    plain = open_mmvp(path=write(tmp_path / "a", table))
    random.Random(0).shuffle(table)
    mixed = open_mmvp(path=write(tmp_path / "b", table))
    assert plain.rows == mixed.rows
    for k in range(len(plain)):
        assert plain[k].images[0].tobytes() == mixed[k].images[0].tobytes()


def test_odd_tables(tmp_path: Path) -> None:
    """A byte order mark, Windows line ends, bare commas, quotes, empty lines and space around cells."""
    path = write(tmp_path, [(1, "State", "x"), (2, "State", "y")])
    lines = ["Question ID,Type,Statement", '1,State, "a dog, asleep"', "", "2,State,a dog,awake  ", ",,"]
    (tmp_path / "Questions.csv").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    assert open_mmvp(path=path).rows[0].texts == ("a photo of a dog, asleep", "a photo of a dog, awake")
    (tmp_path / "Questions.csv").write_text(
        'question_id, TYPE ,statement\n2,State,a "red" dog\n1,State,"a ""red"" cat"\n', "utf-8"
    )
    assert open_mmvp(path=path, prompt="{}!").rows[0].texts == ('a "red" cat!', 'a "red" dog!')


def test_the_fingerprint_follows_rows_and_images(tmp_path: Path) -> None:
    path = write(tmp_path, rows())
    seen = {open_mmvp(path=path).fingerprint, open_mmvp(path=path).fingerprint}
    assert len(seen) == 1
    seen.add(open_mmvp(path=path, prompt="{}").fingerprint)
    (tmp_path / IMAGE_FOLDERS[0] / "State" / "5.jpg").unlink()
    seen.add(open_mmvp(path=path).fingerprint)
    assert len(seen) == 3


def test_a_missing_image_is_a_bad_sample(tmp_path: Path) -> None:
    path = write(tmp_path, rows())
    (tmp_path / IMAGE_FOLDERS[0] / "Orientation" / "2.jpg").unlink()
    source = open_mmvp(path=path)
    with pytest.raises(BadSample, match=r"^1-2: 2\.jpg: missing file$"):
        source[0]
    found = evaluate(tiny_clip(), ["core/pairs"], default_data=f"mmvp:{path}")["core/pairs"]
    assert found.metrics["skipped"] == 1 and found.samples[0]["id"] == "3-4"
    for name, statistic in found.statistics.items():
        assert statistics.value(statistic, found.samples) == pytest.approx(found.metrics[name])


def test_images_do_not_leave_the_folder(tmp_path: Path) -> None:
    path = write(tmp_path / "a", [(1, "State", "x"), (2, "State", "y")])
    (tmp_path / "a" / "Questions.csv").write_text("Question ID,Type,Statement\n1,../..,x\n2,../..,y\n", "utf-8")
    with pytest.raises(BadSample, match="leaves the data folder"):
        open_mmvp(path=path)[0]


def test_every_mistake_is_one_line(tmp_path: Path) -> None:
    assert "no such folder" in refused(tmp_path / "nowhere")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "Questions.csv is missing" in refused(empty)
    path, head = write(tmp_path / "a", rows()), "Question ID,Type,Statement\n"
    assert "must hold {} once" in refused(path, prompt="a photo of")
    table = tmp_path / "a" / "Questions.csv"
    for text, line in {
        "Index,Question,Options,Correct Answer\n1,a,b,c\n": "expected the columns Question ID, Type and Statement",
        "": "expected the columns",
        head: "no row below the header",
        f"{head}1,State,x\n": "has no row 2, the other half of the pair 1-2",
        f"{head}2,State,x\n3,State,x\n4,State,x\n": "has no row 1, the other half of the pair 1-2",
        f"{head}1,State,x\n2,Color,y\n": "the pair 1-2 has two types, 'State' and 'Color'",
        f"{head}one,State,x\n": "line 2: the id 'one' is no number",
        f"{head}0,State,x\n": "the id '0' is no number from 1 on",
        f"{head}1,State,x\n1,State,y\n": "line 3: the id 1 stands there twice",
        f"{head}1,State,\n": "an id without type or statement",
        f"{head}1,State\n": "has 2 cells, expected 3",
        f'{head}1,State,"{"x" * 200_000}\n': "not a table that can be read",
    }.items():
        table.write_text(text, "utf-8")
        assert line in refused(path)
    table.write_bytes(head.encode() + b"1,State,caf\xe9\n")
    assert "not UTF-8 at byte" in refused(path)
    write(tmp_path / "a", rows())
    (tmp_path / "a" / IMAGE_FOLDERS[0]).rename(tmp_path / "a" / "pictures")
    assert all(folder in refused(path) for folder in IMAGE_FOLDERS)
