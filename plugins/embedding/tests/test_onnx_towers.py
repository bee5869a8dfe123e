"""Towers as ONNX graphs: what onnxruntime answers is what torch answers, and a folder of them is a model again."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from clipgraft.checkpoint import write_export
from clipgraft.cli import main
from clipgraft.data.transforms import evaluation_transform
from clipgraft.encoders import apply_grafts, load
from clipgraft.errors import ClipgraftError, InputError
from clipgraft.registry import Registry
from clipgraft.testing.tiny import tiny_clip
from clipgraft.types import FeatureRequest
from clipgraft_embedding import onnx_towers

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
torch.set_num_threads(1)
TEXTS = ["a photo of a cat", "", "seven small green squares", "dogs"]
KINDS = ["vit", "siglip-timm"]


@pytest.fixture(scope="module")
def registry():
    return Registry.discover()


@pytest.fixture(scope="module", params=KINDS)
def written(request, registry, tmp_path_factory):
    """A model and its graphs; writing takes seconds."""
    folder = tmp_path_factory.mktemp(request.param)
    encoder = tiny_clip(3, kind=request.param).eval()
    model = write_export(encoder, folder / "model", lineage=[{"recipe": "core/finetune", "seed": 1}])
    found = onnx_towers.export_towers(str(model), folder / "graphs", registry=registry)
    return encoder, folder / "graphs", found


@torch.no_grad()
@pytest.mark.parametrize("count", [1, 2, 5])
def test_onnxruntime_gives_torchs_features_for_any_batch(written, count):
    encoder, folder, _ = written
    pixels = torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(count))
    ids = encoder.tokenizer((TEXTS * 2)[:count])
    ours = encoder(encoder.preprocess.normalize(pixels), ids)
    for mine, name, given in zip(ours, ("image", "text"), (pixels, ids), strict=True):
        theirs = onnx_towers.Session(folder / f"{name}.onnx")(given)
        torch.testing.assert_close(theirs.pooled, mine.pooled, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(theirs.unit, F.normalize(mine.pooled, dim=-1), atol=1e-5, rtol=0)
        assert count == 1 or (theirs.unit[0] - theirs.unit[1]).abs().max() > 1e-3


def test_the_graphs_are_standard_and_their_files_described(written):
    _, folder, found = written
    about = json.loads((folder / "towers.json").read_text())
    for name in ("image", "text"):
        graph = onnx.load(folder / f"{name}.onnx")
        onnx.checker.check_model(graph, full_check=True)
        assert [(o.domain, o.version) for o in graph.opset_import] == [("", 18)] and not graph.functions
        assert graph.graph.input[0].type.tensor_type.shape.dim[0].dim_param
        assert about["sha256"][f"{name}.onnx"]
    assert about["parity"] == found["parity"] and max(found["parity"].values()) <= 1e-5
    assert (folder / "tokenizer.json").is_file() and "library_name: onnx" in (folder / "README.md").read_text()


def test_a_folder_of_graphs_is_a_model_again(written, registry, tmp_path, capsys):
    encoder, folder, _ = written
    again = load(str(folder), registry=registry)
    pixels, ids = torch.rand(3, 3, 32, 32), encoder.tokenizer(TEXTS)
    with torch.no_grad():
        for mine, theirs in zip(
            encoder(encoder.preprocess.normalize(pixels), ids),
            again(again.preprocess.normalize(pixels), again.tokenizer(TEXTS)),
            strict=True,
        ):
            torch.testing.assert_close(theirs.pooled, mine.pooled, atol=1e-5, rtol=1e-5)
    assert again.data.origin.lineage == ({"recipe": "core/finetune", "seed": 1},)
    torch.testing.assert_close(again.logit_scale, encoder.logit_scale)
    assert again.image.sha256.tolist() != again.text.sha256.tolist(), "caches tell graphs apart by their state"
    with pytest.raises(InputError, match="can't be trained"):
        again.image(pixels, FeatureRequest(tokens=True))
    for label, shade in (("red", (200, 0, 0)), ("blue", (0, 0, 200))):
        (tmp_path / "data" / label).mkdir(parents=True)
        for k in range(3):
            Image.new("RGB", (40, 40), tuple(c + 9 * k for c in shade)).save(tmp_path / "data" / label / f"{k}.png")
    told = []
    for model in (folder, write_export(encoder, tmp_path / "model")):
        with pytest.raises(SystemExit) as ended:
            main(["eval", str(model), "--on", "zero-shot", "--data", f"folder:{tmp_path / 'data'}", "--json"])
        streams = capsys.readouterr()
        assert not ended.value.code, streams.err
        told.append(json.loads(streams.out)["results"])
    assert told[0] == told[1]


def test_a_picture_goes_in_without_clipgraft(written, tmp_path):
    import onnxruntime

    encoder, folder, _ = written
    about = json.loads((folder / "towers.json").read_text())
    photo = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    pixels = (photo.astype(np.float32) / 255).transpose(2, 0, 1)[None]
    session = onnxruntime.InferenceSession(str(folder / "image.onnx"), providers=["CPUExecutionProvider"])
    found = session.run(["unit"], {about["inputs"]["image"]["name"]: pixels})[0]
    with torch.no_grad():
        ours = encoder.image(
            encoder.preprocess.normalize(evaluation_transform(encoder.preprocess)(Image.fromarray(photo))[None])
        )
    np.testing.assert_allclose(found, ours.unit().numpy(), atol=1e-4)


def test_a_damaged_or_incomplete_folder_is_named(written, registry, tmp_path):
    import shutil

    folder = tmp_path / "graphs"
    shutil.copytree(written[1], folder)
    (folder / "text.onnx").write_bytes(b"x")
    with pytest.raises(InputError, match=r"text.onnx is missing or damaged"):
        load(str(folder), registry=registry)
    (folder / "towers.json").write_text("{}")
    with pytest.raises(InputError, match=r"towers.json is damaged"):
        load(str(folder), registry=registry)


def test_one_tower_alone_and_adapters_inside(registry, tmp_path):
    from clipgraft.config.schema import GraftNode

    encoder = apply_grafts(tiny_clip(), [GraftNode(use="core/lora", rank=2)], registry).eval()
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if "lora" in name or "original" not in name:
                parameter.add_(0.01)
        pixels = torch.rand(2, 3, 32, 32)
        ours = encoder.image(encoder.preprocess.normalize(pixels)).unit()
    write_export(encoder, tmp_path / "model")
    argv = ["export", f"{tmp_path / 'model'}?tower=image", "--out", str(tmp_path / "out"), "--format", "onnx-towers"]
    with pytest.raises(SystemExit) as ended:
        main([*argv, "--json"])
    assert not ended.value.code and not (tmp_path / "out/text.onnx").exists()
    theirs = onnx_towers.Session(tmp_path / "out/image.onnx")(pixels).unit
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=0)
    assert load(str(tmp_path / "out"), registry=registry).text is None


def test_refusals(registry, tmp_path, monkeypatch):
    model = str(write_export(tiny_clip(), tmp_path / "model"))
    with pytest.raises(InputError, match=r"tower is 'txt'; write \?tower=image or \?tower=text"):
        onnx_towers.export_towers(f"{model}?tower=txt", tmp_path / "out", registry=registry)
    blind, odd = tiny_clip(), tiny_clip()
    blind.text = None
    assert onnx_towers.why_no_text_graph(blind) == "it has no text tower"
    odd.data.tokenizer = lambda texts: torch.zeros(len(texts), 3, 7)  # features, as of a language model's cache
    assert "doesn't read token ids" in onnx_towers.why_no_text_graph(odd)
    assert onnx_towers.why_no_text_graph(tiny_clip()) == ""
    monkeypatch.setattr(onnx_towers, "load", lambda *_, **__: odd)
    with pytest.raises(InputError, match=r"export the image tower alone: 'x\?tower=image'"):
        onnx_towers.export_towers("x", tmp_path / "out", registry=registry)
    assert not (tmp_path / "out").exists()


def test_graphs_that_differ_are_not_kept(written, registry, tmp_path, monkeypatch):
    encoder, folder, _ = written
    moved = onnx_towers.ImageGraph(encoder)
    moved.mean = moved.mean + 0.3
    with pytest.raises(
        ClipgraftError, match=r"differ by \S+ in image embeddings, more than 0.0001; nothing was written"
    ):
        onnx_towers.compare(moved, folder / "image.onnx", onnx_towers.probes(encoder, "image"))
