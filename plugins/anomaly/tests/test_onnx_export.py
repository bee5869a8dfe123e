"""The ONNX graph against torch, what lies beside it, and what is refused. Graphs are written once: it takes seconds."""

import json
import shutil

import pytest
import torch
from PIL import Image

from clipgraft.checkpoint import write_export
from clipgraft.cli import main
from clipgraft.data.transforms import evaluation_transform
from clipgraft.errors import ClipgraftError, InputError
from clipgraft.registry import Registry
from clipgraft.testing.tiny import tiny_clip
from clipgraft_anomaly import onnx_export
from clipgraft_anomaly.anomalyclip.prompts import AnomalyClip, PromptConfig
from clipgraft_anomaly.detector import Fits, detect, open_detector
from clipgraft_anomaly.genclip.name_filter import FilterConfig
from clipgraft_anomaly.genclip.prompts import BlendConfig, GenClip, QueryConfig
from clipgraft_anomaly.genclip.vision import LayeredReadConfig
from clipgraft_anomaly.handwritten import PlainReadConfig, Prompts, WordsConfig
from clipgraft_anomaly.onnx_graph import baked, folded, why_not_baked
from clipgraft_anomaly.reading import ReadConfig
from clipgraft_anomaly.thresholds import Threshold, Thresholds, identity, write_thresholds

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
torch.set_num_threads(1)


@pytest.fixture(scope="module")
def registry():
    return Registry.discover()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """An export with learnt prompts, read at twice the tower's size, from two layers, with every optional part on."""
    encoder = tiny_clip(depth=3, context=24, patch=16, width=32).eval().requires_grad_(False)
    with torch.no_grad():
        encoder.image.tower.positional_embedding.normal_(0, 0.5)
    read = ReadConfig(size=64, layers=(1, 3), vv_start=2, sigma=3.0, fuse="mean", score_weight=0.25).resolved(encoder)
    torch.manual_seed(0)
    prompt = PromptConfig(context=6, deep_tokens=2, deep_layers=1).resolved(encoder)
    head = AnomalyClip(prompt=prompt, read=read, fits=Fits.of(encoder))
    head.settle(encoder)
    return write_export(encoder, tmp_path_factory.mktemp("trained") / "model", components={"anomalyclip": head})


@pytest.fixture(scope="module")
def written(model, registry, tmp_path_factory):
    """One export for all tests, with a threshold beside the model."""
    detector = open_detector(str(model), registry=registry)
    score = Threshold(value=0.5, of="pictures", normal=3, anomalous=2)
    kept = {"data": "parts:x", "split": "tune", "fingerprint": "f", "pictures": 5, "optimistic": False, "schema": 1}
    made = {"model": "m", "detector": detector.header(), "date": "2026-01-01", "version": "0", "rule": "f1"}
    write_thresholds(
        model / "thresholds.json", Thresholds(score=score, model_sha256=identity(detector), **kept, **made)
    )
    out = tmp_path_factory.mktemp("written") / "graph"
    return out, onnx_export.export_onnx(str(model), out, registry=registry)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_onnxruntime_gives_torchs_scores_and_maps_for_any_batch(model, written, registry, count):
    detector, run = open_detector(str(model), registry=registry), onnx_export.Session(written[0] / "model.onnx")
    pixels = torch.rand(count, 3, 64, 64, generator=torch.Generator().manual_seed(count))
    ours, theirs = detect(detector, pixels), run(pixels)
    assert theirs.score.shape == (count,) and theirs.map.shape == (count, 64, 64)
    torch.testing.assert_close(theirs.score, ours.score, atol=1e-5, rtol=0)
    torch.testing.assert_close(theirs.map, ours.map, atol=1e-5, rtol=0)
    assert float(ours.map.std()) > 1e-3  # a map that says nothing would agree with anything


def test_what_lies_beside_the_graph_is_enough_to_run_it_without_clipgraft(model, written, registry, tmp_path):
    import numpy as np
    import onnxruntime

    folder = written[0]
    about = json.loads((folder / "detector.json").read_text())
    photo = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    Image.fromarray(photo).save(tmp_path / "part.png")
    how = about["preprocess"]
    assert (how["resize_mode"], how["interpolation"], how["divide_by"]) == ("squash", "bicubic", 255)
    picture = Image.open(tmp_path / "part.png").resize(how["size"], Image.Resampling.BICUBIC)
    pixels = (np.asarray(picture, dtype=np.float32) / how["divide_by"]).transpose(2, 0, 1)[None]
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    score, found = session.run(list(about["outputs"]), {about["input"]["name"]: pixels})
    detector = open_detector(str(model), registry=registry)
    ours = detect(detector, evaluation_transform(detector.preprocess)(Image.fromarray(photo))[None])
    assert score[0] == pytest.approx(float(ours.score[0]), abs=1e-4)
    np.testing.assert_allclose(found[0], ours.map[0].numpy(), atol=1e-4)


def test_the_graph_has_standard_operators_a_free_batch_and_no_text_tower(model, written):
    graph = onnx.load(written[0] / "model.onnx")
    onnx.checker.check_model(graph, full_check=True)
    assert [(o.domain, o.version) for o in graph.opset_import] == [("", 18)] and not graph.functions
    assert graph.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    assert onnx.TensorProto.DOUBLE not in {i.data_type for i in graph.graph.initializer}
    names = [i.name for i in graph.graph.initializer]
    assert not [n for n in names if "text.tower" in n or "token_embedding" in n]
    image = tiny_clip(depth=3, context=24, patch=16, width=32).image
    numbers = sum(onnx.numpy_helper.to_array(i).size for i in graph.graph.initializer)
    assert numbers < 1.1 * sum(p.numel() for p in image.parameters())


def test_position_embeddings_are_constants_of_the_new_size(model, written, registry):
    graph = onnx.load(written[0] / "model.onnx")
    detector = open_detector(str(model), registry=registry)
    want = detector.reader.dense.positions()
    assert len(want) == 17 and len(detector.encoder.image.tower.positional_embedding) == 5
    held = {i.name: onnx.numpy_helper.to_array(i) for i in graph.graph.initializer}
    positions = [x for x in held.values() if x.shape == tuple(want.shape)]
    assert any(abs(x - want.numpy()).max() < 1e-6 for x in positions)
    resized = [n for n in graph.graph.node if n.op_type == "Resize"]
    assert len(resized) == 2, "one per layer's map, none for positions"


def test_detector_json_holds_settings_thresholds_hashes_and_the_parity_found(model, written, registry):
    from clipgraft.files import sha256_of

    folder, result = written
    about = json.loads((folder / "detector.json").read_text())
    assert sorted(p.name for p in folder.iterdir()) == ["detector.json", "model.onnx"]
    assert (about["method"], about["size"], about["opset"]) == ("anomalyclip", 64, 18)
    assert about["read"]["layers"] == [1, 3] and about["preprocess"]["normalisation"]["inside_the_graph"]
    assert about["thresholds"]["score"]["value"] == 0.5
    assert about["sha256"]["model.onnx"] == sha256_of(folder / "model.onnx")
    assert about["sha256"]["detector"] == identity(open_detector(str(model), registry=registry))
    assert 0 < max(about["parity"].values()) <= 1e-5 and result["parity"] == about["parity"]
    assert str(model.parent) not in json.dumps(about)


def test_thresholds_of_another_detector_are_left_out_with_the_reason(model, tmp_path, written):
    other = tmp_path / "other"
    shutil.copytree(model, other)
    found = onnx_export._thresholds(str(other), "0" * 64, name=None)
    assert found["thresholds"] is None and "other weights" in found["why_no_thresholds"]
    (other / "thresholds.json").unlink()
    assert "none are stored" in onnx_export._thresholds(str(other), "0" * 64, name=None)["why_no_thresholds"]


def test_a_graph_that_differs_is_refused_with_the_difference_and_nothing_is_kept(
    model, written, registry, tmp_path, monkeypatch
):
    moved = open_detector(str(model), registry=registry)
    moved.texts += 0.5 * torch.randn(moved.texts.shape, generator=torch.Generator().manual_seed(1))
    with pytest.raises(ClipgraftError, match=r"differ by 0\.\d+ in scores and 0\.\d+ in maps, more than 0\.0001"):
        onnx_export.compare(written[0] / "model.onnx", moved)
    monkeypatch.setattr(
        onnx_export, "write_graph", lambda _, folder, **__: shutil.copy(written[0] / "model.onnx", folder)
    )
    monkeypatch.setattr(onnx_export, "open_detector", lambda *_, **__: moved)
    with pytest.raises(ClipgraftError, match="nothing was written"):
        onnx_export.export_onnx(str(model), tmp_path / "refused", registry=registry)
    assert not list(tmp_path.iterdir())


def test_the_command_exports_prompts_about_a_named_object(capsys, tmp_path, registry):
    encoder = tiny_clip(depth=2)
    plain = write_export(encoder, tmp_path / "plain")
    argv = ["export", f"{plain}?method=prompts&name=small+cat", "--out", str(tmp_path / "g"), "--format", "onnx"]
    with pytest.raises(SystemExit) as stopped:
        main([*argv, "--json"])
    found = capsys.readouterr()
    assert not stopped.value.code, found.err
    assert json.loads(found.out)["method"] == "prompts" and "exporting to ONNX" in found.err
    detector = open_detector(str(plain), registry=registry, method="prompts")
    pixels = torch.rand(2, 3, 32, 32)
    theirs = onnx_export.Session(tmp_path / "g" / "model.onnx")(pixels)
    named, unnamed = detect(detector, pixels, ["small cat"] * 2), detect(detector, pixels)
    torch.testing.assert_close(theirs.map, named.map, atol=1e-4, rtol=0)
    assert (named.map - unnamed.map).abs().max() > 1e-3
    assert json.loads((tmp_path / "g" / "detector.json").read_text())["class_name"] == "small cat"


def test_what_cannot_be_a_graph_of_pictures_alone_is_refused(model, registry, tmp_path):
    encoder = tiny_clip(depth=2).eval()
    prompts = Prompts(words=WordsConfig(), read=PlainReadConfig()).detector(encoder)
    assert "give the name" in why_not_baked(prompts) and not why_not_baked(prompts, name="cat")
    with pytest.raises(InputError, match="takes no name"):
        baked(open_detector(str(model), registry=registry), name="cat")
    plain = write_export(encoder, tmp_path / "plain")
    for asked, message in (
        (f"{plain}?method=winclip", "winclip has no ONNX graph .it compares windows"),
        (f"{plain}?method=prompts", "give the name"),
        (str(plain), r"holds no detector; .*\?method=prompts&name=NAME"),
        (f"{model}?branch=query", "only genclip has a branch"),
        (f"{plain}?class=cat", "unknown key class; known are branch, method and name"),
    ):
        with pytest.raises(InputError, match=message):
            onnx_export.export_onnx(asked, tmp_path / "out", registry=registry)
        assert not (tmp_path / "out").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years")
    with pytest.raises(InputError, match="is not replaced"):
        onnx_export.export_onnx(str(model), tmp_path / "mine", registry=registry)


def test_genclip_is_exported_by_its_branch_that_is_the_same_for_all_pictures():
    encoder = tiny_clip(depth=3, context=24).eval().requires_grad_(False)
    read = LayeredReadConfig(layers=(2, 3), vv_start=2).resolved(encoder)
    prompt = QueryConfig(query=5, deep_tokens=2, deep_layers=1).resolved(encoder)
    settings = {"read": read, "blend": BlendConfig(), "filter": FilterConfig(), "fits": Fits.of(encoder)}
    head = GenClip(prompt=prompt, **settings).requires_grad_(False)
    head.settle(encoder)
    detector = head.detector(encoder).eval()
    assert "'MODEL?branch=query'" in why_not_baked(detector)
    chosen, pixels = onnx_export._query_only(detector, "query"), torch.rand(2, 3, 32, 32)
    ours, theirs = detect(chosen, pixels), baked(chosen)(pixels)
    torch.testing.assert_close(theirs.score, ours.score)
    torch.testing.assert_close(theirs.map, ours.map)


def test_missing_packages_are_one_line_with_the_command(monkeypatch, model, registry, tmp_path):
    monkeypatch.setattr(onnx_export, "find_spec", lambda name: None if name == "onnxruntime" else object())
    with pytest.raises(InputError, match=r"needs onnxruntime; type: pip install 'clipgraft-anomaly\[onnx\]'"):
        onnx_export.export_onnx(str(model), tmp_path / "out", registry=registry)


def test_folding_leaves_the_detector_as_it_was(model, registry):
    detector = open_detector(str(model), registry=registry)
    before = identity(detector)
    copy = folded(detector.reader.dense)
    pixels = torch.randn(2, 3, 64, 64)
    for one in (None, 2):
        ours, theirs = (tower(pixels, layers=(1, 3), vv_start=one) for tower in (detector.reader.dense, copy))
        torch.testing.assert_close(theirs.cls, ours.cls)
        torch.testing.assert_close(theirs.local[3], ours.local[3])
    assert identity(detector) == before and len(detector.encoder.image.tower.positional_embedding) == 5
