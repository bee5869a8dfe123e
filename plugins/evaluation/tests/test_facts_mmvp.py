"""What MMVP-VLM's protocol implies, fact by fact, from files on disk to the score."""

from __future__ import annotations

import csv
import random
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from clipgraft.data import open_source
from clipgraft.data.base import BadSample
from clipgraft.data.transforms import evaluation_transform
from clipgraft.encoders.base import DEFAULT_REQUEST, Encoder, ImageEncoder, TextEncoder
from clipgraft.errors import InputError
from clipgraft.evaluation import evaluate
from clipgraft.evaluation.base import Evaluation
from clipgraft.testing.tiny import tiny_clip
from clipgraft.types import FeatureRequest, ImageFeatures, TextFeatures
from clipgraft_evaluation.mmvp import IMAGE_FOLDERS

COLOURS = {"red": (255, 0, 0), "blue": (0, 0, 255)}
Row = tuple[int, str, str, str]
"""Id, type, statement, colour of the image."""


class MeanColour(ImageEncoder):
    """An image's mean colour, standardised: (B, 3)."""

    width = embed_dim = 3
    depth, grid = 1, None

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(3))

    def forward(self, pixels: Tensor, want: FeatureRequest = DEFAULT_REQUEST) -> ImageFeatures:
        """(B, 3, H, W') -> (B, 3)."""
        return ImageFeatures(self.gain * pixels.mean((2, 3)))


class NamedColour(TextEncoder):
    """The colour that a text names, as MeanColour sees a picture of it."""

    width = embed_dim = 3
    context_length, trim_exact = 16, True

    def __init__(self, ids: dict[str, int]) -> None:
        super().__init__()
        self.ids = ids

    def embed(self, tokens: Tensor) -> Tensor:
        """Not needed."""
        raise NotImplementedError

    def forward(
        self, tokens: Tensor, want: FeatureRequest = DEFAULT_REQUEST, *, ids: Tensor | None = None
    ) -> TextFeatures:
        """(B, L) -> (B, 3)."""
        pooled = torch.zeros(len(tokens), 3)
        for word, number in self.ids.items():
            pooled[(tokens == number).any(1)] = torch.tensor(COLOURS[word]) / 127.5 - 1
        return TextFeatures(pooled)


def sees_colours() -> Encoder:
    """A CLIP that is right about colours and knows nothing else."""
    plain = tiny_clip()
    ids = {word: int(plain.tokenizer([word])[0, 1]) for word in COLOURS}
    data = replace(plain.data, preprocess=replace(plain.preprocess, mean=(0.5,) * 3, std=(0.5,) * 3))
    return Encoder(MeanColour(), NamedColour(ids), logit_scale=plain.logit_scale, data=data)


def write(root: Path, table: Sequence[Row], *, folder: str = IMAGE_FOLDERS[0]) -> str:
    """Questions.csv and one picture of a colour per row; the data reference."""
    root.mkdir(parents=True)
    with (root / "Questions.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("Question ID", "Type", "Statement"), *(row[:3] for row in table)])
    for number, pattern, _, colour in table:
        image = root / folder / pattern / f"{number}.jpg"
        image.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 32), COLOURS[colour]).save(image, quality=95)
    return f"mmvp:{root}"


def pair(index: int, pattern: str, *, says: tuple[str, str], shows: tuple[str, str] = ("red", "blue")) -> list[Row]:
    """The rows of the ids 2 index + 1 and 2 index + 2."""
    return [(2 * index + 1 + k, pattern, f"a {says[k]} wall", shows[k]) for k in (0, 1)]


RIGHT, SWAPPED = ("red", "blue"), ("blue", "red")


def fixture() -> list[Row]:
    """18 images: State is always right, Text never, and one Color pair of four is."""
    says = [
        *(("State", RIGHT), ("State", RIGHT)),
        *(("Text", SWAPPED), ("Text", SWAPPED), ("Text", SWAPPED)),
        *(("Color", RIGHT), ("Color", SWAPPED), ("Color", ("red", "red")), ("Color", ("blue", "blue"))),
    ]
    return [row for k, (pattern, said) in enumerate(says) for row in pair(k, pattern, says=said)]


def score(reference: str, encoder: Encoder | None = None) -> Evaluation:
    return evaluate(encoder or sees_colours(), ["core/pairs"], default_data=reference)["core/pairs"]


def test_e1_eighteen_images_score_100_0_and_25(tmp_path: Path) -> None:
    found = score(write(tmp_path / "a", fixture()))
    assert found.counts == {"State": (2, 2), "Text": (0, 3), "Color": (1, 4), "total": (3, 9)}
    assert found.metrics == {
        "State": 1.0,
        "Text": 0.0,
        "Color": 0.25,
        "total": pytest.approx(1 / 3),
        "mean": pytest.approx(1.25 / 3),  # of patterns, which is that of pairs where all patterns are alike in size
    }


def test_e2_a_tie_is_a_wrong_pair(tmp_path: Path) -> None:
    """Two equal images: the official rule takes the second for both texts, ours none; the pair is wrong either way."""
    table = pair(0, "Color", says=RIGHT, shows=("red", "red")) + pair(1, "Color", says=RIGHT)
    found = score(write(tmp_path / "a", table))
    assert [row["correct"] for row in found.samples] == [False, True]
    assert found.samples[0]["margins"] == [0.0, 0.0]


def test_e3_shuffled_rows_give_the_same_score(tmp_path: Path) -> None:
    table = fixture()
    plain = score(write(tmp_path / "a", table))
    random.Random(1).shuffle(table)
    mixed = score(write(tmp_path / "b", table))
    assert (mixed.metrics, mixed.counts) == (plain.metrics, plain.counts)
    assert mixed.samples == plain.samples


def noisy(root: Path, pairs: int = 24) -> str:
    """Pairs of noise that a random CLIP is right about now and then."""
    table = [row for k in range(pairs) for row in pair(k, ("State", "Text")[k % 2], says=RIGHT)]
    reference = write(root, table)
    for number, pattern, _, _ in table:
        noise = Image.frombytes("RGB", (40, 32), random.Random(number).randbytes(40 * 32 * 3))
        noise.save(root / IMAGE_FOLDERS[0] / pattern / f"{number}.jpg")
    return reference


def test_e4_logit_scale_and_bias_change_no_choice(tmp_path: Path) -> None:
    reference, encoder = noisy(tmp_path / "a"), tiny_clip(kind="siglip-timm")
    before = score(reference, encoder)
    assert 0 < before.counts["total"][0] < 24
    with torch.no_grad():
        encoder.logit_scale.add_(4)
        assert encoder.logit_bias is not None
        encoder.logit_bias.sub_(7)
    assert score(reference, encoder) == before


def test_e5_norms_of_images_would_change_choices_and_are_left_out(tmp_path: Path) -> None:
    reference, encoder = noisy(tmp_path / "a"), tiny_clip(kind="siglip-timm")
    before = score(reference, encoder)
    assert before.counts["total"][0] > 0

    class Loud(ImageEncoder):
        """The tower with embeddings of very different lengths."""

        def __init__(self, tower: ImageEncoder) -> None:
            super().__init__()
            self.tower, self.grid, self.depth = tower, tower.grid, tower.depth
            self.width, self.embed_dim = tower.width, tower.embed_dim

        def forward(self, pixels: Tensor, want: FeatureRequest = DEFAULT_REQUEST) -> ImageFeatures:
            length = (400 * pixels.mean((1, 2, 3))).exp()[:, None]
            return ImageFeatures(length * self.tower(pixels, want).pooled)

    loud = Encoder(Loud(encoder.image), encoder.text, logit_scale=encoder.logit_scale, data=encoder.data)
    assert [row["correct"] for row in score(reference, loud).samples] == [row["correct"] for row in before.samples]

    source, transform, chosen = open_source(reference), evaluation_transform(encoder.preprocess), []
    with torch.no_grad():
        for one in (source[k] for k in range(len(source))):
            pixels = encoder.preprocess.normalize(torch.stack([transform(image) for image in one.images]))
            image, text = loud(pixels, encoder.tokenizer(list(one.texts)))
            raw = text.unit() @ image.pooled.T  # as a script that forgets to normalise has it
            chosen.append(bool(raw[0, 0] > raw[0, 1] and raw[1, 1] > raw[1, 0]))
    assert chosen != [row["correct"] for row in before.samples]


def test_e6_the_odd_id_is_the_first_image_wherever_it_stands(tmp_path: Path) -> None:
    first, second = pair(0, "Color", says=RIGHT)
    assert score(write(tmp_path / "a", [first, second])).metrics["total"] == 1
    assert score(write(tmp_path / "b", [second, first])).metrics["total"] == 1
    source = open_source(write(tmp_path / "c", [second, first]))
    assert (source[0].id, source[0].texts) == ("1-2", ("a photo of a red wall", "a photo of a blue wall"))
    odd, even = first[0], second[0]  # ids exchanged: the statement of the odd id is about the other image
    exchanged = [(even, *first[1:3], "blue"), (odd, *second[1:3], "red")]
    assert score(write(tmp_path / "d", exchanged)).metrics["total"] == 0
    with pytest.raises(InputError, match="no row 3, the other half of the pair 3-4"):
        open_source(write(tmp_path / "e", [first, second, (4, *first[1:])]))


def test_e7_missing_files_are_named(tmp_path: Path) -> None:
    reference = write(tmp_path / "a", fixture())
    (tmp_path / "a" / IMAGE_FOLDERS[0] / "State" / "2.jpg").unlink()
    with pytest.raises(BadSample, match=r"^1-2: 2\.jpg: missing file$"):
        open_source(reference)[0]
    found = score(reference)
    assert found.counts["State"] == (1, 1)
    assert found.metrics["skipped"] == 1
    (tmp_path / "a" / "Questions.csv").unlink()
    with pytest.raises(InputError, match=r"Questions\.csv is missing"):
        open_source(reference)
    with pytest.raises(InputError, match="no such folder"):
        open_source(f"mmvp:{tmp_path / 'nowhere'}")


def test_e8_three_names_of_the_image_folder(tmp_path: Path) -> None:
    assert set(IMAGE_FOLDERS) == {"MLLM_VLM Images", "MLLM_VLM_Images", "MMVP_VLM_Images"}
    found = [score(write(tmp_path / str(k), fixture(), folder=name)) for k, name in enumerate(IMAGE_FOLDERS)]
    assert found[0].metrics == found[1].metrics == found[2].metrics
    shutil.move(tmp_path / "0" / IMAGE_FOLDERS[0], tmp_path / "0" / "Images")
    with pytest.raises(InputError, match="it is called MLLM_VLM Images or"):
        open_source(f"mmvp:{tmp_path / '0'}")
