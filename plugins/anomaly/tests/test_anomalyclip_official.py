"""Official checkpoints: exactly their tensors, for exactly their backbone."""

import open_clip
import pytest
import torch

from clipgraft.encoders.base import Origin
from clipgraft.encoders.openclip import build
from clipgraft.errors import InputError
from clipgraft_anomaly.anomalyclip.official import import_official
from clipgraft_anomaly.reading import ReadConfig

torch.set_num_threads(1)
READ = ReadConfig(size=32, vv_start=2)


def encoder(*, seed=0, quick=True):
    """A small CLIP with OpenAI's vocabulary."""
    config = {
        "embed_dim": 16,
        "quick_gelu": quick,
        "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 3, "head_width": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 4},
    }
    torch.manual_seed(seed)
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    tokenizer.pad_id = 0
    origin = Origin("tiny", "tiny")
    return build(config, None, preprocess={"mean": (0.5,) * 3, "std": (0.5,) * 3}, tokenizer=tokenizer, origin=origin)


def official(clip, *, context=12, layers=2, tokens=4):
    g = torch.Generator().manual_seed(1)
    found = {}
    for side, words in (("pos", "object."), ("neg", "damaged object.")):
        ids = clip.tokenizer(["X " * context + words])
        embedded = clip.text.embed(ids).detach()[None]
        found |= {
            f"ctx_{side}": torch.randn(1, 1, context, 8, generator=g),
            f"token_prefix_{side}": embedded[:, :, :1].clone(),
            f"token_suffix_{side}": embedded[:, :, 1 + context :].clone(),
            f"tokenized_prompts_{side}": ids[None].int(),
        }
    for layer in range(layers):
        found |= {
            f"compound_prompts_text.{layer}": torch.randn(tokens, 8, generator=g),
            f"compound_prompt_projections.{layer}.weight": torch.randn(5, 8, generator=g),
            f"compound_prompt_projections.{layer}.bias": torch.randn(5, generator=g),
        }
    return found


def saved(tmp_path, tensors, name="epoch_15.pth"):
    torch.save({"prompt_learner": tensors}, tmp_path / name)
    return tmp_path / name


def test_prompts_are_taken_and_give_the_texts_of_the_official_forward(tmp_path):
    clip = encoder()
    tensors = official(clip)
    head = import_official(saved(tmp_path, tensors), clip, read=READ)
    assert head.prompt.legacy_half and head.context.shape == (2, 12, 8) and head.deep.shape == (2, 4, 8)
    tower = clip.text.tower
    for k, side in enumerate(("pos", "neg")):
        x = torch.cat([tensors[f"{part}_{side}"][0] for part in ("token_prefix", "ctx", "token_suffix")], 1)
        x = x + tower.positional_embedding
        with torch.no_grad():
            for index, block in enumerate(tower.transformer.resblocks):
                if 1 <= index <= 2:
                    x = torch.cat([x[:, :1], tensors[f"compound_prompts_text.{index - 1}"][None].half(), x[:, 5:]], 1)
                x = block(x, attn_mask=tower.attn_mask)
            want = tower.ln_final(x)[0, 15 + k] @ tower.text_projection
        torch.testing.assert_close(head.texts[k], want, atol=1e-5, rtol=1e-5)


def test_anything_else_is_refused(tmp_path):
    clip = encoder()
    good = official(clip)
    for change, complaint in (
        ({"more": torch.zeros(1)}, "'more'"),
        ({"ctx_neg": torch.zeros(1, 1, 12, 9)}, r"ctx_neg is \(1, 1, 12, 9\)"),
        ({"token_suffix_pos": good["token_suffix_pos"] + 0.1}, "another backbone"),
        ({"tokenized_prompts_neg": good["tokenized_prompts_neg"] + 1}, "tokenizer"),
        ({"ctx_pos": "text"}, "more than tensors"),
    ):
        with pytest.raises(InputError, match=complaint):
            import_official(saved(tmp_path, good | change), clip, read=READ)
    lacking = {k: v for k, v in good.items() if k != "token_prefix_neg"}
    with pytest.raises(InputError, match="lacks 'token_prefix_neg'"):
        import_official(saved(tmp_path, lacking), clip, read=READ)
    with pytest.raises(InputError, match="another backbone"):
        import_official(saved(tmp_path, good), encoder(seed=5), read=READ)
    with pytest.raises(InputError, match="QuickGELU"):
        import_official(saved(tmp_path, good), encoder(quick=False), read=READ)
    with pytest.raises(InputError, match="is no file"):
        import_official(tmp_path / "nothing.pth", clip)


class Evil:
    def __reduce__(self):
        return print, ("code ran",)


def test_code_in_a_file_never_runs(tmp_path, capsys):
    torch.save({"prompt_learner": {"ctx_pos": Evil()}}, tmp_path / "evil.pth")
    with pytest.raises(InputError, match="not opened"):
        import_official(tmp_path / "evil.pth", encoder(), read=READ)
    assert "code ran" not in capsys.readouterr().out
    (tmp_path / "noise.pth").write_bytes(b"not a checkpoint")
    with pytest.raises(InputError, match="not opened"):
        import_official(tmp_path / "noise.pth", encoder(), read=READ)
