"""Rewritten captions beside a source's own: joined by id, drawn by share, counted where they are missing."""

import json
import logging
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from clipgraft.data import open_source
from clipgraft.data.loader import TrainLoader
from clipgraft.encoders.base import Preprocess
from clipgraft.encoders.tokenizers import BpeTokenizer
from clipgraft.errors import InputError
from clipgraft.registry import Registry
from clipgraft_llm.captions.rewrites import read_rewrites

N = 10


@pytest.fixture(scope="module")
def registry():
    return Registry.discover()


@pytest.fixture
def table(tmp_path):
    rows = ["image,caption"]
    for k in range(N):
        Image.fromarray(np.full((32, 32, 3), 20 * k, dtype=np.uint8)).save(tmp_path / f"{k}.png")
        rows.append(f"{k}.png,own {k}")
    (tmp_path / "pairs.csv").write_text("\n".join(rows) + "\n")
    return tmp_path


def lines(folder, rows, name="rewrites.jsonl"):
    (folder / name).write_text("\n".join(json.dumps(row) for row in rows) + "\n")


def opened(folder, registry, name="rewrites.jsonl", **query):
    asked = "&".join(f"{k}={v}" for k, v in ({"from": f"csv:{folder}/pairs.csv"} | query).items())
    return open_source(f"captions:{folder}/{name}?{asked}", registry=registry)


def both(k):
    return {"id": f"{k}.png", "llama": f"llama {k}", "chat": [f"chat {k}", f"chat again {k}"]}


def test_every_text_is_drawn_equally_often_unless_told_otherwise(table, registry):
    lines(table, [both(k) for k in range(N)])
    sample = opened(table, registry)[3]
    assert sample.captions == ("own 3", "chat 3", "chat again 3", "llama 3")
    assert sample.caption_weights == pytest.approx([0.25] * 4)


def test_shares_add_up_to_one_and_a_missing_version_leaves_its_share_to_the_others(table, registry):
    rows = [both(k) for k in range(N)]
    rows[4] = {"id": "4.png", "llama": "llama 4", "chat": " "}
    rows[5] = {"id": "5.png", "other": "unused"}
    lines(table, rows)
    source = opened(table, registry, original=0.4, versions="llama:0.3,chat:0.1", missing=0.1)
    assert source[0].captions == ("own 0", "llama 0", "chat 0", "chat again 0")
    assert source[0].caption_weights == pytest.approx((0.4, 0.45, 0.075, 0.075))
    assert source[4].captions == ("own 4", "llama 4") and source[4].caption_weights == pytest.approx((0.4, 0.6))
    assert source[5].captions == ("own 5",) and source[5].caption_weights == ()
    assert source.entry(0).captions == source[0].captions and source.entry(0).file == "0.png"
    assert source.content(0) == (table / "0.png").read_bytes()


def drawn(source, *, epochs=400, seed=0):
    """How often training draws each kind of caption; ids of the tokenizer are enough to tell them apart."""
    words = {tuple(BpeTokenizer(6)([text])[0].tolist()): text for k in range(N) for text in source[k].captions}
    preprocess = Preprocess(size=(32, 32), mean=(0.5,) * 3, std=(0.5,) * 3)
    loader = TrainLoader(source, preprocess=preprocess, tokenizer=BpeTokenizer(6), batch_size=N, seed=seed, crop=None)
    batches = loader.iterate()
    return [words[tuple(row)] for _ in range(epochs) for row in next(batches).text.tolist()]


def test_training_draws_by_share_and_the_same_for_the_same_seed(table, registry):
    lines(table, [both(k) for k in range(N)])
    uniform = drawn(opened(table, registry), epochs=60)
    counts = Counter(text.rsplit(" ", 1)[0] for text in uniform)
    assert all(abs(counts[kind] / 600 - 0.25) < 4 * (0.25 * 0.75 / 600) ** 0.5 for kind in counts) and len(counts) == 4
    assert uniform[:50] == drawn(opened(table, registry), epochs=5)
    assert uniform[:50] != drawn(opened(table, registry), epochs=5, seed=1)
    mixed = drawn(opened(table, registry, original=0.8, versions="llama"), epochs=60)
    share = sum(text.startswith("own") for text in mixed) / 600
    assert abs(share - 0.8) < 4 * (0.8 * 0.2 / 600) ** 0.5


def test_own_captions_keep_their_weights_among_each_other(table, registry):
    pytest.importorskip("clipgraft_data")
    rows = [{"image": f"{k}.png", "captions": ["a", "b"], "caption_weights": [3, 1]} for k in range(N)]
    lines(table, rows, "table.jsonl")
    lines(table, [{"id": f"{k}.png", "llama": "c"} for k in range(N)])
    reference = f"table:{table}/table.jsonl"
    weights = opened(table, registry, **{"from": reference, "original": 0.8})[0].caption_weights
    assert weights == pytest.approx((0.6, 0.2, 0.2))
    assert opened(table, registry, **{"from": reference})[0].caption_weights == pytest.approx((0.5, 1 / 6, 1 / 3))


def test_tables_join_rows_of_one_id(table, registry):
    (table / "r.csv").write_text("image,llama\n" + "".join(f'{k}.png,"one, {k}"\n{k}.png,two {k}\n' for k in range(N)))
    assert opened(table, registry, name="r.csv")[1].captions == ("own 1", "one, 1", "two 1")
    (table / "r.tsv").write_text("id\tllama\n" + "".join(f"{k}.png\tone {k}\n" for k in range(N)))
    assert opened(table, registry, name="r.tsv")[1].captions == ("own 1", "one 1")


def test_references_with_several_settings_are_written_with_a_semicolon(tmp_path, registry):
    pytest.importorskip("clipgraft_toyworld")
    lines(tmp_path, [{"id": f"tune-0-{k}", "llama": f"scene {k}"} for k in range(6)])
    source = open_source(
        f"llm/captions:{tmp_path}/rewrites.jsonl?from=toyworld/images?split=tune;n=6&original=0.5", registry=registry
    )
    assert len(source) == 6 and source[2].captions[1] == "scene 2" and source[2].caption_weights == (0.5, 0.5)
    assert source.classes and source.attributes


def test_epochs_that_a_source_plans_stay_planned(table, registry):
    pytest.importorskip("clipgraft_data")
    (table / "mix.yaml").write_text(f"[{{from: 'csv:{table}/pairs.csv', weight: 1}}]\n")
    lines(table, [{"id": f"0/{k}.png", "llama": "c"} for k in range(N)])
    source = opened(table, registry, **{"from": f"mix:{table}/mix.yaml"})
    assert [count for _, count in source.quotas] == [N] and source[0].captions == ("own 0", "c")
    assert not hasattr(opened_plain(table, registry), "quotas")


def opened_plain(table, registry):
    lines(table, [both(k) for k in range(N)])
    return opened(table, registry)


def test_samples_without_rewrites_are_named_and_counted(table, registry, caplog):
    lines(table, [both(k) for k in range(N - 1)])
    with pytest.raises(InputError, match=r"no rewrite for 1 of 10 samples .*, such as 9\.png; raise missing"):
        opened(table, registry)
    with caplog.at_level(logging.WARNING, logger="clipgraft"):
        assert opened(table, registry, missing=0.1)[9].captions == ("own 9",)
    assert "1 of 10 samples keep their own captions: 9.png" in caplog.text
    lines(table, [{"id": f"folder/{k}.png", "llama": "x"} for k in range(N)])
    with pytest.raises(InputError, match=r"10 of 10 .*ids there look like folder/0\.png"):
        opened(table, registry)


def test_the_fingerprint_follows_file_and_shares(table, registry):
    lines(table, [both(k) for k in range(N)])
    one, again, other = opened(table, registry), opened(table, registry), opened(table, registry, original=0.5)
    lines(table, [both(k) | {"llama": "new"} for k in range(N)])
    assert one.fingerprint == again.fingerprint
    assert len({one.fingerprint, other.fingerprint, opened(table, registry).fingerprint}) == 3


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"id": "0.png"}\n', "no caption in any of its 1 rows"),
        ("\n", "no row"),
        ('{"llama": "x"}\n', "line 1: no id"),
        ('{"id": "0.png", "llama": 3}\n', "llama holds a int"),
        ("[1]\n", "expected an object, got a list"),
        ("{broken\n", "line 1: no JSON"),
    ],
)
def test_files_that_are_no_captions_are_refused(tmp_path, content, said):
    (tmp_path / "r.jsonl").write_text(content)
    with pytest.raises(InputError, match=said):
        read_rewrites(f"{tmp_path}/r.jsonl", name="captions")


def test_other_mistakes_are_told_in_a_line(table, registry, tmp_path):
    lines(table, [both(k) for k in range(N)])
    for query, said in (
        ({"versions": "lama"}, "did you mean llama"),
        ({"versions": "llama:x"}, "names no version"),
        ({"versions": "llama:0", "original": 0.5}, "all shares of versions are zero"),
        ({"versions": "llama:0.5"}, "add original=0.5"),
        ({"original": 1.5}, "original"),
        ({"from": f"captions:{table}/rewrites.jsonl"}, "put all versions into one file"),
    ):
        with pytest.raises(InputError, match=said):
            opened(table, registry, **query)
    for name, content, said in (
        ("r.txt", "x", "expected a file that ends in"),
        ("gone.jsonl", None, "No such file"),
        ("r.csv", "name,llama\n1,2\n", "expected a column id"),
        ("s.csv", "id,llama\n0.png,a,b\n", "more cells than columns"),
    ):
        if content is not None:
            (table / name).write_text(content)
        with pytest.raises(InputError, match=said):
            opened(table, registry, name=name)
