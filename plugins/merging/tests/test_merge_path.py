"""The path report: facts 6 to 11 of straggler-layer sharpness as we define it, tables, figure, command."""

import csv
import json
import math

import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from typer.testing import CliRunner

from clipgraft.checkpoint import write_export
from clipgraft.errors import InputError
from clipgraft.testing.tiny import tiny_clip
from clipgraft_merging.commands import app
from clipgraft_merging.path.barrier import barrier, spearman, stragglers
from clipgraft_merging.path.measuring import PathPoint
from clipgraft_merging.path.report import PathReport, write_report
from clipgraft_merging.path.sharpness import rising, sharpness
from clipgraft_merging.path.sparsify import SparsePath, largest
from clipgraft_merging.weights.engine import merge_state, open_inputs

torch.set_num_threads(1)


def two_layers(seed=0):
    """Weights of a ReLU net of one hidden layer, and its loss on some data."""
    g = torch.Generator().manual_seed(seed)
    first, second = torch.randn(6, 4, generator=g).double(), torch.randn(3, 6, generator=g).double()
    x, y = torch.randn(20, 4, generator=g).double(), torch.randint(3, (20,), generator=g)
    return [first, second], lambda w: F.cross_entropy(torch.relu(x @ w[0].T) @ w[1].T, y)


def on_block(loss, weights, k):
    """The loss as a function of one weight alone."""
    return lambda w: loss([w[0] if i == k else other for i, other in enumerate(weights)])


def test_fact_6_never_negative_and_zero_without_a_radius():
    weights, loss = two_layers()
    assert sharpness(loss, weights, rho=0).value == 0
    assert sharpness(loss, weights, rho=0.01).value > 0
    flat = sharpness(lambda w: -sum((x - x.detach()).square().sum() + 0 * x.sum() for x in w), weights, rho=0.1)
    assert flat.value >= 0
    with pytest.raises(InputError, match="rho is -1"):
        sharpness(loss, weights, rho=-1)


def test_the_perturbation_stays_in_its_box_and_reaches_what_it_says():
    weights, loss = two_layers()
    found = sharpness(loss, weights, rho=0.05)
    moved = [w + 0.05 * w.abs() * z for w, z in zip(weights, found.shares, strict=True)]
    assert all(z.abs().max() <= 1 for z in found.shares)
    assert float(loss(moved) - loss(weights)) == pytest.approx(found.value)


def test_fact_7_values_do_not_fall_with_the_radius():
    weights, loss = two_layers(1)
    values = [a.value for a in rising(loss, weights, radii=(0, 0.001, 0.01, 0.05, 0.2), steps=5)]
    assert values == sorted(values) and values[0] == 0


def test_fact_8_a_block_is_never_sharper_than_all_blocks_together():
    weights, loss = two_layers(2)
    parts = [sharpness(on_block(loss, weights, k), [weights[k]], rho=0.02) for k in range(2)]
    starts = [
        [part.shares[0] if i == k else torch.zeros_like(w) for i, w in enumerate(weights)]
        for k, part in enumerate(parts)
    ]
    whole = sharpness(loss, weights, rho=0.02, starts=starts)
    assert all(part.value <= whole.value + 1e-12 for part in parts)


def test_fact_9_rescaling_a_pair_of_relu_layers_changes_nothing():
    weights, loss = two_layers(3)
    scaled = [7.0 * weights[0], weights[1] / 7.0]
    for k in range(2):
        one = sharpness(on_block(loss, weights, k), [weights[k]], rho=0.02).value
        other = sharpness(on_block(loss, scaled, k), [scaled[k]], rho=0.02).value
        assert other == pytest.approx(one, rel=1e-9)


def test_fact_10_no_barrier_between_equals_or_under_a_convex_loss():
    alphas = [k / 10 for k in range(11)]
    assert barrier(alphas, [0.4] * 11) == 0
    assert barrier(alphas, [(a - 0.3) ** 2 for a in alphas]) < 0
    assert barrier(alphas, [math.sin(math.pi * a) for a in alphas]) == pytest.approx(1)
    with pytest.raises(ValueError, match="both ends"):
        barrier([0.0, 0.5], [1, 2])


def test_stragglers_and_rank_correlation():
    assert stragglers({"a": 0.1, "b": 0.5, "c": 0.2}, 2) == ["b", "c"]
    assert spearman([1, 2, 3, 4], [10, 20, 25, 90]) == pytest.approx(1)
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert spearman([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(0.9486833)
    assert math.isnan(spearman([1, 1, 1], [1, 2, 3]))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base, a fine-tuned model of which the last image block and the projection moved, and data of two classes."""
    folder = tmp_path_factory.mktemp("path")
    base, tuned, g = tiny_clip(), tiny_clip(), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, p in tuned.named_parameters():
            if "image.tower.transformer.resblocks.1" in name or name.endswith("tower.proj"):
                p.add_(0.2 * torch.randn(p.shape, generator=g))
    write_export(base, folder / "base")
    write_export(tuned, folder / "tuned")
    for kind, shade in (("red", (200, 30, 30)), ("blue", (30, 30, 200))):
        (folder / "data" / kind).mkdir(parents=True)
        for k in range(6):
            Image.new("RGB", (32, 32), tuple(c + 7 * k for c in shade)).save(folder / "data" / kind / f"{k}.png")
    return folder


def test_fact_11_all_of_the_change_is_the_path_and_none_of_it_the_base(models):
    inputs = open_inputs([models / "tuned"], base=models / "base")
    key = "visual.transformer.resblocks.1.mlp.c_fc.weight"
    block = ["visual.1"]
    full = dict(merge_state(inputs, SparsePath(alpha=1, blocks=block, keep=1)))
    none = dict(merge_state(inputs, SparsePath(alpha=1, blocks=block, keep=0)))
    some = dict(merge_state(inputs, SparsePath(alpha=1, blocks=block, keep=0.1)))
    assert all(torch.equal(full[k], inputs.tensor(0, k)) for k in inputs.keys)
    assert torch.equal(none[key], inputs.base_tensor(key))
    assert torch.equal(none["visual.proj"], inputs.tensor(0, "visual.proj"))
    share = float((some[key] != inputs.base_tensor(key)).float().mean())
    assert share == pytest.approx(0.1, abs=0.01)
    assert torch.equal(largest(torch.tensor([3.0, -5, 1, 0]), keep=0.5), torch.tensor([3.0, -5, 0, 0]))
    with pytest.raises(InputError, match="keep is 2"):
        largest(torch.ones(2), keep=2)


def test_report_has_tables_and_a_figure(tmp_path):
    points = [PathPoint(a, {"same": a, "shifted": 0.5 - (a - 0.5) ** 2}) for a in (0.0, 0.5, 1.0)]
    points += [PathPoint(a, {"same": a, "shifted": -abs(a - 0.5)}, "visual.1") for a in (0.0, 0.5, 1.0)]
    report = PathReport("base", "tuned", "top1", False, points, chosen=0.5)
    written = write_report(report, tmp_path)
    told = json.loads((tmp_path / "path.json").read_text())
    assert told["best_alpha"] == {"same": 1.0, "shifted": 0.5} and told["chosen_alpha"] == 0.5
    assert told["barriers"]["shifted"] == {"": pytest.approx(-0.25), "visual.1": pytest.approx(-0.5)}
    with (tmp_path / "path.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6 and rows[-1]["block"] == "visual.1" and float(rows[1]["shifted"]) == 0.5
    assert set(written) == {"json", "csv", "svg", "png"} and (tmp_path / "path.png").stat().st_size > 1000
    lower = PathReport("base", "tuned", "loss", True, points[:3])
    assert lower.best("same") == 0 and lower.barriers("shifted")[""] == pytest.approx(0.25)


def test_command(models, tmp_path):
    call, data = CliRunner().invoke, f"folder:{models / 'data'}"
    pair = [str(models / "base"), str(models / "tuned")]
    more = [
        "--blocks",
        "--stragglers",
        "1",
        "--keep",
        "0.2",
        "--sharpness",
        "0.01",
        "--examples",
        "12",
        "--ascent",
        "3",
    ]
    where = ["--data", data, "--ood", data, "--alphas", "0,0.5,1", "--out", str(tmp_path / "out")]
    done = call(app, ["path", *pair, *where, *more, "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert {p["block"] for p in told["path"]} == {"", "visual", "visual.1"} and len(told["path"]) == 9
    ends = [p for p in told["path"] if p["block"] and p["alpha"] == 1]
    assert all(p["same"] == told["path"][2]["same"] for p in ends)  # all others stay at the fine-tuned model
    assert told["sparsified"]["blocks"] and len(told["sparsified"]["path"]) == 3
    assert [p["alpha"] for p in told["sharpness"]["points"]] == [0, 0.5, 1]
    assert all(p["visual.1"] >= 0 for p in told["sharpness"]["points"])
    for wrong, line in ((["--alphas", "0,x"], "write numbers"), (["--alphas", "0,2"], "goes from 0 to 1"),
                        (["--stragglers", "1"], "add --blocks"), (["--metric", "nope"], "unknown metric")):  # fmt: skip
        failed = call(app, ["path", *pair, "--data", data, "--out", str(tmp_path / "bad"), *wrong])
        assert isinstance(failed.exception, InputError) and line in str(failed.exception)
