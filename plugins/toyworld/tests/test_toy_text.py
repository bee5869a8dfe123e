"""Words: a closed vocabulary, captions that are true, and a tokenizer that stock open_clip reads."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from clipgraft_toyworld.captions import (
    COLORS,
    PARAPHRASES,
    RARE,
    SHAPES,
    TEMPLATES,
    detailed_captions,
    long_captions,
    phrase,
    records,
    reworded_captions,
    short_captions,
    statement,
    story_captions,
    words,
)
from clipgraft_toyworld.tokenizer import CONTEXT_LENGTH, END, START, encode, save_tokenizer, vocabulary
from clipgraft_toyworld.world import DETAILS, SIZES, sample_scene


def scenes(n: int = 300):
    return sample_scene(n, torch.Generator().manual_seed(5))


def test_every_value_has_its_own_words_in_every_tier() -> None:
    for detail in DETAILS:
        told = [*detail.phrases, *PARAPHRASES[detail.name], *RARE[detail.name]]
        assert len(told) == 3 * SIZES[detail.name] and len(set(told)) == len(told)
    assert len(RARE["shape"]) == len(SHAPES) and len(RARE["color"]) == len(COLORS)


def test_captions_stay_inside_the_vocabulary_and_the_context() -> None:
    scene, rng = scenes(), random.Random(0)
    told = short_captions(scene, rng) + long_captions(scene, rng) + reworded_captions(scene, rng)
    told += [statement(record, detail.name) for record in records(scene)[:50] for detail in DETAILS]
    assert {word for text in told for word in text.split()} <= set(words())
    ids = encode(told)
    assert ids.shape[1] == CONTEXT_LENGTH and not (ids == vocabulary()["<unk>"]).any()
    assert (ids == vocabulary()[END]).sum(1).eq(1).all()  # nothing was cut


def test_a_long_caption_tells_everything_and_a_short_one_little() -> None:
    scene = scenes()
    everything = long_captions(scene, random.Random(1))
    short = short_captions(scene, random.Random(1), no_color=0.0)
    named = 0
    for record, long, brief in zip(records(scene), everything, short, strict=True):
        for detail in DETAILS:
            value = record[detail.name]
            either = [phrase(detail.name, value), phrase(detail.name, value, tier="paraphrase")]
            assert sum(f" {words} " in f" {long} " for words in either) == 1, (long, either)
            named += either[0] in brief
        assert SHAPES[record["shape"]] in brief and COLORS[record["color"]] in brief
    assert 0.2 < named / len(scene) < 0.6


def test_a_story_opens_with_a_short_caption_and_tells_every_detail_behind_the_wall() -> None:
    scene = scenes()
    stories = story_captions(scene, random.Random(4))
    assert stories == story_captions(scene, random.Random(4))
    ids = encode(stories, context_length=200)
    lengths = ids.argmax(1) + 1
    assert not (ids == vocabulary()["<unk>"]).any() and lengths.min() > 50 and lengths.max() <= 104
    assert 62 < lengths.float().mean() < 67
    known = {word for text in long_captions(scene, random.Random(1)) for word in text.split()}
    for record, story in zip(records(scene), stories, strict=True):
        opening, *rest = story.removesuffix(".").split(". ")
        assert f"{COLORS[record['color']]} {SHAPES[record['shape']]}" in opening and len(opening.split()) <= 6
        assert len(rest) == len(DETAILS)
        for detail in DETAILS:
            words_of_it = phrase(detail.name, record[detail.name])
            assert sum(f" {words_of_it} " in f"{sentence} " for sentence in rest) == 1
    telling = {word for detail in DETAILS for text in detail.phrases for word in text.split()}
    assert telling <= known


def test_reworded_captions_share_no_telling_word_with_image_captions() -> None:
    scene = scenes()
    rare = {word for text in reworded_captions(scene, random.Random(2)) for word in text.split()}
    usual = {word for text in long_captions(scene, random.Random(2)) for word in text.split()}
    assert rare & usual <= {word for template in TEMPLATES for word in template.split()} | {"edge", "over"}


def test_a_negation_denies_the_value_that_is_not_there() -> None:
    scene = scenes()
    for record, text in zip(records(scene), reworded_captions(scene, random.Random(3), negated=1.0), strict=True):
        other = phrase("perspective", 1 - record["perspective"], tier="rare")
        assert f"not {other}" in text


def test_detailed_captions_count_their_details() -> None:
    for count in (1, 4):
        told = detailed_captions(scenes(50), random.Random(0), counts=(count,), paraphrased=0.0, no_color=0.0)
        for text in told:
            assert sum(words in text for detail in DETAILS for words in detail.phrases) == count


def test_the_end_token_is_the_highest_id() -> None:
    table = vocabulary()
    assert table[END] == len(table) - 1 == max(table.values()) and table["<pad>"] == 0 and table[START] < table[END]


def test_open_clip_reads_the_saved_tokenizer_and_agrees(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    save_tokenizer(tmp_path)
    saved = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    texts = ["A photo of a red arrow.", "the blue moon, upside down!", "an unheard-of word", ""]
    texts += long_captions(scenes(20), random.Random(0))
    options = {"padding": "max_length", "max_length": CONTEXT_LENGTH, "truncation": True, "return_tensors": "pt"}
    assert torch.equal(saved(texts, **options).input_ids, encode(texts))
    back = saved.decode(encode(["a red arrow upright"])[0], skip_special_tokens=True)
    assert back == "a red arrow upright"
