"""Runs of negclip, count-to-ten and clip-refine: two steps each, resumed, in chunks, bad settings, the command."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from clipgraft.checkpoint import open_export, read_manifest, write_export
from clipgraft.errors import InputError, Interrupted
from clipgraft.execution import run_recipe
from clipgraft.registry import Registry
from clipgraft.runhooks import RunHooks
from clipgraft.spec import runhook
from clipgraft.testing.tiny import tiny_clip
from clipgraft_llm.commands import app

torch.set_num_threads(1)
CAPTIONS = ("a red cat on a small dog", "a blue star and a white car", "two dogs", "three red cats")


@pytest.fixture(scope="module")
def registry():
    return Registry.discover()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root, rng, rows = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0), ["image,caption"]
    for k in range(16):
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(root / f"{k}.png")
        rows.append(f"{k}.png,{CAPTIONS[k % 4]}")
    (root / "table.csv").write_text("\n".join(rows) + "\n")
    (root / "dull.csv").write_text("image,caption\n" + "\n".join(f"{k}.png,the sun" for k in range(16)) + "\n")
    (root / "bare.csv").write_text("image,caption\n" + "\n".join(f"{k}.png," for k in range(16)) + "\n")
    write_export(tiny_clip().eval(), root / "base")
    return root


def settings(folder, **more):
    return {
        "model.from": str(folder / "base"), "data.from": f"csv:{folder}/table.csv", "train.steps": 3,
        "train.batch_size": 8, "train.log_every": 1, "train.warmup": 0, "train.lr": 1e-4, "threads": 1,
        "evaluate.retention": "none", **more,
    }  # fmt: skip


def rows_of(run):
    return [json.loads(line) for line in (run / "stages/00-train/metrics.jsonl").read_text().splitlines()]


class Stop:
    """Asks the run to stop after its second step."""

    observer = False

    @runhook
    def after_step(self, run, step):
        run.stop_requested = step == 1


@pytest.mark.parametrize("recipe", ["negclip", "clip-refine"])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path, folder, registry, monkeypatch, recipe):
    straight = run_recipe(recipe, overrides=settings(folder), out=tmp_path / "straight", registry=registry)
    made = RunHooks.__init__

    def with_stop(self, *args, **kwargs):
        made(self, *args, **kwargs)
        self.register(Stop(), "stop")

    with monkeypatch.context() as patch:
        patch.setattr(RunHooks, "__init__", with_stop)
        with pytest.raises(Interrupted, match="after step 2"):
            run_recipe(recipe, overrides=settings(folder), out=tmp_path / "cut", registry=registry)
    again = run_recipe(resume=tmp_path / "cut", registry=registry)
    assert again.steps == straight.steps == 3
    one, two = (open_export(tmp_path / name / "export").state_dict() for name in ("straight", "cut"))
    assert all(torch.equal(one[k], two[k]) for k in one)
    start = open_export(folder / "base").state_dict()
    assert any(not torch.equal(one[k], start[k]) for k in one)
    assert read_manifest(tmp_path / "cut/export")["level"] == "L0"


def test_chunks_train_as_the_whole_batch_does(tmp_path, folder, registry):
    found = []
    for chunks in (1, 2):
        overrides = settings(folder, **{"train.accumulate": chunks, "negatives.per_caption": 2})
        run_recipe("negclip", overrides=overrides, out=tmp_path / str(chunks), registry=registry)
        found.append((rows_of(tmp_path / str(chunks)), open_export(tmp_path / str(chunks) / "export").state_dict()))
    (one, weights), (other, chunked) = found
    assert [r["loss"] for r in one] == pytest.approx([r["loss"] for r in other], rel=1e-4)
    assert all(torch.allclose(weights[k], chunked[k], atol=2e-5) for k in weights)


def test_counting_runs_with_an_exact_share(tmp_path, folder, registry, capsys):
    overrides = settings(folder, **{"counting.share": 0.5})
    run_recipe("count-to-ten", overrides=overrides, out=tmp_path / "run", registry=registry)
    assert "8 of 16 samples count (2: 4, 3: 4)" in capsys.readouterr().err
    terms = rows_of(tmp_path / "run")[0]["terms"]
    assert terms["CountLoss.1.loss"] == pytest.approx(np.log(2), abs=0.3) and 0 <= terms["CountLoss.1.right"] <= 1


def test_refining_has_a_frozen_teacher_and_other_references_every_step(tmp_path, folder, registry):
    from clipgraft_llm.named_stage import NamedStage

    seen, forward = [], NamedStage.loss_from

    def spy(self, features, batch):
        assert not self.teacher.training and not any(p.requires_grad for p in self.teacher.parameters())
        drawn, randn = [], torch.randn_like
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "randn_like", lambda x: drawn.append(randn(x)) or drawn[-1])
            out = forward(self, features, batch)
        assert len(drawn) == 1 and not drawn[0].requires_grad  # one for both modalities
        seen.append((drawn[0], {k: v.clone() for k, v in self.teacher.state_dict().items()}))
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NamedStage, "loss_from", spy)
        run_recipe("clip-refine", overrides=settings(folder), out=tmp_path / "run", registry=registry)
    base = open_export(folder / "base").state_dict()
    assert len(seen) == 3 and all(torch.equal(state[k], base[k]) for _, state in seen for k in base)
    rows = torch.cat([reference for reference, _ in seen])
    assert rows.shape == (24, 16) and len({tuple(row.tolist()) for row in rows}) == 24
    state = open_export(tmp_path / "run/export").state_dict()
    assert torch.equal(state["logit_scale"], base["logit_scale"])  # raw features: no loss reads it


def test_an_epoch_of_the_paper_has_228_steps():
    assert int(0.99 * 118_287) // 512 == 228


@pytest.mark.parametrize(
    ("recipe", "change", "words"),
    [
        ("negclip", {"data.from": "dull.csv"}, "no wrong caption for the first 16 samples .*; add rules"),
        ("negclip", {"negatives.made": "source"}, "set negatives.made to rules"),
        ("negclip", {"negatives.made": "file"}, "made: file and file: PATH go together"),
        ("negclip", {"losses": ["core/clip"]}, "list llm/negclip, or run core/finetune"),
        ("negclip", {"data.from": "bare.csv"}, "empty caption"),
        ("clip-refine", {"teacher": None}, "llm/hycd learns from a teacher"),
        ("count-to-ten", {"data.from": "dull.csv"}, "no caption has exactly one number"),
        ("count-to-ten", {"counting.verified": "nowhere.txt"}, "counting.verified: nowhere.txt can't be read"),
        ("finetune", {"losses": ["llm/negclip"]}, "llm/negclip or llm/count-to-ten"),
    ],
)
def test_bad_settings_are_one_line(tmp_path, folder, registry, recipe, change, words):
    change = {k: f"csv:{folder}/{v}" if k == "data.from" else v for k, v in change.items()}
    with pytest.raises(Exception, match=words) as error:
        run_recipe(recipe, overrides=settings(folder) | change, out=tmp_path / "run", registry=registry)
    assert "\n" not in str(error.value)


def test_the_command_writes_wrong_captions_that_a_run_takes(tmp_path, folder, registry):
    out = tmp_path / "wrong.jsonl"
    result = CliRunner().invoke(app, ["negatives", f"csv:{folder}/table.csv", "--out", str(out), "--json"])
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["captions"] == 16 and told["without"] == 0 and told["rules"][0] == "swap-heads"
    overrides = settings(folder, **{"negatives.made": "file", "negatives.file": str(out)})
    assert run_recipe("negclip", overrides=overrides, out=tmp_path / "run", registry=registry).status == "done"
    result = CliRunner().invoke(app, ["negatives", f"csv:{folder}/table.csv", "--out", str(tmp_path / "no/x.jsonl")])
    assert isinstance(result.exception, InputError) and "is no folder" in str(result.exception)
    result = CliRunner().invoke(app, ["negatives", f"csv:{folder}/dull.csv", "--out", str(out), "--rule", "replace"])
    assert isinstance(result.exception, InputError) and "make no wrong caption" in str(result.exception)


def test_hard_pictures_are_neighbours_in_one_batch(tmp_path, folder, registry):
    from safetensors.torch import save_file

    ids = [f"{k}.png" for k in range(16)]
    angle = torch.arange(16) // 2 * 0.7  # pairs of alike pictures
    told = torch.frombuffer(bytearray(json.dumps(ids).encode()), dtype=torch.uint8)
    save_file(
        {"embeddings": torch.stack([angle.cos(), angle.sin()], 1), "ids_json": told}, tmp_path / "near.safetensors"
    )
    seen = []

    class Watch:
        observer = False

        @runhook
        def before_step(self, run, batch):
            seen.append(batch.ids)

    made = RunHooks.__init__

    def watched(self, *args, **kwargs):
        made(self, *args, **kwargs)
        self.register(Watch(), "watch")

    overrides = settings(
        folder, **{"data.batches": "hard", "data.neighbours": str(tmp_path / "near.safetensors"), "data.cluster": 2}
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunHooks, "__init__", watched)
        run_recipe("negclip", overrides=overrides, out=tmp_path / "run", registry=registry)
    assert len(seen) == 3
    for batch in seen:
        numbers = [int(name.removesuffix(".png")) for name in batch]
        assert all(number ^ 1 in numbers for number in numbers)
