"""``clipgraft anomaly predict`` on folders: files and numbers, resuming, stopping, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from clipgraft.checkpoint import write_export
from clipgraft.data.transforms import evaluation_transform
from clipgraft.errors import InputError, Interrupted
from clipgraft.testing.tiny import tiny_clip
from clipgraft_anomaly import predict as predicting
from clipgraft_anomaly import predict_overlays
from clipgraft_anomaly.anomalyclip.prompts import AnomalyClip, PromptConfig
from clipgraft_anomaly.commands import app
from clipgraft_anomaly.detector import Detection, Detector, Fits, detect
from clipgraft_anomaly.overlays import OUTLINE, outline, overlay
from clipgraft_anomaly.predict import folder_source, predict
from clipgraft_anomaly.predict_lines import read_lines
from clipgraft_anomaly.predict_maps import read_map
from clipgraft_anomaly.predict_overlays import Limits, colour_scale
from clipgraft_anomaly.reading import ReadConfig
from clipgraft_anomaly.tiling import Tiling, resized

torch.set_num_threads(1)


class Bright(Detector):
    """The map is the red channel, the score its mean; pictures after ``last`` stop the command."""

    method = "bright"

    def __init__(self, last=10**9):
        super().__init__()
        self.encoder, self.size, self.last, self.seen = tiny_clip(), 16, last, 0

    def forward(self, pixels, names=None):
        if self.seen >= self.last:
            raise KeyboardInterrupt
        self.seen += len(pixels)
        return Detection(pixels[:, 0].mean((1, 2)), pixels[:, 0])


def folder(root, count=6, seed=0):
    rng = np.random.default_rng(seed)
    for k in range(count):
        where = root / ("inner/deep" if k % 2 else ".")
        where.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 128, (20 + k, 30, 3)).astype(np.uint8)
        if k >= 4:
            pixels[4:12, 5:20, 0] = 250
        Image.fromarray(pixels).save(where / f"{k}.png")
    return root


def run(images, out, detector=None, **how):
    return predict(detector or Bright(), images, out, model="m", sha256="s", batch_size=2, **how)


def invoke(*words, code=0):
    done = CliRunner().invoke(app, ["predict", *map(str, words)])
    if code == 0:
        assert done.exit_code == 0, done.output + repr(done.exception)
    return done


def tiny_export(folder, *, depth=3, context=32):
    encoder = tiny_clip(depth=depth, context=context).eval()
    torch.manual_seed(0)
    prompt = PromptConfig(context=4, deep_tokens=2, deep_layers=1).resolved(encoder)
    head = AnomalyClip(prompt=prompt, read=ReadConfig(vv_start=2).resolved(encoder), fits=Fits.of(encoder))
    head.settle(encoder)
    return write_export(encoder, folder, components={"anomalyclip": head})


def test_scores_maps_masks_and_overlays_are_those_of_the_detector(tmp_path):
    images, out, detector = folder(tmp_path / "images"), tmp_path / "out", Bright()
    found = run(images, out, detector, limits=Limits(0.3, 0.8, "given"))
    assert found.new == 6
    header, lines = read_lines(out / "predictions.jsonl")
    assert [line["file"] for line in lines] == sorted(p.relative_to(images).as_posix() for p in images.rglob("*.png"))
    assert lines == list(found.lines) and header["status"] == "done"
    bad = sum(line["label"] == "anomalous" for line in lines)
    assert header["counts"] == {"pictures": 6, "unreadable": 0, "anomalous": bad} and 0 < bad < 6
    prepare = evaluation_transform(detector.preprocess)
    medians, tops = [], []
    for line in lines:
        picture = Image.open(images / line["file"])
        own = detect(detector, prepare(picture)[None])
        assert line["score"] == pytest.approx(float(own.score), abs=1e-6)
        assert line["label"] == ("anomalous" if line["score"] >= 0.3 else "normal")
        assert (line["width"], line["height"]) == picture.size and line["passes"] == 1
        scores = resized(own.map[0], picture.size[::-1]).numpy()
        assert read_map(out / line["map"]) == pytest.approx(scores, abs=1 / 65535)
        assert (line["map_low"], line["map_high"]) == (0.0, 1.0)
        mask = np.asarray(Image.open(out / line["mask"]))
        assert set(np.unique(mask)) <= {0, 255} and np.array_equal(mask == 255, scores >= 0.8)
        assert line["mask_share"] == pytest.approx((mask == 255).mean())
        medians.append(float(own.map.median()))
        tops.append(float(own.map.max()))
        assert line["map_max"] == pytest.approx(tops[-1]) and line["map_median"] == pytest.approx(medians[-1], abs=0.01)
    assert header["scale"] == list(colour_scale(lines))
    assert header["scale"][1] == pytest.approx(np.quantile(tops, 0.99))
    line = next(line for line in lines if line["file"] == "4.png")
    drawn = np.asarray(Image.open(out / line["overlay"])).astype(int)
    want = overlay(np.asarray(Image.open(images / "4.png")), read_map(out / line["map"]), tuple(header["scale"]))
    inside = np.s_[6:10, 8:17]  # away from the outline
    assert np.abs(drawn[inside] - want[inside]).mean() < 12 and drawn.shape == want.shape
    mask = np.asarray(Image.open(out / line["mask"])) == 255
    marked = np.abs(drawn - OUTLINE).sum(2) < 60
    assert marked[outline(mask)].mean() > 0.9 and not marked[~mask].any() and not marked[inside].any()


def test_the_header_says_what_a_reader_must_know(tmp_path):
    images, model = folder(tmp_path / "images", 2), tiny_export(tmp_path / "export")
    told = json.loads(invoke(model, "--images", images, "--out", tmp_path / "out", "--json").stdout)
    header, lines = read_lines(tmp_path / "out/predictions.jsonl")
    assert header["detector"]["method"] == "anomalyclip" and header["layers"] == [3] and header["model"] == str(model)
    assert header["model_sha256"] == told["model_sha256"] and len(told["model_sha256"]) == 64
    assert header["thresholds"] == {"score": None, "pixel": None, "source": ""} and "label" not in lines[0]
    assert "softmax" in header["score"] and "raw" in header["score"] and "mask" not in lines[0]
    assert told["anomalous"] is None and told["new"] == 2 and told["scale"] == header["scale"]


def test_unreadable_pictures_are_listed_and_never_fatal(tmp_path):
    images = folder(tmp_path / "images", 3)
    (images / "broken.jpg").write_bytes(b"\xff\xd8 no more")
    (images / "inner/empty.png").write_bytes(b"")
    (images / "notes.txt").write_text("no picture")
    (images / ".hidden.png").write_bytes(b"")
    (images / "outside.png").symlink_to(tmp_path / "secret.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "secret.png")
    found = run(images, tmp_path / "out")
    assert {line["file"] for line in found.unreadable} == {"broken.jpg", "inner/empty.png", "outside.png"}
    assert len(found.scored) == 3 and found.header["counts"] == {"pictures": 6, "unreadable": 3}
    for file in list(images.rglob("*.png")):
        if file.is_file() and "empty" not in file.name and not file.is_symlink():
            file.unlink()
    only = run(images, tmp_path / "none")
    assert not only.scored and only.header["scale"] is None


def test_files_at_the_detectors_size_and_as_float16(tmp_path):
    images = folder(tmp_path / "images", 5)
    found = run(images, tmp_path / "out", maps="npy", keep_size=False, limits=Limits(None, 0.5, "given"))
    for line in found.scored:
        stored = np.load(tmp_path / "out" / line["map"])
        assert stored.dtype == np.float16 and stored.shape == (16, 16) and "map_low" not in line
        assert Image.open(tmp_path / "out" / line["overlay"]).size == (16, 16)
        assert Image.open(tmp_path / "out" / line["mask"]).size == (16, 16) and line["width"] == 30
    bare = run(images, tmp_path / "bare", overlays=False)
    assert not (tmp_path / "bare/overlays").exists() and "overlay" not in bare.scored[0]


def test_names_that_differ_in_their_suffix_or_bytes_stay_apart(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for name, value in (("a.png", 10), ("a.bmp", 200), ("Größe ☃.png", 99), ("a.png.png", 50)):
        Image.new("RGB", (8, 8), (value, 0, 0)).save(images / name)
    found = run(images, tmp_path / "out")
    assert {round(line["score"] * 255): line["file"] for line in found.scored} == {
        10: "a.png", 200: "a.bmp", 99: "Größe ☃.png", 50: "a.png.png"
    }  # fmt: skip
    assert len({line["map"] for line in found.lines}) == 4
    for line in found.scored:
        assert read_map(tmp_path / "out" / line["map"]).mean() == pytest.approx(line["score"], abs=1e-4)


def test_what_was_written_into_the_folder_of_pictures_is_no_picture(tmp_path):
    images = folder(tmp_path / "images", 3)
    first = run(images, images / "out")
    again = run(images, images / "out", resume=True)
    assert len(first.lines) == len(again.lines) == 3 and again.new == 0
    assert len(folder_source(images).ids) > 3


def test_a_stopped_command_goes_on_and_ends_with_the_same(tmp_path, monkeypatch):
    images = folder(tmp_path / "images")
    whole = run(images, tmp_path / "whole", limits=Limits(0.4, 0.8, "given"))
    out, how = tmp_path / "out", {"limits": Limits(0.4, 0.8, "given")}
    with pytest.raises(Interrupted, match=r"4 of 6 pictures .* --resume"):
        run(images, out, Bright(last=4), **how)
    with (out / "predictions.jsonl").open("a") as file:
        file.write('{"file": "4.png", "sco')  # a kill in the middle of a line
    with pytest.raises(InputError, match="--resume"):
        run(images, out, **how)
    monkeypatch.setattr(predict_overlays, "overlay", _stop_after(2))
    with pytest.raises(Interrupted, match="6 of 6"):
        run(images, out, resume=True, **how)
    monkeypatch.undo()
    detector, drawn = Bright(), []
    monkeypatch.setattr(predict_overlays, "overlay", lambda *a: drawn.append(1) or overlay(*a))
    found = run(images, out, detector, resume=True, **how)
    assert detector.seen == 0 and found.new == 0 and len(drawn) == 4
    assert found.lines == whole.lines
    same = {k: v for k, v in found.header.items() if k not in ("date", "images")}
    assert same == {k: v for k, v in whole.header.items() if k not in ("date", "images")}
    files = sorted(p.relative_to(out) for p in out.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(tmp_path / "whole") for p in (tmp_path / "whole").rglob("*") if p.is_file())
    for name in files:
        if name.name != "predictions.jsonl":
            assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def _stop_after(count):
    calls = []

    def drawn(*arguments):
        calls.append(1)
        if len(calls) > count:
            raise KeyboardInterrupt
        return overlay(*arguments)

    return drawn


def test_resuming_sees_new_changed_and_removed_pictures_and_redraws_for_a_new_scale(tmp_path):
    images, out = folder(tmp_path / "images"), tmp_path / "out"
    first = run(images, out)
    old = (out / "overlays/0.png.jpg").read_bytes()
    Image.new("RGB", (9, 9), (255, 0, 0)).save(images / "new.png")
    Image.new("RGB", (30, 20), (200, 0, 0)).save(images / "2.png")
    (images / "inner/deep/1.png").unlink()
    (out / "maps/4.png.png").unlink()
    detector = Bright()
    second = run(images, out, detector, resume=True)
    assert detector.seen == second.new == 3
    by_name = {line["file"]: line for line in second.lines}
    assert by_name["2.png"]["score"] == pytest.approx(200 / 255) and "inner/deep/1.png" not in by_name
    assert by_name["new.png"]["score"] == 1 and by_name["0.png"]["score"] == first.lines[0]["score"]
    assert second.header["scale"][0] > first.header["scale"][0]
    assert (out / "overlays/0.png.jpg").read_bytes() != old
    for other in ({"name": "cap"}, {"tiling": Tiling(8)}, {"maps": "npy"}, {"limits": Limits(0.5)}):
        with pytest.raises(InputError, match="begun differently"):
            run(images, out, resume=True, **other)
    with pytest.raises(InputError, match="the detector differs"):
        predict(Bright(), images, out, model="m", sha256="other", resume=True)


def test_a_given_scale_makes_folders_comparable(tmp_path):
    images, out = folder(tmp_path / "images", 2), tmp_path / "out"
    model = tiny_export(tmp_path / "export")
    told = json.loads(invoke(model, "--images", images, "--out", out, "--scale", "0.25,0.75", "--json").stdout)
    assert told["scale"] == [0.25, 0.75]
    for wrong in ("1", "0.9,0.1", "a,b"):
        done = invoke(model, "--images", images, "--out", tmp_path / "x", "--scale", wrong, code=2)
        assert isinstance(done.exception, InputError) and "--scale" in str(done.exception)


def test_tiles_on_the_command_line(tmp_path):
    images, model = tmp_path / "images", tiny_export(tmp_path / "export")
    images.mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (70, 90, 3)).astype(np.uint8)).save(images / "large.png")
    invoke(model, "--images", images, "--out", tmp_path / "out", "--tile", 40, "--overlap", 8)
    header, (line,) = read_lines(tmp_path / "out/predictions.jsonl")
    assert header["tiles"] == {"tile": 40, "overlap": 8} and "highest of all tiles" in header["score"]
    assert line["passes"] == 1 + 2 * 3 and read_map(tmp_path / "out" / line["map"]).shape == (70, 90)
    plain, one = tmp_path / "plain", tmp_path / "one"
    invoke(model, "--images", images, "--out", plain)
    invoke(model, "--images", images, "--out", one, "--tile", 90)
    a, b = (read_lines(f / "predictions.jsonl")[1][0] for f in (plain, one))
    assert a == b and (plain / a["map"]).read_bytes() == (one / b["map"]).read_bytes()


def test_a_table_for_people(tmp_path):
    images, model = folder(tmp_path / "images", 3), tiny_export(tmp_path / "export")
    (images / "broken.jpg").write_bytes(b"no")
    printed = invoke(model, "--images", images, "--out", tmp_path / "out", "--threshold", 0.0).stdout
    assert "label" in printed and "3 pictures scored, 3 anomalous; 1 can't be read" in printed
    assert "broken.jpg: not an image" in printed and "threshold given" in printed


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["{export}", "--images", "{empty}"], "holds no pictures"),
        (["{export}", "--images", "{missing}"], "is no folder"),
        (["{missing}", "--images", "{images}"], "no run or export with a detector"),
        (["{plain}", "--images", "{images}"], "holds no detector"),
        (["{export}", "--images", "{images}", "--overlap", "3"], "--tile"),
        (["{export}", "--images", "{images}", "--tile", "4", "--overlap", "4"], "--overlap"),
        (["{export}", "--images", "{images}", "--set", "a=1"], "--method"),
        (["{export}", "--images", "{images}", "--method", "nonsense"], "nonsense"),
        (["{other}", "--images", "{images}"], "was made for"),
    ],
)
def test_mistakes_are_told_in_a_line(tmp_path, words, said):
    names = {"export": tiny_export(tmp_path / "export"), "missing": tmp_path / "missing", "empty": tmp_path / "empty"}
    names |= {"images": folder(tmp_path / "images", 1), "plain": write_export(tiny_clip().eval(), tmp_path / "plain")}
    names["empty"].mkdir()
    names["other"] = _with_head_of(names["export"], tiny_clip(depth=2, context=32).eval(), tmp_path / "other")
    done = invoke(*[w.format(**names) for w in words], "--out", tmp_path / "out", code=2)
    assert isinstance(done.exception, InputError) and said in str(done.exception), repr(done.exception)
    assert "\n" not in str(done.exception) and not (tmp_path / "out").exists()


def _with_head_of(export: Path, encoder, target: Path) -> Path:
    """An export whose prompts were trained for another backbone."""
    from clipgraft.registry import current
    from clipgraft_anomaly.evaluator import trained_head

    return write_export(encoder, target, components={"anomalyclip": trained_head(export, registry=current())})


def test_wrong_flags_are_usage_errors(tmp_path):
    for words in (["--maps", "jpg"], ["--batch-size", "0"], ["--colour", "red"]):
        done = invoke("m", "--images", tmp_path, "--out", tmp_path / "out", *words, code=2)
        assert done.exit_code == 2


def test_the_module_keeps_its_pictures_out_of_memory(tmp_path, monkeypatch):
    images = folder(tmp_path / "images", 24)
    alive, most = [], []
    keep = predicting._keep

    def counted(found, *a, **k):
        most.append(len(alive))
        return keep(found, *a, **k)

    import clipgraft_anomaly.predict_stream as stream

    read = stream._Read

    class Counted(read):
        def __init__(self, *a):
            super().__init__(*a)
            alive.append(1)

        def __del__(self):
            alive.pop()

    monkeypatch.setattr(stream, "_Read", Counted)
    monkeypatch.setattr(predicting, "_keep", counted)
    run(images, tmp_path / "out")
    assert len(most) == 24 and max(most) <= 2 + 2 + stream.READERS + 1
