"""The predictor of masked codes: the facts that the paper's description implies."""

import math

import pytest
import torch
from torch.nn import functional as F

from clipgraft_diffusion.condition import projector
from clipgraft_diffusion.masked import Mask, MaskedFeedback, MaskLaw, masked_losses
from clipgraft_diffusion.perceiver import Perceiver

K, D_Q, GRID, L, WIDTH = 30, 5, (3, 4), 12, 24


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def small(seed=0, **changes):
    torch.manual_seed(seed)
    return Perceiver(drawn(K, D_Q), GRID, **{"width": WIDTH, "heads": 2, "layers": 2, **changes})


def case(batch=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    indices = torch.randint(0, K, (batch, L), generator=g)
    return indices, MaskLaw().draw(batch, L, generator=g), torch.randn(batch, WIDTH, generator=g)


def logits(model, indices, mask, told):
    return model(model.embed(indices), mask.shown, mask.hidden, told)


def test_x1_logits_of_every_hidden_position():
    indices, mask, told = case()
    assert logits(small(), indices, mask, told).shape == (3, mask.hidden.shape[1], K)


@pytest.mark.parametrize("codes", [30, 512])
def test_x2_loss_starts_near_the_logarithm_of_the_number_of_codes(codes):
    torch.manual_seed(0)
    model = Perceiver(drawn(codes, D_Q), GRID, width=64, heads=2, layers=6)
    indices = torch.randint(0, codes, (32, L))
    mask = MaskLaw().draw(32, L)
    loss = masked_losses(logits(model, indices, mask, drawn(32, 64)), indices, mask).mean()
    assert loss.item() == pytest.approx(math.log(codes), abs=0.35)


def test_x3_x11_nothing_of_a_hidden_position_is_an_input():
    indices, mask, told = case()
    model = small()
    out = logits(model, indices, mask, told)
    for column in range(mask.hidden.shape[1]):
        other = indices.clone()
        other.scatter_(1, mask.hidden[:, column : column + 1], (indices.gather(1, mask.hidden)[:, :1] + 7) % K)
        assert torch.equal(logits(model, other, mask, told), out)
    embeddings = model.embed(indices).scatter(1, mask.hidden[..., None].expand(-1, -1, D_Q), math.nan)
    assert torch.equal(model(embeddings, mask.shown, mask.hidden, told), out)


def test_x4_every_shown_code_matters():
    indices, mask, told = case()
    model = small()
    out = logits(model, indices, mask, told)
    for column in range(mask.shown.shape[1]):
        at = mask.shown[:, column : column + 1]
        other = indices.scatter(1, at, (indices.gather(1, at) + 7) % K)
        changed = (logits(model, other, mask, told) - out).abs().amax((1, 2))
        assert (changed > 1e-5).all()


def test_x5_ratio_stays_in_its_range_and_positions_are_a_partition():
    g, shares = torch.Generator().manual_seed(0), []
    for _ in range(300):
        mask = MaskLaw().draw(2, 100, generator=g)
        both = torch.cat([mask.shown, mask.hidden], 1).sort(1).values
        assert torch.equal(both, torch.arange(100).expand(2, -1))
        shares.append(mask.hidden.shape[1] / 100)
    assert 0.5 <= min(shares) < 0.52
    assert 0.88 < max(shares) <= 0.9
    assert sum(shares) / 300 == pytest.approx(0.7, abs=0.02)


def test_x5_one_of_each_kind_at_least():
    assert MaskLaw(0.01, 0.01).draw(2, 4).hidden.shape == (2, 1)
    assert MaskLaw(0.99, 0.99).draw(2, 4).shown.shape == (2, 1)


def test_x5_samples_of_a_batch_hide_different_positions_and_all_positions_equally_often():
    mask = MaskLaw(0.5, 0.5).draw(4000, 8, generator=torch.Generator().manual_seed(0))
    assert len({tuple(sorted(row)) for row in mask.hidden.tolist()}) == math.comb(8, 4)
    assert mask.hidden.flatten().bincount() / 4000 == pytest.approx(torch.full((8,), 0.5), abs=0.05)


def test_x6_the_condition_is_one_more_key_and_value():
    indices, mask, told = case()
    model, lengths = small(), []
    model.listen.kv.register_forward_hook(lambda _, args, out: lengths.append(args[0].shape[1]))
    model.listen.q.register_forward_hook(lambda _, args, out: lengths.append(args[0].shape[1]))
    logits(model, indices, mask, told)
    shown = mask.shown.shape[1]
    assert sorted(lengths) == [shown, shown + 1]


def test_x7_the_condition_matters_and_only_for_its_own_sample():
    indices, mask, told = case(batch=4)
    model = small()
    out = logits(model, indices, mask, told)
    assert ((logits(model, indices, mask, torch.zeros_like(told)) - out).abs().amax((1, 2)) > 1e-5).all()
    swapped = (logits(model, indices, mask, told[[1, 0, 2, 3]]) - out).abs().amax((1, 2))
    assert (swapped[:2] > 1e-5).all()
    assert (swapped[2:] < 1e-6).all()


def test_x10_the_same_seed_gives_the_same_mask():
    def mask(seed):
        return MaskLaw().draw(3, 50, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(mask(5).hidden, mask(5).hidden)
    assert torch.equal(mask(5).shown, mask(5).shown)
    assert mask(5).hidden.tolist() != mask(6).hidden.tolist()
    torch.manual_seed(5)
    assert torch.equal(MaskLaw().draw(3, 50).hidden, mask(5).hidden)  # the global generator is one like any other


def test_x12_the_projector_is_a_normed_mlp_of_the_predictors_width():
    layers = list(projector(768, WIDTH))
    assert [type(layer).__name__ for layer in layers] == ["LayerNorm", "Linear", "GELU", "Linear"]
    assert [tuple(layer.weight.shape) for layer in layers if hasattr(layer, "weight")] == [
        (768,),
        (WIDTH, 768),
        (WIDTH, WIDTH),
    ]


def test_loss_is_cross_entropy_on_hidden_positions_alone():
    indices, mask, _ = case()
    given = drawn(3, mask.hidden.shape[1], K)
    wanted = [
        sum(-F.log_softmax(given[b, m], -1)[indices[b, int(at)]] for m, at in enumerate(mask.hidden[b]))
        / mask.hidden.shape[1]
        for b in range(3)
    ]
    torch.testing.assert_close(masked_losses(given, indices, mask), torch.stack(wanted))
    assert masked_losses(given.bfloat16(), indices, mask).dtype == torch.float32


def test_every_parameter_receives_a_gradient_at_random_initialisation():
    indices, mask, told = case()
    model = small()
    masked_losses(logits(model, indices, mask, told), indices, mask).mean().backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert silent == []


def test_positions_are_learnt_in_two_dimensions_and_the_only_sense_of_place():
    indices, mask, told = case()
    model = small()
    assert model.positions().shape == (L, WIDTH)
    torch.testing.assert_close(model.positions()[1 * 4 + 2], (model.rows[1, 0] + model.columns[0, 2]))
    out = logits(model, indices, mask, told)
    order = torch.randperm(mask.shown.shape[1], generator=torch.Generator().manual_seed(0))
    again = logits(model, indices, Mask(mask.shown[:, order], mask.hidden), told)
    torch.testing.assert_close(again, out, atol=1e-5, rtol=1e-4)


def test_checkpointing_changes_memory_not_gradients():
    indices, mask, told = case()
    grads = []
    for checkpointing in (False, True):
        model, z = small(checkpointing=checkpointing), told.clone().requires_grad_()
        masked_losses(logits(model, indices, mask, z), indices, mask).mean().backward()
        grads.append((z.grad, model.embedder.weight.grad))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ValueError, match="divide"):
        small(heads=5)


def test_condition_gap_is_positive_when_the_predictor_has_learnt_and_zero_when_it_is_deaf():
    torch.manual_seed(0)
    feedback = MaskedFeedback(projector(8, WIDTH), small(), masks=MaskLaw(0.9, 0.9))
    z = drawn(4, 8)
    indices = torch.randint(0, K, (4, L), generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.AdamW(feedback.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        feedback(z.repeat(4, 1), indices.repeat(4, 1)).mean().backward()
        optimizer.step()
    found = feedback.condition_gap(z, indices)
    assert found.gap > 0.5
    assert found == feedback.condition_gap(z, indices)  # its own seed, no global draw
    assert set(found.metrics()) == {"cross_entropy_right", "cross_entropy_wrong", "condition_gap"}
    torch.nn.init.zeros_(feedback.condition[-1].weight)
    assert feedback.condition_gap(z, indices).gap == pytest.approx(0, abs=1e-6)


def test_blur_reaches_the_condition_and_is_off_by_default():
    torch.manual_seed(0)
    feedback, heard = MaskedFeedback(projector(8, WIDTH), small(), masks=MaskLaw()), []
    feedback.condition.register_forward_pre_hook(lambda _, args: heard.append(args[0]))
    z, indices = drawn(4, 8), case(4)[0]
    feedback(z, indices)
    feedback.noise = 0.5
    feedback(z, indices)
    assert torch.equal(heard[0], z)
    assert 0 < (heard[1] - z).abs().max() < 4 * z.std()


def test_same_generator_same_losses():
    torch.manual_seed(0)
    feedback = MaskedFeedback(projector(8, WIDTH), small(), masks=MaskLaw())
    z, indices = drawn(4, 8), case(4)[0]
    first, second, other = (feedback(z, indices, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert first.shape == (4,)
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
