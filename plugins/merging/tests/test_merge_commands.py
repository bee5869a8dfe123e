"""The merging commands as a user types them: what they write, what they print, and one line for bad input."""

import json

import pytest
import torch

from clipgraft.checkpoint import write_export
from clipgraft.cli import main
from clipgraft.encoders import load
from clipgraft.testing.tiny import tiny_clip

torch.set_num_threads(1)


@pytest.fixture
def cli(capsys):
    """Runs ``clipgraft merging ...``; stdout, or the one line of an error."""

    def call(*words, code=0):
        with pytest.raises(SystemExit) as end:
            main(["merging", *(str(word) for word in words)])
        told = capsys.readouterr()
        assert end.value.code == code, told.err
        if code:
            errors = [line for line in told.err.splitlines() if line.startswith("error:")]
            assert len(errors) == 1 and "Traceback" not in told.err and told.out == "", told.err
            return errors[0]
        return told.out

    return call


@pytest.fixture
def models(tmp_path):
    """A base and two models."""
    paths = [tmp_path / name for name in ("base", "a", "b")]
    for seed, path in enumerate(paths):
        write_export(tiny_clip(seed), path)
    return paths


def proj(folder):
    return load(str(folder)).state_dict()["image.tower.proj"]


def test_soup(cli, models, tmp_path):
    _, a, b = models
    assert cli("soup", a, b, "--out", tmp_path / "out") == f"model: {tmp_path / 'out'}\n"
    torch.testing.assert_close(proj(tmp_path / "out"), (proj(a) + proj(b)) / 2)


def test_json_is_one_document_with_every_input_s_hash(cli, models, tmp_path):
    base, a, b = models
    told = json.loads(cli("ties", a, b, "--base", base, "--out", tmp_path / "out", "--density", 0.5, "--json"))
    assert told["merge"] == "merging/ties" and told["out"] == str(tmp_path / "out") and told["base"] == str(base)
    assert told["settings"] == {"density": 0.5, "scale": 1.0, "keep": "strict", "merge": "mean"}
    assert [m["uri"] for m in told["models"]] == [str(a), str(b)] and all(
        len(m["sha256"]) == 64 for m in told["models"]
    )
    assert told["tensors"] == 62


def test_task_arithmetic_takes_a_scale_per_model(cli, models, tmp_path):
    base, a, b = models
    cli("task-arithmetic", a, b, "--base", base, "--scale", 0.5, "--scale=-0.25", "--out", tmp_path / "out")
    expected = proj(base) + 0.5 * (proj(a) - proj(base)) - 0.25 * (proj(b) - proj(base))
    torch.testing.assert_close(proj(tmp_path / "out"), expected, rtol=1e-4, atol=1e-6)


def test_wise_ft_writes_a_folder_per_alpha(cli, models, tmp_path):
    base, a, _ = models
    told = json.loads(cli("wise-ft", a, "--base", base, "--alpha", "0,0.25,1", "--out", tmp_path / "path", "--json"))
    assert [r["settings"]["alpha"] for r in told["results"]] == [0.0, 0.25, 1.0]
    assert torch.equal(proj(tmp_path / "path" / "alpha-0"), proj(base))
    assert torch.equal(proj(tmp_path / "path" / "alpha-1"), proj(a))
    torch.testing.assert_close(proj(tmp_path / "path" / "alpha-0.25"), 0.75 * proj(base) + 0.25 * proj(a))
    cli("wise-ft", a, "--base", base, "--block", "visual=1", "--block", "text.*=0", "--out", tmp_path / "one")
    assert torch.equal(proj(tmp_path / "one"), proj(a))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["ties", "A", "--base", "BASE", "--density", "20"], "20 percent is written 0.2"),
        (["ties", "A", "--base", "BASE", "--merge", "max"], "mean or sum"),
        (
            ["task-arithmetic", "A", "B", "--base", "BASE", "--scale", "1", "--scale", "1", "--scale", "1"],
            "3 scales for 2",
        ),
        (["wise-ft", "A", "--base", "BASE", "--alpha", "1.5"], "--extrapolate"),
        (["wise-ft", "A", "--base", "BASE", "--alpha", "half"], "'half' is no number"),
        (["wise-ft", "A", "--base", "BASE", "--alpha", "0.5,0.5"], "names a value twice"),
        (["wise-ft", "A", "--base", "BASE", "--block", "visual.0"], "expected PATTERN=A"),
        (["wise-ft", "A", "--base", "BASE", "--block", "visul.0=1"], "did you mean visual.0"),
        (["wise-ft", "A", "--base", "BASE", "--fisher", "A"], "give it twice"),
        (["soup", "A", "nowhere"], "nowhere"),
        (["greedy", "A", "B", "--accept", "maybe"], "gt or ge"),
        (["greedy", "A", "B"], "has no data to measure on"),
    ],
)
def test_bad_input_is_one_line_with_the_fix(words, told, cli, models, tmp_path):
    names = dict(zip(("BASE", "A", "B"), models, strict=True))
    line = cli(*(names.get(word, word) for word in words), "--out", tmp_path / "out", code=2)
    assert told in line
    assert not (tmp_path / "out").exists()


def test_several_alphas_do_not_go_into_an_export(cli, models, tmp_path):
    base, a, b = models
    line = cli("wise-ft", a, "--base", base, "--alpha", "0,1", "--out", b, code=2)
    assert "is an export" in line


@pytest.mark.slow
def test_greedy_judges_with_an_evaluator_and_a_second_call_judges_nothing(cli, tmp_path):
    pytest.importorskip("clipgraft_toyworld")
    near = load("toyworld/clip")
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in near.image.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    write_export(near, tmp_path / "far")
    words = [
        "greedy",
        "toyworld/clip",
        tmp_path / "far",
        "--on",
        "zero-shot",
        "--data",
        "toyworld/images?split=tune&n=128",
    ]
    words += ["--leave-one-out", "--out", tmp_path / "out", "--json"]
    first, second = json.loads(cli(*words)), json.loads(cli(*words))
    assert first["settings"]["ingredients"] == [0] and first["settings"]["steps"][1]["accepted"] is False
    assert first["ledger"] == str(tmp_path / "out.greedy.json")
    assert {k: v for k, v in first.items() if k != "seconds"} == {k: v for k, v in second.items() if k != "seconds"}
    assert torch.equal(proj(tmp_path / "out"), proj("toyworld/clip"))
