"""CLIP-MoE and EWA as a user runs them: from a folder to an export, stopped and resumed, on two ranks."""

from __future__ import annotations

import json

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from clipgraft.checkpoint import open_export, read_manifest, write_export
from clipgraft.errors import InputError, Interrupted
from clipgraft.execution import run_recipe
from clipgraft.registry import Registry
from clipgraft.spec import runhook
from clipgraft.testing.ranks import run_ranks
from clipgraft.testing.tiny import tiny_clip
from clipgraft_merging.moe.mixture import Mixture, mixtures

torch.set_num_threads(1)
TRAIN = {"steps": 3, "batch_size": 4, "lr": 1e-2, "weight_decay": 0.0, "warmup": 0, "log_every": 1}
WORDS = ["red", "green", "blue", "yellow", "purple", "orange", "white", "black", "circle", "square", "star", "moon"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny CLIP and 32 captioned pictures."""
    folder = tmp_path_factory.mktemp("world")
    write_export(tiny_clip(), folder / "clip")
    g = torch.Generator().manual_seed(0)
    rows = ["image,caption"]
    for i in range(32):
        pixels = torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8, generator=g)
        Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
        rows.append(f"{i}.png,a {WORDS[i % 12]} {WORDS[(i * 5 + 1) % 12]}")
    (folder / "pairs.csv").write_text("\n".join(rows) + "\n")
    return folder


def settings(world, **more):
    base = {"model.from": str(world / "clip"), "data.from": f"csv:{world / 'pairs.csv'}", "evaluate.retention": "none"}
    return {**base, **more}


def moe(world, **more):
    both = {"experts.train": TRAIN, "router.train": TRAIN, "experts.stages": 2, "experts.clusters": 2}
    return settings(world, **(both | more))


def registry():
    return Registry.discover(allow=["merging"])


def tensors(folder):
    return load_file(next(iter(folder.glob("export/*.safetensors"))))


@pytest.fixture(scope="module")
def done(world, tmp_path_factory):
    return run_recipe("clip-moe", overrides=moe(world), out=tmp_path_factory.mktemp("r") / "run", registry=registry())


def test_f08_extraction_moves_feed_forward_networks_and_nothing_else(world, done):
    base = tensors_of(open_export(world / "clip"))
    for stage in ("01-experts-1", "03-experts-2"):
        now = tensors_of(open_export(done.run / "stages" / stage / "result" / "encoder"))
        assert {k for k in base if not base[k].equal(now[k])} == {k for k in base if ".mlp." in k}


def tensors_of(encoder):
    return dict(encoder.state_dict())


def test_f12_router_training_moves_gates_only_and_experts_are_those_of_the_stages(world, done):
    base, found = tensors_of(open_export(world / "clip")), tensors_of(open_export(done.run / "export"))
    stages = [
        tensors_of(open_export(done.run / "stages" / s / "result" / "encoder"))
        for s in ("01-experts-1", "03-experts-2")
    ]
    for key, value in base.items():
        if ".mlp." not in key:
            assert found[key].equal(value), key
            continue
        place, _, name = key.partition(".mlp.")
        for number, source in enumerate([base, *stages]):
            assert found[f"{place}.mlp.experts.{number}.{name}"].equal(source[key])
    fresh = [m.gate.weight for m in mixtures(upcycled(world)).values()]
    moved = [m.gate.weight for m in mixtures(open_export(done.run / "export")).values()]
    assert len(moved) == 4 and all(not a.equal(b) for a, b in zip(fresh, moved, strict=True))


def upcycled(world):
    from clipgraft_merging.moe.graft import MoE

    return MoE(experts=3).apply(open_export(world / "clip"))


def test_the_export_is_l2_with_a_reason_and_says_what_it_balanced(done):
    manifest = read_manifest(done.run / "export")
    assert manifest["level"] == "L2" and "merging/moe" in manifest["reason"]
    rows = [json.loads(line) for line in (done.run / "stages/04-router/metrics.jsonl").read_text().splitlines()]
    terms = rows[-1]["terms"]
    expected = terms["contrast"] + 0.01 * (terms["balance_image"] + terms["balance_text"]) / 2
    assert rows[-1]["loss"] == pytest.approx(expected, abs=1e-5) and terms["balance_image"] > 0.9
    kept = json.loads((done.run / "stages/00-clusters-1/result/metrics.json").read_text())
    assert kept["clusters"] >= 2 and kept["smallest"] >= 4


def test_labels_of_a_run_nest(done):
    one, two = (
        load_file(done.run / f"stages/{s}/result/labels.safetensors")["labels"]
        for s in ("00-clusters-1", "02-clusters-2")
    )
    assert all(len(one[two == k].unique()) == 1 for k in two.unique())


class Stopper:
    def __init__(self, stage, step):
        self.at = stage, step

    @runhook
    def after_step(self, run, stage, step, output):
        if (stage.name, step) == self.at:
            run.stop_requested = True


@pytest.mark.parametrize("stage", [pytest.param("experts-2", marks=pytest.mark.slow), "router"])
def test_a_stopped_run_resumes_to_the_same_bits(world, done, tmp_path, stage, monkeypatch):
    import clipgraft.runner

    begin = clipgraft.runner.Run.__post_init__

    def with_stopper(run):
        begin(run)
        run.hooks.register(Stopper(stage, 0), "stopper")

    monkeypatch.setattr(clipgraft.runner.Run, "__post_init__", with_stopper)
    with pytest.raises(Interrupted):
        run_recipe("clip-moe", overrides=moe(world), out=tmp_path / "run", registry=registry())
    monkeypatch.setattr(clipgraft.runner.Run, "__post_init__", begin)
    saved = next((tmp_path / "run/stages").glob(f"*-{stage}/state/step-*/stage.safetensors"))
    assert all(".mlp." in k for k in load_file(saved)), "a state holds what is trained"
    run_recipe(resume=tmp_path / "run", registry=registry())
    ours, theirs = tensors(tmp_path / "run"), tensors(done.run)
    assert ours.keys() == theirs.keys() and all(ours[k].equal(theirs[k]) for k in ours)


def test_a_dense_export_is_l0_and_open_clip_opens_it(world, done, tmp_path):
    more = {"export": "dense", "router.towers": ["image"], "router.last": 1, "experts.restart": "previous"}
    result = run_recipe("clip-moe", overrides=moe(world, **more), out=tmp_path / "run", registry=registry())
    assert read_manifest(result.export)["level"] == "L0"
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{result.export}")
    base = tensors_of(open_export(world / "clip"))
    now = tensors_of(open_export(result.export))
    assert {k for k in base if not base[k].equal(now[k])} == {
        k for k in base if k.startswith("image.tower.transformer.resblocks.1.mlp.")
    }
    assert model.visual.transformer.resblocks[1].mlp.c_fc.weight.equal(
        now["image.tower.transformer.resblocks.1.mlp.c_fc.weight"]
    )


def test_the_command_collapses_an_export(world, done, tmp_path, capsys):
    from clipgraft.cli import main

    with pytest.raises(SystemExit) as ended:
        main(["merging", "collapse", str(done.export), "--out", str(tmp_path / "dense"), "--json"])
    assert ended.value.code == 0
    assert json.loads(capsys.readouterr().out)["mixtures"] == 4
    mixed, dense = open_export(done.export), open_export(tmp_path / "dense")
    assert read_manifest(tmp_path / "dense")["level"] == "L0"
    place: Mixture = mixed.image.tower.transformer.resblocks[0].mlp
    expected = torch.stack([e.c_fc.weight for e in place.experts]).double().mean(0).float()
    assert dense.image.tower.transformer.resblocks[0].mlp.c_fc.weight.equal(expected)
    assert mixed.image.tower.proj.equal(dense.image.tower.proj)


def test_sparse_upcycling_trains_copies_and_gates(world, tmp_path):
    more = {"init": "copies", "router.tune": "experts", "router.compat": "official", "router.dropout": 0.1}
    result = run_recipe("clip-moe", overrides=moe(world, **more), out=tmp_path / "run", registry=registry())
    assert result.steps == 3 and [p.name for p in (result.run / "stages").iterdir()] == ["00-router"]
    place = open_export(result.export).text.tower.transformer.resblocks[0].mlp
    assert not place.experts[0].c_fc.weight.equal(place.experts[1].c_fc.weight)


def test_accumulating_in_chunks_gives_the_weights_of_the_whole_batch(world, tmp_path):
    plain = TRAIN | {"optimizer": "sgd", "lr": 0.05, "steps": 2}
    found = []
    for chunks in (1, 2):
        more = {"init": "copies", "router.tune": "experts", "router.balance": 1.0}
        overrides = moe(world, **more, **{"router.train": plain | {"accumulate": chunks}})
        found.append(
            tensors(run_recipe("clip-moe", overrides=overrides, out=tmp_path / str(chunks), registry=registry()).run)
        )
    for key, value in found[0].items():
        torch.testing.assert_close(found[1][key], value, atol=1e-6, rtol=1e-4)


def test_what_excludes_itself_is_refused_with_the_fix(world, tmp_path):
    for more, words in (
        ({"init": "copies"}, "set router.tune=experts"),
        ({"grafts": [{"use": "merging/moe"}]}, "remove lora and moe"),
        ({"router.top_k": 4}, "for 3 experts"),
        ({"experts.train.batch_size": 64}, "set experts.train.batch_size to 32 or less"),
    ):
        with pytest.raises(InputError, match=words):
            run_recipe("clip-moe", overrides=moe(world, **more), out=tmp_path / words[:5], registry=registry())


def both_ranks(folder, recipe, overrides):
    """One rank of a run; the folder tells the rest."""
    run_recipe(recipe, overrides=overrides, out=folder, registry=registry())
    return True


@pytest.mark.slow
def test_two_ranks_find_the_weights_of_one_process(world, tmp_path):
    plain = TRAIN | {"optimizer": "sgd", "lr": 0.05}  # Adam makes a step of any difference in a gradient near zero
    overrides = moe(
        world, **{"experts.stages": 1, "experts.train": plain, "router.train": plain, "router.tune": "experts"}
    )
    one = run_recipe("clip-moe", overrides=overrides, out=tmp_path / "one", registry=registry())
    run_ranks(both_ranks, 2, tmp_path / "two", "clip-moe", overrides)
    labels = [
        load_file(r / "stages/00-clusters-1/result/labels.safetensors")["labels"] for r in (tmp_path / "two", one.run)
    ]
    assert labels[0].equal(labels[1])
    ours, theirs = tensors(tmp_path / "two"), tensors(one.run)
    for key in ours:
        torch.testing.assert_close(ours[key], theirs[key], atol=2e-6, rtol=1e-4)


def ewa(world, **more):
    return settings(world, **({f"train.{k}": v for k, v in TRAIN.items()} | {"train.lr": 1e-3} | more))


def test_ewa_exports_the_plain_clip_it_was_with_other_weights(world, tmp_path):
    result = run_recipe("ewa", overrides=ewa(world, experts=3, every=1), out=tmp_path / "run", registry=registry())
    assert read_manifest(result.export)["level"] == "L0"
    base, now = tensors_of(open_export(world / "clip")), tensors_of(open_export(result.export))
    assert base.keys() == now.keys() and any(not base[k].equal(now[k]) for k in base if ".mlp." in k)
    open_clip.create_model_and_transforms(f"local-dir:{result.export}")


def test_ewa_with_one_expert_is_finetune(world, tmp_path):
    one = run_recipe("ewa", overrides=ewa(world, experts=1, share=0.0), out=tmp_path / "ewa", registry=registry())
    plain = run_recipe(
        "finetune", overrides=ewa(world) | {"losses": ["core/clip"]}, out=tmp_path / "ft", registry=registry()
    )
    ours, theirs = tensors(one.run), tensors(plain.run)
    assert all(ours[k].equal(theirs[k]) for k in theirs)


def test_ewa_refuses_a_share_that_flips_experts(world, tmp_path):
    with pytest.raises(InputError, match=r"below 0\.75"):
        run_recipe("ewa", overrides=ewa(world, share=0.8), out=tmp_path / "never", registry=registry())
