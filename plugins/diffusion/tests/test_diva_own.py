"""DIVA with a generator that the run pretrains itself: two stages, what each may change, and what is refused before."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from clipgraft.checkpoint import write_export
from clipgraft.encoders import load
from clipgraft.errors import InputError
from clipgraft.execution import run_recipe
from clipgraft.registry import Registry
from clipgraft.testing.tiny import tiny_clip
from clipgraft_diffusion.decoder import Decoder, DecoderConfig, decoder_grid
from clipgraft_diffusion.pretraining import CaptionTeller
from clipgraft_diffusion.prompt import CrossCondition, fit_projection

REGISTRY = Registry.discover(allow=["diffusion"])
WEIGHTS = "open_clip_model.safetensors"
TRAIN = {"steps": 2, "batch_size": 8, "lr": 1e-2, "warmup": 0, "log_every": 1}
SMALL = {"width": 24, "heads": 2, "depth": 1, "single_depth": 1, "positions": 4, "low": 0.8}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny CLIP, 24 pictures with captions, and the same pictures without."""
    folder = tmp_path_factory.mktemp("world")
    write_export(tiny_clip(), folder / "clip")
    (folder / "bare").mkdir()
    g = torch.Generator().manual_seed(0)
    rows = ["image,caption"]
    for i in range(24):
        pixels = torch.randint(0, 256, (40, 36, 3), dtype=torch.uint8, generator=g)
        Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
        Image.fromarray(pixels.numpy()).save(folder / "bare" / f"{i}.png")
        rows.append(f"{i}.png,a {('red', 'green', 'blue')[i % 3]} {('cat', 'dog')[i % 2]} {i % 5}")
    (folder / "captioned.csv").write_text("\n".join(rows))
    return folder


@pytest.fixture(scope="module")
def run(world):
    def go(out, **more):
        settings = {
            "model.from": str(world / "clip"),
            "data.from": f"csv:{world / 'captioned.csv'}",
            "train": TRAIN,
            "decoder": {**SMALL, "train": TRAIN},
            "evaluate.retention": "none",
        }
        return run_recipe("diffusion/diva:own", overrides=settings | more, out=out, registry=REGISTRY)

    return go


@pytest.fixture(scope="module")
def finished(run, tmp_path_factory):
    return run(tmp_path_factory.mktemp("runs") / "one")


def metrics(done, stage):
    return json.loads((done.run / "stages" / stage / "result/metrics.json").read_text())


def changed(world, export):
    before = open_clip.create_model_and_transforms(f"local-dir:{world / 'clip'}")[0].state_dict()
    after = open_clip.create_model_and_transforms(f"local-dir:{export}")[0].state_dict()
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_two_stages_of_which_the_first_trains_the_generator_alone_and_the_second_the_image_tower(world, finished):
    assert (finished.status, finished.steps) == ("done", 4)
    assert metrics(finished, "00-decoder").keys() == {"decoder_right", "decoder_wrong", "condition_gap"}
    assert {"noise_right", "noise_wrong", "condition_gap", "weight_drift"} <= metrics(finished, "01-clip").keys()
    assert not (finished.run / "stages/00-decoder/result/encoder").exists()
    touched = changed(world, finished.export)
    assert touched
    assert all(name.startswith("visual.") for name in touched)


def test_the_second_stage_resumed_asks_the_generator_that_the_first_left(finished, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(finished.run, again)
    shutil.rmtree(again / "stages" / "01-clip")
    shutil.rmtree(again / "export")
    run_recipe(resume=again, registry=REGISTRY)
    assert (again / "export" / WEIGHTS).read_bytes() == (finished.export / WEIGHTS).read_bytes()


def test_controls_another_generator_another_latent_and_the_anchor_alone(run, finished, tmp_path):
    first = (finished.export / WEIGHTS).read_bytes()
    random = run(tmp_path / "random", **{"denoiser.random": True})
    shuffled = run(tmp_path / "shuffled", **{"condition.shuffled": True})
    decoder = "stages/00-decoder/result/decoder.safetensors"
    assert (shuffled.run / decoder).read_bytes() == (finished.run / decoder).read_bytes()
    assert first not in {(random.export / WEIGHTS).read_bytes(), (shuffled.export / WEIGHTS).read_bytes()}
    alone = run(tmp_path / "alone", weight=0)
    assert alone.steps == 2
    assert [p.name for p in (alone.run / "stages").iterdir()] == ["00-clip"]


def test_images_for_diva_need_no_captions_when_the_generator_has_its_own(world, run, tmp_path):
    more = {"data.from": f"folder:{world / 'bare'}", "decoder.data": f"csv:{world / 'captioned.csv'}"}
    assert run(tmp_path / "run", **more).status == "done"


def test_between_a_text_tower_and_itself_the_projection_is_the_identity_from_images_to_texts(world):
    g = torch.Generator().manual_seed(0)
    texts, images = torch.randn(200, 16, generator=g) + 1, torch.randn(50, 16, generator=g) - 2
    condition = CrossCondition(16, 16, prompt=None, combine="none")
    fit_projection(condition.project, told=texts, wanted=texts, seen=images)
    torch.testing.assert_close(condition.project.weight, torch.eye(16), atol=2e-3, rtol=0)
    torch.testing.assert_close(condition(images[:, None]).mean((0, 1)), texts.mean(0), atol=1e-4, rtol=0)


def test_a_caption_is_read_once_and_means_the_same_afterwards(world):
    base = load(str(world / "clip"), registry=REGISTRY).eval()
    teller, calls = CaptionTeller(base), []
    base.text.register_forward_hook(lambda *_: calls.append(1))
    text = base.tokenizer(["a cat", "a dog", "a hat"])
    both = teller(SimpleNamespace(text=text), None)
    assert len(calls) == 1
    torch.testing.assert_close(teller(SimpleNamespace(text=text[[2, 0]]), None), both[[2, 0]])
    assert len(calls) == 1
    torch.testing.assert_close(both.norm(dim=-1), torch.ones(3))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"data.from": "folder:{world}/bare"}, "has no caption.*decoder.data"),
        ({"decoder.data": "csv:{world}/none.csv"}, "none.csv"),
        ({"decoder.pool": 3}, "decoder.pool 3"),
        ({"noise.low": 100}, "levels 0.25 to 0.99.*decoder.low"),
        ({"decoder.high": 0.9}, "decoder.high"),
        ({"decoder.heads": 5}, "multiple of heads"),
        ({"precision": "fp16"}, "fp16"),
        ({"condition.captions": "csv:{world}/no-such.csv"}, "no-such.csv"),
    ],
)
def test_problems_are_named_before_any_work(world, run, tmp_path, more, said):
    given = {k: v.format(world=world) if isinstance(v, str) else v for k, v in more.items()}
    with pytest.raises(InputError, match=said):
        run(tmp_path / "run", **given)
    assert not (tmp_path / "run").exists()


def test_towers_without_a_patch_grid_and_models_without_a_text_tower_are_refused(world):
    with pytest.raises(InputError, match="no patch grid"):
        decoder_grid(SimpleNamespace(grid=None), pool=1)
    base = load(str(world / "clip"), registry=REGISTRY)
    base.text = None
    with pytest.raises(InputError, match="text tower"):
        CaptionTeller(base)


def test_what_is_kept_of_the_generator_rebuilds_it(world, finished):
    base = load(str(world / "clip"), registry=REGISTRY)
    decoder = Decoder(DecoderConfig(**SMALL), base.image, told=base.image.embed_dim)
    kept = load_file(finished.run / "stages/00-decoder/result/decoder.safetensors")
    decoder.load_state_dict(kept)
    assert kept["statistics.std"].min() > 0
    assert not torch.equal(kept["statistics.mean"], torch.zeros_like(kept["statistics.mean"]))
