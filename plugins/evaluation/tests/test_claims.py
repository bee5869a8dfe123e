from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from clipgraft.claims import Arm, Claim, Gain, Kept
from clipgraft.cli import main
from clipgraft.errors import ClipgraftError, InputError
from clipgraft.evaluation import records
from clipgraft.evaluation.base import Evaluation
from clipgraft.evaluation.statistics import Share
from clipgraft.registry import PluginInfo, Registry, use
from clipgraft_evaluation.claim_command import identity as command_identity
from clipgraft_evaluation.claim_command import run_in_subprocess
from clipgraft_evaluation.verdict import Job, check, judge, paired_p_value

PAIRS, ZERO = "core/pairs.mean", "core/zero-shot.top1"


def claim(**changes: object) -> Claim:
    standard = Claim(
        name="fake/sharper",
        statement="Details become readable.",
        paper="A. Author, A title, 2025",
        bases=("toyworld/clip", "toyworld/clip-1"),
        method=Arm(name="method", recipe="fake/sharper:tiny"),
        controls=(Arm(name="anchor-only", recipe="fake/sharper:tiny", overrides=("flow.weight=0",)),),
        gains=(Gain(metric=PAIRS, over="anchor-only", at_least=0.08), Gain(metric=PAIRS, over="before", at_least=0.05)),
        kept=(Kept(metric=ZERO, share=0.95),),
        budget=480,
    )
    return replace(standard, **changes)  # type: ignore[arg-type]


def arms(after: list[float], control: list[float], *, zero: float = 0.78) -> dict[str, dict[str, list[float]]]:
    n = len(after)
    return {
        "before": {PAIRS: [0.20] * n, ZERO: [0.80] * n},
        "after": {PAIRS: after, ZERO: [zero] * n},
        "anchor-only": {PAIRS: control, ZERO: [0.80] * n},
    }


@pytest.mark.parametrize("n", [2, 3, 4, 5, 10, 40])
@pytest.mark.parametrize("shift", [-1.0, 0.0, 0.3, 2.0, 30.0])
def test_p_value_is_scipys(n: int, shift: float) -> None:
    stats = pytest.importorskip("scipy.stats")
    draw = random.Random(f"{n}/{shift}")
    differences = [draw.gauss(shift, 1) for _ in range(n)]
    expected = stats.ttest_rel(differences, [0.0] * n, alternative="greater").pvalue
    assert paired_p_value(differences) == pytest.approx(expected, rel=1e-7)


def test_p_value_without_spread_is_decided_by_the_sign() -> None:
    assert [paired_p_value([d] * 3) for d in (0.1, 0.0, -0.1)] == [0.0, 1.0, 1.0]


def test_holds_when_every_gain_is_large_and_sure_and_the_rest_is_kept() -> None:
    verdict = judge(claim(), arms([0.31, 0.32, 0.30], [0.20, 0.21, 0.20]))
    assert verdict.unmet == () and len(verdict.met) == 3
    assert verdict.p_value is not None and 0 < verdict.p_value < 0.05


def test_a_gain_that_is_too_small_fails() -> None:
    verdict = judge(claim(), arms([0.31, 0.32, 0.30], [0.24, 0.25, 0.24]))
    assert verdict.unmet == (f"{PAIRS}: +0.0667 over anchor-only (needs +0.08), p = 0.0012 (needs below 0.05)",)
    assert verdict.as_json()["holds"] is False


def test_an_allowed_loss_must_surely_be_smaller() -> None:
    near = claim(gains=(Gain(metric=PAIRS, over="anchor-only", at_least=-0.03),), kept=())
    verdict = judge(near, arms([0.300, 0.291, 0.295], [0.30, 0.30, 0.30]))
    assert not verdict.unmet and verdict.p_value is not None
    assert verdict.p_value == pytest.approx(paired_p_value([0.030, 0.021, 0.025]))
    unsure = judge(near, arms([0.36, 0.22, 0.29], [0.30, 0.30, 0.30]))  # -.01 in the mean, one seed at -.08
    assert len(unsure.unmet) == 1 and unsure.p_value is not None and unsure.p_value > 0.05
    assert judge(near, arms([0.25, 0.26, 0.25], [0.30, 0.30, 0.30])).unmet
    assert f"after is less than 0.03 below anchor-only in {PAIRS}" in near.rule
    assert "tests that it is smaller than allowed" in near.rule and "allowed" not in claim().rule


def test_a_large_gain_that_chance_explains_fails() -> None:
    verdict = judge(claim(), arms([0.60, 0.21, 0.22], [0.20, 0.20, 0.20]))
    assert len(verdict.unmet) == 2 and all("p = 0.1" in text for text in verdict.unmet)
    assert verdict.p_value == pytest.approx(0.197, abs=0.01)


def test_what_must_be_kept_and_is_lost_fails() -> None:
    verdict = judge(claim(), arms([0.31, 0.32, 0.30], [0.20, 0.21, 0.20], zero=0.70))
    assert verdict.unmet == (f"{ZERO}: 0.7000 after 0.8000 (needs 95.0% of it, 0.7600)",)
    assert verdict.as_json()["kept"] == {ZERO: pytest.approx([0.875] * 3)}


def test_one_seed_is_undecided() -> None:
    verdict = judge(claim(), arms([0.9], [0.1]))
    assert verdict.p_value is None and [text.split(":")[0] for text in verdict.unmet] == ["undecided"]


def test_the_method_against_itself_never_holds() -> None:
    draw = random.Random(0)
    rule = claim(gains=(Gain(metric=PAIRS, over="anchor-only", at_least=0.0),), kept=())
    held = 0
    for _ in range(400):
        values = [[draw.gauss(0.3, 0.02) for _ in range(3)] for _ in range(2)]
        held += not judge(rule, arms(*values)).unmet
    assert 5 <= held <= 40, "alpha = 0.05 lets about 20 of 400 through"


def test_json_has_the_documented_keys() -> None:
    entry = json.loads(json.dumps(judge(claim(), arms([0.31, 0.32], [0.20, 0.21])).as_json()))
    assert list(entry) == ["name", "statement", "holds", "seeds", "arms", "kept", "p_value", "seconds"]
    assert list(entry["arms"]) == ["before", "after", "anchor-only"]
    assert entry["seeds"] == 2 and all(len(v) == 2 for arm in entry["arms"].values() for v in arm.values())


def test_the_rule_is_in_words() -> None:
    assert claim().rule == (
        "Holds if, in the mean over seeds, after exceeds anchor-only in core/pairs.mean by 0.08 or more; "
        "after exceeds before in core/pairs.mean by 0.05 or more; core/zero-shot.top1 keeps 95.0% of before or more; "
        "and every gain has p < 0.05 in a one-sided paired t-test over at least two seeds."
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"controls": (Arm(name="method", recipe="x"),)},
        {"controls": (Arm(name="before", recipe="x"),)},
        {"controls": (Arm(name="../out", recipe="x"),)},
        {"gains": (Gain(metric=PAIRS, over="anchor", at_least=0.1),)},
        {"gains": ()},
        {"bases": ()},
    ],
)
def test_a_claim_that_contradicts_itself_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(InputError, match="fake/sharper"):
        claim(**changes)


def fake_runner(ran: list[tuple[str, int]], *, gain: float = 0.12) -> Callable[[Job], None]:
    """Writes what a run leaves: the method gains, the control does not; one base is better than the other."""
    lock = threading.Lock()

    def run_arm(job: Job) -> None:
        with lock:
            ran.append((job.arm.name, job.seed))
        base = 0.2 if job.overrides[-1] == "model.from=toyworld/clip" else 0.3
        after = base + 0.01 * job.seed + (gain if job.arm.name == "method" else 0.0)
        job.folder.mkdir()
        numbers = {"before": (base, 0.8), "after": (after, 0.79)}
        measured = {w: {"core/pairs": {"mean": p}, "core/zero-shot": {"top1": z}} for w, (p, z) in numbers.items()}
        (job.folder / "evaluations.json").write_text(json.dumps(measured))

    return run_arm


def identity(job: Job) -> str:
    return f"{job.arm.recipe} {job.overrides}"


def test_check_runs_every_arm_on_cycled_bases_and_pairs_the_seeds(tmp_path: Path) -> None:
    ran: list[tuple[str, int]] = []
    verdict = check(claim(), seeds=3, out=tmp_path, run_arm=fake_runner(ran), identity=identity)
    assert sorted(ran) == [(arm, seed) for arm in ("anchor-only", "method") for seed in range(3)]
    assert verdict.arms["before"][PAIRS] == [0.2, 0.3, 0.2]
    assert verdict.arms["after"][PAIRS] == pytest.approx([0.32, 0.43, 0.34])
    assert verdict.arms["anchor-only"][PAIRS] == pytest.approx([0.2, 0.31, 0.22])
    assert verdict.unmet == () and verdict.seconds > 0
    assert (tmp_path / "fake" / "sharper" / "seed-2" / "method" / "evaluations.json").exists()


def test_finished_arms_are_reused_and_changed_ones_run_again(tmp_path: Path) -> None:
    ran: list[tuple[str, int]] = []
    first = check(claim(), seeds=2, out=tmp_path, run_arm=fake_runner(ran), identity=identity)
    ran.clear()
    again = check(claim(), seeds=3, out=tmp_path, run_arm=fake_runner(ran), identity=identity)
    assert sorted(ran) == [("anchor-only", 2), ("method", 2)], "only the new seed"
    assert {k: v[:2] for k, v in again.arms["after"].items()} == first.arms["after"]
    ran.clear()
    other = claim(method=Arm(name="method", recipe="fake/sharper:tiny", overrides=("steps=9",)))
    changed = check(other, seeds=2, out=tmp_path, run_arm=fake_runner(ran, gain=0.01), identity=identity)
    assert sorted(ran) == [("method", 0), ("method", 1)]
    assert changed.arms["after"][PAIRS] == pytest.approx([0.21, 0.32]), "numbers of the new configuration"


def test_claims_that_share_a_folder_take_up_each_others_arms(tmp_path: Path) -> None:
    ran: list[tuple[str, int]] = []
    first = check(claim(shares="fake/arms"), seeds=2, out=tmp_path, run_arm=fake_runner(ran), identity=identity)
    ran.clear()
    more = (*claim().controls, Arm(name="shuffled", recipe="fake/sharper:tiny", overrides=("shuffled=true",)))
    second = claim(name="fake/steadier", controls=more, kept=(), shares="fake/arms")
    found = check(second, seeds=2, out=tmp_path, run_arm=fake_runner(ran), identity=identity)
    assert sorted(ran) == [("shuffled", 0), ("shuffled", 1)]
    assert found.arms["anchor-only"][PAIRS] == first.arms["anchor-only"][PAIRS] and found.seconds > 0
    ran.clear()
    check(claim(name="fake/alone"), seeds=2, out=tmp_path, run_arm=fake_runner(ran), identity=identity)
    assert len(ran) == 4, "a claim that shares nothing runs its own arms"
    ran.clear()
    longer = (replace(claim().controls[0], overrides=("train.steps=9",)),)
    third = claim(controls=longer, shares="fake/arms")
    check(third, seeds=2, out=tmp_path, run_arm=fake_runner(ran), identity=identity)
    assert sorted(ran) == [("anchor-only", 0), ("anchor-only", 1)], "one name, other settings: another run"
    ran.clear()
    check(claim(shares="fake/arms"), seeds=2, out=tmp_path, run_arm=fake_runner(ran), identity=identity)
    assert ran == [], "and neither took the other's place"


def test_ctrl_c_begins_no_further_arm(tmp_path: Path) -> None:
    ran: list[int] = []

    def interrupted(job: Job) -> None:
        ran.append(job.seed)
        time.sleep(0.1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        check(claim(), seeds=20, out=tmp_path, run_arm=interrupted, identity=identity)
    assert len(ran) < 20, "of 40"


def test_a_failure_between_two_configurations_leaves_nothing_that_looks_finished(tmp_path: Path) -> None:
    ran: list[tuple[str, int]] = []
    check(claim(), seeds=1, out=tmp_path, run_arm=fake_runner(ran), identity=identity)

    def dies_half_way(job: Job) -> None:
        fake_runner(ran)(job)
        raise ClipgraftError("disk full")

    with pytest.raises(ClipgraftError, match="disk full"):
        check(claim(), seeds=1, out=tmp_path, run_arm=dies_half_way, identity=lambda job: "another")
    ran.clear()
    check(claim(), seeds=1, out=tmp_path, run_arm=fake_runner(ran), identity=identity)
    assert ("method", 0) in ran


def test_a_failing_arm_stops_the_claim_and_keeps_what_was_done(tmp_path: Path) -> None:
    ran: list[tuple[str, int]] = []

    def run_arm(job: Job) -> None:
        if job.arm.name == "anchor-only":
            raise ClipgraftError("arm 'anchor-only' with seed 0 failed: out of memory")
        fake_runner(ran)(job)

    with pytest.raises(ClipgraftError, match="out of memory"):
        check(claim(), seeds=9, out=tmp_path, run_arm=run_arm, identity=identity)
    assert 0 < len(ran) < 9, "what waited behind the failure is not started"
    assert len(list(tmp_path.rglob("method.json"))) == len(ran)


def test_a_metric_that_no_arm_measured_is_named(tmp_path: Path) -> None:
    odd = claim(kept=(Kept(metric="core/retrieval.r1", share=0.9),))
    with pytest.raises(ClipgraftError, match=r"no finite 'core/retrieval.r1' before; it has core/pairs.mean"):
        check(odd, seeds=1, out=tmp_path, run_arm=fake_runner([]), identity=identity)


PLUGIN = """
from clipgraft.claims import Arm, Claim, Gain, Kept
from clipgraft.spec import Component, hookimpl

data = ("data.from=folder:pictures", "train.steps=5")
CLAIM = Claim(
    name="sharper",
    statement="Details become readable.",
    paper="A. Author, A title, 2025",
    bases=("toyworld/clip", "toyworld/clip-1"),
    method=Arm(name="method", recipe="core/finetune", overrides=data),
    controls=(Arm(name="anchor-only", recipe="core/finetune", overrides=(*data, "train.lr=1e-9"), note="(still)"),),
    gains=(Gain(metric="core/pairs.mean", over="anchor-only", at_least=0.08),),
    kept=(Kept(metric="core/zero-shot.top1", share=0.95),),
    budget=480,
    tried="pixels as the target",
)


@hookimpl
def clipgraft_claims():
    return [Component(name="sharper", target="sharper_claims:CLAIM")]
"""


@pytest.fixture(scope="module")
def plugin_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("plugin") / "sharper_claims.py"
    file.write_text(PLUGIN)
    return file


@pytest.fixture
def run_claims(
    plugin_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[str, str, int]]:
    """The command in this process, arms by the fake runner; returns stdout, stderr and the number of arms run."""
    monkeypatch.setenv("CLIPGRAFT_PLUGINS", "evaluation")

    def run(*words: str) -> tuple[str, str, int]:
        ran: list[tuple[str, int]] = []
        monkeypatch.setattr("clipgraft_evaluation.claim_command.run_in_subprocess", fake_runner(ran))
        with pytest.raises(SystemExit) as ended:
            main(["--plugin", str(plugin_file), "claims", *words, "--out", str(tmp_path / "out")])
        streams = capsys.readouterr()
        assert ended.value.code == 0, streams.err
        return streams.out, streams.err, len(ran)

    return run


def test_the_command_prints_one_document_and_the_rule_first(run_claims: Callable[..., tuple[str, str, int]]) -> None:
    out, err, ran = run_claims("sharper", "--seeds", "3", "--json")
    (entry,) = json.loads(out)["claims"]
    assert list(entry) == ["name", "statement", "holds", "seeds", "arms", "kept", "p_value", "seconds"]
    assert entry["name"] == "sharper-claims/sharper" and entry["holds"] is True and ran == 6
    assert "Details become readable.\nHolds if, in the mean over seeds, after exceeds anchor-only" in err


def test_a_claim_that_fails_exits_with_0_and_is_written_as_such(
    run_claims: Callable[..., tuple[str, str, int]], tmp_path: Path
) -> None:
    out, _, _ = run_claims("--seeds", "1")
    assert "sharper-claims/sharper: undecided" in out and "unmet: undecided: one seed" in out
    page, record = (
        (tmp_path / "out" / "claims.md").read_text(),
        json.loads((tmp_path / "out" / "claims.json").read_text()),
    )
    assert "| arm | core/pairs.mean | core/zero-shot.top1 |" in page and "| after | 0.320 | 0.790 |" in page
    assert "- anchor-only: `core/finetune data.from=folder:pictures train.steps=5 train.lr=1e-9` (still)" in page
    assert "Tried: pixels as the target" in page and "0 s (budget 480 s)" in page
    assert record["claims"][0]["unmet"] == ["undecided: one seed can't tell a gain from chance; use --seeds 2 or more"]
    assert (
        record["claims"][0]["rule"].startswith("Holds if")
        and record["claims"][0]["method"]["recipe"] == "core/finetune"
    )


def test_a_second_call_runs_only_what_is_new(run_claims: Callable[..., tuple[str, str, int]]) -> None:
    assert run_claims("--seeds", "2")[2] == 4
    assert run_claims("--seeds", "2")[2] == 0
    assert run_claims("--seeds", "3")[2] == 2


def test_what_decides_a_result_is_part_of_its_identity(tmp_path: Path) -> None:
    file = tmp_path / "edited_claims.py"
    file.write_text(PLUGIN)
    overrides = ("model.from=x", "data.from=folder:y")
    job = Job(arm=Arm(name="a", recipe="core/finetune"), seed=0, overrides=overrides, folder=tmp_path)
    with use(Registry.discover(allow=(), files=[file])):
        text = command_identity(job)
        assert text.startswith("# code ") and "from: folder:y" in text
        others = [replace(job, seed=1), replace(job, overrides=(*job.overrides, "train.lr=1e-3"))]
        assert len({text, *map(command_identity, others)}) == 3
        assert command_identity(replace(job, folder=tmp_path / "elsewhere")) == text
        with pytest.raises(InputError, match=r"train\.stepz"):
            command_identity(replace(job, overrides=(*job.overrides, "train.stepz=1")))
        (tmp_path / "beside.py").write_text("x = 1")
        assert command_identity(job) == text, "what lies beside a plugin file is not part of it"
        file.write_text(PLUGIN + "x = 1\n")
        assert command_identity(job) != text, "edited code"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("blurrier",), "unknown claim 'blurrier'; known: sharper"),
        (("--plugin", "diffusionn"), "unknown plugin 'diffusionn'"),
        (("--plugin", "core"), "no claim to check"),
    ],
)
def test_a_wrong_name_is_one_line(
    words: tuple[str, ...],
    message: str,
    plugin_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("CLIPGRAFT_PLUGINS", "evaluation")
    with pytest.raises(SystemExit) as ended:
        main(["--plugin", str(plugin_file), "claims", *words])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.startswith("error: ") and message in error and error.count("\n") == 1


def test_a_run_that_fails_is_told_with_its_last_line(
    plugin_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLIPGRAFT_PLUGINS", "evaluation")
    job = Job(
        arm=Arm(name="method", recipe="core/finetuna"), seed=4, overrides=("model.from=x",), folder=tmp_path / "method"
    )
    with use(Registry.discover(allow=(), files=[plugin_file])), pytest.raises(ClipgraftError) as failed:
        run_in_subprocess(job)
    log = tmp_path / "method.log"
    assert str(failed.value).startswith("arm 'method' with seed 4 failed: unknown recipe 'core/finetuna'; did you mean")
    assert str(failed.value).endswith(f"(log: {log})") and "error: unknown recipe" in log.read_text()


def test_without_its_plugins_the_demo_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CLIPGRAFT_PLUGINS", "evaluation")
    with use(Registry.discover()), pytest.raises(SystemExit) as ended:
        main(["demo"])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1
    assert "pip install clipgraft-toyworld clipgraft-diffusion, or in a checkout" in error


def test_the_demo_measures_runs_and_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_recipe(recipe: str, *, out: Path, overrides: list[str]) -> SimpleNamespace:
        assert (recipe, overrides) == ("diffusion/genhancer:tiny", ["threads=1"])
        out.mkdir()
        measured = {"before": {"mean": 0.2}, "after": {"mean": 0.3, "skipped": 1.0}}
        (out / "evaluations.json").write_text(json.dumps({w: {"core/pairs": m} for w, m in measured.items()}))
        for when, right in (("before", 2), ("after", 3)):
            samples = tuple({"id": str(k), "correct": k < right} for k in range(10))
            found = Evaluation(measured[when], samples=samples, statistics={"mean": Share("correct")})
            records.save(out / "evaluation" / when, {"core/pairs": found})
        return SimpleNamespace(run=out, export=out / "export", forgetting={})

    monkeypatch.setattr("clipgraft_evaluation.report.write_report", lambda run: run / "report.html")
    monkeypatch.setattr("clipgraft.execution.run_recipe", run_recipe)
    registry = Registry.discover(allow=("evaluation",))
    names = ("toyworld", "diffusion")
    registry.plugins = [p for p in registry.plugins if p.name not in names]
    registry.plugins += [PluginInfo(name, f"clipgraft-{name}") for name in names]
    streams = []
    for words in (["--json", "--out", str(tmp_path / "a")], ["--out", str(tmp_path / "b")]):
        with use(registry), pytest.raises(SystemExit) as ended:
            main(["demo", *words])
        assert ended.value.code == 0
        streams.append(capsys.readouterr().out)
    found = json.loads(streams[0])
    assert list(found) == ["before", "after", "forgetting", "export", "report", "seconds"] and found["seconds"] >= 0
    assert found["before"] == {"core/pairs.mean": 0.2} and found["after"]["core/pairs.mean"] == 0.3
    assert found["export"] == str(tmp_path / "a" / "export") and found["report"] == str(tmp_path / "a" / "report.html")
    assert all(word in streams[1] for word in ("0.2000", "0.3000", "+0.1000", "cannot tell"))
    assert f"report  {tmp_path / 'b' / 'report.html'}" in streams[1]
