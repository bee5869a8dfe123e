"""Planned epochs: balanced, mixed, hard and thinned out, each a pure function of (seed, epoch)."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from clipgraft.config.load import validate
from clipgraft.config.schema import DataConfig
from clipgraft.data import open_source
from clipgraft.data.base import BadSample, Entry, Sample, Source
from clipgraft.data.exclude import exclude
from clipgraft.data.loader import TrainLoader
from clipgraft.data.sampling import Plan, epoch_order, nearest, plan, read_embeddings
from clipgraft.encoders.base import Preprocess
from clipgraft.errors import InputError


@dataclass
class Listing:
    """Samples whose images must not be looked at to plan an epoch."""

    labels: Sequence[int | None]
    groups: Sequence[str] = ()
    classes: Sequence[str] = ("a", "b", "c")
    templates: Sequence[str] = ()
    name: str = "listing"
    fingerprint: str = "listing"
    attributes: dict[str, Sequence[str]] = field(default_factory=dict)
    readable: bool = False

    def __len__(self) -> int:
        return len(self.labels)

    def entry(self, index: int) -> Entry:
        return Entry(f"s{index}", label=self.labels[index], group=self.groups[index] if self.groups else "")

    def content(self, index: int) -> bytes:
        raise BadSample(f"s{index}", "no file")

    def __getitem__(self, index: int) -> Sample:
        assert self.readable, "the plan reads images"
        image = torch.full((3, 8, 8), index, dtype=torch.uint8)
        return Sample(f"s{index}", image, label=self.labels[index])


class Mixed(Listing):
    """Two parts of which an epoch holds given amounts."""

    quotas = ((range(0, 4), 10), (range(4, 24), 6))


def orders(found: Plan, epochs: int = 6, seed: int = 0) -> list[list[int]]:
    return [epoch_order(found, seed=seed, epoch=k).tolist() for k in range(epochs)]


def embedding_file(path: Path, rows: Tensor, ids: Sequence[str]) -> Path:
    save_file({"embeddings": rows}, path, {"ids": json.dumps(list(ids))})
    return path


def batches(source: Source, found: Plan, **changes: Any) -> TrainLoader:
    preprocess = Preprocess(size=(8, 8), mean=(0.5,) * 3, std=(0.5,) * 3)
    settings = {"batch_size": 4, "seed": 3, "crop": None, "plan": found, **changes}
    return TrainLoader(source, preprocess=preprocess, **settings)


# -- balance -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["class", "group"])
def test_every_class_or_group_is_shown_equally_often(by: Any) -> None:
    labels = [0] * 40 + [1] * 7 + [2] * 3
    source = Listing(labels, [f"g{k}" for k in labels])
    for order in orders(plan(source, balance=by)):
        assert len(order) == 50
        shown = Counter(labels[i] for i in order)
        assert max(shown.values()) - min(shown.values()) <= 1
        often = Counter(order)
        for k in range(3):
            per_sample = [often[i] for i in range(50) if labels[i] == k]
            assert max(per_sample) - min(per_sample) <= 1
    first, second = orders(plan(source, balance=by), 2)
    assert first != second and {i for i in first if i < 40} != {i for i in second if i < 40}


def test_balance_needs_two_classes_and_a_label_on_each_sample() -> None:
    with pytest.raises(InputError, match=r"1 class; data\.balance class needs two or more"):
        plan(Listing([0, 0]), balance="class")
    with pytest.raises(InputError, match=r"s1 has no class, which data\.balance class needs"):
        plan(Listing([0, None, 1]), balance="class")
    with pytest.raises(InputError, match="s0 has no group"):
        plan(Listing([0, 1]), balance="group")


# -- mixtures ----------------------------------------------------------------------------------------------------------


def test_a_mix_shows_its_amounts_and_another_selection_each_epoch() -> None:
    seen = set[int]()
    for order in orders(plan(Mixed([None] * 24)), 12):
        often = Counter(order)
        assert sum(often[i] for i in range(4)) == 10 and {often[i] for i in range(4)} == {2, 3}
        assert sum(often[i] for i in range(4, 24)) == 6 and max(often[i] for i in range(4, 24)) == 1
        seen |= set(order)
    assert seen == set(range(24))
    with pytest.raises(InputError, match="a mix and balance each decide"):
        plan(Mixed([0, 1] * 12), balance="class")


# -- hard batches ------------------------------------------------------------------------------------------------------


def test_nearest_equals_a_search_by_cosine() -> None:
    rows = torch.randn(200, 24, generator=torch.Generator().manual_seed(0))
    found = nearest(rows, k=5, block=64)
    unit = torch.nn.functional.normalize(rows.double(), dim=-1)
    cosine = unit @ unit.T - 2 * torch.eye(200, dtype=torch.float64)
    # rounding may swap neighbours whose cosines differ by less than the grid
    for k in range(5):
        best = cosine.sort(descending=True).values[:, k]
        assert torch.allclose(cosine[torch.arange(200), found[:, k].long()], best, atol=1e-2)


def test_nearest_is_exact_on_ties_whatever_the_blocks() -> None:
    rows = torch.randint(-2, 3, (150, 6), generator=torch.Generator().manual_seed(1)).float()
    rows[7] = 0
    found = nearest(rows, k=9, block=150)
    assert torch.equal(found, nearest(rows, k=9, block=31))
    assert (found[7] == -1).all() and not (found[torch.arange(150) != 7] == 7).any()
    twins = nearest(torch.ones(5, 3), k=4)
    assert twins.tolist() == [[j for j in range(5) if j != i] for i in range(5)]


def test_hard_epochs_show_every_sample_once_in_neighbourhoods(tmp_path: Path) -> None:
    centre = torch.arange(96) // 8
    rng = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.one_hot(centre, 12).float() + 0.01 * torch.randn(96, 12, generator=rng)
    mixed = torch.randperm(96, generator=rng)
    path = embedding_file(tmp_path / "e.safetensors", rows[mixed], [f"s{i}" for i in mixed.tolist()])
    found = plan(Listing([None] * 96), neighbours=path, cluster=8)
    first, second = orders(found, 2)
    assert sorted(first) == sorted(second) == list(range(96)) and first != second
    for order in (first, second):
        assert all(len({int(centre[i]) for i in order[k : k + 8]}) == 1 for k in range(0, 96, 8))


def test_embeddings_that_do_not_fit_are_one_clear_line(tmp_path: Path) -> None:
    path, source = tmp_path / "e.safetensors", Listing([None] * 4)
    embedding_file(path, torch.eye(3), ["s0", "s1", "s2"])
    with pytest.raises(InputError, match="no embedding of 1 of 4 samples of listing, such as s3"):
        plan(source, neighbours=path)
    lenient = plan(source, neighbours=path, cluster=2, missing=0.25)
    assert all(sorted(order) == [0, 1, 2, 3] for order in orders(lenient))
    embedding_file(path, torch.eye(3), ["s0"])
    with pytest.raises(InputError, match="one id per row"):
        plan(source, neighbours=path)
    save_file({"other": torch.eye(3)}, path)
    with pytest.raises(InputError, match="no tensor 'embeddings'"):
        plan(source, neighbours=path)
    path.write_bytes(b"no safetensors")
    with pytest.raises(InputError, match="can't be read") as caught:
        plan(source, neighbours=path)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="balance and hard batches each decide"):
        plan(source, balance="class", neighbours=path)


def test_ids_are_read_from_metadata_tensor_or_file_beside(tmp_path: Path) -> None:
    rows, path = torch.eye(2), tmp_path / "e.safetensors"
    embedding_file(path, rows, ["a", "ü"])
    assert read_embeddings(path)[0] == ["a", "ü"]
    text = torch.tensor(list(json.dumps(["b", "ü"]).encode()), dtype=torch.uint8)
    save_file({"embeddings": rows, "ids_json": text}, path)
    assert read_embeddings(path)[0] == ["b", "ü"]
    save_file({"embeddings": rows}, path)
    path.with_suffix(".json").write_text('{"ids": ["c", "d"]}')
    assert read_embeddings(path)[0] == ["c", "d"]


# -- the loader over planned epochs ------------------------------------------------------------------------------------


def plans(source: Listing, tmp_path: Path) -> list[Plan]:
    n = len(source)
    rows = torch.randn(n, 6, generator=torch.Generator().manual_seed(5))
    path = embedding_file(tmp_path / "e.safetensors", rows, [f"s{i}" for i in range(n)])
    return [plan(source), plan(source, balance="class"), plan(source, neighbours=path, cluster=3)]


def test_ranks_workers_and_a_late_start_see_the_same_batches(tmp_path: Path) -> None:
    source = Listing([0] * 14 + [1] * 6 + [2] * 4, readable=True)
    for found in plans(source, tmp_path):
        whole = [b.ids for b in islice(batches(source, found, batch_size=8).iterate(), 8)]
        assert (
            whole == [[f"s{i}" for i in order[k : k + 8]] for order in orders(found, 3, seed=3) for k in (0, 8, 16)][:8]
        )
        halves = [[b.ids for b in islice(batches(source, found, rank=rank, world=2).iterate(), 8)] for rank in (0, 1)]
        assert [a + b for a, b in zip(*halves, strict=True)] == whole
        helped = batches(source, found, batch_size=8, workers=2)
        assert [b.ids for b in islice(helped.iterate(5), 3)] == whole[5:]


def test_an_epoch_is_as_long_as_its_plan() -> None:
    source = Mixed([None] * 24, readable=True)
    loader = batches(source, plan(source))
    assert loader.steps_per_epoch == 4
    shown = [name for b in islice(loader.iterate(), 4) for name in b.ids]
    assert Counter(int(name[1:]) < 4 for name in shown) == {True: 10, False: 6}


# -- captions by weight ------------------------------------------------------------------------------------------------


class Texts:
    """Keeps what it was given."""

    context_length, pad_id = 1, 0

    def __init__(self) -> None:
        self.seen = Counter[str]()

    def __call__(self, texts: Sequence[str]) -> Tensor:
        self.seen.update(texts)
        return torch.zeros(len(texts), 1, dtype=torch.long)

    def save(self, folder: str) -> None:
        """Nothing."""


@dataclass
class Captioned(Listing):
    """Four images, three captions each."""

    weights: tuple[float, ...] = ()

    def __getitem__(self, index: int) -> Sample:
        image = torch.zeros(3, 8, 8, dtype=torch.uint8)
        return Sample(f"s{index}", image, ("one", "two", "three"), caption_weights=self.weights)


def test_captions_are_drawn_in_proportion_to_their_weights() -> None:
    texts = Texts()
    list(islice(batches(Captioned([None] * 4, weights=(6.0, 0.0, 2.0)), None, tokenizer=texts).iterate(), 500))
    assert texts.seen["two"] == 0 and texts.seen["one"] / 2000 == pytest.approx(0.75, abs=0.04)
    texts = Texts()
    list(islice(batches(Captioned([None] * 4), None, tokenizer=texts).iterate(), 500))
    assert all(count / 2000 == pytest.approx(1 / 3, abs=0.04) for count in texts.seen.values())


@pytest.mark.parametrize("weights", [(1.0,), (0.0, 0.0, 0.0), (1.0, -1.0, 1.0), (1.0, float("nan"), 1.0)])
def test_weights_that_do_not_fit_the_captions_are_one_clear_line(weights: tuple[float, ...]) -> None:
    with pytest.raises(InputError, match=r"listing: s[0-3]: .*caption_weights"):
        next(batches(Captioned([None] * 4, weights=weights), None, tokenizer=Texts()).iterate())


# -- what is left out --------------------------------------------------------------------------------------------------


def test_excluded_ids_are_gone_and_unknown_ones_told_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(4):
        Image.new("RGB", (8, 8), (60 * i, 0, 0)).save(tmp_path / f"{i}.png")
    whole = open_source(f"folder:{tmp_path}")
    listing = tmp_path / "quarantine.tsv"
    listing.write_text("1.png\tduplicate of 0.png\n\nnowhere.png\n3.png\n")
    left = exclude(whole, listing)
    assert isinstance(left, Source)
    assert [left[i].id for i in range(len(left))] == ["0.png", "2.png"] == [left.entry(i).id for i in range(2)]
    assert left.content(1) == (tmp_path / "2.png").read_bytes()
    err = capsys.readouterr().err
    assert err.count("nowhere.png") == 1 and "1 of 3 excluded ids don't occur" in err
    prints = {whole.fingerprint, left.fingerprint}
    listing.write_text("1.png\n")
    assert len({exclude(whole, listing).fingerprint, *prints}) == 3
    listing.write_text("".join(f"{i}.png\n" for i in range(4)))
    with pytest.raises(InputError, match="leaves none of 4 samples"):
        exclude(whole, listing)
    with pytest.raises(InputError, match="can't be read"):
        exclude(whole, tmp_path / "missing")


def test_a_mix_keeps_its_amounts_without_excluded_samples(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("s0\ns5\n")
    left = exclude(Mixed([None] * 24), tmp_path / "out")
    (order,) = orders(plan(left), 1)
    ids = [left.entry(i).id for i in order]
    assert not {"s0", "s5"} & set(ids) and sum(int(i[1:]) < 4 for i in ids) == 10 and len(ids) == 16


# -- settings ----------------------------------------------------------------------------------------------------------


def test_hard_batches_and_neighbours_go_together() -> None:
    base = {"from": "folder:x"}
    assert validate(DataConfig, {**base, "batches": "hard", "neighbours": "e.safetensors"}).cluster == 16
    for wrong in ({"batches": "hard"}, {"neighbours": "e.safetensors"}):
        with pytest.raises(InputError, match="go together"):
            validate(DataConfig, {**base, **wrong})


def test_parts_stay_together_in_runs_and_are_drawn_anew_each_epoch():
    parts = ((torch.arange(10), 8), (torch.arange(10, 22), 12), (torch.arange(22, 25), 4))
    drawn = Plan(24, parts, together=4)
    first, again, other = (epoch_order(drawn, seed=1, epoch=e) for e in (0, 0, 1))
    assert first.equal(again) and not first.equal(other)
    for order in (first, other):
        runs = [{(i >= 10) + (i >= 22) for i in run} for run in order.view(-1, 4).tolist()]
        assert sorted(r.pop() for r in runs) == [0, 0, 1, 1, 1, 2] and all(not r for r in runs)
        assert sorted(order[(order >= 10) & (order < 22)].tolist()) == list(range(10, 22))
    assert not first[first >= 10].equal(first[first >= 10].sort().values)
    assert epoch_order(Plan(24, parts), seed=1, epoch=0).sort().values.equal(first.sort().values)
