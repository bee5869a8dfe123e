"""CLIP-MoE's checkable facts on tiny tensors."""

from collections import OrderedDict

import open_clip
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from clipgraft.errors import InputError
from clipgraft.testing.tiny import tiny_clip
from clipgraft_merging.feed_forwards import feed_forwards, mean_network
from clipgraft_merging.moe.accumulate import OneClusterAtATime, accumulated, pair_labels
from clipgraft_merging.moe.balance import balance, shares
from clipgraft_merging.moe.collapse import collapse
from clipgraft_merging.moe.contrast import SmoothedClipLoss
from clipgraft_merging.moe.graft import MoE
from clipgraft_merging.moe.kmeans import kmeans
from clipgraft_merging.moe.mixture import Mixture, Routing, mixtures, routings

torch.set_num_threads(1)


def network(width=8, seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    layers = {"c_fc": nn.Linear(width, 4 * width), "gelu": nn.GELU(), "c_proj": nn.Linear(4 * width, width)}
    return nn.Sequential(OrderedDict(layers)).to(dtype)


def mixture(experts=4, top_k=2, **settings):
    return Mixture([network(seed=i) for i in range(experts)], top_k=top_k, **settings)


def tokens(b=3, n=5, width=8):
    return torch.randn(b, n, width, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def test_f01_renormalised_top_k_softmax_is_the_softmax_over_the_top_k_logits():
    mixed, x = mixture(), tokens()
    weights, _ = mixed.route(x)
    logits = F.linear(x, mixed.gate.weight).topk(2, -1).values
    torch.testing.assert_close(weights, logits.softmax(-1), atol=1e-12, rtol=0)


def test_f02_identical_experts_are_the_dense_network_for_any_gate():
    x, dense = tokens(), network()
    for seed in range(3):
        mixed = Mixture([network() for _ in range(4)], seed=seed)
        torch.testing.assert_close(mixed(x), dense(x), atol=1e-12, rtol=0)
        mixed.gate.weight.data.mul_(100)
        torch.testing.assert_close(mixed(x), dense(x), atol=1e-12, rtol=0)


@pytest.fixture(scope="module")
def vit_l_14():
    """OpenAI's ViT-L/14 without memory."""
    from clipgraft.encoders.base import Origin
    from clipgraft.encoders.openclip import build

    how = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    with torch.device("meta"):
        config = open_clip.get_model_config("ViT-L-14-quickgelu")
        return build(config, None, preprocess=how, tokenizer=object(), origin=Origin("meta", "ViT-L-14"))


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_f03_f04_parameters_of_vit_l_14_with_four_experts(vit_l_14):
    ffns = {t: sum(count(p.module) for p in feed_forwards(vit_l_14, towers=[t])) for t in ("image", "text")}
    assert count(vit_l_14) == 427_616_513 and ffns == {"image": 201_449_472, "text": 56_669_184}
    mixed = MoE(experts=4, top_k=2).apply(vit_l_14)
    gates = sum(count(m.gate) for m in mixtures(mixed).values())
    assert gates == 24 * 1024 * 4 + 12 * 768 * 4 == 135_168
    assert count(mixed) == 1_202_107_649
    active = count(mixed) - 2 * sum(ffns.values())
    assert round(active / 1e6, 1) == 685.9 and round(active / 427_616_513, 2) == 1.6


def test_f05_a_gate_of_zeros_weighs_its_experts_equally():
    mixed = mixture(experts=5, top_k=3)
    mixed.gate.weight.data.zero_()
    weights, routing = mixed.route(tokens())
    assert weights.eq(1 / 3).all() and routing.probabilities.eq(0.2).all()


def routed(logits):
    """(M, B, L, E) logits -> a routing per mixture, two experts per token."""
    p = logits.softmax(-1)
    return [Routing(x, x.topk(2, -1).indices) for x in p]


def test_f06_balance_is_1_when_balanced_and_k_in_the_official_form():
    one_each = 1e-6 * torch.eye(4, dtype=torch.float64)  # four tokens, each prefers another expert ever so slightly
    pairs = one_each + 5e-7 * torch.eye(4, dtype=torch.float64).roll(1, 1)
    routings_ = routed(pairs.expand(3, 2, 4, 4))
    assert float(balance(*shares(routings_))) == pytest.approx(1, abs=1e-6)
    assert float(balance(*shares(routings_, compat="official"), compat="official")) == pytest.approx(2, abs=1e-6)
    collapsed = routed(torch.tensor([50.0, 0, 0, 0], dtype=torch.float64).expand(3, 2, 4, 4))
    assert float(balance(*shares(collapsed))) == pytest.approx(4, abs=1e-6)


def test_f07_mixtures_that_collapse_onto_different_experts_are_seen_only_per_mixture():
    logits = (30 * torch.eye(4, dtype=torch.float64)).view(4, 1, 1, 4).repeat(1, 2, 6, 1)
    # the second choice differs too, so that the official form finds everything balanced
    logits = (logits + 15 * torch.eye(4, dtype=torch.float64).roll(1, 1).view(4, 1, 1, 4)).requires_grad_()
    ours = balance(*shares(routed(logits)))
    official = balance(*shares(routed(logits), compat="official"), compat="official")
    assert ours.item() == pytest.approx(4, abs=1e-4) and official.item() == pytest.approx(2, abs=1e-4)
    (theirs,) = torch.autograd.grad(official, logits, retain_graph=True)
    (own,) = torch.autograd.grad(ours, logits)
    assert theirs.abs().max() < 1e-16 < 1e-9 < own.abs().max()


def test_f10_labels_nest_and_tiny_clusters_join_the_nearest_of_their_parent():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(600, 6, generator=g)
    first = accumulated(None, torch.randint(0, 9, (600,), generator=g), minimum=20, features=x)
    second = accumulated(first, torch.randint(0, 9, (600,), generator=g), minimum=20, features=x)
    assert second.unique().tolist() == list(range(int(second.max()) + 1)) and second.max() > first.max()
    assert second.bincount().min() >= 20
    for label in second.unique():
        assert len(first[second == label].unique()) == 1, "equal at a stage implies equal at the stage before"
    parent = torch.tensor([0] * 8 + [1] * 8)
    new = torch.tensor([0] * 3 + [1] * 4 + [2] + [0] * 8)
    places = torch.tensor([[0.0]] * 3 + [[10.0]] * 4 + [[9.0]] + [[9.0]] * 8)
    assert accumulated(parent, new, minimum=2, features=places).tolist() == [0] * 3 + [1] * 5 + [2] * 8
    assert accumulated(parent, new, minimum=9, features=places).tolist() == [0] * 8 + [1] * 8, "parents are not mixed"


def test_combined_labels_are_text_times_clusters_plus_image():
    assert pair_labels(torch.tensor([0, 2, 1]), torch.tensor([0, 0, 2]), clusters=3).tolist() == [0, 2, 7]


class Listed:
    name, fingerprint, classes, templates, attributes = "listed", "listed", (), (), {}

    def __len__(self):
        return 40


def test_f09_every_batch_has_one_accumulated_label():
    from clipgraft.data.sampling import epoch_order, plan

    labels = torch.tensor([0] * 17 + [1] * 9 + [-1] * 4 + [2] * 10)
    source = OneClusterAtATime(Listed(), labels, size=4)
    for epoch in range(3):
        order = epoch_order(plan(source), seed=0, epoch=epoch)
        assert len(order) == 16 + 8 + 8 and order.unique().numel() == len(order)
        runs = labels[order].view(-1, 4)
        assert (runs == runs[:, :1]).all() and (runs >= 0).all()


def test_f11_all_experts_per_token_is_the_dense_soft_mixture():
    mixed, x = mixture(top_k=4), tokens()
    p = F.linear(x, mixed.gate.weight).softmax(-1)
    soft = sum(p[..., [e]] * mixed.experts[e](x) for e in range(4))
    torch.testing.assert_close(mixed(x), soft, atol=1e-12, rtol=0)


def test_a_mixture_is_the_sum_over_each_tokens_experts_and_costs_top_k_networks():
    mixed, x = mixture(), tokens()
    weights, routing = mixed.route(x)
    for b, n in [(0, 0), (2, 4)]:
        parts = zip(weights[b, n], routing.chosen[b, n], strict=True)
        expected = sum(w * mixed.experts[int(e)](x[b, n]) for w, e in parts)
        torch.testing.assert_close(mixed(x)[b, n], expected, atol=1e-12, rtol=0)
    flops = {}
    for name, module in {"mixed": mixed, "dense": network(), "gate": mixed.gate}.items():
        with FlopCounterMode(display=False) as counter:
            module(x)
        flops[name] = counter.get_total_flops()
    assert flops["mixed"] == 2 * flops["dense"] + flops["gate"]


def test_gradients_reach_gate_and_experts_and_an_idle_expert_gets_zeros():
    mixed, x = mixture(experts=3), tokens()
    mixed.gate.weight.data[2] = -1e3 * x.mean((0, 1))
    mixed.gate.weight.data[:2].zero_()
    x = x.abs() * x.mean((0, 1)).sign()
    mixed(x).square().sum().backward()
    assert mixed.gate.weight.grad.abs().sum() > 0 and mixed.experts[0].c_fc.weight.grad.abs().sum() > 0
    assert mixed.experts[2].c_fc.weight.grad.abs().sum() == 0


def test_dropout_falls_on_hidden_units_in_training_only():
    mixed, x = mixture(dropout=0.5), tokens()
    mixed.experts.eval()
    assert not mixed.train()(x).equal(mixed(x)), "frozen experts drop units too"
    mixed.eval()
    assert mixed(x).equal(mixed(x))


def test_gates_are_drawn_from_their_seed_and_leave_the_global_state_alone():
    before = torch.get_rng_state()
    one, two = (MoE(seed=5).apply(tiny_clip()) for _ in range(2))
    assert torch.get_rng_state().equal(before)
    gates = [m.gate.weight for m in mixtures(one).values()]
    assert all(a.equal(b.gate.weight) for a, b in zip(gates, mixtures(two).values(), strict=True))
    assert len({g[0, 0].item() for g in gates}) == len(gates) == 4 and all(g.abs().max() <= 32**-0.5 for g in gates)


def test_an_upcycled_clip_computes_what_it_did_and_collapses_to_itself():
    plain = tiny_clip().eval()
    mixed = MoE(experts=3, last=1, towers=("image", "text")).apply(tiny_clip()).eval()
    assert list(mixtures(mixed)) == [
        "image.tower.transformer.resblocks.1.mlp",
        "text.tower.transformer.resblocks.1.mlp",
    ]
    pixels, ids = torch.rand(2, 3, 32, 32), torch.randint(1, 100, (2, 16))
    for a, b in zip(plain(pixels, ids), mixed(pixels, ids), strict=True):
        torch.testing.assert_close(a.pooled, b.pooled, atol=1e-5, rtol=0)
    back = collapse(mixed).state_dict()
    assert back.keys() == plain.state_dict().keys()
    assert all(torch.equal(back[k], v) for k, v in plain.state_dict().items())
    with pytest.raises(InputError, match="no mixture of experts"):
        collapse(plain)


def test_the_mean_network_is_the_mean_of_weights():
    found = mean_network(nn.ModuleList([network(seed=1), network(seed=2)]))
    expected = (network(seed=1).c_fc.weight + network(seed=2).c_fc.weight) / 2
    torch.testing.assert_close(found.c_fc.weight, expected, atol=1e-15, rtol=0)


def test_records_of_gates_end_with_the_block_that_asked_for_them():
    mixed = MoE().apply(tiny_clip()).eval()
    with routings(mixed.image) as found:
        mixed.image(torch.rand(2, 3, 32, 32))
    assert len(found) == 2 and found[0].probabilities.shape == (2, 17, 4) and found[0].chosen.shape == (2, 17, 2)
    mixed.image(torch.rand(2, 3, 32, 32))
    assert len(found) == 2 and all(m._record is None for m in mixtures(mixed).values())


@pytest.mark.parametrize("engine", ["torch", "scikit-learn"])
def test_kmeans_finds_separated_clusters_alike_every_time(engine):
    if engine == "scikit-learn":
        pytest.importorskip("sklearn")
    g = torch.Generator().manual_seed(0)
    truth = torch.randint(0, 4, (400,), generator=g)
    x = 10 * torch.eye(4)[truth] + torch.randn(400, 4, generator=g)
    one, two = (kmeans(x, k=4, seed=1, engine=engine) for _ in range(2))
    assert one.labels.equal(two.labels)
    assert all(len(truth[one.labels == k].unique()) == 1 for k in range(4))
    means = torch.stack([x[one.labels == k].double().mean(0) for k in range(4)])
    if engine == "torch":
        torch.testing.assert_close(one.centers, means, atol=1e-6, rtol=0)
        assert one.inertia == pytest.approx(float((x - means[one.labels]).square().sum()), rel=1e-6)


def test_kmeans_gives_an_empty_cluster_the_worst_served_row_and_refuses_too_many():
    x = torch.tensor([[0.0]] * 8 + [[1.0], [5.0]])
    assert kmeans(x, k=3).labels.bincount().tolist().count(1) == 2
    assert kmeans(torch.zeros(5, 2), k=3).inertia == 0
    with pytest.raises(InputError, match="ask for 2 or fewer"):
        kmeans(x[:2], k=3)


def test_label_smoothing_is_torchs_and_zero_is_clips_loss():
    from clipgraft.losses.base import LossInputs
    from clipgraft.losses.contrastive import ClipLoss

    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(5, 3, generator=g), torch.randn(5, 3, generator=g)
    inputs = LossInputs(image=a, text=b, logit_scale=torch.tensor(10.0))
    assert SmoothedClipLoss()(inputs)["loss"].equal(ClipLoss()(inputs)["loss"])
    logits = 10 * F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T
    soft = torch.full((5, 5), 0.1 / 5) + 0.9 * torch.eye(5)
    expected = -(soft * logits.log_softmax(1)).sum(1).mean() / 2 - (soft * logits.log_softmax(0)).sum(0).mean() / 2
    torch.testing.assert_close(SmoothedClipLoss(smoothing=0.1)(inputs)["loss"], expected)


def test_what_does_not_fit_is_refused_with_the_fix():
    with pytest.raises(InputError, match="no open_clip transformer"):
        MoE().apply(tiny_clip(kind="siglip-timm"))
    with pytest.raises(InputError, match="collapse it first"):
        MoE().apply(MoE().apply(tiny_clip()))
    with pytest.raises(ValueError, match="choose 2 to 3"):
        MoE(experts=3, top_k=4)
    with pytest.raises(InputError, match="choose 2 to 4"):
        mixture(top_k=1)
