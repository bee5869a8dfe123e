"""Codes: what a frozen VQ model or a k-means codebook says of an image."""

import json

import pytest
import torch
from torch.nn import functional as F

from clipgraft.errors import InputError
from clipgraft.testing.tiny import tiny_clip
from clipgraft_diffusion.codes import VQ, Codebook, TokenCodes, VqCodes, code_grid, embed, kmeans, nearest
from clipgraft_diffusion.latent import TOKENS, Standardise, TokenLatent
from clipgraft_diffusion.target import Target


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pixels(n=4, seed=0):
    return torch.rand(n, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def vq_model(seed=0):
    from diffusers import VQModel

    torch.manual_seed(seed)
    return VQModel(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=6,
        num_vq_embeddings=20,
        norm_num_groups=4,
    )


def token_codes(size=12, *, pool=1):
    tower = tiny_clip().eval()
    tokens = TokenLatent(tower.image, like=tower.image, preprocess=tower.preprocess, pool=pool)
    codes = TokenCodes(tokens, size=size)
    seen = tower.image(tower.preprocess.normalize(pixels(40)), TOKENS)
    codes.codebook.fit(tokens.raw(seen).split(16))
    return codes


def fitted(kind):
    if kind == "tokens":
        return token_codes()
    codes = VqCodes(vq_model(), size=(32, 32))
    torch.nn.init.normal_(codes.vq.quantize.embedding.weight)  # spread over the latents, so that many codes are used
    return codes


@pytest.mark.parametrize("kind", ["vq", "tokens"])
def test_x8_codes_are_int64_below_k_and_nothing_of_them_has_a_gradient(kind):
    codes = fitted(kind)
    with torch.enable_grad():
        indices = codes(pixels().requires_grad_())
    assert indices.dtype == torch.int64
    assert indices.shape == (4, codes.grid[0] * codes.grid[1])
    assert indices.min() >= 0
    assert indices.max() < codes.size
    assert len(indices.unique()) > 2
    assert not any(p.requires_grad for p in codes.parameters())
    assert embed(codes, indices).shape == (*indices.shape, codes.width)
    assert not embed(codes, indices).requires_grad
    assert codes.vectors.shape == (codes.size, codes.width)


@pytest.mark.parametrize("given", ["symmetric", "unit"])
def test_vq_codes_are_the_nearest_vectors_of_the_encoders_latent_row_by_row(given):
    vq = vq_model()
    codes, x = VqCodes(vq, size=(32, 32), pixels=given), pixels()
    latent = vq.encode(2 * x - 1 if given == "symmetric" else x).latents  # (B, 6, 4, 4)
    table = vq.quantize.embedding.weight
    wanted = [
        [[int((table - latent[b, :, r, c]).square().sum(1).argmin()) for c in range(4)] for r in range(4)]
        for b in range(len(x))
    ]
    assert codes.grid == (4, 4)
    assert codes(x).tolist() == torch.tensor(wanted).flatten(1).tolist()


def test_vq_codes_leave_autocast():
    codes, x = fitted("vq"), pixels()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(codes(x), codes(x.clone()))
        inside = codes(x)
    assert torch.equal(inside, codes(x))


@pytest.mark.parametrize(("size", "codes"), [(224, 196), (336, 441), (384, 576)])
def test_a_vq_model_with_factor_16_gives_as_many_codes_as_the_paper_has_latent_tokens(size, codes):
    h, w = code_grid((size, size), factor=16)
    assert h * w == codes


def test_a_size_between_two_codes_is_refused_with_the_next_one():
    with pytest.raises(InputError, match="384 x 384"):
        code_grid((378, 378), factor=16)


def test_vq_opens_from_a_directory_with_or_without_the_subfolder_and_from_safetensors_only(tmp_path):
    vq = vq_model()
    vq.save_pretrained(tmp_path / "repo" / "vqvae")
    for where in (tmp_path / "repo", tmp_path / "repo" / "vqvae"):
        opened = VQ.open(str(where), "vqvae")
        assert all(torch.equal(a, b) for a, b in zip(opened.parameters(), vq.parameters(), strict=True))
    weights = tmp_path / "repo" / "vqvae" / "diffusion_pytorch_model.safetensors"
    torch.save(vq.state_dict(), weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(InputError, match=r"codes\.vq"):
        VQ.open(str(tmp_path / "repo"), "vqvae")


def test_what_is_no_vq_model_is_one_clear_line(tmp_path, monkeypatch):
    assert "config.json" in VQ.problem(str(tmp_path), "vqvae")
    with pytest.raises(InputError, match=r"codes\.kind to tokens"):
        VQ.open(str(tmp_path / "none"), None)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    assert "AutoencoderKL" in VQ.problem(str(tmp_path), None)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE" in VQ.problem("someone/no-such-vq-model", "vqvae")


def test_nearest_is_the_smallest_distance():
    x, vectors = drawn(50, 7), drawn(9, 7, seed=1)
    assert torch.equal(nearest(x, vectors), torch.cdist(x.double(), vectors.double()).argmin(1))


def test_kmeans_finds_separated_groups_and_their_means():
    means = 20 * drawn(6, 3)
    x = means.repeat_interleave(30, 0) + drawn(180, 3, seed=1)
    owner = nearest(x, centres := kmeans(x, 6))
    for k in range(6):
        assert len(owner[30 * k : 30 * k + 30].unique()) == 1
        torch.testing.assert_close(centres[owner[30 * k]], x[30 * k : 30 * k + 30].mean(0), atol=1e-4, rtol=1e-4)


def test_kmeans_ends_at_a_fixed_point_no_worse_than_scikit_learns():
    cluster = pytest.importorskip("sklearn.cluster")
    x = drawn(400, 4)
    centres = kmeans(x, 10, steps=200)
    owner = nearest(x, centres)
    for k in range(10):
        torch.testing.assert_close(centres[k], x[owner == k].mean(0), atol=1e-4, rtol=1e-4)
    theirs = cluster.KMeans(10, n_init=1, random_state=0).fit(x.numpy()).inertia_
    assert (x - centres[owner]).square().sum() < 1.1 * theirs


def test_kmeans_is_the_same_for_the_same_seed_and_leaves_the_global_generator_alone():
    x, state = drawn(200, 4), torch.get_rng_state()
    assert torch.equal(kmeans(x, 8, seed=3), kmeans(x, 8, seed=3))
    assert not torch.equal(kmeans(x, 8, seed=3), kmeans(x, 8, seed=4))
    assert torch.equal(torch.get_rng_state(), state)


def test_kmeans_with_fewer_different_rows_than_codes_stays_finite():
    x = drawn(3, 4).repeat(10, 1)
    centres = kmeans(x, 8)
    assert centres.isfinite().all()
    torch.testing.assert_close(centres[nearest(x, centres)], x)
    with pytest.raises(InputError, match=r"codes\.size"):
        kmeans(x, 31)


def test_the_codebook_does_not_depend_on_batches_and_quantises_standardised_tokens():
    raw, books = 3 * drawn(40, 4, 5) + 1, []
    for size in (40, 16):
        book = Codebook(Standardise(4, 5), size=6)
        book.fit(raw.split(size))
        books.append(book)
    torch.testing.assert_close(books[0].vectors, books[1].vectors, atol=1e-5, rtol=1e-5)
    book = books[0]
    by_hand = torch.cdist(((raw - book.standardise.mean) / book.standardise.std).flatten(0, 1), book.vectors).argmin(1)
    assert torch.equal(book(raw), by_hand.view(40, 4))


def test_the_codebook_looks_at_a_bounded_number_of_tokens_but_at_all_statistics():
    raw = drawn(40, 4, 5)
    book = Codebook(Standardise(4, 5), size=6)
    book.fit(raw.split(10), most=50)
    torch.testing.assert_close(book.standardise.mean, raw.mean(0), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(book.vectors, kmeans(book.standardise(raw[:20]).flatten(0, 1)[:50], 6))


def test_codes_of_the_base_need_no_second_pass_and_shuffling_gives_another_images():
    base = tiny_clip().eval()
    tokens = TokenLatent(None, like=base.image, preprocess=base.preprocess, pool=2)
    codes = TokenCodes(tokens, size=5)
    calls = []
    base.image.register_forward_hook(lambda *_: calls.append(1))
    codes.codebook.fit([tokens.raw(base.image(base.preprocess.normalize(pixels(9)), TOKENS))])
    target, x = Target(base, codes), pixels()
    seen = target.look(x)
    assert len(calls) == 2
    assert seen.x1.dtype == torch.int64
    features = base.image(base.preprocess.normalize(x), TOKENS)
    pooled = F.avg_pool2d(features.map(), 2).flatten(2).transpose(1, 2)
    assert torch.equal(seen.x1, codes.codebook(pooled))
    with pytest.raises(ValueError, match="from_features"):
        codes(x)
