"""OPCM over whole models: facts 3, 4, 7, 10 and 13, the official code's omissions, growing on disk, and refusals."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from clipgraft.checkpoint import open_export, write_export
from clipgraft.errors import InputError
from clipgraft.testing.tiny import tiny_clip
from clipgraft_merging.commands import app
from clipgraft_merging.opcm.merger import check_new, merge_into, new_state
from clipgraft_merging.opcm.settings import ContinualSettings
from clipgraft_merging.opcm.state import read_state
from clipgraft_merging.weights.engine import open_inputs

torch.set_num_threads(1)
WEIGHTS = "open_clip_model.safetensors"


def moved(encoder, seed, *, size=0.02, only=""):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in encoder.named_parameters():
            if only in name and "logit" not in name:
                p.add_(size * torch.randn(p.shape, generator=generator))
    return encoder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base and four models fine-tuned from it: the image tower alone."""
    folder = tmp_path_factory.mktemp("models")
    write_export(tiny_clip(), folder / "base")
    for k in range(4):
        write_export(moved(tiny_clip(), k + 1, size=0.01 * (k + 2), only="image"), folder / f"m{k}")
    return folder


def weights(folder):
    return {k: v.double() for k, v in load_file(folder / WEIGHTS).items()}


def merge(models, out, order, **settings):
    inputs = open_inputs([models / f"m{k}" for k in order], base=models / "base")
    return merge_into(out, inputs, new_state(inputs, ContinualSettings(**settings)))


def vectors(models, order):
    base = weights(models / "base")
    return base, [{k: v - base[k] for k, v in weights(models / f"m{i}").items()} for i in order]


def norm(tau):
    return math.sqrt(sum(float(v.square().sum()) for v in tau.values()))


def matrices(key, value):
    """The projections inside a tensor of open_clip's, as Hugging Face has them; none when it is no matrix."""
    if key.endswith("in_proj_weight"):
        return list(value.chunk(3))
    fine = value.ndim == 2 and "embedding" not in key
    return [value] if fine else []


def official(base, taus, alpha, *, skip=()):
    """The update as published, step by step with full bases: Raw = l D + P(tau), l = |Raw| / mean|tau|."""
    merged, scale, norms = taus[0], 1.0, [norm(taus[0])]
    for tau in taus[1:]:
        norms.append(norm(tau))
        raw = {}
        for key, old in merged.items():
            parts = []
            for d, new in zip(matrices(key, old), matrices(key, tau[key]), strict=True):
                left, values, right = torch.linalg.svd(d, full_matrices=True)
                share = values.cumsum(0) / values.sum()
                r = int((share > alpha).float().argmax())
                inner = left.T @ new @ right.T
                inner.diagonal().fill_(0)
                inner[:r, :r] = 0
                parts.append(scale * d + left @ inner @ right)
            raw[key] = torch.cat(parts) if parts else old if key in skip else scale * old + tau[key]
        mean = sum(norms) / len(norms)
        scale = norm(raw) / mean
        merged = {k: v / scale for k, v in raw.items()}
    return {k: base[k] + v for k, v in merged.items()}


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 0.9])
def test_fact_4_the_sum_on_disk_is_the_stepwise_update(models, tmp_path, alpha):
    base, taus = vectors(models, (0, 1, 2, 3))
    # the frozen text tower has zero task vectors, which the published step can't take: it is compared as it is
    image = [{k: v for k, v in tau.items() if k.startswith("visual")} for tau in taus]
    wanted = official({k: base[k] for k in image[0]}, image, alpha)
    merge(models, tmp_path / "out", (0, 1, 2, 3), alpha=alpha)
    found = weights(tmp_path / "out")
    for key, value in wanted.items():  # sums are kept in fp32, and singular vectors of close values magnify that
        assert (found[key] - value).norm() < 1e-3 * (value - base[key]).norm(), key
    assert all(torch.equal(found[k], v) for k, v in base.items() if not k.startswith("visual"))


def test_compat_reproduces_the_class_token_that_only_shrinks(models, tmp_path):
    base, taus = vectors(models, (0, 1, 2))
    image = [{k: v for k, v in tau.items() if k.startswith("visual")} for tau in taus]
    token = "visual.class_embedding"
    wanted = official({k: base[k] for k in image[0]}, image, 0.5, skip={token})
    merge(models, tmp_path / "out", (0, 1, 2), compat="fusionbench")
    found = weights(tmp_path / "out")
    for key, value in wanted.items():  # sums are kept in fp32, and singular vectors of close values magnify that
        assert (found[key] - value).norm() < 1e-3 * (value - base[key]).norm(), key
    shrunk, first = found[token] - base[token], taus[0][token]
    assert torch.cosine_similarity(shrunk, first, dim=0) > 0.9999 and shrunk.norm() < 0.8 * first.norm()
    with pytest.raises(InputError, match="leave qkv at split"):
        ContinualSettings(compat="fusionbench", qkv="fused")


def test_fact_3_the_merge_is_as_far_from_the_base_as_models_are_on_average(models, tmp_path):
    base, taus = vectors(models, (0, 1, 2, 3))
    state = merge(models, tmp_path / "out", (0, 1, 2, 3))
    distance = norm({k: v - base[k] for k, v in weights(tmp_path / "out").items()})
    assert distance == pytest.approx(sum(map(norm, taus)) / 4, rel=1e-5) == pytest.approx(state.mean_norm, rel=1e-5)


def test_fact_7_order_matters_for_opcm_only(models, tmp_path):
    for method, depends in (("opcm", True), ("rescaled", False), ("average", False), ("task-arithmetic", False)):
        merge(models, tmp_path / "a", (0, 1, 2), method=method)
        merge(models, tmp_path / "b", (2, 0, 1), method=method)
        one, other = weights(tmp_path / "a"), weights(tmp_path / "b")
        assert all(torch.allclose(one[k], other[k], atol=1e-6) for k in one) != depends


def test_baselines_are_what_their_names_say(models, tmp_path):
    base, taus = vectors(models, (0, 1, 2))
    merge(models, tmp_path / "average", (0, 1, 2), method="average")
    merge(models, tmp_path / "ta", (0, 1, 2), method="task-arithmetic", scale=0.4)
    average, ta = weights(tmp_path / "average"), weights(tmp_path / "ta")
    for key, value in base.items():
        total = sum(tau[key] for tau in taus)
        assert torch.allclose(average[key], value + total / 3, atol=1e-6)
        assert torch.allclose(ta[key], value + 0.4 * total, atol=1e-6)


def test_continual_ties_adds_ties_of_the_merged_and_the_new_vector(models, tmp_path):
    base, taus = vectors(models, (0, 1))
    merge(models, tmp_path / "out", (0, 1), method="ties", scale=0.3, density=0.2)
    both = [{k: 0.3 * v for k, v in taus[0].items()}, taus[1]]
    trimmed = []
    for tau in both:
        flat = torch.cat([v.flatten() for v in tau.values()])
        keep = math.ceil(0.2 * len(flat))
        threshold = flat.abs().sort(descending=True).values[keep - 1]
        trimmed.append({k: torch.where(v.abs() >= threshold - 1e-9, v, 0.0) for k, v in tau.items()})
    found = weights(tmp_path / "out")
    for key, value in base.items():
        a, b = trimmed[0][key], trimmed[1][key]
        sign = torch.sign(a + b)
        agreed = torch.where(a * sign > 0, a, 0.0) + torch.where(b * sign > 0, b, 0.0)
        assert torch.allclose(found[key], value + both[0][key] + 0.3 * agreed, atol=1e-6), key


def test_one_model_alone_comes_back_bit_for_bit(models, tmp_path):
    merge(models, tmp_path / "out", (2,))
    one, alone = load_file(models / "m2" / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    assert all(torch.equal(one[k], alone[k]) for k in one)


def test_fact_10_the_same_model_twice_changes_no_matrix_and_doubles_vectors_before_the_rescale(models, tmp_path):
    state = merge(models, tmp_path / "out", (0, 0))
    _, (tau, _) = vectors(models, (0, 0))
    for key in ("visual.transformer.resblocks.0.attn.in_proj_weight", "visual.transformer.resblocks.1.mlp.c_fc.weight"):
        assert torch.allclose(state.store.read(key).double(), tau[key], atol=1e-5)
    assert torch.allclose(state.store.read("visual.ln_post.bias").double(), 2 * tau["visual.ln_post.bias"], atol=1e-6)


def test_split_and_fused_q_k_v_are_different_algorithms(models, tmp_path):
    merge(models, tmp_path / "split", (0, 1))
    merge(models, tmp_path / "fused", (0, 1), qkv="fused")
    one, other = weights(tmp_path / "split"), weights(tmp_path / "fused")
    differing = {k for k in one if not torch.allclose(one[k], other[k], atol=1e-5)}
    assert "visual.transformer.resblocks.0.attn.in_proj_weight" in differing


def test_a_model_added_later_gives_the_same_merge(models, tmp_path):
    merge(models, tmp_path / "whole", (0, 1, 2))
    merge(models, tmp_path / "grown", (0, 1))
    inputs = open_inputs([models / "m2"], base=models / "base")
    state = merge_into(tmp_path / "grown", inputs, read_state(tmp_path / "grown"))
    assert [m.uri.rpartition("/")[2] for m in state.models] == ["m0", "m1", "m2"]
    one, other = load_file(tmp_path / "whole" / WEIGHTS), load_file(tmp_path / "grown" / WEIGHTS)
    assert all(torch.equal(one[k], other[k]) for k in one)
    opened = open_export(tmp_path / "grown")
    assert [m["norm"] for m in opened.data.origin.lineage[-1]["settings"]["merged"]] == [m.norm for m in state.models]
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_fact_13_one_sum_is_kept_however_many_models_there_are(models, tmp_path, monkeypatch):
    from clipgraft_merging.opcm import merger

    widths, inner = [], merger.project
    monkeypatch.setattr(merger, "project", lambda new, old, **k: widths.append(new.shape) or inner(new, old, **k))
    sizes = []
    for count in (2, 4):
        merge(models, tmp_path / f"out{count}", range(count))
        sizes.append(sum(f.stat().st_size for f in (tmp_path / f"out{count}" / "continual").glob("*.safetensors")))
    assert sizes[0] == sizes[1] and set(widths[: len(widths) // 4]) == set(widths)


def test_an_interrupted_merge_leaves_the_old_one_whole(models, tmp_path, monkeypatch):
    from clipgraft_merging.opcm import merger

    merge(models, tmp_path / "out", (0, 1))
    before = (tmp_path / "out" / WEIGHTS).read_bytes()
    monkeypatch.setattr(merger, "write_state", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        inputs = open_inputs([models / "m2"], base=models / "base")
        merge_into(tmp_path / "out", inputs, read_state(tmp_path / "out"))
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == before and len(read_state(tmp_path / "out").models) == 2


def test_refusals(models, tmp_path):
    with pytest.raises(InputError, match="0 <= alpha < 1"):
        ContinualSettings(alpha=1.0)
    with pytest.raises(InputError, match="expected one of opcm"):
        ContinualSettings(method="opmc")
    state = merge(models, tmp_path / "out", (0, 1))
    with pytest.raises(InputError, match="is in this merge already, as number 2"):
        check_new(state, open_inputs([models / "m1"], base=models / "base"))
    with pytest.raises(InputError, match="other weights than the base of this merge"):
        check_new(state, open_inputs([models / "m2"], base=models / "m3"))
    with pytest.raises(InputError, match="named twice"):
        inputs = open_inputs([models / "m2", models / "m2"], base=models / "base")
        check_new(new_state(inputs, ContinualSettings()), inputs)
    with pytest.raises(InputError, match="holds no continual merge"):
        read_state(models / "base")
    held = load_file(tmp_path / "out" / "continual" / "sum.safetensors")
    save_file({k: v + 1 for k, v in held.items()}, tmp_path / "out" / "continual" / "sum.safetensors")
    with pytest.raises(InputError, match="merge its models again"):
        read_state(tmp_path / "out")
    (tmp_path / "out" / "continual" / "state.json").write_text("{")
    with pytest.raises(InputError, match=r"state.json is damaged"):
        read_state(tmp_path / "out")


def test_command_begins_and_grows_a_merge(models, tmp_path):
    call, out = CliRunner().invoke, str(tmp_path / "out")
    named = [str(models / f"m{k}") for k in range(3)]
    made = call(app, ["opcm", named[0], named[1], "--base", str(models / "base"), "--out", out, "--alpha", "0.4"])
    assert made.exit_code == 0, made.output
    grown = call(app, ["opcm", named[2], "--into", out, "--json"])
    assert grown.exit_code == 0, grown.output
    told = json.loads(grown.stdout)
    assert len(told["models"]) == 3 and told["settings"]["alpha"] == 0.4 and told["out"] == out
    for arguments, line in (
        ([named[0]], "give --out DIR to begin a merge"),
        ([named[0], "--out", str(tmp_path / "b")], "give --base MODEL"),
        ([named[0], "--into", out, "--alpha", "0.7"], "leave the settings out"),
        ([named[0], "--base", str(models / "base"), "--out", named[0]], "would replace it"),
    ):
        failed = call(app, ["opcm", *arguments])
        assert isinstance(failed.exception, InputError) and line in str(failed.exception)
