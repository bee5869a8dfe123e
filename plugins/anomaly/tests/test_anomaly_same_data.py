"""A detector must not be tested on what it was trained on, under whatever name."""

import shutil

import pytest
import torch
from PIL import Image

from clipgraft.data.base import Sample
from clipgraft.errors import InputError
from clipgraft_anomaly.inspection import open_inspection
from clipgraft_anomaly.same_data import SAMPLE, DataRecord, digests, refuse_same

torch.set_num_threads(1)


def parts(root, values):
    for number, value in enumerate(values):
        folder = root / ("good" if number % 2 else "bad")
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (value, 0, 0)).save(folder / f"{number}.png")
    return f"folder:{root}"


def test_copies_under_other_names_are_found_and_other_pictures_are_not(tmp_path):
    reference = parts(tmp_path / "a", range(6))
    trained = DataRecord.of(reference, open_inspection(reference))
    assert trained.pictures == 6 and len(trained.digests) == 6
    other = open_inspection(parts(tmp_path / "b", range(50, 56)))
    assert refuse_same(trained, other) == 0 and refuse_same(None, other) == 0
    shutil.copytree(tmp_path / "a", tmp_path / "c")
    (tmp_path / "c/bad/0.png").rename(tmp_path / "c/bad/renamed.png")
    for file in [*(tmp_path / "c").rglob("*.png")][2:]:
        file.unlink()
    parts(tmp_path / "c", range(60, 66))
    copied = open_inspection(f"folder:{tmp_path / 'c'}")
    assert copied.fingerprint != trained.fingerprint
    with pytest.raises(InputError, match="--allow-same"):
        refuse_same(trained, copied)
    assert refuse_same(trained.model_dump(), copied, allow_same=True) >= 1


class Made:
    """Pictures without files."""

    fingerprint, classes, templates, attributes = "made", ("normal", "anomalous"), (), {}

    def __init__(self, first, count):
        self.name, self.first, self.count = f"made {first}", first, count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        seed = torch.Generator().manual_seed(self.first + index)
        return Sample(f"{index}", torch.randint(0, 255, (3, 8, 8), generator=seed, dtype=torch.uint8), label=index % 2)


def test_made_pictures_are_compared_by_their_pixels():
    train = Made(0, 300)
    record = DataRecord.of("made", train)
    assert len(record.digests) == SAMPLE and DataRecord.model_validate_json(record.model_dump_json()) == record
    assert refuse_same(record, Made(1000, 64)) == 0
    with pytest.raises(InputError, match="sampled pictures"):
        refuse_same(record, Made(0, 64))
    assert len(digests(Made(0, 64))) == 64 and digests(Made(0, 64)) <= digests(train)
