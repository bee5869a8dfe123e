"""Text features on disk: joined by key, resumed, refused when they are other features than a run asks for."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from typer.testing import CliRunner

from clipgraft.data.base import BadSample, Sample
from clipgraft.errors import InputError
from clipgraft.log import RunLog
from clipgraft.testing.ranks import run_ranks
from clipgraft_llm.cache.build import build_cache
from clipgraft_llm.cache.layout import hash_of, read_description, shard_file
from clipgraft_llm.cache.reader import FeatureCache, FeatureLookup, covered
from clipgraft_llm.commands import app
from clipgraft_llm.testing import WORDS, write_tiny_llama
from clipgraft_llm.tower.language_model import read_language_model
from clipgraft_llm.tower.model_folder import find_model
from clipgraft_llm.tower.settings import TextModelConfig, settled

torch.set_num_threads(1)
NAMES = WORDS.split()


class Told:
    """n samples with two captions, but for every seventh with one."""

    name, classes, templates, attributes = "told", (), (), {}

    def __init__(self, n=20, *, without=(), changed=(), broken=()):
        self.rows = [k for k in range(n) if k not in without]
        self.changed, self.broken = changed, broken
        self.fingerprint = f"told-{n}-{without}-{changed}-{broken}"

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        k = self.rows[index]
        if k in self.broken:
            raise BadSample(f"s{k}", "broken")
        captions = (f"a {NAMES[k % 40]} {NAMES[k // 40 + 7]}", f"{NAMES[k % 40]} with {NAMES[(k * 7) % 40]} and more")
        captions = ("another caption",) if k in self.changed else captions[: 1 if k % 7 == 0 else 2]
        return Sample(f"s{k}", torch.zeros(3, 2, 2, dtype=torch.uint8), captions)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return find_model(str(write_tiny_llama(tmp_path_factory.mktemp("models") / "llama")))


def asked(folder, **more):
    return settled(TextModelConfig(model=folder.reference, **more), folder)


def built(source, out, folder, *, settings=None, stored="fp32", rows=8):
    settings = settings or asked(folder)
    return build_cache(
        source, out, folder=folder, settings=settings, read=lambda: read_language_model(folder, settings),
        log=RunLog(), stored=stored, rows=rows, batch_size=4,
    )  # fmt: skip


def test_fact_12_a_missing_key_drops_one_sample_and_keeps_all_pairs(folder, tmp_path, capsys):
    whole, some = Told(20), Told(20, without=(5,))
    found = built(some, tmp_path / "cache", folder)
    assert (found.samples, found.captions, found.shards, found.skipped) == (19, 35, 3, 0)
    cache = FeatureCache(tmp_path / "cache")
    joined = covered(whole, cache, log=RunLog())
    assert len(joined) == 19 and joined.missing == 1 and joined.first_missing == ["s5"]
    assert "1 of 20 samples of told have no cached features" in capsys.readouterr().err
    language = read_language_model(folder, asked(folder))
    for k in range(19):
        captions = joined[k].captions
        assert captions == joined.entry(k).captions == some[k].captions
        online = language(language.tokens(captions)).pooled
        assert torch.allclose(cache.features(captions), online, atol=1e-5)


def test_fact_12_half_the_bytes_and_the_same_direction(folder, tmp_path):
    exact, half = (tmp_path / name for name in ("fp32", "bf16"))
    big, small = built(Told(), exact, folder).bytes, built(Told(), half, folder, stored="bf16").bytes
    assert small < big
    texts = [c for k in range(20) for c in Told()[k].captions]
    a, b = FeatureLookup(FeatureCache(exact))(texts), FeatureLookup(FeatureCache(half))(texts)
    assert float(F.cosine_similarity(a, b).min()) > 0.99999


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"template": "photo: {}"}, "its template is '{}', this run's is 'photo: {}'"),
        ({"attention": "bidirectional"}, "its attention is 'native'"),
        ({"max_length": 40}, "its max_length is 128"),
        ({"random": 0}, "its random is None"),
    ],
)
def test_fact_12_features_of_another_way_of_asking_are_refused(folder, tmp_path, change, told):
    built(Told(4), tmp_path / "cache", folder)
    cache = FeatureCache(tmp_path / "cache")
    cache.require(folder=folder, settings=asked(folder))
    with pytest.raises(InputError) as error:
        cache.require(folder=folder, settings=asked(folder, **change))
    assert told in str(error.value)


def test_features_of_another_model_or_tokenizer_are_refused(folder, tmp_path):
    built(Told(4), tmp_path / "cache", folder)
    cache = FeatureCache(tmp_path / "cache")
    other = find_model(str(write_tiny_llama(tmp_path / "other", seed=1)))
    with pytest.raises(InputError, match="other weights or files"):
        cache.require(folder=other, settings=asked(other))
    file = other.path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"clean_up_tokenization_spaces": True}))
    with pytest.raises(InputError, match="its tokenizer was another one"):
        cache.require(folder=other, settings=asked(other))


def test_a_caption_that_changed_is_missing_too(folder, tmp_path):
    built(Told(20), tmp_path / "cache", folder)
    joined = covered(Told(20, changed=(3, 4)), FeatureCache(tmp_path / "cache"), log=RunLog())
    assert joined.missing == 2 and joined.first_missing == ["s3", "s4"]
    with pytest.raises(InputError, match="no features of the caption 'never written'"):
        FeatureCache(tmp_path / "cache").features(["never written"])


def test_building_goes_on_where_it_stopped(folder, tmp_path):
    out, source = tmp_path / "cache", Told(20)

    class Stops(Exception):
        pass

    def reads_and_fails():
        language, calls = read_language_model(folder, asked(folder)), []
        usual = language.forward

        def forward(*args, **more):
            calls.append(1)
            if len(calls) > 5:
                raise Stops
            return usual(*args, **more)

        language.forward = forward
        return language

    with pytest.raises(Stops):
        build_cache(
            source, out, folder=folder, settings=asked(folder), read=reads_and_fails, log=RunLog(), stored="fp32",
            rows=8, batch_size=4,
        )  # fmt: skip
    assert sorted(p.name for p in out.iterdir()) == ["cache.json", "features-00000.safetensors"]
    with pytest.raises(InputError, match="is not finished"):
        FeatureCache(out)
    first = shard_file(out, 0).stat().st_mtime_ns
    found = built(source, out, folder)
    assert (found.reused, found.shards) == (1, 3) and shard_file(out, 0).stat().st_mtime_ns == first
    straight = tmp_path / "straight"
    built(source, straight, folder)
    for k in range(3):
        one, other = load_file(shard_file(out, k)), load_file(shard_file(straight, k))
        assert all(torch.equal(one[name], other[name]) for name in ("emb", "key_hash", "caption_hash"))

    def never():
        raise AssertionError("the model isn't needed")

    again = build_cache(
        source, out, folder=folder, settings=asked(folder), read=never, log=RunLog(), stored="fp32", rows=8
    )
    assert again.reused == 3


def test_a_damaged_or_foreign_folder_is_told_in_one_line(folder, tmp_path):
    out = tmp_path / "cache"
    built(Told(20), out, folder)
    with pytest.raises(InputError, match="made with another model, prompt or setting"):
        built(Told(20), out, folder, settings=asked(folder, template="photo: {}"))
    with pytest.raises(InputError, match="source_fingerprint"):
        built(Told(19), out, folder)
    shard_file(out, 1).write_bytes(b"damaged")
    with pytest.raises(InputError, match="is damaged"):
        FeatureCache(out)
    assert built(Told(20), out, folder).reused == 2
    shard_file(out, 2).unlink()
    with pytest.raises(InputError, match="is missing"):
        FeatureCache(out)
    with pytest.raises(InputError, match=r"holds no cache\.json"):
        read_description(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    with pytest.raises(InputError, match="is not empty and no cache"):
        built(Told(4), tmp_path / "full", folder)
    (out / "cache.json").write_text("{}")
    with pytest.raises(InputError, match="damaged or of another kind"):
        FeatureCache(out)


def test_unreadable_samples_and_lost_words_are_counted(folder, tmp_path):
    settings = asked(folder, max_length=10)
    found = built(Told(20, broken=(2,)), tmp_path / "cache", folder, settings=settings)
    assert found.skipped == 1 and found.first_skipped == ("s2",)
    tokens = read_language_model(folder, settings).tokens
    captions = [(s.id, c) for k in range(20) if k != 2 for s in [Told(20)[k]] for c in s.captions]
    assert found.cut == sum(tokens.ids(c)[1] for _, c in captions) > 0
    assert found.first_cut[0] == next(name for name, c in captions if tokens.ids(c)[1])
    with pytest.raises(InputError, match="no sample of told is in the cache"):
        covered(Told(3, changed=(0, 1, 2)), FeatureCache(tmp_path / "cache"), log=RunLog())


def test_hashes_are_signed_numbers_of_64_bits_and_never_zero():
    values = {hash_of(f"text {k}") for k in range(1000)}
    assert len(values) == 1000 and 0 not in values and all(-(2**63) <= v < 2**63 for v in values)


def test_the_command_builds_one_and_tells_as_json(folder, tmp_path):
    table = tmp_path / "table.csv"
    from PIL import Image

    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    table.write_text("image,caption\na.png,a red dog\na.png,a dog near a car\n")
    out = tmp_path / "cache"
    line = ["cache", str(folder.path), "--data", f"csv:{table}", "--out", str(out), "--template", "a\\n{}", "--json"]
    found = CliRunner().invoke(app, line, catch_exceptions=False)
    told = json.loads(found.stdout)
    assert told["samples"] == 1 and told["captions"] == 2 and told["cut"] == 0 and told["reused"] == 0
    assert told["settings"]["template"] == "a\n{}" and len(FeatureCache(out)) == 1
    again = json.loads(CliRunner().invoke(app, line, catch_exceptions=False).stdout)
    assert again["reused"] == again["shards"] == 1


class Mixed(Told):
    """A source of which an epoch draws planned amounts."""

    quotas = ((range(0, 10), 3), (range(10, 20), 5))


def test_a_mix_stays_one_without_the_samples_that_are_missing(folder, tmp_path):
    built(Told(20, without=(5, 12)), tmp_path / "cache", folder)
    joined = covered(Mixed(20), FeatureCache(tmp_path / "cache"), log=RunLog())
    assert [(list(places), count) for places, count in joined.quotas] == [
        (list(range(9)), 3),
        (list(range(9, 18)), 5),
    ]
    assert joined[9].id == "s10" and not hasattr(
        covered(Told(20), FeatureCache(tmp_path / "cache"), log=RunLog()), "quotas"
    )


def on_this_rank(model, out):
    folder = find_model(model)
    found = built(Told(20), out, folder, rows=4)
    return found.shards, found.reused


@pytest.mark.slow
def test_two_processes_share_the_files(folder, tmp_path):
    assert run_ranks(on_this_rank, 2, str(folder.path), tmp_path / "two") == [(5, 0), (5, 0)]
    built(Told(20), tmp_path / "one", folder, rows=4)
    texts = [c for k in range(20) for c in Told()[k].captions]
    one, two = (FeatureCache(tmp_path / name).features(texts) for name in ("one", "two"))
    assert torch.equal(one, two)
