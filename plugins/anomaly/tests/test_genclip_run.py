"""The GenCLIP reconstruction from a run to its export and back: tiny, resumed, measured, bad input."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from clipgraft.checkpoint import read_component, read_manifest, write_export
from clipgraft.errors import InputError, Interrupted
from clipgraft.execution import run_recipe
from clipgraft.registry import Registry
from clipgraft.runhooks import RunHooks
from clipgraft.spec import runhook
from clipgraft.testing.tiny import tiny_clip
from clipgraft_anomaly.commands import app
from clipgraft_anomaly.detector import detect, open_detector
from clipgraft_anomaly.thresholds import identity

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def registry():
    return Registry.discover()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_export(tiny_clip(depth=3, context=32).eval(), tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """MVTec's layout: two kinds of part, one with a name that is a label, three normal and three damaged each."""
    root, rng = tmp_path_factory.mktemp("parts"), np.random.default_rng(0)
    for name in ("cat", "connector1"):
        for kind in ("good", "dent"):
            for number in range(3):
                image, mask = rng.integers(0, 150, (40, 36, 3)).astype(np.uint8), np.zeros((40, 36), np.uint8)
                if kind == "dent":
                    image[8:24, 8:24], mask[8:24, 8:24] = 255, 255
                    truth = root / name / "ground_truth" / kind
                    truth.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(mask).save(truth / f"{number:03}_mask.png")
                folder = root / name / "test" / kind
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image).save(folder / f"{number:03}.png")
    return f"mvtec:{root}"


def settings(base, parts, **more):
    return {
        "model.from": str(base), "data.from": parts,
        "prompt.query": 4, "prompt.deep_tokens": 2, "prompt.deep_layers": 1,
        "train.steps": 4, "train.batch_size": 5, "train.lr": 0.01, "train.log_every": 1, "train.schedule": "constant",
    } | more  # fmt: skip


def pixels(count=2):
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def invoke(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_a_run_trains_both_branches_and_its_export_is_a_detector(tmp_path, base, parts, registry):
    pytest.importorskip("clipgraft_toyworld")
    on = [{"use": "anomaly/inspection", "data": "toyworld/defects?split=tune&n=24&shapes=[moon]"}]
    more = {"evaluate.on": on, "train.steps": 2}
    done = run_recipe("genclip", overrides=settings(base, parts, **more), out=tmp_path / "run", registry=registry)
    assert done.steps == 2 and "'connector1': it holds digits" in (tmp_path / "run/log.txt").read_text()
    record = read_manifest(done.export)["components"][0]
    assert (record["use"], record["name"]) == ("anomaly/genclip", "genclip")
    assert record["config"]["read"]["layers"] == [1, 2, 3] and record["config"]["trained"]["pictures"] == 12
    kept = read_component(done.export, "genclip")
    assert set(kept) == {"query", "deep", "texts", *(f"vision.{k}.{w}" for k in (1, 2, 3) for w in ("weight", "bias"))}
    detector = open_detector(str(tmp_path / "run"), registry=registry)
    assert torch.equal(detector.texts, detector.head.query_texts(detector.encoder)[0])
    found, query = detect(detector, pixels(), ["cat", "connector1"]), detect(detector.query_only(), pixels())
    assert found.map.shape == (2, 32, 32) and (found.map - query.map).abs().max() > 0
    assert not any(p.requires_grad for p in detector.parameters())
    before = identity(detector)
    detect(detector, pixels(), ["zz9", "dog"])
    assert identity(detector) == before != identity(detector.query_only())
    stored = json.loads((tmp_path / "run/evaluations.json").read_text())
    before, after = (stored[when]["anomaly/inspection"] for when in ("before", "after"))
    told = json.loads(invoke("eval", tmp_path / "run", "--data", on[0]["data"], "--json").stdout)
    assert told["mean"]["pixel_auroc"] == pytest.approx(after["pixel_auroc"]) != before["pixel_auroc"]
    assert told["detector"]["method"] == "genclip" and told["detector"]["reconstruction"] is True
    same = invoke("eval", tmp_path / "run", "--data", parts, "--json")
    assert isinstance(same.exception, InputError) and "12 of 12 sampled pictures" in str(same.exception)


class Stop:
    """Asks the run to stop after its third step."""

    observer = False

    @runhook
    def after_step(self, run, step):
        run.stop_requested = step == 2


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path, base, parts, registry, monkeypatch):
    given = settings(base, parts, **{"cache.keep": "disk"})
    straight = run_recipe("genclip", overrides=given, out=tmp_path / "straight", registry=registry)
    made = RunHooks.__init__

    def with_stop(self, *args, **kwargs):
        made(self, *args, **kwargs)
        self.register(Stop(), "stop")

    with monkeypatch.context() as patch:
        patch.setattr(RunHooks, "__init__", with_stop)
        with pytest.raises(Interrupted, match="after step 3"):
            run_recipe("genclip", overrides=given, out=tmp_path / "cut", registry=registry)
    again = run_recipe(resume=tmp_path / "cut", registry=registry)
    assert again.steps == straight.steps == 4
    one, two = (read_component(tmp_path / name / "export", "genclip") for name in ("straight", "cut"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_training_lowers_both_branches_losses(tmp_path, base, parts, registry):
    more = {"train.steps": 25, "train.batch_size": 12, "prompt.per_state": True}
    run_recipe("genclip", overrides=settings(base, parts, **more), out=tmp_path / "run", registry=registry)
    lines = next((tmp_path / "run/stages").glob("*/metrics.jsonl")).read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    first, last = ([row["terms"] for row in rows if "terms" in row][k] for k in (0, -1))
    assert all(last[branch] < 0.5 * first[branch] for branch in ("vision", "query"))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"read.layers": [4]}, "layer 4 was asked of a tower of 3 layers"),
        ({"read.layers": [1, 1]}, "names a layer twice"),
        ({"read.size": 30}, "no multiple"),
        ({"prompt.query": 30}, "set prompt.query to"),
        ({"prompt.query": 13, "filter.mode": "off"}, "prompts about 'connector1' take 3[0-9] tokens"),
        ({"loss.vision": 0, "loss.query": 0}, "nothing would be learnt"),
        ({"blend.a": 1.5}, "blend.a"),
        ({"prompt.normal": "object."}, "must hold {} once"),
        ({"data.from": "toyworld/images?n=8"}, "inspection needs two"),
    ],
)
def test_what_can_not_work_is_told_before_any_work(tmp_path, base, parts, registry, more, said):
    if "toyworld" in str(more):
        pytest.importorskip("clipgraft_toyworld")
    with pytest.raises(InputError, match=said.replace("{}", r"\{\}")):
        run_recipe(
            "genclip", overrides=settings(base, parts, **more), out=tmp_path / "x", dry_run=True, registry=registry
        )
    assert not (tmp_path / "x").exists()


def test_towers_that_can_not_do_it_are_refused_and_another_backbone_is_told(tmp_path, base, parts, registry):
    other = write_export(tiny_clip(kind="siglip-timm").eval(), tmp_path / "siglip")
    with pytest.raises(InputError, match="SigLIP"):
        run_recipe("genclip", overrides=settings(other, parts), out=tmp_path / "x", dry_run=True, registry=registry)
    head = registry.build("head", "anomaly/genclip", read_config(tmp_path, base, parts, registry))
    assert "depth 3" in head.fits.problem(tiny_clip(depth=2))
    with pytest.raises(InputError, match="run it, then give its run"):
        registry.build("head", "anomaly/genclip", {})


def read_config(tmp_path, base, parts, registry):
    more = {"train.steps": 1, "blend.a": 0, "blend.b": 0, "loss.vision": 0}
    done = run_recipe("genclip", overrides=settings(base, parts, **more), out=tmp_path / "one", registry=registry)
    assert open_detector(str(done.export), registry=registry).image_only
    return read_manifest(done.export)["components"][0]["config"]


def test_the_preset_for_the_toy_world_fits(tmp_path, registry):
    pytest.importorskip("clipgraft_toyworld")
    few = {"data.from": "toyworld/defects?split=train&n=16&size=64&shapes=[moon, heart]"}
    done = run_recipe("genclip:tiny", overrides=few, out=tmp_path / "x", dry_run=True, registry=registry)
    assert done.status == "dry-run"
