import pytest
import torch

from clipgraft_diffusion.condition import Condition, GlobalCondition
from clipgraft_diffusion.denoiser import FluxDenoiser, grid_ids, rope_axes

SMALL = {"width": 48, "heads": 2, "depth": 1, "single_depth": 2, "vec_dim": 20, "txt_dim": 28}


def small(seed=0, **changes):
    torch.manual_seed(seed)
    return FluxDenoiser(6, (2, 3), **{**SMALL, **changes})


def inputs(seed=0, batch=4):
    g = torch.Generator().manual_seed(seed)
    condition = Condition(torch.randn(batch, 20, generator=g), torch.randn(batch, 1, 28, generator=g))
    return torch.randn(batch, 6, 6, generator=g), torch.rand(batch, generator=g), condition


@pytest.mark.parametrize(
    ("depth", "single", "millions"), [(1, 2, 687), (2, 4, 1310.154816), (3, 6, 1933), (4, 8, 2556)]
)
def test_g01_full_size_light_denoiser_has_1310154816_parameters(depth, single, millions):
    with torch.device("meta"):
        denoiser = FluxDenoiser(64, (14, 14), depth=depth, single_depth=single)
    count = sum(p.numel() for p in denoiser.parameters())
    assert count == 1_310_154_816 if depth == 2 else round(count / 1e6) == millions


def test_g02_condition_shapes():
    told = GlobalCondition(768)(torch.randn(2, 768))
    assert told.vec.shape == (2, 768)
    assert told.txt.shape == (2, 1, 4096)
    assert grid_ids((14, 14), compat="fixed").shape == (196, 3)
    assert grid_ids((2, 3), compat="fixed").tolist() == [[0, r, c] for r in range(2) for c in range(3)]


def test_g02_projectors_are_independent():
    condition = GlobalCondition(8, vec_dim=4, txt_dim=4)
    names = {name.split(".")[0] for name, _ in condition.named_parameters()}
    assert names == {"vec", "txt"}
    assert len({p.data_ptr() for p in condition.parameters()}) == 12


@pytest.mark.parametrize("prediction", ["velocity", "sample"])
def test_velocity_has_the_latents_shape_and_is_fp32(prediction):
    x, t, condition = inputs()
    out = small(prediction=prediction)(x, t, condition)
    assert out.shape == x.shape
    assert out.dtype == torch.float32


def test_g15_every_parameter_receives_a_gradient_at_random_initialisation():
    x, t, condition = inputs()
    denoiser = small(positions=4)
    denoiser(x, t, condition).square().mean().backward()
    silent = [name for name, p in denoiser.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert silent == []


def test_condition_matters_through_both_routes():
    x, t, condition = inputs()
    denoiser = small()
    out = denoiser(x, t, condition)
    for changed in (
        Condition(condition.vec.roll(1, 0), condition.txt),
        Condition(condition.vec, condition.txt.roll(1, 0)),
    ):
        assert (denoiser(x, t, changed) - out).abs().max() > 1e-4


def test_g16_guidance_enters_as_one_vector_shared_by_all_samples():
    denoiser, vectors, whole = small(), [], []
    embed = denoiser.flux.time_text_embed
    embed.guidance_embedder.register_forward_hook(lambda _, args, out: vectors.append(out))
    embed.register_forward_hook(lambda _, args, out: whole.append(out))
    x, t, condition = inputs()
    outs = []
    for guidance in (4.0, 7.0):
        denoiser.guidance = guidance
        outs.append(denoiser(x, t, condition))
    denoiser(*inputs(seed=1))
    for vector in vectors:  # (B, width), the same row for every sample
        torch.testing.assert_close(vector, vector[:1].expand_as(vector))
    torch.testing.assert_close(vectors[1], vectors[2])  # whatever the latent, the time and the condition are
    moved = vectors[1] - vectors[0]
    assert moved.abs().max() > 1e-3
    torch.testing.assert_close(whole[1] - whole[0], moved, atol=1e-5, rtol=1e-4)  # added to time and condition
    assert (outs[1] - outs[0]).abs().max() > 1e-5
    denoiser.guidance = 4.0
    shift = embed.register_forward_hook(lambda _, args, out: out + moved[0])
    torch.testing.assert_close(denoiser(x, t, condition), outs[1], atol=1e-5, rtol=1e-4)  # and nowhere else
    shift.remove()


def test_no_guidance_embedder_when_it_is_off():
    assert not any("guidance" in name for name, _ in small(guidance=None).named_parameters())


def test_timestep_keeps_fp32_under_autocast():
    x, t, condition = inputs()
    denoiser, seen = small(), []
    denoiser.flux.time_text_embed.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    t[0] = 0.1234
    with torch.autocast("cpu", torch.bfloat16):
        denoiser(x, t, condition)
    assert seen[0].dtype == torch.float32
    assert seen[0][0].item() == pytest.approx(123.4, abs=1e-3)
    denoiser.compat = "official"
    denoiser(x, t, condition)
    assert seen[1][0].item() == pytest.approx(123.5, abs=1e-3)


def test_official_ids_are_exact_up_to_256():
    assert torch.equal(grid_ids((24, 24), compat="official"), grid_ids((24, 24), compat="fixed"))
    assert not torch.equal(grid_ids((1, 300), compat="official"), grid_ids((1, 300), compat="fixed"))


def test_permuting_samples_permutes_outputs():
    x, t, condition = inputs()
    denoiser, order = small(), torch.tensor([2, 0, 3, 1])
    out = denoiser(x, t, condition)
    moved = denoiser(x[order], t[order], Condition(condition.vec[order], condition.txt[order]))
    torch.testing.assert_close(moved, out[order], atol=1e-5, rtol=1e-4)


def test_checkpointing_changes_memory_not_gradients():
    x, t, condition = inputs()
    grads = []
    for checkpointing in (False, True):
        denoiser = small(checkpointing=checkpointing)
        vec = condition.vec.clone().requires_grad_()
        denoiser(x, t, Condition(vec, condition.txt)).square().mean().backward()
        grads.append(vec.grad)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize(
    ("head_dim", "axes"), [(128, (16, 56, 56)), (64, (8, 28, 28)), (24, (4, 10, 10)), (32, (4, 14, 14))]
)
def test_rope_axes(head_dim, axes):
    assert rope_axes(head_dim) == axes


def test_rope_axes_refuse_odd_heads():
    with pytest.raises(ValueError, match="even"):
        rope_axes(25)
