"""The training loader is a pure function of (seed, number, rank), whatever the workers, ranks and bad samples."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from clipgraft.data import open_source
from clipgraft.data.base import BadSample, Pair, Sample
from clipgraft.data.exclude import exclude
from clipgraft.data.loader import BadSamples, TrainLoader, class_prompts, evaluation_batches, stack_images
from clipgraft.encoders.base import Preprocess
from clipgraft.errors import InputError
from clipgraft.types import Batch

PREPROCESS = Preprocess(size=(8, 8), mean=(0.5,) * 3, std=(0.5,) * 3)


@dataclass
class Pixels:
    """n random uint8 pictures with captions, labels and attributes; ``broken`` indices can't be read."""

    n: int
    broken: frozenset[int] = frozenset()
    captions: int = 2
    labels: bool = True
    classes: Sequence[str] = ("red_thing", "blue thing")
    templates: Sequence[str] = ()
    name: str = "pixels"
    fingerprint: str = "pixels"
    attributes: dict[str, Sequence[str]] = field(default_factory=lambda: {"parity": ("even", "odd")})

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> Sample:
        if index in self.broken:
            raise BadSample(f"s{index}", "missing file")
        image = torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(index))
        return Sample(
            f"s{index}",
            image,
            tuple(f"{index} {k}" for k in range(self.captions)),
            index % 2 if self.labels else None,
            {"parity": index % 2},
            {"mask": torch.full((2, 2), index)},
        )


class Numbers:
    """Texts "17 1" to ids (17, 1); other texts by their length."""

    context_length, pad_id = 2, 0

    def __call__(self, texts: Sequence[str]) -> Tensor:
        return torch.tensor([[int(w) if w.isdigit() else len(t) for w in (t.split() * 2)[:2]] for t in texts])

    def save(self, folder: str) -> None:
        """Nothing."""


def loader(source: Any, **changes: Any) -> TrainLoader:
    return TrainLoader(source, **{"preprocess": PREPROCESS, "batch_size": 4, "seed": 0, "max_bad": 0.5, **changes})


def rows(batches: Sequence[Batch]) -> dict[str, tuple[Tensor, Tensor | None]]:
    return {i: (b.pixels[k], None if b.text is None else b.text[k]) for b in batches for k, i in enumerate(b.ids)}


def equal(a: Batch, b: Batch) -> bool:
    text = a.text is b.text is None or torch.equal(a.text, b.text)  # type: ignore[arg-type]
    return a.ids == b.ids and torch.equal(a.pixels, b.pixels) and text


def test_an_epoch_shows_every_sample_at_most_once_and_epochs_differ() -> None:
    batches = loader(Pixels(22))
    assert batches.steps_per_epoch == 5
    drawn = list(islice(batches.iterate(), 10))
    first, second = ([i for b in part for i in b.ids] for part in (drawn[:5], drawn[5:]))
    assert len(first) == len(set(first)) == 20 and len(second) == len(set(second)) == 20
    assert first != second
    assert [b.ids for b in islice(loader(Pixels(22), seed=1).iterate(), 5)] != [b.ids for b in drawn[:5]]


def test_batch_fields_belong_to_their_sample() -> None:
    batch = next(loader(Pixels(12), tokenizer=Numbers(), crop=None).iterate())
    index = torch.tensor([int(i[1:]) for i in batch.ids])
    assert torch.equal(batch.text[:, 0], index) and set(batch.text[:, 1].tolist()) <= {0, 1}
    assert torch.equal(batch.labels, index % 2) and torch.equal(batch.attributes["parity"], index % 2)
    assert torch.equal(batch.extra["mask"][:, 0, 0], index)
    expected = torch.stack([Pixels(12)[int(i)].image for i in index]).float() / 255
    assert torch.equal(batch.pixels, expected)


def test_what_not_every_sample_has_is_left_out() -> None:
    class Partial(Pixels):
        def __getitem__(self, index: int) -> Sample:
            sample = super().__getitem__(index)
            return sample if index else Sample(sample.id, sample.image)

    batch = next(loader(Partial(4)).iterate())
    assert batch.labels is None and batch.attributes == {} and batch.extra == {} and batch.text is None


@pytest.mark.parametrize("broken", [frozenset(), frozenset({0, 5, 11})])
@pytest.mark.parametrize("world", [2, 3])
def test_the_global_batch_is_the_same_for_every_world(world: int, broken: frozenset[int]) -> None:
    source = Pixels(40, broken)
    whole = list(islice(loader(source, batch_size=12, tokenizer=Numbers()).iterate(), 7))
    parts = [
        list(islice(loader(source, batch_size=12 // world, rank=r, world=world, tokenizer=Numbers()).iterate(), 7))
        for r in range(world)
    ]
    for n, batch in enumerate(whole):
        assert [i for part in parts for i in part[n].ids] == batch.ids
        expected, found = rows([batch]), rows([part[n] for part in parts])
        for i, (pixels, text) in expected.items():
            assert torch.equal(found[i][0], pixels) and torch.equal(found[i][1], text)


def test_starting_late_equals_having_started_early() -> None:
    source = Pixels(22, frozenset({3}))
    early = list(islice(loader(source, tokenizer=Numbers()).iterate(), 14))
    for start in (0, 1, 4, 5, 13):
        late = next(loader(source, tokenizer=Numbers()).iterate(start))
        assert equal(late, early[start])


def test_workers_change_nothing_and_report_what_is_unreadable() -> None:
    source = Pixels(22, frozenset({3, 4}))
    alone, helped = loader(source, tokenizer=Numbers()), loader(source, tokenizer=Numbers(), workers=2)
    for a, b in zip(islice(alone.iterate(2), 9), islice(helped.iterate(2), 9), strict=True):
        assert equal(a, b)
        assert (helped.bad.indices, helped.bad.first) == (alone.bad.indices, alone.bad.first)
    assert alone.bad.indices == {3, 4}


@pytest.mark.parametrize("workers", [0, 1])
def test_the_global_random_state_is_left_alone_and_not_read(workers: int) -> None:
    def three(seed: int) -> list[Batch]:
        torch.manual_seed(seed)
        random.seed(seed)
        before = torch.get_rng_state(), random.getstate()
        found = list(islice(loader(Pixels(12), tokenizer=Numbers(), workers=workers).iterate(), 3))
        assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
        return found

    assert all(equal(a, b) for a, b in zip(three(0), three(1), strict=True))


def test_augmentation_and_caption_vary_from_epoch_to_epoch() -> None:
    batches = list(islice(loader(Pixels(4, captions=50), crop=(0.2, 0.5), tokenizer=Numbers()).iterate(), 2))
    first, second = rows(batches[:1]), rows(batches[1:])
    assert any(not torch.equal(first[i][0], second[i][0]) for i in first)
    assert any(not torch.equal(first[i][1], second[i][1]) for i in first)


def test_unreadable_samples_are_replaced_from_outside_the_global_batch() -> None:
    broken = frozenset({1, 2, 7})
    batches = loader(Pixels(40, broken), batch_size=8)
    for batch in islice(batches.iterate(), 20):
        assert len(batch.ids) == 8 and not set(batch.ids) & {f"s{i}" for i in broken}
        assert len(set(batch.ids)) == 8
    assert batches.bad.count == 3 and batches.bad.indices == set(broken)
    assert sorted(batches.bad.first) == ["s1: missing file", "s2: missing file", "s7: missing file"]


def test_even_without_spare_samples_a_batch_is_full() -> None:
    batch = next(loader(Pixels(4, frozenset({0, 1}))).iterate())
    assert len(batch.ids) == 4 and set(batch.ids) == {"s2", "s3"}


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_unreadable_samples_end_the_run_with_one_line(workers: int) -> None:
    source = Pixels(200, frozenset({3, 9, 60}))
    assert len(list(islice(loader(source, max_bad=0.015, workers=workers).iterate(), 100))) == 100
    with pytest.raises(InputError) as caught:
        list(islice(loader(source, max_bad=0.01, workers=workers).iterate(), 100))
    assert "3 of 200 samples can't be read: " in str(caught.value) and "missing file" in str(caught.value)
    assert "data.max_bad" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("max_bad", [0.01, 1.0])
def test_a_source_that_cannot_be_read_at_all_ends_at_once(max_bad: float) -> None:
    with pytest.raises(InputError, match="samples can't be read"):
        next(loader(Pixels(50, frozenset(range(50))), max_bad=max_bad).iterate())


def test_the_bad_samples_survive_a_resume() -> None:
    first = loader(Pixels(22, frozenset({3, 4})))
    list(islice(first.iterate(), 5))
    second = loader(Pixels(22, frozenset({3, 4})))
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.bad == first.bad and second.bad.count == 2
    list(islice(second.iterate(5), 5))
    assert second.bad.count == 2
    second.load_state_dict({})
    assert second.bad == BadSamples(22)


def test_only_ten_names_are_kept() -> None:
    bad = BadSamples(100)
    for i in [*range(30), 0]:
        bad.add(i, BadSample(f"s{i}", "gone"))
    assert bad.count == 30 and bad.first == [f"s{i}: gone" for i in range(10)]


def test_fewer_samples_than_one_global_batch_is_an_error_with_both_numbers() -> None:
    with pytest.raises(InputError, match=r"7 samples, fewer than one batch of 8; .*batch_size to 7 or less"):
        loader(Pixels(7), batch_size=4, world=2)


@pytest.mark.parametrize("workers", [0, 1])
def test_class_names_stand_in_for_captions_and_nothing_else_does(workers: int) -> None:
    source = Pixels(8, captions=0, templates=("a {} here", "some {}"))

    class Spy(Numbers):
        def __call__(self, texts: Sequence[str]) -> Tensor:
            assert set(texts) <= {"a red thing here", "a blue thing here", "some red thing", "some blue thing"}
            return super().__call__(texts)

    assert next(loader(source, tokenizer=Spy(), workers=workers).iterate()).text is not None
    with pytest.raises(InputError, match="has no caption; train on a csv:") as caught:
        next(loader(Pixels(8, captions=0, labels=False), tokenizer=Numbers(), workers=workers).iterate())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_files_are_loaded_and_damaged_ones_replaced(tmp_path: Path, workers: int) -> None:
    for i in range(7):
        Image.new("RGB", (9 + i, 8), (30 * i, 0, 0)).save(tmp_path / f"{i}.png")
    (tmp_path / "3.png").write_bytes((tmp_path / "3.png").read_bytes()[:50])
    rows = "".join(f"{i}.png,{i} {i}\n" for i in range(7))
    (tmp_path / "pairs.csv").write_text(f"image,caption\n{rows}")
    batches = loader(open_source(f"csv:{tmp_path / 'pairs.csv'}"), tokenizer=Numbers(), workers=workers)
    for batch in islice(batches.iterate(), 8):
        assert "3.png" not in batch.ids
        for i, name in enumerate(batch.ids):
            assert batch.text[i].tolist() == [int(name[0])] * 2
            assert torch.allclose(batch.pixels[i, 0] * 255, torch.tensor(30.0 * int(name[0])), atol=0.01)
    assert batches.bad.count == 1 and batches.bad.first[0].startswith("3.png: ")


def test_class_prompts() -> None:
    assert class_prompts("golden_retriever") == ("a photo of a golden retriever.",)
    assert class_prompts("cat", ("{}!", "the {}")) == ("cat!", "the cat")
    with pytest.raises(InputError, match=r"must hold \{\} once"):
        class_prompts("cat", ("no place",))


def test_evaluation_sees_every_readable_sample_once_in_order() -> None:
    bad = BadSamples(11)
    source = Pixels(11, frozenset({2, 10}))
    batches = list(evaluation_batches(source, preprocess=PREPROCESS, batch_size=4, bad=bad))
    assert [len(b) for b in batches] == [3, 4, 2]  # of four places each
    items = [item for batch in batches for item in batch]
    assert [item.id for item in items] == [f"s{i}" for i in range(11) if i not in (2, 10)]
    assert torch.equal(stack_images(items)[2], Pixels(11)[3].image.float() / 255)
    assert bad.indices == {2, 10}


class Pairs:
    """Pairs of random pictures."""

    name = fingerprint = "pairs"
    patterns = ("p",)

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Pair:
        pixels = Pixels(6)
        return Pair(f"p{index}", (pixels[2 * index].image, pixels[2 * index + 1].image), ("a", "b"), "p")


def test_pairs_give_two_rows_each() -> None:
    (batch,) = evaluation_batches(Pairs(), preprocess=PREPROCESS, batch_size=8, bad=BadSamples(3))
    expected = torch.stack([Pixels(6)[i].image for i in range(6)]).float() / 255
    assert torch.equal(stack_images(batch), expected)


class Turning(Pixels):
    """Shows every sample with noise that the loader's generator decides."""

    def varied(self, index: int, rng: torch.Generator) -> Sample:
        noise = torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8, generator=rng)
        return Sample(f"s{index}", noise, extra={"frames": noise})


def test_a_source_may_show_a_sample_differently_in_every_epoch(tmp_path: Path) -> None:
    source = Turning(8)
    loader = TrainLoader(source, preprocess=PREPROCESS, batch_size=8, seed=3, crop=None)
    first, second = (batch for batch in islice(loader.iterate(), 2))
    again = next(TrainLoader(source, preprocess=PREPROCESS, batch_size=8, seed=3, crop=None).iterate(1))
    at = {name: k for k, name in enumerate(second.ids)}
    assert not any(
        torch.equal(first.extra["frames"][k], second.extra["frames"][at[n]]) for k, n in enumerate(first.ids)
    )
    assert torch.equal(second.pixels, again.pixels)  # and alike whenever that epoch is read
    ids = tmp_path / "ids.txt"
    ids.write_text("s3\n")
    rest = next(TrainLoader(exclude(source, ids), preprocess=PREPROCESS, batch_size=7, seed=3, crop=None).iterate())
    assert "s3" not in rest.ids and "frames" in rest.extra  # as the source draws it, also without some samples
