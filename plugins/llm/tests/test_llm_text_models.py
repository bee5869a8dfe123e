"""Text models as they are published: attention, padding, pooling, prompts, and what is refused in one line."""

import json
import os
import shutil
import warnings
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from clipgraft.encoders import load
from clipgraft.errors import ClipgraftError, InputError
from clipgraft_llm.testing import LLAMA_TEMPLATE, write_tiny_embedder, write_tiny_llama
from clipgraft_llm.tower.caption_tokens import CaptionTokenizer
from clipgraft_llm.tower.language_model import LanguageModel, from_config, pool, read_language_model
from clipgraft_llm.tower.model_folder import find_model
from clipgraft_llm.tower.settings import TextModelConfig, settled

torch.set_num_threads(1)
TEXTS = ["a red dog", "a large yellow cat over a small white car", "near"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write_tiny_llama(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def embedder(tmp_path_factory):
    return write_tiny_embedder(tmp_path_factory.mktemp("models") / "embedder")


def opened(folder, **more):
    found = find_model(str(folder))
    return read_language_model(found, settled(TextModelConfig(model=str(folder), **more), found))


def plain_llama(implementation, **config):
    from transformers import LlamaConfig

    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "attn_implementation": implementation}
    return from_config(LlamaConfig(**sizes, **heads, **config), seed=0).eval()


MASKS = {"none": None, "ones": [1] * 6, "padded": [0, 0] + [1] * 6}


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("mask", MASKS)
def test_facts_5_and_6_a_causal_model_is_opened_by_its_configuration(implementation, mask):
    model, ids = plain_llama(implementation), list(range(5, 11))
    rows = [[0] * (len(MASKS[mask] or ids) - 6) + row for row in (ids, [*ids[:-1], 50])]
    given = None if MASKS[mask] is None else torch.tensor([MASKS[mask]])

    @torch.no_grad()
    def change():
        a, b = (model(input_ids=torch.tensor([row]), attention_mask=given).last_hidden_state[0] for row in rows)
        return float((a - b)[-6].abs().max())

    assert change() == 0
    model.config.is_causal = False
    assert change() > 0.1


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_fact_6_an_attribute_of_the_attention_modules_is_no_way(implementation):
    """Why the probe is there: with padding, this leaves the model causal without a word."""
    model = plain_llama(implementation)
    for layer in model.layers:
        layer.self_attn.is_causal = False
    mask = torch.tensor([[0, 0] + [1] * 6])
    with torch.no_grad():
        a, b = (
            model(input_ids=torch.tensor([[0, 0, 5, 6, 7, 8, 9, last]]), attention_mask=mask).last_hidden_state[0, 2]
            for last in (10, 50)
        )
    assert float((a - b).abs().max()) == 0


def test_the_probe_ends_a_run_that_would_stay_causal(llama):
    language = opened(llama)
    assert not language.reads_the_end()
    assert opened(llama, attention="bidirectional").reads_the_end()

    class Deaf(torch.nn.Module):
        """Ignores both the configuration and a mask of four dimensions."""

        def __init__(self, model):
            super().__init__()
            self.inner, self.config = model, model.config

        def forward(self, input_ids, attention_mask=None):
            self.config.is_causal = True
            mask = attention_mask if attention_mask.ndim == 2 else None
            return self.inner(input_ids=input_ids, attention_mask=mask)

    tokens = CaptionTokenizer(language.tokens.inner, settings=replace(language.settings, attention="bidirectional"))
    with pytest.raises(ClipgraftError, match="stays causal"):
        LanguageModel(Deaf(language.model), tokens=tokens)


def test_where_the_configuration_is_ignored_a_mask_opens_attention(llama):
    language = opened(llama, attention="bidirectional")
    expected = language(language.tokens(TEXTS)).pooled

    class Fixed(torch.nn.Module):
        """Takes causality from nowhere but the mask."""

        def __init__(self, model):
            super().__init__()
            self.inner, self.config = model, model.config

        def forward(self, input_ids, attention_mask=None, position_ids=None):
            self.inner.config.is_causal = True
            return self.inner(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids)

    other = LanguageModel(Fixed(opened(llama).model), tokens=language.tokens).eval()
    assert other.mask4d and other.reads_the_end()
    assert torch.allclose(other(language.tokens(TEXTS)).pooled, expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "embedder"])
def test_fact_7_padding_changes_nothing(kind, llama, embedder):
    language = opened(llama if kind == "llama" else embedder)
    together = language(language.tokens(TEXTS)).pooled
    for k, text in enumerate(TEXTS):
        alone = language(language.tokens.trim(language.tokens([text]))).pooled[0]
        assert torch.allclose(together[k], alone, atol=1e-5)


def test_fact_8_pooling_leaves_the_prompt_out_and_the_end_token_in(llama):
    language = opened(llama, template=LLAMA_TEMPLATE, attention="bidirectional")
    assert language.settings.over == "caption"
    tokens, inner = language.tokens, language.tokens.inner
    ids = tokens.trim(tokens([TEXTS[0]]))
    own = inner(TEXTS[0] + "<|eot_id|>", add_special_tokens=False)["input_ids"]
    assert ids[0, -len(own) :].tolist() == own and ids.shape[1] == tokens.lead + len(own)
    hidden = language(ids, want=replace_tokens()).tokens
    expected = hidden[0, -len(own) :].mean(0)
    assert torch.allclose(language(ids).pooled[0], expected, atol=1e-6)
    assert not torch.allclose(language(ids, lead=tokens.lead - 1).pooled[0], expected, atol=1e-4)
    whole = opened(llama, template=LLAMA_TEMPLATE, attention="bidirectional", over="all")
    assert torch.allclose(whole(ids).pooled[0], hidden[0].mean(0), atol=1e-6)


def replace_tokens():
    from clipgraft.types import FeatureRequest

    return FeatureRequest(tokens=True)


def test_pooling_on_hidden_states_that_say_which_token_they_are(llama):
    settings = opened(llama).settings
    hidden = torch.arange(5.0)[None, :, None].expand(1, 5, 2)
    real = torch.tensor([[False, True, True, True, True]])
    found = {
        name: float(pool(hidden, real=real, settings=replace(settings, **change), lead=1)[0, 0])
        for name, change in {
            "caption": {"pooling": "mean", "over": "caption"}, "all": {"pooling": "mean", "over": "all"},
            "last": {"pooling": "last"}, "cls": {"pooling": "cls"},
        }.items()
    }  # fmt: skip
    assert found == {"caption": 3.0, "all": 2.5, "last": 4.0, "cls": 1.0}


def test_ids_of_llama_pad_on_the_left_even_when_padding_is_the_end_token(llama):
    tokens = opened(llama, template=LLAMA_TEMPLATE).tokens
    assert tokens.pad_id == tokens.inner.convert_tokens_to_ids("<|eot_id|>")
    ids = tokens(TEXTS)
    real = tokens.real(ids)
    assert real[:, -1].all() and not real[:, 0].any()
    assert (ids[real.nonzero()[:1, 0], -1] == tokens.pad_id).all()  # a true end token, not padding
    assert tokens.trim(ids).shape[1] == int(real.sum(1).max())


def test_texts_that_are_too_long_lose_whole_words_and_are_counted(llama):
    tokens = opened(llama, template=LLAMA_TEMPLATE, max_length=24).tokens
    long = " ".join(["yellow", "triangle"] * 20)
    with pytest.warns(UserWarning, match="loses words"):
        ids = tokens(["a dog", long])
    assert (tokens.cut, tokens.seen) == (1, 2)
    kept = tokens.inner.decode(ids[1, tokens.lead :]).removesuffix("<|eot_id|>")
    words = kept.split()
    assert words == long.split()[: len(words)]
    whole = ids[1, tokens.real(ids)[1]]
    assert whole[-1] == tokens.pad_id and whole[0] == tokens.head[0]  # the end token is there, and so is the beginning
    more = " ".join(long.split()[: len(words) + 1])
    assert len(tokens._own(more)) > 24 - tokens.lead
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # told once
        tokens([long])
        one = tokens(["y" * 500])
    assert tokens.cut == 3 and one.shape == (1, 24) and one[0, -1] == tokens.pad_id


def test_sentence_transformers_files_decide(embedder, tmp_path):
    language = opened(embedder)
    s = language.settings
    assert (s.pooling, s.over, s.unit, s.max_length, s.decoder) == ("mean", "all", True, 48, False)
    ids = language.tokens(TEXTS)
    mask = (ids != 0).long()
    with torch.no_grad():
        hidden = language.model(input_ids=ids, attention_mask=mask).last_hidden_state
    mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    assert torch.allclose(language(ids).pooled, F.normalize(mean, dim=-1), atol=1e-6)
    cls = opened(write_tiny_embedder(tmp_path / "cls", pooling="cls", unit=False))
    assert torch.allclose(cls(ids).pooled, hidden[:, 0], atol=1e-6) and not cls.settings.unit
    last = opened(write_tiny_embedder(tmp_path / "last", pooling="last", unit=False))
    ends = mask.sum(1) - 1
    assert torch.allclose(last(ids).pooled, hidden[torch.arange(3), ends], atol=1e-6)


def test_the_default_prompt_of_a_directory_is_used(embedder, tmp_path):
    folder = shutil.copytree(embedder, tmp_path / "prompted")
    described = {"prompts": {"query": "a photo of ", "document": ""}, "default_prompt_name": "query"}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(described))
    tokens = opened(folder).tokens
    assert tokens.settings.template == "a photo of {}"
    assert torch.equal(tokens(["dog"]), opened(embedder).tokens(["a photo of dog"]))


def test_a_random_model_is_the_same_every_time_and_another_one(embedder):
    state = torch.get_rng_state()
    first, again = (opened(embedder, random=1)(opened(embedder).tokens(TEXTS)).pooled for _ in range(2))
    assert torch.equal(first, again) and torch.equal(torch.get_rng_state(), state)
    assert not torch.allclose(first, opened(embedder)(opened(embedder).tokens(TEXTS)).pooled, atol=1e-2)


def test_fingerprints_follow_contents_and_not_places(llama, tmp_path):
    copy = shutil.copytree(llama, tmp_path / "elsewhere")
    assert find_model(str(copy)).fingerprint() == find_model(str(llama)).fingerprint()
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    assert find_model(str(copy)).fingerprint() != find_model(str(llama)).fingerprint()
    assert find_model(str(copy)).tokenizer_fingerprint() == find_model(str(llama)).tokenizer_fingerprint()


def test_a_moved_directory_is_found_where_the_variable_says(llama, tmp_path, monkeypatch):
    gone = tmp_path / "models" / "llama"
    with pytest.raises(InputError, match="CLIPGRAFT_LLM_PATH"):
        find_model(str(gone))
    monkeypatch.setenv("CLIPGRAFT_LLM_PATH", f"{tmp_path}/nowhere:{llama.parent}")
    assert find_model(str(gone)).path == llama.resolve()


def refused(folder, **more):
    with pytest.raises(InputError) as error:
        opened(folder, **more)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_is_refused_is_told_in_one_line(llama, embedder, tmp_path):
    bare = shutil.copytree(llama, tmp_path / "bare")
    (bare / "model.safetensors").unlink()
    assert "no weights" in refused(bare)
    (bare / "pytorch_model.bin").write_bytes(b"x")
    assert "a pickle, which is not read" in refused(bare)
    broken = shutil.copytree(llama, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"not a tensor")
    assert "can't be read" in refused(broken)
    coded = shutil.copytree(llama, tmp_path / "coded")
    config = json.loads((coded / "config.json").read_text())
    (coded / "config.json").write_text(json.dumps(config | {"model_type": "mystery"}))
    assert "its own code" in refused(coded)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "has no config.json" in refused(empty)
    assert "{} once" in refused(llama, template="no place")
    assert "more than" in refused(llama, max_length=4096)
    assert "cls reads the first token" in refused(llama, pooling="cls")
    assert "shorten it" in refused(llama, template=LLAMA_TEMPLATE, max_length=8)
    maxed = tmp_path / "maxed"
    assert "pools by max_tokens" in refused(write_tiny_embedder(maxed, pooling="max"))
    dense = shutil.copytree(embedder, tmp_path / "dense")
    modules = json.loads((dense / "modules.json").read_text())
    modules.append({"idx": 3, "path": "3_Dense", "type": "sentence_transformers.models.Dense"})
    (dense / "modules.json").write_text(json.dumps(modules))
    assert "its step Dense is not supported" in refused(dense)
    part = shutil.copytree(llama, tmp_path / "part")
    from safetensors.torch import load_file, save_file

    tensors = load_file(part / "model.safetensors")
    tensors.pop("model.norm.weight")
    save_file(tensors, part / "model.safetensors", {"format": "pt"})
    assert "norm.weight is missing" in refused(part)


@pytest.mark.skipif("CLIPGRAFT_SENTENCE_MODEL" not in os.environ, reason="CLIPGRAFT_SENTENCE_MODEL names no directory")
def test_a_real_sentence_model_gives_what_transformers_gives():
    """A sentence-transformers directory that pools by the mean, such as all-MiniLM-L6-v2's."""
    from transformers import AutoModel, AutoTokenizer

    folder = os.environ["CLIPGRAFT_SENTENCE_MODEL"]
    texts = ["A man is eating food.", "Someone has a meal.", "The girl is carrying a baby."]
    inputs = AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
    encoder = load(f"llm:{folder}").eval()
    assert encoder.text is not None
    with torch.no_grad():
        hidden = AutoModel.from_pretrained(folder).eval()(**inputs).last_hidden_state
        mask = inputs["attention_mask"][..., None]
        wanted = F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
        found = encoder.text(encoder.tokenizer(texts)).unit()
    assert torch.allclose(found, wanted, atol=1e-5)
    near = found @ found.T
    assert near[0, 1] > 0.5 > near[0, 2]
