"""Stretched positions: the facts of the matrix, the graft on towers, an export that open_clip opens alone."""

import json

import open_clip
import pytest
import torch
from torch.nn import functional as F
from torch.nn.utils import parametrize

from clipgraft.checkpoint import open_export, read_manifest, write_export
from clipgraft.config.schema import GraftNode
from clipgraft.encoders import apply_grafts, merge_grafts
from clipgraft.encoders.openclip import CONFIG, build
from clipgraft.encoders.tokenizers import BpeTokenizer
from clipgraft.errors import InputError
from clipgraft.registry import Registry
from clipgraft.testing.tiny import tiny_clip
from clipgraft_llm.longclip.graft import KeptRows, StretchPositions
from clipgraft_llm.longclip.positions import interpolation_matrix, stretch_matrix, stretched, stretched_length

torch.set_num_threads(1)


def S(n, d, p):
    i, j = torch.arange(1, n + 1, dtype=torch.float64)[:, None], torch.arange(1, d + 1, dtype=torch.float64)[None]
    return torch.sin(0.61 * i + 1.37 * j + 0.053 * i * j + p)


def U(n, d, p):
    return F.normalize(S(n, d, p), dim=-1)


A = stretch_matrix(77, keep=20, context=248)


def bpe_clip(seed=0, *, context=77):
    """A tiny CLIP with CLIP's own tokenizer and layout."""
    encoder = tiny_clip(seed, context=context, vocab=49408).eval()
    encoder.data.tokenizer = BpeTokenizer(context)
    del encoder.data.model_config["text_cfg"]["hf_tokenizer_name"]
    return encoder


def features(encoder, texts):
    with torch.no_grad():
        return encoder.text(encoder.text.trim(encoder.tokenizer(texts))).pooled


def test_the_anchors_of_the_golden_inputs():
    assert U(8, 16, 0)[0, :3].tolist() == pytest.approx([0.30992413, -0.10708071, -0.34146130], abs=1e-8)
    assert float(U(8, 16, 0.5)[7, 15]) == pytest.approx(0.16323208, abs=1e-8)


def test_fact_1_the_matrix():
    assert A.shape == (248, 77) and stretched_length(77, keep=20, ratio=4) == 248
    assert A.sum(1).sub(1).abs().max() < 1e-12 and A.min() == -0.75 and A.max() == 1.75
    assert torch.linalg.matrix_rank(A) == 77 and A[247, 76] == 1.75 and A[247, 75] == -0.75


def test_fact_2_a_ramp_is_stretched_and_not_clamped():
    ramp = torch.arange(77, dtype=torch.float64)[:, None]
    new = stretched(ramp, A)[:, 0]
    assert new[19:23].tolist() == [19, 20, 20.25, 20.5]
    assert new[243:].tolist() == [75.75, 76, 76.25, 76.5, 76.75]
    naive = stretched(ramp, interpolation_matrix(77, context=248))[:, 0]
    assert naive[:4].tolist() == pytest.approx([0, 0, 0.276, 0.587], abs=1e-3) and naive[-1] == 76


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fact_3_every_old_position_survives_to_the_bit(dtype):
    old = S(77, 64, 0).to(dtype)
    new = stretched(old, A)
    assert torch.equal(new[:20], old[:20]) and torch.equal(new[20::4], old[20:])
    by_hand = torch.stack([(1 - j / 4) * old[20:76] + j / 4 * old[21:] for j in range(4)], 1).flatten(0, 1)
    assert torch.allclose(new[20:244], by_hand, atol=1e-6)
    assert torch.allclose(new[247], old[76] + 0.75 * (old[76] - old[75]), atol=1e-6)


def test_fact_4_half_precision_differs_by_its_rounding():
    old = S(77, 64, 0)
    half = old.half()
    parts = [half[:20]] + [((1 - j / 4) * half[20:76] + j / 4 * half[21:]) for j in range(4)]
    official = torch.cat([parts[0], torch.stack(parts[1:], 1).flatten(0, 1)])
    gap = (official.double() - stretched(old, A)[:244]).abs().max()
    assert 1e-5 < gap < 2.5e-3


def test_other_lengths_are_the_same_line_at_another_pace():
    ramp = torch.arange(32, dtype=torch.float64)[:, None]
    for keep, context in ((8, 104), (8, 50), (0, 77), (20, 33)):
        new = stretched(ramp, stretch_matrix(32, keep=keep, context=context))[:, 0]
        expected = torch.cat([torch.arange(keep), keep + torch.arange(context - keep) * (32 - keep) / (context - keep)])
        assert torch.allclose(new, expected.double(), atol=1e-9) and len(new) == context
    for wrong in ({"keep": 31, "context": 60}, {"keep": 8, "context": 32}):
        with pytest.raises(ValueError, match="can't stretch"):
            stretch_matrix(32, **wrong)


SHORT = ["a red circle", "two cats and a dog on the left of a small car"]
LONG = [" ".join(["a small red circle in the picture of a cat and a dog"] * n) for n in (8, 3)]


def test_fact_5_short_captions_keep_their_embeddings_to_the_bit():
    encoder = bpe_clip()
    before, cut = features(encoder, SHORT), features(encoder, LONG)
    StretchPositions().apply(encoder)
    assert torch.equal(features(encoder, SHORT), before)
    assert encoder.tokenizer.context_length == encoder.text.context_length == 248
    assert encoder.data.model_config["text_cfg"]["context_length"] == 248
    mask = encoder.text.tower.attn_mask
    assert mask.shape == (248, 248) and mask[0, 1] == -torch.inf and mask[247].eq(0).all()
    assert not torch.allclose(features(encoder, LONG), cut, atol=1e-3)


def test_interpolating_all_positions_changes_short_captions():
    encoder = bpe_clip()
    before = features(encoder, SHORT)
    StretchPositions(method="interpolate", context=248).apply(encoder)
    assert not torch.allclose(features(encoder, SHORT), before, atol=1e-4)
    assert not parametrize.is_parametrized(encoder.text.tower)


def test_fact_9_two_tensors_in_training_and_one_after_merging():
    encoder = bpe_clip()
    StretchPositions().apply(encoder)
    tower = encoder.text.tower
    names = [name for name in tower.state_dict() if "positional_embedding" in name]
    assert len(names) == 2 and not any(b.requires_grad for b in tower.buffers())
    rows = tower.parametrizations.positional_embedding
    assert rows.original.shape == (228, 32) and rows[0].kept.shape == (20, 32) and isinstance(rows[0], KeptRows)
    with torch.no_grad():
        rows.original.add_(torch.randn_like(rows.original))
    texts, table = features(encoder, SHORT + LONG), tower.positional_embedding.detach().clone()
    merge_grafts(apply_nothing(encoder))
    assert torch.equal(tower.positional_embedding, table) and isinstance(tower.positional_embedding, torch.nn.Parameter)
    assert torch.equal(features(encoder, SHORT + LONG), texts)


def apply_nothing(encoder):
    """The encoder with its graft listed, as ``apply_grafts`` lists it."""
    from clipgraft.encoders.base import AppliedGraft

    encoder.data.grafts.append(AppliedGraft("llm/stretch-positions", {}, StretchPositions()))
    return encoder


def test_fact_10_a_text_that_is_too_long_ends_in_its_last_place():
    encoder = bpe_clip()
    StretchPositions().apply(encoder)
    ids = encoder.tokenizer(["word " * 300, "other " * 300])
    assert ids.shape == (2, 248) and (ids[:, 247] == 49407).all()


def test_fact_11_only_trained_rows_that_are_read_get_a_gradient():
    encoder = bpe_clip()
    StretchPositions().apply(encoder)
    ids = encoder.tokenizer(LONG)
    encoder.text(ids).pooled.square().sum().backward()
    rows, last = encoder.text.tower.parametrizations.positional_embedding, int(ids.argmax(1).max())
    found = rows.original.grad.abs().sum(1)
    assert rows[0].kept.grad is None and 77 < last < 247
    assert (found[: last - 19] > 0).all() and (found[last - 19 :] == 0).all()


def test_open_clip_alone_reads_the_export(tmp_path):
    encoder = apply_grafts(bpe_clip(), [GraftNode(use="llm/stretch-positions")], Registry.discover())
    with torch.no_grad():
        encoder.text.tower.parametrizations.positional_embedding.original.mul_(1.5)
    folder = write_export(encoder, tmp_path / "export")
    manifest = read_manifest(folder)
    assert manifest["level"] == "L0" and manifest["grafts"][0]["merged"]
    assert json.loads((folder / CONFIG).read_text())["model_cfg"]["text_cfg"]["context_length"] == 248
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    ids = tokenizer(SHORT + LONG)
    assert ids.shape[1] == 248
    with torch.no_grad():
        theirs = model.eval().encode_text(ids)
    assert torch.allclose(theirs, features(encoder, SHORT + LONG), atol=1e-5)
    again = open_export(folder)
    assert torch.equal(features(again, SHORT + LONG), features(encoder, SHORT + LONG))
    assert parametrize.is_parametrized(encoder.text.tower), "the trained model is not merged by an export"
    StretchPositions(context=300).apply(again)
    assert again.tokenizer.context_length == 300


def test_beside_adapters_both_become_plain_weights():
    registry, encoder = Registry.discover(), bpe_clip()
    nodes = [GraftNode(use="llm/stretch-positions"), GraftNode(use="core/lora", rank=2, towers=["text"])]
    apply_grafts(encoder, nodes, registry)
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if "parametrizations" in name:
                parameter.add_(0.1)
    before = features(encoder, SHORT + LONG)
    assert not encoder.text.tower.parametrizations.positional_embedding.original.requires_grad, "as all but adapters"
    merge_grafts(encoder)
    assert not any("parametrizations" in name for name in encoder.state_dict()) and not encoder.data.grafts
    assert torch.allclose(features(encoder, SHORT + LONG), before, atol=1e-5)


def test_with_frozen_towers_the_rows_are_frozen_too():
    encoder = bpe_clip()
    encoder.requires_grad_(False)
    StretchPositions().apply(encoder)
    assert not any(p.requires_grad for p in encoder.parameters())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"context": 77}, "reads 77 tokens already.*78 or more"),
        ({"context": 40}, "not longer"),
        ({"keep": 76}, "lower keep"),
    ],
)
def test_targets_that_are_no_longer_than_the_context_are_refused(settings, said):
    encoder = bpe_clip()
    with pytest.raises(InputError, match=said):
        StretchPositions(**settings).apply(encoder)
    assert encoder.text.context_length == 77 and encoder.tokenizer.context_length == 77


def test_other_text_towers_are_refused_with_the_fix():
    encoder = bpe_clip()
    with pytest.raises(InputError, match="listed twice"):
        StretchPositions(context=500).apply(StretchPositions().apply(encoder))
    with pytest.raises(InputError, match="causal text tower"):
        StretchPositions(keep=4).apply(tiny_clip(kind="siglip-timm"))
    with pytest.raises(InputError, match="can't be changed"):
        StretchPositions(keep=4).apply(tiny_clip())
    blind = bpe_clip()
    blind.text = None
    with pytest.raises(InputError, match="no text tower"):
        StretchPositions().apply(blind)


def test_language_models_are_refused(monkeypatch):
    from transformers import RobertaConfig

    from clipgraft.encoders.base import Origin

    small = RobertaConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    monkeypatch.setattr("open_clip.hf_model.AutoConfig.from_pretrained", lambda *_, **__: small)
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16},
        "text_cfg": {"hf_model_name": "roberta-base", "hf_tokenizer_name": "roberta-base", "hf_proj_type": "mlp"},
    }
    preprocess = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    encoder = build(config, None, preprocess=preprocess, tokenizer=BpeTokenizer(77), origin=Origin("hf-text", "tiny"))
    with pytest.raises(InputError, match="HuggingFaceText text tower"):
        StretchPositions().apply(encoder)


def test_before_training_short_captions_are_retrieved_as_ever_to_the_bit():
    pytest.importorskip("clipgraft_toyworld")
    from clipgraft.data import open_source
    from clipgraft.encoders import load
    from clipgraft.evaluation import evaluate
    from clipgraft.evaluation.features import EncoderFeatures

    registry = Registry.discover()
    on = [f"core/{name}@toyworld/images?split=tune&n=128" for name in ("retrieval", "zero-shot")]
    plain, long = (load("toyworld/clip", registry=registry) for _ in range(2))
    StretchPositions(keep=12, ratio=4).apply(long)
    assert long.tokenizer.context_length == 92
    source = open_source("toyworld/images?split=tune&n=128", registry=registry)
    captions = [caption for k in range(128) for caption in source[k].captions]
    assert torch.equal(EncoderFeatures(long).texts(captions), EncoderFeatures(plain).texts(captions))
    one, two = (evaluate(encoder, on, registry=registry, spread=False) for encoder in (plain, long))
    assert {k: e.metrics for k, e in one.items()} == {k: e.metrics for k, e in two.items()}
    resampled = load("toyworld/clip", registry=registry)
    StretchPositions(method="interpolate", context=92).apply(resampled)
    assert not torch.allclose(
        EncoderFeatures(resampled).texts(captions), EncoderFeatures(plain).texts(captions), atol=0.01
    )
