"""LLM2CLIP in numbers: what its equations and transformers say, on inputs that anyone can write down."""

import math

import pytest
import torch
from torch.nn import functional as F

from clipgraft.data.base import Sample
from clipgraft.data.loader import TrainLoader
from clipgraft.data.sampling import seeded
from clipgraft.testing.ranks import run_ranks
from clipgraft.testing.tiny import tiny_clip
from clipgraft_llm.llm2clip.layer_rates import layer_of, layer_rate
from clipgraft_llm.llm2clip.objective import hard_negative_nll
from clipgraft_llm.tower.text_proj import TextProj

torch.set_num_threads(1)


def s(n, d, p):
    i = torch.arange(1, n + 1, dtype=torch.float64)[:, None]
    j = torch.arange(1, d + 1, dtype=torch.float64)[None]
    return torch.sin(0.61 * i + 1.37 * j + 0.053 * i * j + p)


def u(n, d, p):
    return F.normalize(s(n, d, p), dim=-1)


X, Y5, Y, Z = (u(8, 16, p) for p in (0.0, 0.5, 1.2, 1.9))


def test_the_anchors():
    """Without these no other golden number means anything."""
    assert X[0, :3].tolist() == pytest.approx([0.30992413, -0.10708071, -0.34146130], abs=1e-8)
    assert float(Y5[7, 15]) == pytest.approx(0.16323208, abs=1e-8)
    assert float((X * Y).sum(1).mean()) == pytest.approx(0.35701882, abs=1e-8)


@pytest.mark.parametrize(
    ("width", "out", "count"),
    [(4096, 1280, 273_769_728), (2048, 1280, 69_776_640), (4096, 1152, 273_245_312), (4096, 768, 271_672_064)],
)
def test_fact_1_size_of_the_projection(width, out, count):
    with torch.device("meta"):
        proj = TextProj(width, out)
    assert sum(p.numel() for p in proj.parameters()) == count
    assert len(list(proj.parameters())) == 28


def filled(*, input_norm):
    proj = TextProj(16, 8, input_norm=input_norm).double()
    with torch.no_grad():
        for k, (name, p) in enumerate(proj.named_parameters()):
            p.copy_(0.2 * torch.sin(0.7 * torch.arange(p.numel(), dtype=torch.float64) + k).view_as(p))
            if name.endswith("norm.weight") or name == "layers.4.weight":
                p.add_(1)
    return proj


def test_fact_2_the_projection_in_numbers():
    out = filled(input_norm=True)(3 * s(4, 16, 0))
    golden = [0.316639, -0.273727, -0.305682, 0.121449, 0.189812, -0.268890, -0.477227, 0.026981]
    assert out[0].tolist() == pytest.approx(golden, abs=1e-6)
    assert float(out.detach().norm()) == pytest.approx(1.62349544, abs=1e-8)


def test_fact_3_input_norm_is_a_property_of_the_projection():
    x = 3 * s(4, 16, 0)
    normed, plain = filled(input_norm=True), filled(input_norm=False)
    assert torch.allclose(normed(7 * x), normed(x), atol=1e-12)
    assert float((normed(x) - plain(x)).detach().abs().max()) == pytest.approx(0.54697305, abs=1e-8)


def test_fact_4_stage_1_loss():
    def loss(*rows):
        return float(hard_negative_nll(*rows, scale=50.0)["loss"])

    assert loss(X, Y5, Z) == pytest.approx(0.4188225457, abs=1e-9)
    assert loss(X, Y5, None) == pytest.approx(0.0732959430, abs=1e-9)
    assert loss(X, Y, Z) == pytest.approx(28.0366276539, abs=1e-8)
    assert loss(3 * X, Y5, Z) == pytest.approx(loss(X, Y5, Z), abs=1e-12)
    assert loss(X.float(), Y5.float(), Z.float()) == pytest.approx(0.4188225457, rel=2e-5)


def test_without_negatives_it_is_one_direction_of_the_contrastive_loss():
    logits = 50 * X @ Y5.T
    assert float(hard_negative_nll(X, Y5, None, scale=50.0)["loss"]) == float(F.cross_entropy(logits, torch.arange(8)))
    with_negatives = hard_negative_nll(X, Y5, Z, scale=50.0)["loss"]
    assert with_negatives > hard_negative_nll(X, Y5, None, scale=50.0)["loss"]  # more to be confused with


def half(rank):
    rows = slice(4 * rank, 4 * rank + 4)
    inputs = [t[rows].clone().requires_grad_() for t in (X, Y5, Z)]
    loss = hard_negative_nll(*inputs, scale=50.0)["loss"]
    loss.backward()
    return float(loss), [t.grad for t in inputs]


def of_this_rank():
    from clipgraft import distributed

    return half(distributed.rank())


@pytest.mark.slow
def test_two_ranks_have_the_loss_and_gradient_of_one():
    whole = [t.clone().requires_grad_() for t in (X, Y5, Z)]
    loss = hard_negative_nll(*whole, scale=50.0)["loss"]
    loss.backward()
    found = run_ranks(of_this_rank, 2)
    assert [value for value, _ in found] == pytest.approx([float(loss)] * 2, abs=1e-12)
    for k, t in enumerate(whole):
        gathered = torch.cat([grads[k] for _, grads in found])
        assert torch.allclose(gathered / 2, t.grad, atol=1e-12)  # DDP divides by the number of ranks


def test_fact_10_rates_fall_from_head_to_pixels():
    names = [
        "tower.conv1.weight", "tower.class_embedding", "tower.positional_embedding", "tower.ln_pre.weight",
        *[f"tower.transformer.resblocks.{k}.ln_1.weight" for k in range(24)], "tower.ln_post.weight", "tower.proj",
    ]  # fmt: skip
    rates = {name: layer_rate(f".{name}", 24, decay=0.85) for name in names}
    assert len(set(rates.values())) == 26
    assert min(rates.values()) == pytest.approx(0.0171978, abs=1e-7) == pytest.approx(0.85**25, abs=1e-7)
    assert rates["tower.transformer.resblocks.23.ln_1.weight"] == pytest.approx(0.85)
    assert rates["tower.proj"] == rates["tower.ln_post.weight"] == 1.0
    low = {rates[n] for n in names[:4]}
    assert low == {min(rates.values())}


def test_fact_10_the_official_rule_misses_two_names():
    rates = {
        n: layer_rate(f".tower.{n}", 24, decay=0.85, compat="official") for n in ("class_embedding", "conv1.weight")
    }
    assert rates["class_embedding"] == layer_rate(".tower.ln_pre.bias", 24, decay=0.85, compat="official") == 1.0
    assert rates["conv1.weight"] == pytest.approx(0.85**25)


def test_layers_of_real_towers_have_a_place():
    for kind in ("vit", "siglip-timm"):
        image = tiny_clip(kind=kind).image
        places = {layer_of(f".{n}", image.depth) for n, _ in image.named_parameters()}
        assert places == set(range(image.depth + 2))


class Two:
    """Samples with a short and a long caption."""

    name, fingerprint, classes, templates, attributes = "two", "two", (), (), {}

    def __len__(self):
        return 2000

    def __getitem__(self, index):
        return Sample(str(index), torch.zeros(3, 2, 2, dtype=torch.uint8), ("short", "a longer one"))


def test_fact_11_either_caption_is_drawn_half_of_the_time():
    encoder, source = tiny_clip(), Two()
    loader = TrainLoader(source, preprocess=encoder.preprocess, tokenizer=encoder.tokenizer, batch_size=8, seed=0)

    def drawn(seed):
        return [
            loader._caption(source[k], seeded(seed, epoch, k))[0] == "short" for epoch in range(5) for k in range(2000)
        ]

    share = sum(drawn(0)) / 10_000
    assert abs(share - 0.5) < 4 * math.sqrt(0.25 / 10_000)
    assert drawn(0) == drawn(0) != drawn(1)
