"""Retrieval with long captions: recall as the core has it, what is cut, captions among captions, published layouts."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from clipgraft.data import open_source
from clipgraft.data.base import BadSample
from clipgraft.encoders.tokenizers import BpeTokenizer
from clipgraft.errors import InputError
from clipgraft.evaluation import evaluate
from clipgraft.evaluation.features import EncoderFeatures
from clipgraft.registry import Registry
from clipgraft.testing.tiny import TinyTokenizer, tiny_clip
from clipgraft_llm.long_retrieval.caption_retrieval import CaptionRetrieval
from clipgraft_llm.long_retrieval.cut import cut_tokens

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def registry():
    return Registry.discover()


def clip(context=20):
    encoder = tiny_clip(context=context, vocab=49408, width=16, depth=1).eval()
    encoder.data.tokenizer = BpeTokenizer(context)
    del encoder.data.model_config["text_cfg"]["hf_tokenizer_name"]
    return encoder


def picture(file, k):
    file.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(k)
    Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(file)


# -- what is cut ---------------------------------------------------------------------------------------------------


def test_tokens_behind_the_context_are_counted():
    texts = ["a cat", "cat " * 18, "cat " * 19, "dog " * 200, ""]
    found = cut_tokens(BpeTokenizer(20), texts)
    assert [cut.length for cut in found] == [4, 20, 21, 202, 2]
    assert [cut.lost for cut in found] == [0, 0, 1, 182, 0]
    assert cut_tokens(BpeTokenizer(77), []) == []


def test_a_tokenizer_that_pads_with_its_end_is_counted_alike(tmp_path):
    from clipgraft.encoders.tokenizers import HuggingFaceTokenizer

    TinyTokenizer(context_length=9).save(str(tmp_path))
    file = tmp_path / "tokenizer_config.json"
    for pad in ("[PAD]", "[EOT]"):
        file.write_text(
            json.dumps(json.loads(file.read_text()) | {"pad_token": pad, "tokenizer_class": "PreTrainedTokenizerFast"})
        )
        saved = json.loads((tmp_path / "tokenizer.json").read_text())
        saved["truncation"] = saved["padding"] = None
        (tmp_path / "tokenizer.json").write_text(json.dumps(saved))
        found = cut_tokens(HuggingFaceTokenizer(str(tmp_path), 9), ["a cat", "a cat and a dog and a car", "cat " * 30])
        assert [cut.lost for cut in found] == [0, 1, 23]


def test_a_tokenizer_whose_context_is_fixed_is_refused():
    with pytest.raises(InputError, match="can't be counted"):
        cut_tokens(TinyTokenizer(), ["a cat"])


# -- evaluators ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Twelve images with two captions each, one of them longer than 20 tokens, and one image with a single caption."""
    root, rows = tmp_path_factory.mktemp("table"), ["image,caption"]
    for k in range(12):
        picture(root / f"{k}.png", k)
        rows += [f"{k}.png,number {k} " + "of many things " * 8, f"{k}.png,the number {k}"]
    (root / "table.csv").write_text("\n".join(rows) + "\n")
    (root / "single.csv").write_text("\n".join([*rows[:-1]]) + "\n")
    return root


def test_long_retrieval_is_the_cores_and_says_what_is_cut(table, registry):
    names, encoder = ["llm/long-retrieval", "core/retrieval"], clip()
    found = evaluate(encoder, [f"{name}@csv:{table}/table.csv" for name in names], registry=registry)
    long, plain = (found[name] for name in names)
    assert {k: long.metrics[k] for k in plain.metrics} == plain.metrics
    lengths = [n for n, _ in ((c.length, c.lost) for c in cut_tokens(encoder.tokenizer, captions(table)))]
    lost = [max(0, n - 20) for n in lengths]
    assert long.metrics["truncated"] == 0.5 and long.counts["truncated"] == (12, 24)
    assert long.metrics["tokens_lost"] == sum(lost) / 24 and long.metrics["tokens"] == sum(lengths) / 24
    assert long.lower == {"truncated", "tokens_lost"}
    assert long.samples[0]["truncated"] == 1 and long.samples[0]["captions"] == 2
    assert long.intervals["truncated"] == (0.5, 0.5) and "tokens_lost" in long.intervals
    whole = evaluate(clip(77), [f"llm/long-retrieval@csv:{table}/table.csv"], registry=registry)["llm/long-retrieval"]
    assert whole.metrics["truncated"] == whole.metrics["tokens_lost"] == 0


def captions(table):
    source = open_source(f"csv:{table}/table.csv")
    return [caption for k in range(12) for caption in source[k].captions]


def test_caption_retrieval_asks_the_text_tower_alone(table, registry):
    source, encoder = open_source(f"csv:{table}/table.csv"), clip(77)
    read = type(source).__getitem__
    type(source).__getitem__ = lambda *_: pytest.fail("an image was read")
    try:
        found = CaptionRetrieval()(EncoderFeatures(encoder), source)
    finally:
        type(source).__getitem__ = read
    said = [source.entry(k).captions for k in range(12)]
    with torch.no_grad():
        first, other = (
            torch.nn.functional.normalize(encoder.text(encoder.tokenizer([pair[k] for pair in said])).pooled)
            for k in (0, 1)
        )
    scores = first @ other.T
    ranks = (scores >= scores.diagonal()[:, None] - 1e-6).sum(1) - 1
    assert [row["rank"] for row in found.samples] == ranks.tolist()
    assert found.metrics["r1"] == float((ranks < 1).double().mean()) and found.metrics["left_out"] == 0
    assert set(found.counts) == {"r1", "r5", "r10", "left_out"}


def test_images_with_one_caption_are_left_out_and_counted(table, registry):
    found = evaluate(clip(77), [f"llm/caption-retrieval@csv:{table}/single.csv"], registry=registry)
    metrics = found["llm/caption-retrieval"].metrics
    assert metrics["left_out"] == pytest.approx(1 / 12) and len(found["llm/caption-retrieval"].samples) == 11


def test_with_more_captions_any_other_one_counts(tmp_path):
    rows = ["image,caption"]
    for k, names in enumerate((("a", "x", "a b"), ("c", "y", "c d"))):
        picture(tmp_path / f"{k}.png", k)
        rows += [f"{k}.png,{name}" for name in names]
    (tmp_path / "t.csv").write_text("\n".join(rows) + "\n")
    source = open_source(f"csv:{tmp_path}/t.csv")

    class Vectors:
        """Letters as directions."""

        encoder = clip()

        @staticmethod
        def texts(texts):
            rows = [[float(letter in text.split()) for letter in "abcdxy"] for text in texts]
            return torch.nn.functional.normalize(torch.tensor(rows), dim=-1)

    assert CaptionRetrieval(captions=3, ks=(1,))(Vectors(), source).metrics["r1"] == 1
    assert CaptionRetrieval(captions=2, ks=(1,))(Vectors(), source).metrics["r1"] == 0  # a tie counts against it


def test_captions_that_are_too_few_are_said_to_be(tmp_path, registry):
    picture(tmp_path / "0.png", 0)
    (tmp_path / "t.csv").write_text("image,caption\n0.png,one\n0.png,one\n")
    with pytest.raises(InputError, match="0 images have two different captions"):
        evaluate(clip(), [f"llm/caption-retrieval@csv:{tmp_path}/t.csv"], registry=registry)


# -- layouts -------------------------------------------------------------------------------------------------------


@pytest.fixture
def urban(tmp_path):
    for k in (1, 2, 10):
        picture(tmp_path / "image" / f"{k}.jpg", k)
        (tmp_path / "caption").mkdir(exist_ok=True)
        (tmp_path / "caption" / f"{k}.txt").write_text(f"A street, number {k}.\nanother line\n")
    return tmp_path


def test_urban1k_has_the_first_line_of_each_caption(urban, registry):
    source = open_source(f"urban1k:{urban}", registry=registry)
    assert [source.entry(k).id for k in range(3)] == ["image/1.jpg", "image/2.jpg", "image/10.jpg"]
    assert source[2].captions == ("A street, number 10.",) and source[2].image.size == (32, 32)


def test_an_image_without_its_caption_is_named_and_counted(urban, registry):
    (urban / "caption/2.txt").unlink()
    (urban / "caption/7.txt").write_text("Nothing to see.")
    picture(urban / "image/3.jpg", 3)
    (urban / "caption/3.txt").write_text("A third street.")
    source = open_source(f"urban1k:{urban}", registry=registry)
    reasons = {}
    for k in range(len(source)):
        try:
            source[k]
        except BadSample as error:
            reasons[error.sample_id] = error.reason
    assert reasons == {"image/2.jpg": "empty caption", "image/7.jpg": "missing file"}
    found = evaluate(clip(), [f"llm/long-retrieval?ks=[1]@urban1k:{urban}"], registry=registry)["llm/long-retrieval"]
    assert found.metrics["skipped"] == 2 and len(found.samples) == 3


def test_urban1k_without_its_folders_or_captions_is_refused(urban, registry):
    with pytest.raises(InputError, match="no folder image/"):
        open_source(f"urban1k:{urban}/image", registry=registry)
    for file in (urban / "caption").iterdir():
        file.write_text("\n")
    with pytest.raises(InputError, match="none of 3 images has a caption"):
        open_source(f"urban1k:{urban}", registry=registry)


@pytest.fixture
def docci(tmp_path):
    rows = []
    for k, split in enumerate(("train", "test", "test", "qual_dev")):
        name = f"{split}_{k:05d}"
        picture(tmp_path / "images" / f"{name}.jpg", k)
        row = {"example_id": name, "split": split, "image_file": f"{name}.jpg", "description": f"A dog.\nIt is {k}."}
        rows.append(json.dumps(row))
    (tmp_path / "docci_descriptions.jsonlines").write_text("\n".join(rows) + "\n")
    return tmp_path


def test_docci_by_split(docci, registry):
    source = open_source(f"docci:{docci}", registry=registry)
    assert [source[k].captions for k in range(len(source))] == [("A dog. It is 1.",), ("A dog. It is 2.",)]
    assert len(open_source(f"docci:{docci}?split=train", registry=registry)) == 1
    with pytest.raises(InputError, match="did you mean"):
        open_source(f"docci:{docci}?split=tests", registry=registry)
    with pytest.raises(InputError, match="there is no docci_descriptions"):
        open_source(f"docci:{docci}/images", registry=registry)
    file = docci / "docci_descriptions.jsonlines"
    file.write_text('{"split": "test", "image_file": "test_00001.jpg"}\n')
    with pytest.raises(InputError, match="line 1: no description; found split, image_file"):
        open_source(f"docci:{docci}", registry=registry)
    file.write_text("{broken\n")
    with pytest.raises(InputError, match="line 1: no JSON"):
        open_source(f"docci:{docci}", registry=registry)


@pytest.fixture
def shared(tmp_path):
    records = []
    for k in range(1004):
        image = f"sam/{k}.jpg" if k != 1003 else "sam/5.jpg"  # an image of the validation part once more
        turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": f"Line one {k}.\nTwo."}]
        records.append({"id": str(k), "image": image, "conversations": turns})
    (tmp_path / "cap.json").write_text(json.dumps(records))
    for k in (0, 1000):
        picture(tmp_path / "data/sam" / f"{k}.jpg", k)
    return tmp_path


def test_sharegpt4v_keeps_its_first_thousand_out_of_training(shared, registry):
    def opened(split):
        return open_source(f"sharegpt4v:{shared}/cap.json?images={shared}/data&split={split}", registry=registry)

    val, train = opened("val"), opened("train")
    assert len(val) == 1000 and val[0].captions == ("Line one 0. Two.",)
    assert [train.entry(k).id for k in range(len(train))] == ["sam/1000.jpg", "sam/1001.jpg", "sam/1002.jpg"]
    assert not {val.entry(k).id for k in range(1000)} & {train.entry(k).id for k in range(3)}
    assert len(opened("all")) == 1003 and train[0].image.size == (32, 32)
    with pytest.raises(BadSample, match="missing file"):
        train[1]


def test_sharegpt4v_says_what_is_wrong_with_the_file(shared, registry):
    def opened(**query):
        asked = "&".join(f"{k}={v}" for k, v in ({"images": f"{shared}/data"} | query).items())
        return open_source(f"sharegpt4v:{shared}/cap.json?{asked}", registry=registry)

    with pytest.raises(InputError, match="no such folder"):
        opened(images="nowhere")
    records = json.loads((shared / "cap.json").read_text())
    for wrong, said in (
        ([], "expected a list"),
        ({"a": 1}, "expected a list of conversations, got dict"),
        ([records[0] | {"conversations": records[0]["conversations"][:1]}], "record 0: no caption"),
        ([{"conversations": records[0]["conversations"]}], "record 0: no image"),
        (records[:1000], None),
    ):
        (shared / "cap.json").write_text(json.dumps(wrong))
        if said:
            with pytest.raises(InputError, match=said):
                opened()
        else:
            with pytest.raises(InputError, match="split train of 1000 records is empty"):
                opened(split="train")
    for record in records:
        record["conversations"][1]["value"] = " "
    (shared / "cap.json").write_text(json.dumps(records))
    with pytest.raises(InputError, match="none of its 1000 images has a caption"):
        opened()
