"""Latents on disk: equal numbers, resumed fills, several writers, caches that don't fit."""

from __future__ import annotations

import json
import threading

import pytest
import torch
from PIL import Image
from torch import nn

from clipgraft.checkpoint import write_export
from clipgraft.data.base import BadSample, Sample
from clipgraft.encoders.base import Preprocess
from clipgraft.errors import InputError
from clipgraft.execution import run_recipe
from clipgraft.log import RunLog
from clipgraft.registry import Registry
from clipgraft.testing.tiny import tiny_clip
from clipgraft_diffusion import store as module
from clipgraft_diffusion.latent import VaeLatent
from clipgraft_diffusion.store import LatentStore, about

REGISTRY = Registry.discover(allow=["diffusion"])
SHAPE = Preprocess(size=(4, 4), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


class Numbered:
    """Ten pictures, each of one grey; number 3 can't be read."""

    name, templates, attributes, classes = "numbered", (), {}, ()

    def __init__(self, fingerprint="one"):
        self.fingerprint = fingerprint

    def __len__(self):
        return 10

    def __getitem__(self, index):
        if index == 3:
            raise BadSample("n3", "torn")
        return Sample(f"n{index}", torch.full((3, 4, 4), 20 * index, dtype=torch.uint8))


def greys(pixels):
    return pixels.mean((1, 2, 3))[:, None] * torch.tensor([1.0, 255.0])


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(module, "ROWS", 4)


def opened(folder, *, calls=None, source=None, precision="fp32", generator=None, compute=greys, **settings):
    source = source or Numbered()
    told = about(source, generator or One(), precision=precision, size=(4, 4), **settings)
    found = LatentStore(folder, told, log=RunLog())

    def counted(pixels):
        if calls is not None:
            calls.append(len(pixels))
        return compute(pixels)

    found.fill(source, counted, preprocess=SHAPE, batch_size=2)
    return found


class One(nn.Module):
    """A generator of one number."""

    def __init__(self, value=1.0):
        super().__init__()
        self.register_buffer("value", torch.tensor(value))


def unasked():
    raise AssertionError("computed although it is on disk")


def test_rows_come_back_by_id_to_the_last_bit_and_are_computed_once(tmp_path, small):
    calls = []
    first = opened(tmp_path, calls=calls)
    assert calls == [2, 1, 2, 2, 2]  # shards of 4, 4 and 2 places, one picture torn
    found = first(["n7", "n0", "n9"], unasked)
    wanted = greys(torch.stack([Numbered()[i].image.float().div(255) for i in (7, 0, 9)]))
    assert torch.equal(found, wanted)
    assert torch.equal(opened(tmp_path, calls=calls)(["n7", "n0", "n9"], unasked), wanted)
    assert len(calls) == 5
    assert first(["n0", "n3"], lambda: torch.ones(2, 2)).tolist() == [[1, 1], [1, 1]]


def test_a_fill_that_stopped_goes_on_with_what_is_missing(tmp_path, small):
    def failing(pixels):
        if pixels.max() > 0.4:
            raise RuntimeError("stopped")
        return greys(pixels)

    with pytest.raises(RuntimeError, match="stopped"):
        opened(tmp_path, compute=failing)
    (folder,) = (p for p in tmp_path.iterdir())
    assert len(list(folder.glob("*.safetensors"))) == 1
    assert not list(folder.glob(".*"))
    calls = []
    opened(tmp_path, calls=calls)
    assert calls == [2, 2, 2]


def test_a_damaged_shard_is_computed_again_and_said(tmp_path, small, capsys):
    found = opened(tmp_path)
    shard = sorted(found.folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-3])
    calls = []
    again = opened(tmp_path, calls=calls)
    assert calls == [2, 2]
    assert f"{shard} is damaged" in capsys.readouterr().err.replace("\n", "")
    assert torch.equal(again(["n5"], unasked), greys(Numbered()[5].image.float().div(255)[None]))


def test_a_cache_of_other_crops_generator_or_settings_is_named_and_not_read(tmp_path, small, capsys):
    opened(tmp_path, generator=One(1.0))
    calls = []
    opened(tmp_path, calls=calls, generator=One(2.0))
    assert len(calls) == 5
    assert "are of another generator and are not read" in capsys.readouterr().err.replace("\n", " ")
    for other in ({"source": Numbered("two")}, {"compat": "official"}, {"precision": "fp16"}):
        calls.clear()
        opened(tmp_path, calls=calls, **{"generator": One(2.0), **other})
        assert len(calls) == 5
    assert len(list(tmp_path.iterdir())) == 5
    told = json.loads(next(tmp_path.glob("*/about.json")).read_text())
    assert {"source", "generator", "precision", "size"} <= set(told)


def test_fp16_halves_and_refuses_what_it_can_not_hold(tmp_path, small):
    full, half = opened(tmp_path), opened(tmp_path, precision="fp16")
    rows = [s(["n7"], unasked) for s in (full, half)]
    assert rows[1].dtype == torch.float32
    torch.testing.assert_close(rows[1], rows[0].half().float(), atol=0, rtol=0)
    with pytest.raises(InputError, match="fp32"):
        opened(tmp_path / "other", precision="fp16", compute=lambda pixels: 1e6 * greys(pixels))


def test_codes_stay_integers(tmp_path, small):
    codes = opened(tmp_path, compute=lambda pixels: (greys(pixels) * 1000).long())
    assert codes(["n9"], unasked).dtype == torch.int64


def test_several_writers_leave_one_whole_cache(tmp_path, small):
    found, errors = [], []

    def fill():
        try:
            found.append(opened(tmp_path, generator=One()))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=fill) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    names = [f"n{i}" for i in range(10) if i != 3]
    rows = [s(names, unasked) for s in found]
    assert len(rows) == 4
    assert all(torch.equal(rows[0], r) for r in rows)
    assert len(list(found[0].folder.iterdir())) == 4  # three shards and about.json


def test_a_folder_that_can_not_be_written_is_one_clear_line(tmp_path, small):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="writable folder"):
        opened(tmp_path / "file")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny CLIP directory and 24 pictures."""
    folder = tmp_path_factory.mktemp("world")
    write_export(tiny_clip(), folder / "clip")
    (folder / "pictures").mkdir()
    g = torch.Generator().manual_seed(0)
    for i in range(24):
        pixels = torch.randint(0, 256, (80, 70, 3), dtype=torch.uint8, generator=g)
        Image.fromarray(pixels.numpy()).save(folder / "pictures" / f"{i:02d}.png")
    return folder


def losses(folder, stage):
    lines = (folder / "stages" / stage / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


TRAIN = {"steps": 6, "batch_size": 8, "lr": 1e-3, "warmup": 0, "log_every": 1}
COMMON = {"evaluate.retention": "none"}


def test_divas_losses_are_equal_with_and_without_the_cache(world, tiny_diffusion, tmp_path):
    def go(name, **more):
        denoiser = {"from": str(tiny_diffusion), "size": 64, **more}
        settings = {"model.from": str(world / "clip"), "data.from": f"folder:{world / 'pictures'}", **COMMON}
        settings |= {"denoiser": denoiser, "train": {**TRAIN, "accumulate": 2}}
        run_recipe("diffusion/diva", overrides=settings, out=tmp_path / name, registry=REGISTRY)
        return losses(tmp_path / name, "00-clip")

    plain, cache = go("plain"), str(tmp_path / "latents")
    assert go("first", cache=cache) == plain
    assert go("again", cache=cache) == plain
    log = (tmp_path / "again" / "log.txt").read_text()
    assert "latents of 24 images" in log
    assert "0 new" in log
    half = go("half", cache=cache, cache_precision="fp16")
    assert half == pytest.approx(plain, rel=1e-3)


def test_genhancers_losses_are_equal_with_and_without_the_cache(world, tmp_path):
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=4,
    ).save_pretrained(tmp_path / "vae")

    def go(name, **more):
        settings = {
            "model.from": str(world / "clip"),
            "data.from": f"folder:{world / 'pictures'}",
            "latent": {"kind": "vae", "vae": str(tmp_path / "vae"), **more},
            "condition": {"vec_dim": 16, "txt_dim": 16},
            "denoiser": {"width": 32, "heads": 2, "depth": 1, "single_depth": 1},
            "generator.train": TRAIN,
            "clip.train": TRAIN,
            "crop": None,
            **COMMON,
        }
        run_recipe("diffusion/genhancer", overrides=settings, out=tmp_path / name, registry=REGISTRY)
        return losses(tmp_path / name, "00-generator") + losses(tmp_path / name, "01-clip")

    plain, cache = go("plain"), str(tmp_path / "latents")
    assert go("first", cache=cache) == plain  # moments are kept, a latent is drawn anew each time
    assert len(set(plain)) == len(plain)
    with pytest.raises(InputError, match=r"latent\.cache needs images that are cropped alike"):
        settings = {"model.from": str(world / "clip"), "data.from": f"folder:{world / 'pictures'}"}
        settings |= {"latent": {"kind": "vae", "vae": str(tmp_path / "vae"), "cache": cache}}
        run_recipe("diffusion/genhancer", overrides=settings, out=tmp_path / "crop", dry_run=True, registry=REGISTRY)


def test_moments_give_the_latent_that_the_pixels_give():
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    latent = VaeLatent(AutoencoderKL(latent_channels=4, norm_num_groups=4, block_out_channels=(4,)), size=(4, 4))
    pixels, g = torch.rand(2, 3, 4, 4), torch.Generator()
    whole = latent(pixels, g.manual_seed(1))
    assert torch.equal(latent.from_moments(latent.moments(pixels), g.manual_seed(1)), whole)
