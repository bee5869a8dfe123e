"""Experts Weights Averaging's checkable facts."""

from collections import OrderedDict
from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from clipgraft.errors import InputError
from clipgraft.testing.tiny import tiny_clip
from clipgraft_merging.ewa.experts import AveragedExperts, check_share, draw_together, share_at
from clipgraft_merging.feed_forwards import feed_forwards

torch.set_num_threads(1)


def network(width=8, seed=0):
    torch.manual_seed(seed)
    layers = {"c_fc": nn.Linear(width, 4 * width), "gelu": nn.GELU(), "c_proj": nn.Linear(4 * width, width)}
    return nn.Sequential(OrderedDict(layers)).double()


def apart(experts=4):
    """Experts that differ."""
    module = AveragedExperts(network(), experts=experts)
    for seed, expert in enumerate(module.experts):
        expert.load_state_dict(network(seed=seed).state_dict())
    return module


def weights(module):
    return torch.stack([nn.utils.parameters_to_vector(e.parameters()).detach() for e in module.experts])


def test_f01_the_mean_over_experts_stays():
    module = apart()
    before = weights(module).mean(0)
    draw_together([module], 0.3)
    torch.testing.assert_close(weights(module).mean(0), before, atol=1e-15, rtol=0)


@pytest.mark.parametrize(("experts", "share", "factor"), [(4, 0.3, 0.6), (2, 0.25, 0.5), (3, 0.1, 0.85)])
def test_f02_deviations_shrink_by_one_minus_share_times_n_over_n_minus_one(experts, share, factor):
    module = apart(experts)
    before = weights(module) - weights(module).mean(0)
    draw_together([module], share)
    torch.testing.assert_close(weights(module) - weights(module).mean(0), factor * before, atol=1e-14, rtol=0)


def test_f03_a_share_of_n_minus_one_over_n_makes_all_equal_and_more_is_refused():
    module = apart()
    draw_together([module], 3 / 4)
    assert weights(module).std(0).max() < 1e-15
    flipped = apart()
    before = weights(flipped) - weights(flipped).mean(0)
    draw_together([flipped], 1.0)
    torch.testing.assert_close(weights(flipped) - weights(flipped).mean(0), -before / 3, atol=1e-14, rtol=0)
    for share in (0.75, 1.0, -0.1):
        with pytest.raises(InputError, match=r"below 0\.75"):
            check_share(share, experts=4)
    check_share(0.7499, experts=4)


def test_f04_a_share_of_zero_and_a_single_expert_change_nothing():
    module, alone = apart(), AveragedExperts(network(), experts=1)
    before, single = weights(module), weights(alone)
    draw_together([module, alone], 0.0)
    draw_together([alone], 0.3)
    assert weights(module).equal(before) and weights(alone).equal(single)


def test_f05_identical_experts_are_the_dense_network_for_any_partition():
    module, x = AveragedExperts(network(), experts=3), torch.randn(2, 5, 8).double()
    for seed in range(3):
        torch.manual_seed(seed)
        torch.testing.assert_close(module.train()(x), network()(x))


def test_f06_every_token_is_seen_once_and_parts_differ_by_one():
    seen = []

    class Watch(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, x):
            seen.append(x[:, 0])
            return x

    module = AveragedExperts(Watch(), experts=4).train()
    x = torch.arange(22.0).view(2, 11, 1)
    assert module(x).equal(x), "tokens come back to their places"
    assert sorted(len(part) for part in seen) == [5, 5, 6, 6]
    assert torch.cat(seen).sort().values.equal(torch.arange(22.0))
    first = torch.cat(seen)
    seen.clear()
    module(x)
    assert not torch.cat(seen).equal(first), "another partition per step"


def test_f07_a_collapsed_clip_has_the_names_and_shapes_of_the_base():
    from clipgraft.config.schema import TrainConfig
    from clipgraft.losses.contrastive import ClipLoss
    from clipgraft_merging.ewa.recipe import EwaStage

    encoder = tiny_clip(depth=4)
    base = {k: v.clone() for k, v in encoder.state_dict().items()}
    train = TrainConfig(steps=1, batch_size=2, lr=1e-3)
    settings = {"train": train, "source": None, "encoder": encoder, "losses": [ClipLoss()], "weights": (1.0,)}
    stage = EwaStage("train", experts=3, every=2, share=0.2, ramp=1, **settings)
    assert len(stage.averaged()) == 4 and [p.name for p in feed_forwards(encoder, every=2)] == [
        "image.1", "image.3", "text.1", "text.3"
    ]  # fmt: skip
    plain = stage.current_encoder()
    found = plain.state_dict()
    assert found.keys() == base.keys() and all(torch.equal(found[k], v) for k, v in base.items())
    assert len(stage.averaged()) == 4, "the one in training keeps its experts"


def test_f08_forward_flops_equal_those_of_the_dense_network():
    flops = []
    for module in (network(), AveragedExperts(network(), experts=4).train()):
        with FlopCounterMode(display=False) as counter:
            module(torch.randn(2, 6, 8).double())
        flops.append(counter.get_total_flops())
    assert flops[0] == flops[1] > 0


def test_f09_the_gradient_of_an_expert_comes_from_its_tokens_only():
    module, x = apart(2).train(), torch.randn(10, 8).double()
    torch.manual_seed(7)
    order = torch.randperm(10)
    torch.manual_seed(7)
    module(x).square().sum().backward()
    alone = deepcopy(module.experts[0])
    alone.zero_grad()
    alone(x[order[:5]]).square().sum().backward()
    torch.testing.assert_close(module.experts[0].c_fc.weight.grad, alone.c_fc.weight.grad)


def test_f10_averaging_commutes_with_a_linear_change_of_the_weights():
    one, two = apart(), apart()
    matrix = torch.randn(32, 32, generator=torch.Generator().manual_seed(1)).double()
    draw_together([one], 0.3)
    with torch.no_grad():
        for module in (one, two):
            for expert in module.experts:
                expert.c_fc.weight.copy_(matrix @ expert.c_fc.weight)
    draw_together([two], 0.3)
    for a, b in zip(one.experts, two.experts, strict=True):
        torch.testing.assert_close(a.c_fc.weight, b.c_fc.weight)


def test_eval_mode_uses_the_mean_expert_and_equals_the_collapsed_network():
    module, x = apart().eval(), torch.randn(3, 8).double()
    torch.testing.assert_close(module(x), module.collapse()(x))
    expected = torch.stack([e.c_fc.weight for e in module.experts]).mean(0)
    torch.testing.assert_close(module.collapse().c_fc.weight, expected)


def test_the_share_grows_linearly_and_stays():
    assert [share_at(s, share=0.4, ramp=4) for s in range(6)] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4])
    assert share_at(0, share=0.4, ramp=0) == 0.4
