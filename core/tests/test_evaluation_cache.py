"""Workers change nothing but time; features on disk are reused exactly when all that they follow from is equal."""

from __future__ import annotations

import io
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from clipgraft.cli import main
from clipgraft.config.schema import GraftNode
from clipgraft.data import reading
from clipgraft.data.base import Pair, Sample
from clipgraft.data.folder import open_folder
from clipgraft.data.loader import BadSamples, evaluation_batches
from clipgraft.data.reading import stack_images
from clipgraft.encoders import apply_grafts
from clipgraft.encoders.base import Encoder
from clipgraft.errors import InputError
from clipgraft.evaluation import evaluate, progress
from clipgraft.evaluation.feature_cache import FeatureCache, from_records, to_records
from clipgraft.evaluation.features import EncoderFeatures
from clipgraft.evaluation.progress import LateBar
from clipgraft.evaluation.zero_shot import ZeroShot
from clipgraft.log import RunLog
from clipgraft.registry import Registry, use
from clipgraft.testing.tiny import tiny_clip

CLASSES = ("blue", "green", "red")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """30 pictures in three classes, three of them damaged."""
    for index in range(30):
        path = tmp_path / "data" / CLASSES[index % 3] / f"{index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(0, 256, (36, 40, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(index))
        Image.fromarray(pixels.numpy()).save(path)
        if index in (4, 5, 28):
            path.write_bytes(path.read_bytes()[:80])
    return tmp_path / "data"


def towers_run(encoder: Encoder) -> list[str]:
    """Notes every forward pass of a tower."""
    seen: list[str] = []
    for name in ("image", "text"):
        tower: nn.Module = getattr(encoder, name)
        tower.register_forward_pre_hook(lambda module, args, name=name: seen.append(name))
    return seen


# -- worker processes --------------------------------------------------------------------------------------------------


def test_workers_change_nothing(folder: Path) -> None:
    source, before = open_folder(folder), torch.get_rng_state()
    found = []
    for workers in (0, 2):
        bad = BadSamples(30)
        options: dict[str, Any] = {"preprocess": tiny_clip().preprocess, "batch_size": 12, "workers": workers}
        batches = list(evaluation_batches(source, bad=bad, **options))
        items = [replace(item, image=reading.GONE) for batch in batches for item in batch]
        found.append((list(map(stack_images, batches)), items, bad))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(found[0][0], found[1][0], strict=True))
    assert found[0][1] == found[1][1] and [len(batch) for batch in found[0][0]] == [11, 10, 6]
    assert found[0][2] == found[1][2] and found[0][2].count == 3
    one, two = (ZeroShot()(EncoderFeatures(tiny_clip(), batch_size=7, workers=w), source) for w in (0, 2))
    assert one == two


@dataclass
class Slow:
    """Pictures that take ``seconds`` to read, with the process that read them; pairs of them."""

    seconds: float
    fatal: int = -1
    name: str = "slow"
    fingerprint: str = "slow"
    patterns = ("p",)

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> Pair:
        if index == self.fatal:
            raise InputError(f"place {index} is beyond repair")
        time.sleep(self.seconds)
        images = torch.full((3, 32, 32), index, dtype=torch.uint8), torch.full((3, 32, 32), 99, dtype=torch.uint8)
        return Pair(str(index), images, (str(os.getpid()), ""), "p")


def readers(source: Any, **options: Any) -> Sequence[str]:
    preprocess = tiny_clip().preprocess
    batches = list(evaluation_batches(source, preprocess=preprocess, batch_size=4, bad=BadSamples(40), **options))
    pairs = [item for batch in batches for item in batch if isinstance(item, Pair)]
    assert [int(stack_images([pair])[0, 0, 0, 0] * 255 + 0.5) for pair in pairs] == list(range(40))
    assert all(torch.equal(stack_images([pair])[1], torch.full((3, 32, 32), 99) / 255) for pair in pairs)
    return [pair.texts[0] for pair in pairs]


def test_workers_start_when_reading_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "WORTHWHILE", 0.2)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(3)), raising=False)
    here = str(os.getpid())
    assert set(readers(Slow(0.0), workers=None)) == {here}
    found = readers(Slow(0.01), workers=None)
    assert found[:4] == [here] * 4 and here not in found[4:] and len(set(found[4:])) == 3
    assert here not in readers(Slow(0.0), workers=1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert set(readers(Slow(0.01), workers=None)) == {here}  # eight ranks share three cores


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_in_a_worker_stays_one_line(workers: int) -> None:
    with pytest.raises(InputError) as caught:
        readers(Slow(0.0, fatal=17), workers=workers)
    assert str(caught.value) == "place 17 is beyond repair"


# -- progress ----------------------------------------------------------------------------------------------------------


def test_progress_appears_when_someone_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    log = RunLog(stream=out)
    with LateBar(log, "quick", 10) as bar:
        bar.advance(10)
    assert out.getvalue() == ""
    monkeypatch.setattr(progress, "PATIENCE", 0.05)
    with LateBar(log, "slow", 10) as bar:
        bar.advance(4)
        time.sleep(0.3)
        bar.advance(6)
    assert out.getvalue() == "slow 10/10\n"
    with LateBar(None, "nobody", 10) as bar:
        bar.advance(10)


# -- features on disk --------------------------------------------------------------------------------------------------


def test_a_second_call_runs_no_tower(folder: Path, tmp_path: Path) -> None:
    registry, cache = Registry.discover(allow=()), tmp_path / "cache"
    nodes = ["zero-shot", "linear-probe?on=tokens&solver=ridge"]
    options: dict[str, Any] = {"registry": registry, "default_data": f"folder:{folder}", "batch_size": 8}
    plain = evaluate(tiny_clip(), nodes, **options)
    written = evaluate(tiny_clip(), nodes, cache=cache, **options)
    encoder = tiny_clip()
    seen = towers_run(encoder)
    assert evaluate(encoder, nodes, cache=cache, **options) == written == plain
    assert seen == [] and written["core/zero-shot"].metrics["skipped"] == 3
    assert len(list(cache.glob("*/*/manifest.json"))) == 2
    with pytest.raises(InputError, match="is a file; the cache of features needs a folder"):
        evaluate(encoder, nodes, cache=next(folder.glob("*/*.png")), **options)


def test_features_follow_from_weights_structure_preprocess_and_data(folder: Path, tmp_path: Path) -> None:
    cache, source = FeatureCache(tmp_path / "cache"), open_folder(folder)

    def ran(encoder: Encoder, data: Any = source, *, tokens: bool = False) -> list[str]:
        seen, features = towers_run(encoder), EncoderFeatures(encoder, cache=cache)
        features.tokens(data) if tokens else features.images(data)
        features.texts(["a dog", "a cat"])
        features.classifier(CLASSES, ("a {}", "the {}"))
        return seen

    def changed(**changes: Any) -> Encoder:
        encoder = tiny_clip()
        encoder.data.preprocess = replace(encoder.preprocess, **changes)
        return encoder

    everything, images, texts = ["image", "text", "text"], ["image"], ["text", "text"]
    assert ran(tiny_clip()) == everything
    assert ran(tiny_clip()) == []
    assert ran(tiny_clip(1)) == everything
    trained = tiny_clip()  # another state of the same checkpoint
    with torch.no_grad():
        next(iter(trained.image.parameters())).view(-1)[0] += 1e-3
    assert ran(trained) == images
    assert ran(trained) == []
    with torch.no_grad():
        next(iter(trained.text.parameters())).view(-1)[0] += 1e-3
    assert ran(trained) == texts
    assert ran(changed(mean=(0.4, 0.5, 0.5))) == images
    assert ran(tiny_clip(), tokens=True) == images
    assert ran(tiny_clip().bfloat16()) == everything
    quick = tiny_clip()  # equal tensors, another function
    for module in quick.image.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.GELU):
                setattr(module, name, nn.SiLU())
    assert ran(quick) == images
    grafted = apply_grafts(tiny_clip(), (GraftNode(use="core/lora"),), registry=Registry.discover(allow=()))
    assert ran(grafted) == everything
    file = folder / "red" / "02.png"
    os.utime(file, ns=(1, 1))
    assert ran(tiny_clip(), open_folder(folder)) == images


def test_damaged_entries_are_computed_again(folder: Path, tmp_path: Path) -> None:
    cache, source, logged = FeatureCache(tmp_path / "cache"), open_folder(folder), io.StringIO()
    expected = EncoderFeatures(tiny_clip(), cache=cache).images(source)
    entry = next((tmp_path / "cache").glob("*/*"))
    for damage in ("tensors.safetensors", "items.json", "manifest.json"):
        content = bytearray((entry / damage).read_bytes())
        content[len(content) // 2] ^= 1
        (entry / damage).write_bytes(bytes(content))
        encoder = tiny_clip()
        seen = towers_run(encoder)
        features = EncoderFeatures(encoder, cache=cache)
        assert torch.equal(features.images(source), expected) and seen == ["image"], damage
        assert len(features.samples(source)) == 27 and features.skipped(source) == 3
        encoder = tiny_clip()
        seen = towers_run(encoder)
        assert torch.equal(EncoderFeatures(encoder, cache=cache).images(source), expected) and seen == []
    (tmp_path / "full").write_text("not a folder")
    broken = FeatureCache(tmp_path / "new")
    (tmp_path / "new").write_text("made a file meanwhile")
    found = EncoderFeatures(tiny_clip(), cache=broken, log=RunLog(stream=logged)).images(source)
    assert torch.equal(found, expected) and "features are not kept: " in logged.getvalue()


def test_what_could_not_be_read_is_tried_again(folder: Path, tmp_path: Path) -> None:
    """A file can become readable without a change of size or time: rights, a network folder."""
    cache, file = FeatureCache(tmp_path / "cache"), folder / "green" / "04.png"
    assert EncoderFeatures(tiny_clip(), cache=cache).images(open_folder(folder)).shape[0] == 27
    source = open_folder(folder)
    Image.new("RGB", (40, 36)).save(file)  # the source keeps the fingerprint of the damaged file
    features = EncoderFeatures(tiny_clip(), cache=cache)
    assert features.images(source).shape[0] == 28 and features.skipped(source) == 2


def test_items_come_back_as_they_were() -> None:
    gone = reading.GONE
    items: list[Any] = [
        Sample("a", gone, ("x", "\udcff y"), 3, {"hue": 1}, caption_weights=(0.1, 1 / 3), negatives=("no",), group="g"),
        Sample("b", gone),
        Pair("c", (gone, gone), ("one", "two"), "color"),
    ]
    assert from_records(json.loads(json.dumps(to_records(items)))) == items


def test_the_command_takes_workers_cache_and_settings(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from clipgraft.checkpoint import write_export

    monkeypatch.setenv("CLIPGRAFT_PLUGINS", "")
    write_export(tiny_clip(), tmp_path / "model")
    cache, outputs = tmp_path / "cache", []
    command = ["eval", str(tmp_path / "model"), "--on", "zero-shot?templates=simple&per_class=true", "--json"]
    for more in ([], ["--workers", "2", "--cache", str(cache)], ["--cache", str(cache)]):
        with use(Registry.discover(allow=())), pytest.raises(SystemExit) as ended:
            main([*command, "--data", f"folder:{folder}", *more])
        printed = capsys.readouterr()
        assert not ended.value.code and "3 of 30 samples can't be read" in printed.err
        outputs.append(json.loads(printed.out)["results"]["core/zero-shot"])
    assert outputs[0] == outputs[1] == outputs[2]
    assert {"class/blue", "class/green", "class/red", "skipped"} < outputs[0].keys()
    assert len(list(cache.glob("*/*/manifest.json"))) == 2
    with pytest.raises(SystemExit):
        main(["eval", str(tmp_path / "model"), "--on", "zero-shot?per_class", "--data", f"folder:{folder}"])
    assert "'per_class' is no setting; write NAME?key=value&key=value@SRC" in capsys.readouterr().err
