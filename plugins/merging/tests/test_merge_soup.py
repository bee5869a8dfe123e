"""Model soups: the checkable facts of section 3."""

import json
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from clipgraft.checkpoint import write_export
from clipgraft.encoders import load
from clipgraft.errors import ClipgraftError, InputError
from clipgraft.log import RunLog
from clipgraft.testing.tiny import tiny_clip
from clipgraft_merging.soup.greedy import GreedyRule, GreedySoup, search
from clipgraft_merging.soup.judge import CallableJudge
from clipgraft_merging.soup.uniform import UniformSoup
from clipgraft_merging.task_arithmetic.arithmetic import TaskArithmetic
from clipgraft_merging.weights.checkpoints import Checkpoint
from clipgraft_merging.weights.engine import merge_state, merge_to, open_inputs
from clipgraft_merging.weights.inputs import Inputs
from clipgraft_merging.weights.stores import MemoryStore

torch.set_num_threads(1)
QUIET = RunLog(is_main=False)


def checkpoint(state, ref="model"):
    return Checkpoint(ref, MemoryStore(state), "own", None, None, ref)


def states(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "visual.a.weight": torch.randn(6, 4, generator=generator),
            "visual.b.bias": torch.randn(5, generator=generator),
        }
        for _ in range(count)
    ]


def inputs_of(rows, base=None):
    opened = tuple(checkpoint(s, f"model-{i}") for i, s in enumerate(rows))
    return Inputs(None if base is None else checkpoint(base, "base"), opened)


def merged(inputs, merger):
    return dict(merge_state(inputs, merger))


def closeness(target):
    """Held-out score: how near the weights are to a target."""
    return CallableJudge(lambda state: -sum(float((state[k] - target[k]).square().sum()) for k in target))


def greedy(rows, judge, tmp_path, **rule):
    found = search(inputs_of(rows), judge, rule=GreedyRule(**rule), ledger=tmp_path / "l.json", log=QUIET)
    return found, json.loads((tmp_path / "l.json").read_text())


def test_1_the_mean_of_copies_is_the_model():
    (state,) = states(1)
    found = merged(inputs_of([state] * 7), UniformSoup())
    assert all(torch.equal(found[key], state[key]) for key in state)


def test_2_the_uniform_soup_is_task_arithmetic_with_one_nth():
    base, *rows = states(6)
    for count in (2, 3, 5):
        soup = merged(inputs_of(rows[:count]), UniformSoup())
        arithmetic = merged(inputs_of(rows[:count], base), TaskArithmetic(scales=(1 / count,)))
        for key in soup:
            torch.testing.assert_close(soup[key], arithmetic[key], rtol=0, atol=2e-7)


def test_3_the_greedy_soup_contains_the_best_single_model(tmp_path):
    target, *rows = states(7)
    judge = closeness(target)
    alone = [judge(row.items()) for row in rows]
    found, _ = greedy(rows, judge, tmp_path)
    assert found.ingredients[0] == max(range(len(rows)), key=alone.__getitem__)


@pytest.mark.parametrize("accept", ["gt", "ge"])
def test_4_and_6_the_score_never_falls_and_ends_at_least_at_the_best_single(accept, tmp_path):
    for seed in range(5):
        target, *rows = states(7, seed)
        judge = closeness(target)
        (tmp_path / f"{seed}").mkdir()
        found, ledger = greedy(rows, judge, tmp_path / f"{seed}", accept=accept)
        accepted = [step["score"] for step in ledger["steps"] if step["accepted"]]
        assert accepted == sorted(accepted) and len(ledger["steps"]) == len(rows)
        assert ledger["score"] == accepted[-1] >= max(ledger["alone"].values()) == accepted[0]
        result = merged(inputs_of(rows), found)
        assert math.isclose(judge(result.items()), ledger["score"], rel_tol=1e-6)


def test_6_the_uniform_soup_has_no_such_guarantee(tmp_path):
    good, bad = {"visual.a.weight": torch.zeros(3)}, {"visual.a.weight": torch.full((3,), 9.0)}
    judge = closeness(good)
    assert judge(merged(inputs_of([good, bad]), UniformSoup()).items()) < judge(good.items())
    assert greedy([bad, good], judge, tmp_path)[0].ingredients == [1]


def test_5_with_a_constant_score_gt_keeps_one_and_ge_keeps_all(tmp_path):
    rows, constant = states(5), CallableJudge(lambda state: 0.5)
    for accept, expected in (("gt", [0]), ("ge", [0, 1, 2, 3, 4])):
        (tmp_path / accept).mkdir()
        assert greedy(rows, constant, tmp_path / accept, accept=accept)[0].ingredients == expected


def test_7_the_order_of_ingredients_does_not_change_the_mean():
    rows = states(6)
    first = merged(inputs_of(rows), GreedySoup(ingredients=[4, 0, 2]))
    second = merged(inputs_of(rows), GreedySoup(ingredients=[0, 2, 4]))
    third = merged(inputs_of([rows[2], rows[4], rows[0]]), UniformSoup())
    for key in first:
        assert torch.equal(first[key], second[key])
        torch.testing.assert_close(first[key], third[key], rtol=0, atol=1e-6)


def test_8_models_are_tried_by_their_score_alone_and_ties_go_to_the_one_named_first(tmp_path):
    scores = [0.2, 0.9, 0.5, 0.9, 0.7]
    rows = [{"visual.a.weight": torch.tensor([float(i)])} for i in range(5)]
    judge = CallableJudge(
        lambda state: scores[int(state["visual.a.weight"])] if float(state["visual.a.weight"]) % 1 == 0 else 0
    )
    _, ledger = greedy(rows, judge, tmp_path)
    assert ledger["order"] == [1, 3, 4, 2, 0]


class Mlp(nn.Module):
    """Two layers; its hidden units may be permuted without a change of function."""

    def __init__(self, state):
        super().__init__()
        self.state = state

    def forward(self, x):
        return F.linear(F.relu(F.linear(x, self.state["visual.up.weight"])), self.state["visual.down.weight"])


def test_9_a_soup_with_permuted_hidden_units_is_another_function_behind_a_barrier():
    torch.manual_seed(0)
    x, up, down = torch.randn(256, 4), torch.randn(16, 4), torch.randn(2, 16)
    order = torch.randperm(16)
    one = {"visual.up.weight": up, "visual.down.weight": down}
    two = {"visual.up.weight": up[order], "visual.down.weight": down[:, order]}
    soup = merged(inputs_of([one, two]), UniformSoup())
    y = Mlp(one)(x)
    torch.testing.assert_close(Mlp(two)(x), y, rtol=1e-4, atol=1e-4)
    assert F.mse_loss(Mlp(soup)(x), y) > 0.1 * y.square().mean()


def test_10_averaging_commutes_with_a_linear_head_on_fixed_features():
    features, rows = torch.randn(20, 4), states(4)
    soup = merged(inputs_of(rows), UniformSoup())
    logits = torch.stack([features @ row["visual.a.weight"].T for row in rows]).mean(0)
    torch.testing.assert_close(features @ soup["visual.a.weight"].T, logits, rtol=0, atol=1e-6)


# -- the search ------------------------------------------------------------------------------------------------------


class Counting:
    """A judge that remembers how often it was asked, and can be told to break."""

    def __init__(self, judge, *, break_at=None):
        self.judge, self.asked, self.break_at = judge, 0, break_at

    def identity(self):
        return self.judge.identity()

    def __call__(self, state):
        if self.asked == self.break_at:
            raise KeyboardInterrupt
        self.asked += 1
        return self.judge(state)


@pytest.mark.parametrize("break_at", [0, 2, 5, 6, 8, 10])
def test_an_interrupted_search_goes_on_without_judging_anything_twice(break_at, tmp_path):
    target, *rows = states(7)
    judge = closeness(target)
    (tmp_path / "whole").mkdir()
    expected, whole = greedy(rows, judge, tmp_path / "whole", accept="gt")
    first = Counting(judge, break_at=break_at)
    with pytest.raises(KeyboardInterrupt):
        greedy(rows, first, tmp_path)
    second = Counting(judge)
    found, ledger = greedy(rows, second, tmp_path)
    assert first.asked + second.asked == 2 * len(rows) - 1
    assert found == expected and ledger == whole
    third = Counting(judge)
    assert greedy(rows, third, tmp_path)[0] == expected and third.asked == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["l.json", "whole"]


def test_a_sum_that_is_ahead_of_the_ledger_is_added_up_again(tmp_path, monkeypatch):
    """Killed after the sum was replaced and before the ledger was."""
    from clipgraft_merging.soup.ledger import Ledger

    target, *rows = states(7)
    near = [{k: target[k] + 0.5 * row[k] for k in row} for row in rows]  # many are accepted
    judge = closeness(target)
    (tmp_path / "whole").mkdir()
    expected, whole = greedy(near, judge, tmp_path / "whole")
    assert len(expected.ingredients) > 2
    save, calls = Ledger.save, []

    def dies(self):
        calls.append(len(self.ingredients))
        if len(self.ingredients) == 3:
            raise KeyboardInterrupt
        save(self)

    monkeypatch.setattr(Ledger, "save", dies)
    with pytest.raises(KeyboardInterrupt):
        greedy(near, judge, tmp_path)
    monkeypatch.setattr(Ledger, "save", save)
    assert (tmp_path / "l.json.sum.safetensors").exists()
    found, ledger = greedy(near, judge, tmp_path)
    assert found == expected and ledger == whole


def test_rejected_candidates_stay_in_the_ledger_and_in_the_result(tmp_path):
    target, *rows = states(5)
    far = {key: value + 50 for key, value in rows[0].items()}
    found, ledger = greedy([*rows, far], closeness(target), tmp_path)
    assert ledger["steps"][-1] == {"model": 4, "score": ledger["steps"][-1]["score"], "accepted": False}
    assert found.settings()["steps"] == ledger["steps"] and 4 not in found.settings()["ingredients"]
    assert [m["uri"] for m in ledger["models"]] == [f"model-{i}" for i in range(5)]


def test_min_delta_and_patience(tmp_path):
    scores = {(0.0,): 0.5, (0.5,): 0.505}
    rows = [{"visual.a.weight": torch.tensor([float(i)])} for i in range(4)]
    judge = CallableJudge(lambda state: scores.get((float(state["visual.a.weight"]),), 0.1))
    for name, rule, expected in (
        ("plain", {}, [0, 1]), ("delta", {"min_delta": 0.01}, [0]),
        ("patience", {"min_delta": 0.01, "patience": 1}, [0]),
    ):  # fmt: skip
        (tmp_path / name).mkdir()
        found, ledger = greedy(rows, judge, tmp_path / name, **rule)
        assert found.ingredients == expected
        assert ledger["stopped_early"] == (name == "patience")
        assert len(ledger["steps"]) == (2 if name == "patience" else 4)
    with pytest.raises(InputError, match="patience of 1 or more"):
        GreedyRule(patience=0)


def test_leave_one_out_judges_the_soup_without_each_ingredient(tmp_path):
    target, *rows = states(5)
    near = [{k: target[k] + 0.5 * row[k] for k in row} for row in rows]
    judge = closeness(target)
    found = search(
        inputs_of(near), judge, rule=GreedyRule(accept="ge"), ledger=tmp_path / "l.json", log=QUIET, leave_one_out=True
    )
    without = json.loads((tmp_path / "l.json").read_text())["without"]
    assert sorted(map(int, without)) == sorted(found.ingredients) and len(found.ingredients) > 1
    for index, score in without.items():
        rest = [i for i in found.ingredients if i != int(index)]
        expected = judge(merged(inputs_of(near), GreedySoup(ingredients=rest)).items())
        assert math.isclose(score, expected, rel_tol=1e-5)


def test_another_ledger_and_a_score_that_is_no_number_are_refused(tmp_path):
    target, *rows = states(4)
    greedy(rows, closeness(target), tmp_path)
    with pytest.raises(InputError, match="other models; remove it"):
        greedy(rows[::-1], closeness(target), tmp_path)
    with pytest.raises(InputError, match="other rule"):
        greedy(rows, closeness(target), tmp_path, accept="ge")
    with pytest.raises(InputError, match="other judge"):
        greedy(rows, CallableJudge(lambda state: 0.0, name="other"), tmp_path)
    (tmp_path / "l.json").write_text("[]")
    with pytest.raises(InputError, match="no ledger of a greedy soup"):
        greedy(rows, closeness(target), tmp_path)
    (tmp_path / "l.json").unlink()
    with pytest.raises(ClipgraftError, match="is nan"):
        greedy(rows, CallableJudge(lambda state: float("nan")), tmp_path)


def test_candidates_are_judged_in_the_type_that_they_would_be_written_in(tmp_path):
    rows = [{"visual.a.weight": torch.tensor([x]).half()} for x in (1.0, 1.001)]
    seen = []

    def score(state):
        seen.append(state["visual.a.weight"].clone())
        return float(len(seen))

    greedy(rows, CallableJudge(score), tmp_path)
    assert {x.dtype for x in seen} == {torch.float16}
    assert torch.equal(seen[-1], merged(inputs_of(rows), UniformSoup())["visual.a.weight"])


@pytest.mark.slow
def test_an_evaluator_judges_weights_that_were_never_written(tmp_path):
    pytest.importorskip("clipgraft_toyworld")
    from clipgraft.config.schema import evaluator_named
    from clipgraft.evaluation import evaluate
    from clipgraft.registry import current
    from clipgraft_merging.soup.judge import EvaluatorJudge

    data = "toyworld/images?split=tune&n=64"
    near = load("toyworld/clip")
    for name, sigma in (("near", 0.01), ("far", 0.3)):
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in near.image.parameters():
                parameter += sigma * torch.randn_like(parameter)
        write_export(near, tmp_path / name)
    inputs = open_inputs(["toyworld/clip", tmp_path / "near", tmp_path / "far"])
    judge = EvaluatorJudge(inputs.described, evaluator_named("zero-shot"), registry=current(), data=data)
    found = search(inputs, judge, rule=GreedyRule(accept="ge"), ledger=tmp_path / "l.json", log=QUIET)
    ledger = json.loads((tmp_path / "l.json").read_text())
    out = merge_to(tmp_path / "out", inputs, found)
    for folder, score in ((out, ledger["score"]), (tmp_path / "near", ledger["alone"]["1"])):
        (evaluation,) = evaluate(load(str(folder)).eval(), ["zero-shot"], default_data=data, spread=False).values()
        assert next(iter(evaluation.metrics.values())) == score
    assert 2 not in found.ingredients


def test_a_model_with_damaged_numbers_is_found_before_anything_is_judged(tmp_path):
    rows = states(3)
    rows[2]["visual.b.bias"][0] = float("nan")
    judge = Counting(closeness(rows[0]))
    with pytest.raises(InputError, match=r"model-2: the tensor visual\.b\.bias"):
        greedy(rows, judge, tmp_path)
    assert judge.asked == 0


def test_exports_of_tiny_clips_become_one_that_opens(tmp_path):
    for seed in range(2):
        write_export(tiny_clip(seed), tmp_path / f"{seed}")
    out = merge_to(tmp_path / "out", open_inputs([tmp_path / "0", tmp_path / "1"]), UniformSoup())
    a, b, soup = (load(str(p)).state_dict() for p in (tmp_path / "0", tmp_path / "1", out))
    for key in soup:
        torch.testing.assert_close(soup[key], (a[key] + b[key]) / 2, rtol=0, atol=1e-7)


def test_the_published_script_s_arithmetic_agrees_to_1e_6():
    """It multiplies by 1/N and adds in turn; its greedy soup is a running mean n/(n+1) of fp32 numbers."""
    rows = states(30)
    uniform, greedy_soup = merged(inputs_of(rows), UniformSoup()), merged(inputs_of(rows[:9]), UniformSoup())
    for key in rows[0]:
        turn = torch.zeros_like(rows[0][key])
        for row in rows:
            turn = turn + row[key] * (1 / len(rows))
        torch.testing.assert_close(uniform[key], turn, rtol=0, atol=1e-6)
        running = rows[0][key].clone()
        for n, row in enumerate(rows[1:9], 1):
            running = running * (n / (n + 1)) + row[key] * (1 / (n + 1))
        torch.testing.assert_close(greedy_soup[key], running, rtol=0, atol=1e-6)
