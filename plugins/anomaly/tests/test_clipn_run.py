"""CLIPN from a run to its export and back: tiny, resumed, measured inside the run, rejected pictures, bad input."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from clipgraft import encoders
from clipgraft.checkpoint import MANIFEST, open_export, read_component, read_manifest, write_export
from clipgraft.data import open_source
from clipgraft.errors import InputError, Interrupted
from clipgraft.evaluation import evaluate
from clipgraft.execution import run_recipe
from clipgraft.registry import Registry
from clipgraft.runhooks import RunHooks
from clipgraft.spec import runhook
from clipgraft.testing.tiny import tiny_clip
from clipgraft_anomaly.clipn.branch import NoBranch, NoConfig
from clipgraft_anomaly.clipn.current_branch import branch_for, branch_in
from clipgraft_anomaly.clipn.rejection import judge, known_classes
from clipgraft_anomaly.commands import app

torch.set_num_threads(1)
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "yellow": (220, 220, 30)}


@pytest.fixture(scope="module")
def registry():
    return Registry.discover()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The shipped towers are random here: what is tested is the way, not the gain."""
    folder = tmp_path_factory.mktemp("base") / "base"
    encoder = tiny_clip().eval()
    with torch.no_grad():
        encoder.logit_scale.fill_(3.0)
    return write_export(encoder, folder)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A table with captions and labels, and the same pictures in class folders."""
    root, rng, rows = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0), ["image,caption,label"]
    for k in range(24):
        name = list(COLOURS)[k % 4]
        pixels = np.clip(rng.normal(COLOURS[name], 30, (36, 32, 3)) + rng.normal(0, 120, (1, 1, 3)), 0, 255).astype(
            np.uint8
        )
        file = root / "folders" / name / f"{k}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(file)
        rows.append(f"folders/{name}/{k}.png,a {name} picture,{name}")
    (root / "table.csv").write_text("\n".join(rows) + "\n")
    return root


def settings(base, pictures, **more):
    return {
        "model.from": str(base), "data.from": f"csv:{pictures}/table.csv", "train.steps": 6, "train.batch_size": 8,
        "train.log_every": 1, "threads": 1, **more,
    }  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory, base, pictures, registry):
    """A whole run, measured before and after."""
    out = tmp_path_factory.mktemp("run") / "run"
    on = [{"use": "anomaly/clipn-ood", "known": ["red", "green", "blue"], "data": f"csv:{pictures}/table.csv"}]
    found = run_recipe(
        "clipn",
        overrides=settings(base, pictures, **{"train.lr": 0.003, "evaluate.on": on}),
        out=out,
        registry=registry,
    )
    return out, found


def rows_of(run):
    return [json.loads(line) for line in (run / "stages/00-no/metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_the_clip_as_it_was_and_a_branch_beside_it(trained, base, registry):
    out, found = trained
    rows = rows_of(out)
    assert found.status == "done" and found.steps == 6
    assert rows[-1]["loss"] < rows[0]["loss"] and set(rows[0]["terms"]) == {"match", "mismatch", "semantic"}
    assert rows[0]["terms"]["match"] == pytest.approx(np.log(2), abs=1e-5)
    manifest = read_manifest(out / "export")
    assert manifest["level"] == "L1" and [c["use"] for c in manifest["components"]] == ["anomaly/clipn"]
    before, after = open_export(base).state_dict(), open_export(out / "export").state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    branch = branch_in(out, registry=registry)
    tensors = read_component(out / "export", "clipn")
    assert all(torch.equal(v, tensors[k]) for k, v in branch.state_dict().items())
    assert branch.prompt.abs().sum() > 0 and branch.fits.text_width == 32 and branch.fits.embed_dim == 16
    assert not branch.training and not any(p.requires_grad for p in branch.parameters())


def test_evaluators_see_the_baseline_before_and_the_branch_after_also_in_the_export(trained, pictures, registry):
    out, found = trained
    stored = json.loads((out / "evaluations.json").read_text())
    before, after = (stored[when]["anomaly/clipn-ood"] for when in ("before", "after"))
    assert before["auroc"] == before["auroc_msp"] == after["auroc_msp"] and "auroc_atd" not in before
    assert after["auroc"] == after["auroc_atd"] != before["auroc"]
    on = [f"anomaly/clipn-ood?known=[red, green, blue]@csv:{pictures}/table.csv"]
    for model, more in ((open_export(out / "export"), ""), (tiny_clip(), f"&from={out}")):
        again = evaluate(model, [on[0].replace("blue]", "blue]" + more)], registry=registry)["anomaly/clipn-ood"]
        assert ("auroc_atd" in again.metrics) and (more or again.metrics["auroc"] == pytest.approx(after["auroc"]))
        assert again.intervals["auroc"][0] <= again.metrics["auroc"] <= again.intervals["auroc"][1]
    assert found.metrics["anomaly/clipn-ood.auroc"] == after["auroc"]


class Stop:
    """Asks the run to stop after its third step."""

    observer = False

    @runhook
    def after_step(self, run, step):
        run.stop_requested = step == 2


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path, base, pictures, registry, monkeypatch):
    straight = run_recipe("clipn", overrides=settings(base, pictures), out=tmp_path / "straight", registry=registry)
    made = RunHooks.__init__

    def with_stop(self, *args, **kwargs):
        made(self, *args, **kwargs)
        self.register(Stop(), "stop")

    with monkeypatch.context() as patch:
        patch.setattr(RunHooks, "__init__", with_stop)
        with pytest.raises(Interrupted, match="after step 3"):
            run_recipe("clipn", overrides=settings(base, pictures), out=tmp_path / "cut", registry=registry)
    again = run_recipe(resume=tmp_path / "cut", registry=registry)
    assert again.steps == straight.steps == 6
    one, two = (read_component(tmp_path / name / "export", "clipn") for name in ("straight", "cut"))
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_chunks_train_as_the_whole_batch_does(tmp_path, base, pictures, registry):
    found = []
    for chunks in (1, 4):
        overrides = settings(base, pictures, **{
            "no.offsets": 0, "no.pairs": [["{}", "no {}"]], "train.steps": 2, "train.accumulate": chunks,
        })  # fmt: skip
        run_recipe("clipn", overrides=overrides, out=tmp_path / str(chunks), registry=registry)
        found.append([row["loss"] for row in rows_of(tmp_path / str(chunks))])
    assert found[0] == pytest.approx(found[1], abs=1e-5)
    assert found[0][0] != pytest.approx(0.5 * (2 * np.log(2) + 1.99), abs=1e-3)  # "no" is read from the first step on


def invoke(*words, code=0):
    done = CliRunner().invoke(app, ["reject", *map(str, words)])
    assert (done.exit_code == 0) == (code == 0), done.output
    return done


def test_reject_says_a_class_or_unknown_for_every_picture(tmp_path, trained, pictures, registry):
    out, _ = trained
    images = tmp_path / "images"
    images.mkdir()
    for name in ("red", "blue"):
        (images / name).symlink_to(pictures / "folders" / name)  # not entered: it leads outside
    (images / "deep").mkdir()
    for k, file in enumerate(sorted((pictures / "folders").rglob("*.png"))[:7]):
        (images / "deep" / f"{k}.png").write_bytes(file.read_bytes())
    (images / "broken.jpg").write_bytes(b"no picture")
    (images / ".hidden.png").write_bytes(b"")
    labels = tmp_path / "labels.txt"
    labels.write_text("red\n\ngreen\nblue\n")
    encoder = open_export(out / "export").eval()
    branch = branch_for(encoder, registry=registry)
    known = known_classes(encoder, branch, ["red", "green", "blue"], ["a {} picture"])
    from clipgraft.evaluation.features import EncoderFeatures

    rows = EncoderFeatures(encoder).images(open_source(f"folder:{images / 'deep'}"))
    expected = judge(rows, known.yes, known.no, scale=100.0)
    for rule in ("atd", "ctw"):
        done = invoke(out, "--images", images, "--labels", labels, "--template", "a {} picture", "--rule", rule,
                      "--batch-size", 3, "--workers", 0, "--json")  # fmt: skip
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        assert [line["image"] for line in lines] == [f"deep/{k}.png" for k in range(7)] + ["broken.jpg"]
        assert "error" in lines[-1] and len(lines) == 8
        for k, line in enumerate(lines[:7]):
            nearest = known.names[int(expected.best[k])]
            assert line["nearest"] == nearest and line["rule"] == rule
            assert line["class"] == ("unknown" if expected.rejected(rule)[k] else nearest)
            assert line["unknown"] == pytest.approx(expected.unknown(rule)[k].item(), abs=1e-4)
            assert line["probability"] == pytest.approx(expected.p[k].max().item(), abs=1e-4)
    single = invoke(out / "export", "--images", images / "deep" / "0.png", "--classes", "red, green", "--workers", 0)
    assert len(single.stdout.splitlines()) == 1 and "nearest" in single.stdout


def test_mistakes_with_reject_are_told_in_a_line(tmp_path, trained, base, pictures):
    out, folder = trained[0], pictures / "folders"
    (tmp_path / "empty").mkdir()
    (tmp_path / "none.txt").write_text("\n")
    for words, said in (
        ((base, "--images", folder, "--classes", "red"), "no branch that says no"),
        ((out, "--images", folder), "classes once"),
        ((out, "--images", folder, "--classes", "red", "--labels", tmp_path / "none.txt"), "classes once"),
        ((out, "--images", folder, "--labels", tmp_path / "none.txt"), "names no class"),
        ((out, "--images", folder, "--labels", tmp_path / "gone.txt"), "can't be read"),
        ((out, "--images", folder, "--classes", "red,red"), "named twice"),
        ((out, "--images", folder, "--classes", "red,unknown"), "can't be called"),
        ((out, "--images", tmp_path / "empty", "--classes", "red"), "holds no picture"),
        ((out, "--images", tmp_path / "gone", "--classes", "red"), "no folder or picture"),
        ((out, "--images", folder, "--classes", "red", "--template", "plain"), "must hold"),
    ):
        done = invoke(*words, code=2)
        assert isinstance(done.exception, InputError) and said in str(done.exception), (words, done.exception)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"data.from": "folder:{}/folders"}, "learns from captions"),
        ({"model.from": "siglip"}, "causal text tower"),
        ({"train.batch_size": 1}, "2 or more"),
        ({"no.offsets": 0, "no.pairs": [["{}", "it is not at all and never was in this place a {}"]]}, "shorten it"),
        ({"shuffled": True, "train.accumulate": 8}, "2 or more"),
    ],
)
def test_bad_input_is_refused_before_any_work(tmp_path, base, pictures, registry, monkeypatch, change, said):
    change = {k: v.format(pictures) if isinstance(v, str) else v for k, v in change.items()}
    if change.get("model.from") == "siglip":
        change["model.from"] = str(base)
        monkeypatch.setattr(encoders, "load", lambda *_, **__: tiny_clip(kind="siglip-timm").eval())
    with pytest.raises(InputError, match=said):
        run_recipe("clipn", overrides=settings(base, pictures, **change), out=tmp_path / "run", registry=registry)
    assert not (tmp_path / "run" / "stages").exists()


def test_branches_of_other_models_are_refused(tmp_path, trained, registry):
    out, _ = trained
    with pytest.raises(InputError, match="trained for"):
        branch_for(tiny_clip(embed=24), registry=registry, given=str(out))
    with pytest.raises(InputError, match="holds no branch"):
        branch_for(tiny_clip(), registry=registry, given=str(tmp_path))
    assert branch_for(tiny_clip(), registry=registry) is None
    written = NoBranch.copy_of(tiny_clip(context=24), no=NoConfig(offsets=0))
    write_export(tiny_clip(context=24), tmp_path / "written", components={"clipn": written})
    assert (tmp_path / "written" / MANIFEST).is_file()
    assert branch_in(tmp_path / "written", registry=registry).no == NoConfig(offsets=0)
