"""``winoground:DIR`` and its three scores, against the definitions in the paper applied one example at a time."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from clipgraft.data.base import BadSample, Pair, PairSource
from clipgraft.errors import InputError
from clipgraft.evaluation import evaluate, records, statistics
from clipgraft.evaluation.pairs import Pairs
from clipgraft.testing.tiny import tiny_clip
from clipgraft_evaluation.winoground import WinogroundScore, open_winoground

TAGS = ("Object", "Relation", "Both")


def examples(n: int = 7) -> list[dict[str, Any]]:
    return [
        {
            "id": k,
            "image_0": f"ex_{k}_img_0",
            "image_1": f"ex_{k}_img_1",
            "caption_0": f"a red cat {k} left of a blue dog",
            "caption_1": f"a blue dog {k} left of a red cat",
            "tag": f"Noun, {k % 2}",
            "secondary_tag": "",
            "num_main_preds": 1,
            "collapsed_tag": TAGS[k % 3],
        }
        for k in range(n)
    ]


def write(root: Path, entries: Sequence[Any], *, inside: str = "") -> str:
    """examples.jsonl and images/ as the hub has them, in ``inside``."""
    folder = root / inside
    (folder / "images").mkdir(parents=True, exist_ok=True)
    (folder / "examples.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries), "utf-8")
    for name in (entry[f"image_{i}"] for entry in entries for i in (0, 1)):
        Image.frombytes("RGB", (20, 24), random.Random(name).randbytes(1440)).save(folder / "images" / f"{name}.png")
    return str(root)


class Given:
    """Features from given tensors: images (n, 2, D) and {text: (D,)}."""

    def __init__(self, pairs: Sequence[Pair], images: Tensor, texts: dict[str, Tensor]) -> None:
        self._pairs, self._images, self._texts = list(pairs), images, texts

    def pairs(self, source: Any) -> list[Pair]:
        return self._pairs

    def pair_images(self, source: Any) -> tuple[Tensor, Tensor]:
        return self._images[:, 0], self._images[:, 1]

    def texts(self, texts: Sequence[str]) -> Tensor:
        return torch.stack([self._texts[text] for text in texts])


class Named:
    patterns = ("p", "q", "absent")
    name = fingerprint = "given"


def given(n: int, *, seed: int = 0, dim: int = 3) -> tuple[Given, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    images, texts = F.normalize(torch.randn(2, n, 2, dim, generator=rng), dim=-1)
    gone = torch.empty(0)
    pairs = [Pair(f"{k}", (gone, gone), (f"{k} zero", f"{k} one"), "pq"[k % 2]) for k in range(n)]
    named = {text: texts[k, i] for k, pair in enumerate(pairs) for i, text in enumerate(pair.texts)}
    return Given(pairs, images, named), images, texts


def refused(path: str | Path, **settings: Any) -> str:
    with pytest.raises(InputError) as error:
        open_winoground(path=str(path), **settings)
    assert "\n" not in str(error.value) and str(error.value).startswith(f"winoground:{path}")
    return str(error.value)


@pytest.mark.parametrize("inside", ["", "data"])
def test_the_published_layout(tmp_path: Path, inside: str) -> None:
    source = open_winoground(path=write(tmp_path, examples(), inside=inside))
    assert isinstance(source, PairSource) and len(source) == 7 and source.patterns == TAGS
    pair = source[3]
    assert (pair.id, pair.pattern) == ("3", "Object")
    assert pair.texts == ("a red cat 3 left of a blue dog", "a blue dog 3 left of a red cat")
    with Image.open(tmp_path / inside / "images" / "ex_3_img_1.png") as expected:
        assert pair.images[1].tobytes() == expected.tobytes()
    assert open_winoground(path=str(tmp_path), pattern="tag").patterns == ("Noun, 0", "Noun, 1")


def test_scores_equal_the_definitions() -> None:
    features, images, texts = given(60)
    found = WinogroundScore()(features, Named())
    rows = []
    for k in range(60):
        s = {(c, i): float(texts[k, c].double() @ images[k, i].double()) for c in (0, 1) for i in (0, 1)}
        text = s[0, 0] > s[1, 0] and s[1, 1] > s[0, 1]
        image = s[0, 0] > s[0, 1] and s[1, 1] > s[1, 0]
        rows.append((text, image, text and image))
        assert found.samples[k]["similarities"] == pytest.approx([s[0, 0], s[0, 1], s[1, 0], s[1, 1]])
        assert (found.samples[k]["margin"] > 0) == found.samples[k]["correct"] == (text and image)
    assert {True, False} == {row[0] for row in rows} == {row[1] for row in rows} == {row[2] for row in rows}
    for column, score in enumerate(("text", "image", "group")):
        assert found.counts[score] == (sum(row[column] for row in rows), 60)
        for start, pattern in enumerate("pq"):
            own = [row[column] for row in rows[start::2]]
            assert found.metrics[f"{pattern}/{score}"] == sum(own) / len(own)
    assert not any("absent" in name for name in found.metrics) and len(found.metrics) == 9
    assert found.statistics.keys() == found.metrics.keys()
    for name, statistic in found.statistics.items():
        assert statistics.value(statistic, found.samples) == pytest.approx(found.metrics[name])


def test_the_image_score_is_the_score_of_pairs() -> None:
    features, *_ = given(200, seed=1)
    assert WinogroundScore()(features, Named()).counts["image"] == Pairs()(features, Named()).counts["total"]


def test_ties_are_wrong() -> None:
    features, images, texts = given(20, seed=2)
    same_caption = {text: texts[int(text.split()[0]), 0] for text in features._texts}
    found = WinogroundScore()(Given(features._pairs, images, same_caption), Named())
    assert found.metrics["text"] == found.metrics["image"] == found.metrics["group"] == 0
    found = WinogroundScore()(Given(features._pairs, images[:, :1].expand(-1, 2, -1), features._texts), Named())
    assert found.metrics["text"] == found.metrics["image"] == 0


def test_chance_is_a_quarter_a_quarter_and_a_sixth() -> None:
    metrics = WinogroundScore()(given(6000, seed=3, dim=64)[0], Named()).metrics
    assert [round(metrics[name], 2) for name in ("text", "image")] == pytest.approx([0.25, 0.25], abs=0.021)
    assert metrics["group"] == pytest.approx(1 / 6, abs=0.02)


def test_batches_do_not_matter_and_records_come_back(tmp_path: Path) -> None:
    encoder, ref = tiny_clip(), f"winoground:{write(tmp_path, examples())}"
    found = [evaluate(encoder, ["winoground"], default_data=ref, batch_size=size) for size in (1, 3, 256)]
    one, *others = (next(iter(f.values())) for f in found)
    for other in others:
        assert other.metrics == one.metrics
        for a, b in zip(one.samples, other.samples, strict=True):
            assert a["similarities"] == pytest.approx(b["similarities"], abs=1e-6)
    records.save(tmp_path / "out", found[0])
    back = next(iter(records.read(tmp_path / "out").values()))
    assert {name: statistics.value(s, back.samples) for name, s in back.statistics.items()} == pytest.approx(
        one.metrics
    )
    assert one.intervals.keys() == one.metrics.keys()


def test_a_missing_image_is_a_bad_sample(tmp_path: Path) -> None:
    path = write(tmp_path, examples())
    (tmp_path / "images" / "ex_2_img_1.png").unlink()
    with pytest.raises(BadSample, match=r"^2: ex_2_img_1\.png: missing file$"):
        open_winoground(path=path)[2]
    found = evaluate(tiny_clip(), ["winoground"], default_data=f"winoground:{path}")["evaluation/winoground"]
    assert found.metrics["skipped"] == 1 and found.counts["group"][1] == 6


def test_every_mistake_is_one_line(tmp_path: Path) -> None:
    assert "no such folder" in refused(tmp_path / "nowhere")
    path = write(tmp_path, examples())
    file = tmp_path / "examples.jsonl"

    def changed(**values: Any) -> str:
        entry = {k: v for k, v in (examples()[0] | values).items() if v != "gone"}
        file.write_text(json.dumps(examples()[1]) + "\n" + json.dumps(entry) + "\n", "utf-8")
        return refused(path)

    assert "examples.jsonl entry 2 has no text 'caption_1' but None" in changed(caption_1="gone")
    assert "entry 2 has no text 'caption_0' but ''" in changed(caption_0="")
    assert "entry 2 has no text 'image_0' but 3" in changed(image_0=3)
    assert "entry 2 has no text 'collapsed_tag'" in changed(collapsed_tag="gone")
    assert "entry 2 has no id" in changed(id="gone")
    assert "the id 1 stands there twice" in changed(id=1)
    for text in ("", "[]\n", "3\n"):
        file.write_text(text, "utf-8")
        assert "no list of objects" in refused(path)
    file.write_text('{"id": 1\n', "utf-8")
    assert "examples.jsonl is no JSON" in refused(path)
    file.write_bytes(b'{"id": "\xff"}\n')
    assert "not UTF-8 at byte 8" in refused(path)
    write(tmp_path, examples())
    (tmp_path / "images").rename(tmp_path / "pictures")
    assert "no folder images beside examples.jsonl" in refused(path)
    file.unlink()
    assert "examples.jsonl is missing" in refused(path)


def test_single_images_are_refused(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(InputError, match="minimal pairs"):
        evaluate(tiny_clip(), ["winoground"], default_data=f"folder:{tmp_path}")
