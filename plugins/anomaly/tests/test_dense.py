"""The towers' adapters against open_clip and against the closed form of the paper's code."""

import pytest
import torch

from clipgraft.errors import InputError
from clipgraft.testing.tiny import tiny_clip
from clipgraft.types import FeatureRequest
from clipgraft_anomaly.dense import DenseTower, value_attention
from clipgraft_anomaly.text_path import encode_embeddings

torch.set_num_threads(1)


def tower(**more):
    encoder = tiny_clip(depth=6, **more).eval()
    with torch.no_grad():
        for name, p in encoder.named_parameters():
            if p.ndim == 1 and "norm" not in name:
                p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))))
    return encoder


def pixels(size=32, count=2):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def test_a01_the_ordinary_path_is_open_clips():
    encoder = tower()
    dense = DenseTower(encoder.image)
    found = dense(pixels(), layers=[6], vv_start=None)
    want = encoder.image(pixels(), FeatureRequest(tokens=True))
    torch.testing.assert_close(dense.project(found.cls), want.pooled)
    torch.testing.assert_close(dense.tower.ln_post(found.local[6]), want.tokens)


def test_a03_the_local_path_never_feeds_back_into_the_global_one():
    dense = DenseTower(tower().image)
    a, b = dense(pixels(), layers=[5], vv_start=3), dense(pixels(), layers=[5], vv_start=None)
    assert torch.equal(a.cls, b.cls)
    last = dense(pixels(), layers=[6], vv_start=3)  # the class token alone goes through its ordinary attention
    torch.testing.assert_close(last.cls, b.cls, atol=1e-5, rtol=1e-5)
    assert (a.local[5] - b.local[5]).abs().max() > 1e-3


def test_a04_without_the_last_norm_the_global_embedding_is_another():
    encoder = tower()
    dense = DenseTower(encoder.image)
    cls = dense(pixels(), layers=[], vv_start=2).cls
    whole = encoder.image(pixels()).pooled
    torch.testing.assert_close(dense.project(cls), whole)
    assert (dense.project(cls, ln_post=False) - whole).abs().max() > 1e-2


def test_a05_the_local_path_is_the_sum_of_value_attentions_over_the_ordinary_stream():
    encoder = tower()
    dense = DenseTower(encoder.image)
    stream = [dense.embed(pixels())]
    for block in dense.tower.transformer.resblocks:
        stream.append(block(stream[-1]))
    found = dense(pixels(), layers=[2, 3, 4, 6], vv_start=3)
    torch.testing.assert_close(found.local[2], stream[2][:, 1:])
    for last in (3, 4, 6):
        x = stream[2]
        for layer in range(3, last + 1):
            block = dense.tower.transformer.resblocks[layer - 1]
            y = block.ln_1(stream[layer - 1])
            v = y @ block.attn.in_proj_weight[64:].T + block.attn.in_proj_bias[64:]
            heads = v.reshape(2, -1, 2, 16).transpose(1, 2)
            logits = heads @ heads.transpose(-1, -2) / 4
            torch.testing.assert_close(logits, logits.transpose(-1, -2))  # A7: symmetric, |v|^2 / sqrt(d) in the middle
            torch.testing.assert_close(logits.diagonal(dim1=-2, dim2=-1), heads.square().sum(-1) / 4)
            x = x + block.attn.out_proj((logits.softmax(-1) @ heads).transpose(1, 2).reshape(2, -1, 32))
        torch.testing.assert_close(found.local[last], x[:, 1:], atol=1e-5, rtol=1e-5)


def test_a06_layers_differ():
    found = DenseTower(tower().image)(pixels(), layers=[3, 4, 5, 6], vv_start=3).local
    assert all((found[a] - found[b]).abs().max() > 1e-3 for a in found for b in found if a < b)


def test_a16_another_size_leaves_the_stored_positions_alone_and_is_made_from_the_original_grid():
    encoder = tower()
    before = encoder.image.tower.positional_embedding.clone()
    own = DenseTower(encoder.image)(pixels(), layers=[6]).cls
    large = DenseTower(encoder.image, size=48)
    assert large(pixels(48), layers=[6]).local[6].shape == (2, 36, 32)
    assert torch.equal(encoder.image.tower.positional_embedding, before)
    assert torch.equal(DenseTower(encoder.image)(pixels(), layers=[6]).cls, own)
    want = torch.nn.functional.interpolate(
        before[1:].reshape(1, 4, 4, 32).permute(0, 3, 1, 2), (6, 6), mode="bilinear", align_corners=False
    )
    torch.testing.assert_close(large.positions()[1:], want[0].flatten(1).T)


def test_towers_and_sizes_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match="SigLIP"):
        DenseTower(tiny_clip(kind="siglip-timm").image)
    with pytest.raises(InputError, match="use 48"):
        DenseTower(tiny_clip().image, size=47)
    with pytest.raises(InputError, match="layer 7"):
        DenseTower(tower().image)(pixels(), layers=[7])


def test_embeddings_give_what_words_give():
    encoder = tower()
    ids = encoder.tokenizer(["a red cat", "the photo of a small dog"])
    end = ids.argmax(-1)
    found = encode_embeddings(encoder.text, encoder.text.embed(ids), end)
    torch.testing.assert_close(found, encoder.text(ids).pooled)
    shorter = encode_embeddings(encoder.text, encoder.text.embed(ids)[:, : int(end.max()) + 1], end)
    torch.testing.assert_close(shorter, found)  # A8: what stands behind the end token changes nothing


def test_a09_deep_tokens_overwrite_before_the_second_block_and_later_and_are_rounded_when_asked():
    encoder = tower()
    ids = encoder.tokenizer(["a red cat", "a small dog"])
    embedded, end = encoder.text.embed(ids), ids.argmax(-1)
    deep = [torch.randn(2, 32, requires_grad=True) for _ in range(3)]
    out = encode_embeddings(encoder.text, embedded, end, deep=deep)
    out.sum().backward()
    assert all(token.grad.abs().max() > 0 for token in deep)
    x, blocks = embedded + encoder.text.tower.positional_embedding, encoder.text.tower.transformer.resblocks
    mask = encoder.text.tower.attn_mask
    with torch.no_grad():
        for index, block in enumerate(blocks):
            if 1 <= index <= 3:
                x = x.clone()
                x[:, 1:3] = deep[index - 1].half().float()
            x = block(x, attn_mask=mask)
        want = encoder.text.tower.ln_final(x)[torch.arange(2), end] @ encoder.text.tower.text_projection
        assert torch.equal(encode_embeddings(encoder.text, embedded, end, deep=deep, legacy_half=True), want)
        rounded = [token.half().float() for token in deep]
        assert torch.equal(encode_embeddings(encoder.text, embedded, end, deep=rounded), want)
    with pytest.raises(InputError, match="text layers"):
        encode_embeddings(encoder.text, embedded, end, deep=[deep[0]] * 6)


def test_value_attention_takes_no_query_and_key():
    block = tower().image.tower.transformer.resblocks[0]
    x = torch.randn(1, 5, 32)
    before = value_attention(block, x)
    with torch.no_grad():
        block.attn.in_proj_weight[:64] = 0
    assert torch.equal(value_attention(block, x), before)
