"""The recipe: from folders to an export, stopped and continued to the same bits, and what it refuses."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from clipgraft.checkpoint import read_manifest, write_export
from clipgraft.encoders import load
from clipgraft.errors import InputError, Interrupted
from clipgraft.execution import run_recipe
from clipgraft.registry import Registry
from clipgraft.spec import runhook
from clipgraft.testing.tiny import tiny_clip
from clipgraft_merging.sam.segmenter import segmenter_of
from clipgraft_merging.samclip.image import SamImage

REGISTRY = Registry.discover(allow=["merging"])


@pytest.fixture(scope="module")
def world(tmp_path_factory, sam_folder):
    """A tiny CLIP directory, and pictures in a folder."""
    folder = tmp_path_factory.mktemp("world")
    write_export(tiny_clip(), folder / "clip")
    g = torch.Generator().manual_seed(0)
    (folder / "pictures" / "thing").mkdir(parents=True)
    for i in range(12):
        pixels = torch.randint(0, 256, (48, 40 + i, 3), dtype=torch.uint8, generator=g)
        Image.fromarray(pixels.numpy()).save(folder / "pictures" / "thing" / f"{i}.png")
    (folder / "sam").symlink_to(sam_folder)
    return folder


def settings(world, **more):
    train = {"steps": 3, "batch_size": 4, "lr": 1e-3, "log_every": 1}
    base = {
        "model.from": str(world / "clip"),
        "data.from": f"folder:{world / 'pictures'}",
        "sam.from": str(world / "sam"),
        "student.size": 64,
        "student.blocks": 1,
        "probe": {"sizes": [32], "train": {**train, "steps": 2}},
        "multitask": {
            "sizes": [32, 64],
            "train": train,
            "masks": {"batch_size": 2, "points": 2, "boxes": 1, "grid": 3, "masks": 4},
        },
        "adapt": {"sizes": [32, 96], "train": {**train, "steps": 2}},
        "evaluate.retention": "none",
        "precision": "fp32",
    }
    return base | more


def finished(world, out, **more):
    return run_recipe("merging/sam-clip", overrides=settings(world, **more), out=out, registry=REGISTRY)


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """One run to its end."""
    return finished(world, tmp_path_factory.mktemp("whole") / "run")


def losses(path):
    return [json.loads(line)["loss"] for file in sorted(path.glob("stages/*/metrics.jsonl")) for line in file.open()]


def test_a_run_goes_from_folders_to_an_export(whole, world):
    assert whole.status == "done" and whole.steps == 7
    encoder = load(str(whole.export), registry=REGISTRY).eval()
    assert isinstance(encoder.image, SamImage) and encoder.preprocess.size == (64, 64)
    masks = segmenter_of(encoder)
    with torch.no_grad():
        found = masks.masks(masks.embed(torch.rand(1, 3, 64, 64)), boxes=torch.tensor([[[1.0, 2, 30, 40]]]))
    assert found.logits.shape == (1, 1, 3, 32, 32)
    manifest = read_manifest(whole.export)
    (graft,) = manifest["grafts"]
    assert graft["use"] == "merging/sam-image" and graft["config"]["origin_sha256"] and manifest["level"] == "L2"
    assert [step["recipe"] for step in manifest["lineage"]] == ["merging/sam-clip"]
    text = load(str(world / "clip"), registry=REGISTRY).text.state_dict()
    assert all(torch.equal(text[name], tensor) for name, tensor in encoder.text.state_dict().items())
    log = (whole.run / "log.txt").read_text()
    assert "mask loss soft, match min" in log and "masks of the teacher" in log
    rows = [json.loads(line) for line in (whole.run / "stages" / "01-multitask" / "metrics.jsonl").open()]
    assert set(rows[0]["terms"]) == {"clip", "masks", "focal", "dice", "iou"}


class StopsAt:
    """Asks the run to stop in a stage after a step."""

    def __init__(self, stage, step):
        self.stage, self.step = stage, step

    @runhook
    def after_step(self, run, stage, step):
        if stage.name == self.stage and step == self.step:
            run.stop_requested = True


@pytest.mark.parametrize(("stage", "step"), [("probe", 0), ("multitask", 1), ("adapt", 0)])
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(whole, world, tmp_path, monkeypatch, stage, step):
    from clipgraft_merging.samclip import recipe

    check = recipe.SamClipRecipe.check

    def stopping(self, run):
        run.hooks.register(StopsAt(stage, step), "stops")
        return check(self, run)

    monkeypatch.setattr(recipe.SamClipRecipe, "check", stopping)
    with pytest.raises(Interrupted, match=f"stopped in {stage} after step {step + 1}"):
        finished(world, tmp_path / "run")
    monkeypatch.setattr(recipe.SamClipRecipe, "check", check)
    again = run_recipe(resume=tmp_path / "run", registry=REGISTRY)
    ours, theirs = (load_file(r.export / "encoder.safetensors") for r in (again, whole))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert losses(again.run) == losses(whole.run)


def test_kept_features_change_nothing(world, tmp_path):
    plain = {"probe": None, "adapt": None}
    stage = settings(world)["multitask"] | {"crop": None}
    found = []
    for name, cache in (("without", {}), ("with", {"clip": True, "sam": True})):
        run = finished(world, tmp_path / name, **plain, multitask=stage, cache=cache)
        found.append(losses(run.run))
    assert found[0] == pytest.approx(found[1], rel=1e-3, abs=1e-5)
    kept = sorted((tmp_path / "with" / "features").glob("*/*.safetensors"))
    assert len(kept) == 2
    torch.testing.assert_close(torch.tensor(found[0][0]), torch.tensor(found[1][0]), atol=1e-5, rtol=1e-4)


def test_random_start_and_no_mask_stream(world, tmp_path):
    """The controls: only the teacher is a trained SAM; and no SAM stream at all."""
    stage = settings(world)["multitask"]
    more = {"probe": None, "adapt": None, "multitask": stage | {"masks": stage["masks"] | {"weight": 0}}}
    run = finished(world, tmp_path / "none", **more)
    sam = load_file(world / "sam" / "model.safetensors")
    ours = load_file(run.export / "encoder.safetensors")
    assert torch.equal(ours["image.sam.encoder.neck.conv1.weight"], sam["vision_encoder.neck.conv1.weight"])
    name = "layers.0.attn.qkv.weight"
    assert not torch.equal(ours[f"image.sam.encoder.{name}"], sam[f"vision_encoder.{name}"])
    random = finished(world, tmp_path / "random", **more, **{"sam.start": "random"})
    other = load_file(random.export / "encoder.safetensors")
    assert not torch.equal(other["image.sam.encoder.neck.conv1.weight"], sam["vision_encoder.neck.conv1.weight"])


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"student.size": 60}, "student.size: 60 is no multiple of SAM's patch of 8 pixels; take 64"),
        (
            {"probe": {"sizes": [36], "train": {"steps": 1, "batch_size": 2, "lr": 0.1}}},
            "probe.sizes: 36 is no multiple",
        ),
        ({"precision": "fp16"}, "precision: the step of two backward passes has no scaling for fp16"),
        ({"sam.from": "/nowhere/sam"}, "sam.from: /nowhere/sam has no config.json"),
        ({"grafts": [{"use": "core/freeze"}]}, "grafts: sam-clip replaces the image tower"),
        ({"probe": None, "multitask": None, "adapt": None}, "give at least one stage"),
        ({"cache": {"clip": True}}, "set crop to null in every stage"),
    ],
)
def test_what_does_not_fit_is_one_line_before_any_work(world, tmp_path, more, said):
    with pytest.raises(InputError) as error:
        finished(world, tmp_path / "run", **more)
    assert said in str(error.value) and "\n" not in str(error.value).strip()
    assert not (tmp_path / "run" / "stages").exists()


def test_a_sam_without_weights_and_a_batch_that_does_not_divide(world, tmp_path):
    (tmp_path / "sam").mkdir()
    (tmp_path / "sam" / "config.json").write_text((world / "sam" / "config.json").read_text())
    stage = settings(world)["multitask"]
    stage = stage | {"train": stage["train"] | {"accumulate": 2}, "masks": stage["masks"] | {"batch_size": 3}}
    with pytest.raises(InputError, match=r"has no model\.safetensors; .*must be divisible by 2 .*take 4"):
        finished(world, tmp_path / "run", multitask=stage, **{"sam.from": str(tmp_path / "sam")})


def test_a_source_without_pictures(world, tmp_path):
    (tmp_path / "broken" / "a").mkdir(parents=True)
    for i in range(5):
        (tmp_path / "broken" / "a" / f"{i}.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match="holds no readable picture among its first"):
        finished(world, tmp_path / "run", **{"data.from": f"folder:{tmp_path / 'broken'}"})


def test_a_sam_clip_is_no_teacher_of_itself(whole, world, tmp_path):
    with pytest.raises(InputError, match="is a SAM-CLIP already"):
        finished(world, tmp_path / "run", **{"model.from": str(whole.export)})
