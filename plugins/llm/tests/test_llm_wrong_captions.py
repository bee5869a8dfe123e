"""Wrong captions by rule, other numbers, and how they travel beside the caption that they belong to."""

import json
import random
import re
from typing import ClassVar

import pytest
import torch

from clipgraft.data.base import Sample
from clipgraft.data.loader import TrainLoader
from clipgraft.errors import InputError
from clipgraft.log import RunLog
from clipgraft.testing.given import noise
from clipgraft.testing.tiny import TinyTokenizer, tiny_clip
from clipgraft_llm.counting.mixture import Counting
from clipgraft_llm.counting.numbers import NUMBERS, number_in, other_counts, value_of
from clipgraft_llm.negatives.phrases import phrases
from clipgraft_llm.negatives.rehearsal import Rehearsing
from clipgraft_llm.negatives.rules import RULES, drawn, wrong_captions
from clipgraft_llm.negatives.source import with_negatives
from clipgraft_llm.negatives.written import Written, write

torch.set_num_threads(1)


class Told:
    """Samples with captions."""

    name, fingerprint = "told", "told-1"
    classes = templates = ()
    attributes: ClassVar = {}

    def __init__(self, *captions, negatives=(), weights=()):
        self.captions, self.negatives, self.weights = captions, negatives, weights

    def __len__(self):
        return len(self.captions)

    def __getitem__(self, index):
        told = self.captions[index]
        told = told if isinstance(told, tuple) else (told,)
        return Sample(f"s{index}", noise(index), told, negatives=tuple(self.negatives), caption_weights=self.weights)


def phrase_words(text):
    words = text.split()
    return [(words[p.start : p.stop], [words[k] for k in p.modifiers], words[p.head]) for p in phrases(words)]


def test_captions_are_cut_into_phrases():
    assert phrase_words("a red moon on the left of three small hearts") == [
        (["a", "red", "moon"], ["red"], "moon"),
        (["the", "left"], [], "left"),
        (["three", "small", "hearts"], ["small"], "hearts"),
    ]
    assert phrase_words("of and the") == []


@pytest.mark.parametrize(
    ("rule", "caption", "wrong"),
    [
        ("swap-modifiers", "a red moon and a blue heart", ["a blue moon and a red heart"]),
        ("swap-heads", "a red moon and a blue heart", ["a red heart and a blue moon"]),
        ("swap-heads", "a moon and a heart", []),  # still true
        ("swap-heads", "a cat on a mat", ["a mat on a cat"]),
        ("swap-phrases", "a black cat on a mat", ["a mat on a black cat"]),
        ("swap-phrases", "a red moon and a blue heart", []),  # still true
        ("swap-phrases", "a red moon, and a blue heart", []),
        ("swap-modifiers", "a red moon and a blue moon", []),  # still true
        ("swap-modifiers", "a very old man and a child", ["a man and a very old child"]),
        ("swap-phrases", "an owl above a tree", ["a tree above an owl"]),
        ("swap-modifiers", "an old cat and a red dog", ["a red cat and an old dog"]),
        (
            "swap-phrases",
            "Dogs chase near water in Rome",
            ["Water near dogs chase in Rome", "Rome near water in dogs chase"],
        ),
        ("replace", "two dogs on the left", None),
    ],
)
def test_a_rule_and_its_wrong_captions(rule, caption, wrong):
    found = wrong_captions(caption, (rule,))
    if wrong is None:
        assert "two dogs on the right" in found and "seven dogs on the left" in found and len(found) == 10
    elif rule == "swap-phrases" and "Dogs" in caption:
        assert found and all(
            text[0].isupper() and sorted(text.lower().split()) == sorted(caption.lower().split()) for text in found
        )
    else:
        assert found == wrong


def test_swaps_keep_the_words_and_no_rule_gives_the_caption_back():
    captions = [
        "A man with a red hat, standing next to a white dog.",
        "two small cats under a large wooden table in the kitchen",
        "the sun",
        "a photo of a bird that is sitting on an old fence",
        "",
        "left, right!",
    ]
    for caption in captions:
        for rule in RULES:
            for text in wrong_captions(caption, (rule,)):
                assert text.lower() != caption.lower() and text.count(",") == caption.count(",")
                if rule != "replace":
                    bare = [re.findall(r"\w+", t.lower()) for t in (text, caption)]
                    assert len({tuple(sorted(w for w in words if w not in ("a", "an"))) for words in bare}) == 1
    with pytest.raises(InputError, match="unknown rule 'shuffle'; rules are swap-heads"):
        wrong_captions("a cat", ("shuffle",))


def test_drawing_takes_another_rule_each_time_and_depends_on_the_generator_alone():
    caption = "a red cat on a small mat"
    one = drawn(caption, RULES, 3, rng=random.Random(1))
    assert one == drawn(caption, RULES, 3, rng=random.Random(1)) and len(set(one)) == 3
    assert len({tuple(drawn(caption, RULES, 1, rng=random.Random(k))) for k in range(40)}) > 5
    assert drawn("the sun", RULES, 2, rng=random.Random(0)) == []


# -- numbers ----------------------------------------------------------------------------------------------------------


def test_only_whole_number_words_count():
    for caption in (
        "often",
        "the tenth one",
        "in 2010",
        "someone",
        "12 cats",
        "3.5 miles",
        "twofold",
        "two-door car",
        "1 cat",
    ):
        assert number_in(caption) is None and other_counts(caption) == []
    assert number_in("two cats and three dogs") is None  # which one would be wrong?
    assert value_of(number_in("often ten cats")) == 10 and value_of(number_in("a row of 4 boats")) == 4


def test_other_counts_are_every_other_number_spelt_alike():
    found = other_counts("Three cats, often tenth")
    assert len(found) == 8 and "Three cats, often tenth" not in found
    assert found[0] == "Two cats, often tenth" and all(text.endswith("cats, often tenth") for text in found)
    assert other_counts("4 boats")[:2] == ["2 boats", "3 boats"]
    for word in NUMBERS:
        assert all(text != f"{word} cats" for text in other_counts(f"{word} cats"))


# -- beside their captions --------------------------------------------------------------------------------------------


def load(source, **more):
    settings = {"batch_size": 4, "seed": 3, "crop": None, "tokenizer": TinyTokenizer(), **more}
    return TrainLoader(source, preprocess=tiny_clip().preprocess, **settings)


def by_rule(sample, caption, rng):
    return drawn(caption, RULES, 2, rng=rng)


def test_wrong_captions_belong_to_the_caption_that_was_drawn():
    tokenizer = TinyTokenizer()
    inner = Told(*[("a red cat on a small dog", "the sun")] * 8)
    source = with_negatives(inner, tokenizer=tokenizer, wrong=by_rule, count=2)
    seen = set()
    for _, batch in zip(range(6), load(source).iterate(), strict=False):
        assert batch.extra["negatives"].shape == (4, 2, 16) and batch.extra["present"].dtype == torch.bool
        sun = tokenizer(["the sun"])[0]
        for text, wrong, present in zip(batch.text, batch.extra["negatives"], batch.extra["present"], strict=True):
            if torch.equal(text, sun):
                assert not present.any() and torch.equal(wrong, sun.expand(2, -1))
            else:
                assert present.all() and not (wrong == text).all(1).any()
                seen |= {tuple(row.tolist()) for row in wrong}
    assert len(seen) > 3  # drawn anew


def test_drawing_is_the_same_in_workers_and_whatever_the_number_of_ranks():
    source = with_negatives(Told(*["a red cat on a small dog"] * 8), tokenizer=TinyTokenizer(), wrong=by_rule, count=2)
    whole = next(load(source).iterate(3))
    again = next(load(source, workers=1).iterate(3))
    halves = [next(load(source, batch_size=2, rank=r, world=2).iterate(3)) for r in range(2)]
    for name in ("negatives", "present"):
        assert torch.equal(whole.extra[name], again.extra[name])
        assert torch.equal(whole.extra[name], torch.cat([half.extra[name] for half in halves]))
    assert torch.equal(whole.text, torch.cat([half.text for half in halves]))


def test_a_caption_of_weight_zero_is_never_drawn():
    source = with_negatives(
        Told(*[("a red cat on a dog", "the sun")] * 4, weights=(1.0, 0.0)), tokenizer=TinyTokenizer(), wrong=by_rule
    )
    for _, batch in zip(range(3), load(source).iterate(), strict=False):
        assert batch.extra["present"].all()


def test_the_fingerprint_tells_how_negatives_are_made():
    inner, tokenizer = Told("a cat"), TinyTokenizer()
    made = [
        with_negatives(inner, tokenizer=tokenizer, wrong=by_rule, count=k, told=t)
        for k, t in ((1, "a"), (2, "a"), (1, "b"))
    ]
    assert len({source.fingerprint for source in [inner, *made]}) == 4


def test_a_file_of_wrong_captions_is_written_and_read(tmp_path):
    source, path = Told("a red cat on a small dog", "the sun"), tmp_path / "wrong.jsonl"
    counts = write(source, path, rules=RULES, most=3, log=RunLog())
    assert counts == {"captions": 2, "without": 1, "negatives": 3, "unreadable": 0}
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 1 and rows[0]["id"] == "s0" and len(rows[0]["negatives"]) == 3
    written = Written(path)
    found = written(source[0], "a red cat on a small dog", random.Random(0))
    assert sorted(found) == sorted(rows[0]["negatives"]) and written(source[1], "the sun", random.Random(0)) == []
    first = path.read_bytes()
    write(source, path, rules=RULES, most=3, log=RunLog())
    assert path.read_bytes() == first


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "line 1 is no JSON"),
        ('{"id": 1}', "line 1: expected id, caption and a list negatives"),
        ("\n", "holds no wrong caption"),
        (None, "can't be read"),
    ],
)
def test_a_bad_file_is_one_line(tmp_path, text, words):
    path = tmp_path / "wrong.jsonl"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=words):
        Written(path)


def test_no_captions_or_no_rule_that_fits_are_told(tmp_path):
    with pytest.raises(InputError, match="has no captions"):
        write(Told((), ()), tmp_path / "x", rules=RULES, most=1, log=RunLog())
    with pytest.raises(InputError, match="make no wrong caption of told's 1"):
        write(Told("the sun"), tmp_path / "x", rules=RULES, most=1, log=RunLog())


# -- counting ---------------------------------------------------------------------------------------------------------


def test_an_exact_share_counts_and_numbers_come_equally_often():
    inner = Told(*["two cats"] * 30, *["three dogs"] * 3, *["ten cars"] * 2, *["a star", "two cats and one dog"] * 20)
    source = Counting(inner, tokenizer=TinyTokenizer(), share=0.4, count=2)
    sizes = {k: len(v) for k, v in source.by_number.items()}
    assert sizes == {2: 50, 3: 3, 10: 2} and len(source.others) == 20
    planned = source.quotas
    assert [n for _, n in planned] == [10, 10, 10, 45] and sum(n for _, n in planned) == 75 == len(source)
    plain = TinyTokenizer()(["a star"])[0]
    for _, batch in zip(range(5), load(source).iterate(), strict=False):
        for text, wrong, present in zip(batch.text, batch.extra["negatives"], batch.extra["present"], strict=True):
            assert bool(present.all()) == (not torch.equal(text, plain)) and bool(present.any()) == bool(present.all())
            assert not present.any() or not (wrong == text).all(1).any()


def test_only_verified_samples_count_when_a_list_is_given():
    source = Counting(
        Told("two cats", "two dogs", "a star"), tokenizer=TinyTokenizer(), share=0.34, verified=frozenset({"s1"})
    )
    assert dict(source.by_number) == {2: [1]} and source.others == [0, 2]
    with pytest.raises(InputError, match="no caption has exactly one number"):
        Counting(Told("a star", ("two cats", "three cats")), tokenizer=TinyTokenizer(), share=0.5)
    with pytest.raises(InputError, match=r"set counting\.share to 1"):
        Counting(Told("two cats"), tokenizer=TinyTokenizer(), share=0.5)


# -- rehearsal --------------------------------------------------------------------------------------------------------


class Classed(Told):
    """Samples with a class alone."""

    classes, templates = ("cat", "dog"), ("a {}",)

    def __getitem__(self, index):
        return Sample(f"s{index}", noise(index), label=index % 2, attributes={"kind": 1})


def test_what_is_rehearsed_has_its_own_ids_and_captions_and_no_wrong_ones():
    both = Rehearsing(Told("a red cat", "a blue dog", negatives=("a blue cat",)), Classed("", "", ""))
    assert len(both) == 5 and [both[i].id for i in range(5)] == [
        "s0",
        "s1",
        "rehearsed/s0",
        "rehearsed/s1",
        "rehearsed/s2",
    ]
    assert [both.entry(i).captions for i in (1, 2, 3)] == [("a blue dog",), ("a cat",), ("a dog",)]
    assert both[0].negatives == ("a blue cat",) and both[2].negatives == () and both[2].label is None
    assert both[2].attributes == {} and both.fingerprint != Told("a").fingerprint
    source = with_negatives(both, tokenizer=TinyTokenizer(), wrong=lambda sample, caption, rng: sample.negatives)
    batch = next(load(source, batch_size=5).iterate())
    assert [bool(p) for p in batch.extra["present"][:, 0]] == [not i.startswith("rehearsed/") for i in batch.ids]
    with pytest.raises(IndexError):
        both[5]


def test_a_mix_is_not_rehearsed_around():
    class Mixed(Told):
        quotas = (((0,), 1),)

    with pytest.raises(InputError, match="plans its epochs itself"):
        Rehearsing(Mixed("a"), Told("b"))
