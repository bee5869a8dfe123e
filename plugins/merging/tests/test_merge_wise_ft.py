"""WiSE-FT: the checkable facts of section 4 that are about weights."""

import pytest
import torch
from torch.nn import functional as F

from clipgraft.checkpoint import write_export
from clipgraft.errors import InputError
from clipgraft.testing.tiny import tiny_clip
from clipgraft_merging.soup.uniform import UniformSoup
from clipgraft_merging.weights.checkpoints import Checkpoint
from clipgraft_merging.weights.engine import merge_each, merge_state, open_checkpoint, open_inputs
from clipgraft_merging.weights.inputs import Inputs
from clipgraft_merging.weights.stores import MemoryStore
from clipgraft_merging.wise_ft.interpolation import WiseFt

torch.set_num_threads(1)


def checkpoint(state, ref="model"):
    return Checkpoint(ref, MemoryStore(state), "own", None, None, ref)


def pair(seed=0, *, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "visual.transformer.resblocks.0.mlp.c_fc.weight": torch.randn(6, 4, generator=generator).to(dtype),
            "visual.transformer.resblocks.1.ln_1.bias": torch.randn(5, generator=generator).to(dtype),
            "visual.proj": torch.randn(4, 3, generator=generator).to(dtype),
            "logit_scale": torch.randn((), generator=generator).to(dtype),
        }
        for _ in range(2)
    ]


def between(old, new, **how):
    return dict(merge_state(Inputs(checkpoint(old), (checkpoint(new),)), WiseFt(**how)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_1_the_ends_are_bit_exact(dtype):
    old, new = pair(dtype=dtype)
    for a, end in ((0.0, old), (1.0, new)):
        found = between(old, new, alpha=a)
        assert all(torch.equal(found[key], end[key]) and found[key].dtype is dtype for key in end)


def test_1_a_lerp_in_fp32_would_miss_its_end():
    old, new = {"visual.proj": torch.tensor([1e8])}, {"visual.proj": torch.tensor([1.2345])}
    assert old["visual.proj"] + 1.0 * (new["visual.proj"] - old["visual.proj"]) != new["visual.proj"]
    assert torch.equal(between(old, new, alpha=1.0)["visual.proj"], new["visual.proj"])


def test_2_outside_of_the_unit_interval_only_with_the_flag():
    old, new = pair()
    for how in ({"alpha": 1.5}, {"alpha": -0.1}, {"blocks": {"visual.0": 2.0}}):
        with pytest.raises(InputError, match=r"lies outside of \[0, 1\]; give --extrapolate"):
            WiseFt(**how)
    found = between(old, new, alpha=1.5, extrapolate=True)
    for key in old:
        torch.testing.assert_close(found[key], old[key] + 1.5 * (new[key] - old[key]), rtol=0, atol=1e-6)


def test_3_the_path_is_affine_and_its_middle_is_the_mean():
    old, new = pair()
    middle = between(old, new, alpha=0.5)
    mean = dict(merge_state(Inputs(None, (checkpoint(old), checkpoint(new))), UniformSoup()))
    assert all(torch.equal(middle[key], mean[key]) for key in mean)
    quarter = between(old, new, alpha=0.25)
    again = between(old, middle, alpha=0.5)
    for key in quarter:
        torch.testing.assert_close(quarter[key], again[key], rtol=0, atol=2e-7)


def test_4_logits_of_a_linear_head_move_linearly_while_the_encoder_is_frozen():
    old, new = pair()
    features = torch.randn(8, 4)
    ends = [features @ state["visual.proj"] for state in (old, new)]
    for a in (0.1, 0.5, 0.9):
        logits = features @ between(old, new, alpha=a)["visual.proj"]
        torch.testing.assert_close(logits, torch.lerp(*ends, a), rtol=0, atol=1e-5)


def test_5_equal_fishers_and_fishers_below_the_floor_are_the_plain_line():
    old, new = pair()
    plain = between(old, new, alpha=0.3)
    for scale, floor in ((1.0, 1e-6), (1e-9, 1e-6)):
        fisher = {key: scale * torch.rand(value.shape).add(0.1) for key, value in old.items()}
        other = fisher if scale == 1.0 else {key: value * 0.3 for key, value in fisher.items()}
        found = between(old, new, alpha=0.3, fishers=(checkpoint(fisher), checkpoint(other)), floor=floor)
        for key in plain:
            torch.testing.assert_close(found[key], plain[key], rtol=1e-6, atol=1e-7)


def test_5_fisher_weights_follow_their_equation_and_keep_the_ends():
    old, new = pair()
    fishers = [{key: torch.rand(value.shape) for key, value in old.items()} for _ in range(2)]
    opened = (checkpoint(fishers[0]), checkpoint(fishers[1]))
    found = between(old, new, alpha=0.3, fishers=opened, floor=0.05)
    for key in old:
        c0, c1 = 0.7 * fishers[0][key].clamp_min(0.05), 0.3 * fishers[1][key].clamp_min(0.05)
        torch.testing.assert_close(found[key], (c0 * old[key] + c1 * new[key]) / (c0 + c1))
    assert all(torch.equal(between(old, new, alpha=1.0, fishers=opened)[key], new[key]) for key in new)


def test_fishers_of_another_model_are_refused():
    old, new = pair()
    odd = checkpoint({"visual.proj": torch.ones(4, 3)})
    with pytest.raises(InputError, match="holds other tensors"):
        between(old, new, alpha=0.5, fishers=(odd, odd))
    with pytest.raises(InputError, match="must be above 0"):
        WiseFt(floor=0.0)


def test_blocks_have_their_own_alpha_by_pattern_and_the_first_match_wins():
    old, new = pair()
    found = between(
        old, new, alpha=0.5, blocks={"visual.0": 0.0, "visual.?": 1.0, "logit_scale": 0.25, "visual.*": 0.75}
    )
    expected = {"visual.transformer.resblocks.0.mlp.c_fc.weight": 0.0, "visual.transformer.resblocks.1.ln_1.bias": 1.0}
    expected |= {"logit_scale": 0.25, "visual.proj": 0.75}
    for key, a in expected.items():
        torch.testing.assert_close(found[key], torch.lerp(old[key], new[key], a), rtol=0, atol=1e-6)
    with pytest.raises(InputError, match=r"unknown block or tensor 'visual\.9'"):
        between(old, new, blocks={"visual.9": 1.0})


def test_one_base_and_one_model_are_needed():
    old, new = pair()
    for inputs in (Inputs(None, (checkpoint(new),)), Inputs(checkpoint(old), (checkpoint(new), checkpoint(new)))):
        with pytest.raises(InputError, match="give --base BASE and one MODEL"):
            dict(merge_state(inputs, WiseFt()))


def test_many_alphas_come_from_one_read_and_equal_those_made_one_by_one(tmp_path, monkeypatch):
    for seed in range(2):
        write_export(tiny_clip(seed), tmp_path / f"{seed}")
    inputs = open_inputs([tmp_path / "1"], base=tmp_path / "0")
    reads, read = [], Checkpoint.tensor
    monkeypatch.setattr(Checkpoint, "tensor", lambda self, key: (reads.append(key), read(self, key))[1])
    alphas = [0.0, 0.2, 0.5, 0.8, 1.0]
    merge_each({tmp_path / f"a{a}": WiseFt(alpha=a) for a in alphas}, inputs)
    assert len(reads) == 2 * len(inputs.keys)
    for a in alphas:
        alone = dict(merge_state(inputs, WiseFt(alpha=a)))
        written = open_checkpoint(tmp_path / f"a{a}")
        assert all(torch.equal(written.tensor(key), alone[key]) for key in alone)


def test_the_barrier_of_a_path_between_equal_models_is_zero():
    """Fact 10, on weights: every point of the path is the model, so its loss is."""
    old, _ = pair()
    for a in (0.1, 1 / 3, 0.7):
        found = between(old, old, alpha=a)
        for key in old:
            torch.testing.assert_close(found[key], old[key], rtol=2e-7, atol=0)


def test_a_convex_loss_has_no_barrier():
    old, new = pair()
    target = torch.randn(4, 3)
    loss = {
        a: float(F.mse_loss(between(old, new, alpha=a)["visual.proj"], target)) for a in (0.0, 0.25, 0.5, 0.75, 1.0)
    }
    assert all(loss[a] <= (1 - a) * loss[0.0] + a * loss[1.0] + 1e-6 for a in loss)
