"""The engine: what every merge shares, whatever the method (facts common to all of section 0), and what it refuses."""

import json
import os
import resource
import signal
import stat
import struct
import subprocess
import sys
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from clipgraft.checkpoint import write_export
from clipgraft.encoders import load
from clipgraft.encoders.huggingface import write_huggingface
from clipgraft.errors import ClipgraftError, InputError
from clipgraft.testing.tiny import tiny_clip
from clipgraft_merging.soup.uniform import UniformSoup
from clipgraft_merging.task_arithmetic.arithmetic import TaskArithmetic
from clipgraft_merging.ties.merger import Ties
from clipgraft_merging.weights.checkpoints import Checkpoint
from clipgraft_merging.weights.engine import merge_state, merge_to, open_inputs
from clipgraft_merging.weights.inputs import Inputs
from clipgraft_merging.weights.stores import MemoryStore
from clipgraft_merging.weights.writer import SafetensorsWriter

torch.set_num_threads(1)
WEIGHTS = "open_clip_model.safetensors"


def checkpoint(state, ref="model"):
    """Tensors in memory as a checkpoint, without a configuration."""
    return Checkpoint(ref, MemoryStore(state), "own", None, None, ref)


def models(count, tmp_path, **how):
    """Exports of random CLIPs."""
    paths = [tmp_path / f"m{i}" for i in range(count)]
    for seed, path in enumerate(paths):
        write_export(tiny_clip(seed, **how), path)
    return paths


def merged(inputs, merger):
    return dict(merge_state(inputs, merger))


# -- the result ------------------------------------------------------------------------------------------------------


def test_the_result_is_an_ordinary_export_that_open_clip_opens_alone(tmp_path):
    a, b = models(2, tmp_path)
    out = merge_to(tmp_path / "out", open_inputs([a, b], base=a), TaskArithmetic(scales=(0.5,)))
    ours, (state_a, state_b) = load(str(out)), (load_file(p / WEIGHTS) for p in (a, b))
    stock = open_clip.create_model_and_transforms(f"local-dir:{out}")[0].state_dict()
    state = load_file(out / WEIGHTS)
    assert state.keys() == state_a.keys() == stock.keys()
    for key, value in state.items():
        torch.testing.assert_close(value, (state_a[key] + state_b[key]) / 2)
        assert torch.equal(stock[key], value)
    assert ours.tokenizer(["a red circle"]).shape == (1, 16)
    pixels = torch.rand(2, 3, 32, 32)
    assert torch.isfinite(ours(pixels)[0].pooled).all()
    assert json.loads((out / "clipgraft.json").read_text())["level"] == "L0"


def test_provenance_names_method_settings_and_the_hash_of_every_input_in_order(tmp_path):
    a, b, c = models(3, tmp_path)
    out = merge_to(tmp_path / "out", open_inputs([c, b], base=a), TaskArithmetic(scales=(0.1, 0.2)))
    (record,) = json.loads((out / "clipgraft.json").read_text())["lineage"]
    digests = [json.loads((p / "clipgraft.json").read_text())["files"][WEIGHTS]["sha256"] for p in (a, c, b)]
    assert record["merge"] == "merging/task-arithmetic" and record["settings"] == {"scales": [0.1, 0.2]}
    assert record["base"] == str(a) and record["base_sha256"] == digests[0]
    assert record["models"] == [{"uri": str(c), "sha256": digests[1]}, {"uri": str(b), "sha256": digests[2]}]
    with safe_open(out / WEIGHTS, framework="pt") as file:
        assert json.loads(file.metadata()["clipgraft.merge"]) == record
    again = merge_to(tmp_path / "again", open_inputs([out, a]), UniformSoup())
    assert len(json.loads((again / "clipgraft.json").read_text())["lineage"]) == 2
    assert load(str(again)).data.origin.lineage[0] == record


def test_who_may_read_the_result_is_up_to_the_umask(tmp_path):
    a, b = models(2, tmp_path)
    old = os.umask(0o027)
    try:
        out = merge_to(tmp_path / "out", open_inputs([a, b]), UniformSoup())
    finally:
        os.umask(old)
    assert stat.S_IMODE((out / WEIGHTS).stat().st_mode) == 0o640


def test_layouts_mix_in_one_merge_and_the_first_ones_goes_on(tmp_path):
    plain, custom = tiny_clip(1), tiny_clip(2, kind="custom-text")
    write_export(plain, tmp_path / "plain")
    write_export(custom, tmp_path / "custom")
    write_export(tiny_clip(2), tmp_path / "plain2")
    write_huggingface(custom, tmp_path / "hf")
    expected = merged(open_inputs([tmp_path / "plain", tmp_path / "plain2"]), UniformSoup())
    for second in ("custom", "hf"):
        for order in (["plain", second], [second, "plain"]):
            inputs = open_inputs([tmp_path / name for name in order])
            found = merged(inputs, UniformSoup())
            assert all(torch.equal(found[key], expected[key]) for key in expected) and found.keys() == expected.keys()
            state = load(str(merge_to(tmp_path / "out", inputs, UniformSoup()))).state_dict()
            assert torch.equal(state["text.tower.ln_final.weight"], expected["text.ln_final.weight"])


@pytest.mark.parametrize("merger", [UniformSoup(), TaskArithmetic(), Ties(density=0.3)], ids=lambda m: m.name)
def test_the_result_does_not_depend_on_the_layout_of_shards(merger, tmp_path):
    paths = []
    for seed in range(3):
        write_huggingface(tiny_clip(seed), tmp_path / f"m{seed}")
        state = load_file(tmp_path / f"m{seed}" / "model.safetensors")
        folder = tmp_path / f"s{seed}"
        folder.mkdir()
        names = sorted(state)
        for file in (tmp_path / f"m{seed}").iterdir():
            if file.suffix != ".safetensors":
                (folder / file.name).write_bytes(file.read_bytes())
        places = {name: f"model-{1 + (i * (seed + 1)) % 5}.safetensors" for i, name in enumerate(names)}
        for file in set(places.values()):
            save_file({n: state[n] for n in names if places[n] == file}, folder / file, {"format": "pt"})
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
        paths.append((tmp_path / f"m{seed}", folder))
    whole, parts = ([pair[i] for pair in paths] for i in range(2))
    first = merged(open_inputs(whole[1:], base=whole[0]), merger)
    second = merged(open_inputs(parts[1:], base=parts[0]), merger)
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_copies_of_one_model_give_it_back_bit_for_bit(dtype):
    state = {f"visual.x{i}.weight": torch.randn(7, 5).to(dtype) for i in range(3)}
    for count in (1, 2, 3, 7, 50):
        found = merged(Inputs(None, tuple(checkpoint(state) for _ in range(count))), UniformSoup())
        assert all(torch.equal(found[key], state[key]) and found[key].dtype is dtype for key in state)


def test_many_halves_are_summed_wide_and_cast_once():
    states = [
        {"visual.w.weight": torch.randn(4000, generator=torch.Generator().manual_seed(i)).half()} for i in range(50)
    ]
    found = merged(Inputs(None, tuple(checkpoint(s) for s in states)), UniformSoup())["visual.w.weight"]
    exact = torch.stack([s["visual.w.weight"].double() for s in states]).mean(0)
    assert found.dtype is torch.float16 and torch.equal(found, exact.half())
    running = states[0]["visual.w.weight"].clone()
    for n, s in enumerate(states[1:], 1):
        running = running * (n / (n + 1)) + s["visual.w.weight"] / (n + 1)
    # a running mean in fp16 drifts by several times the rounding of one cast
    assert (running.double() - exact).abs().max() > 3 * (found.double() - exact).abs().max()


@pytest.mark.parametrize("merger", [UniformSoup(), TaskArithmetic(), Ties(density=0.3)], ids=lambda m: m.name)
def test_the_order_of_models_does_not_matter_where_the_maths_says_so(merger):
    states = [{"visual.a.weight": torch.randn(40, 3), "visual.b.bias": torch.randn(9)} for _ in range(5)]
    opened = [checkpoint(s) for s in states]
    first = merged(Inputs(opened[0], tuple(opened[1:])), merger)
    second = merged(Inputs(opened[0], tuple(opened[:0:-1])), merger)
    for key in first:
        torch.testing.assert_close(first[key], second[key], rtol=0, atol=1e-6)


# -- what is copied, not averaged ------------------------------------------------------------------------------------


def test_integers_and_flags_are_copied_with_their_dtype_and_must_agree():
    own = {
        "visual.w.weight": torch.randn(3, 2),
        "visual.bn.num_batches_tracked": torch.tensor(7),
        "mask": torch.ones(2) > 0,
    }
    found = merged(Inputs(None, (checkpoint(own), checkpoint(own))), UniformSoup())
    assert found["visual.bn.num_batches_tracked"].dtype is torch.int64 and found["mask"].dtype is torch.bool
    assert found["visual.bn.num_batches_tracked"] == 7
    other = {**own, "visual.bn.num_batches_tracked": torch.tensor(8)}
    with pytest.raises(InputError, match=r"a and b differ in visual\.bn\.num_batches_tracked"):
        merged(Inputs(None, (checkpoint(own, "a"), checkpoint(other, "b"))), UniformSoup())


def test_position_ids_that_one_file_stores_and_another_does_not_are_no_difference(tmp_path):
    write_huggingface(tiny_clip(0), tmp_path / "a")
    write_huggingface(tiny_clip(0), tmp_path / "b")
    file = tmp_path / "a" / "model.safetensors"
    save_file({**load_file(file), "text_model.embeddings.position_ids": torch.arange(16)[None]}, file, {"format": "pt"})
    found = merged(open_inputs([tmp_path / "a", tmp_path / "b"]), UniformSoup())
    assert not any("position_ids" in key for key in found)


def test_a_tied_tensor_is_merged_once_and_both_names_hold_the_result(tmp_path):
    seen = []

    class Counting(UniformSoup):
        def merge(self, key, inputs):
            seen.append(key)
            return super().merge(key, inputs)

    for i in range(2):
        state = {"visual.a.weight": torch.full((2, 2), float(i)), "visual.z.weight": torch.ones(1)}
        save_file(state, tmp_path / f"{i}.safetensors", {"visual.b.weight": "visual.a.weight"})
    inputs, merger = open_inputs([tmp_path / "0.safetensors", tmp_path / "1.safetensors"]), Counting()
    found = merged(inputs, merger)
    assert inputs.aliases == {"visual.b.weight": "visual.a.weight"}
    assert torch.equal(found["visual.a.weight"], torch.full((2, 2), 0.5))
    assert torch.equal(found["visual.b.weight"], found["visual.a.weight"])
    assert seen == ["visual.a.weight", "visual.z.weight"]


def test_a_tensor_tied_in_one_model_only_is_merged_under_each_name(tmp_path):
    tied, loose = tmp_path / "tied.safetensors", tmp_path / "loose.safetensors"
    save_file({"visual.a.weight": torch.zeros(2)}, tied, {"visual.b.weight": "visual.a.weight"})
    save_file({"visual.a.weight": torch.ones(2), "visual.b.weight": torch.full((2,), 3.0)}, loose)
    found = merged(open_inputs([tied, loose]), UniformSoup())
    assert found["visual.a.weight"][0] == 0.5 and found["visual.b.weight"][0] == 1.5


# -- what is refused -------------------------------------------------------------------------------------------------


def test_different_tensors_are_refused_with_both_sides_of_the_difference():
    a = checkpoint({"visual.x.weight": torch.ones(2), "visual.only_a.weight": torch.ones(1)}, "first")
    b = checkpoint({"visual.x.weight": torch.ones(2), "visual.only_b.weight": torch.ones(1)}, "second")
    with pytest.raises(InputError) as told:
        Inputs(None, (a, b))
    assert "only first has visual.only_a.weight" in str(told.value)
    assert "only second has visual.only_b.weight" in str(told.value) and "\n" not in str(told.value)


def test_different_shapes_and_types_are_refused_by_name():
    a = checkpoint({"visual.x.weight": torch.ones(2)}, "a")
    with pytest.raises(InputError, match=r"differ in shape: visual\.x\.weight is \(2,\) and \(3,\)"):
        Inputs(None, (a, checkpoint({"visual.x.weight": torch.ones(3)}, "b")))
    with pytest.raises(InputError, match=r"differ in type: visual\.x\.weight is torch.float32 and torch.float16"):
        Inputs(None, (a, checkpoint({"visual.x.weight": torch.ones(2).half()}, "b")))
    with pytest.raises(InputError, match="name at least one"):
        Inputs(None, ())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_damaged_number_is_refused_with_its_tensor_and_file(bad, tmp_path):
    a, b = models(2, tmp_path)
    (b / "clipgraft.json").unlink()
    state = load_file(b / WEIGHTS)
    state["visual.ln_post.bias"][3] = bad
    save_file(state, b / WEIGHTS, {"format": "pt"})
    inputs = open_inputs([a, b])
    with pytest.raises(InputError, match=rf"{b}/{WEIGHTS}: the tensor visual\.ln_post\.bias holds 1 numbers"):
        merge_to(tmp_path / "out", inputs, UniformSoup())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m0", "m1"]
    with pytest.raises(InputError, match=r"visual\.ln_post\.bias"):
        inputs.scan()


def test_large_finite_numbers_whose_sum_overflows_are_no_damage():
    state = {"visual.w.weight": torch.full((10,), 3e38), "visual.h.weight": torch.full((1000,), 6e4).half()}
    merged(Inputs(None, (checkpoint(state), checkpoint(state))), UniformSoup())


def test_a_result_that_its_type_cannot_hold_is_refused():
    base, high = ({"visual.h.weight": torch.full((4,), x).half()} for x in (0.0, 6e4))
    inputs = Inputs(checkpoint(base), (checkpoint(high), checkpoint(high)))
    with pytest.raises(ClipgraftError, match=r"visual\.h\.weight is not finite in torch\.float16"):
        merged(inputs, TaskArithmetic(scales=(1.0,)))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"preprocess_cfg": {"mean": [0.4, 0.5, 0.5]}}, "differ in mean"),
        ({"preprocess_cfg": {"std": [0.4, 0.5, 0.5]}}, "differ in std"),
        ({"model_cfg": {"quick_gelu": True}}, "differ in quick_gelu: False and True"),
    ],
)
def test_models_that_see_pictures_differently_are_refused(change, told, tmp_path):
    a, b = models(2, tmp_path)
    (b / "clipgraft.json").unlink()
    config = json.loads((b / "open_clip_config.json").read_text())
    for part, values in change.items():
        config[part] |= values
    (b / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=told):
        open_inputs([a, b])


def test_another_number_of_heads_is_refused_although_every_shape_agrees(tmp_path):
    a, b = models(2, tmp_path)
    (b / "clipgraft.json").unlink()
    config = json.loads((b / "open_clip_config.json").read_text())
    config["model_cfg"]["vision_cfg"]["head_width"] = 8
    (b / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="width of a vision head: 16 and 8"):
        open_inputs([a, b])


def test_another_image_size_is_refused_as_another_shape(tmp_path):
    write_export(tiny_clip(0), tmp_path / "a")
    write_export(tiny_clip(0, image_size=48), tmp_path / "b")
    with pytest.raises(InputError, match=r"visual\.positional_embedding is \(17, 32\) and \(37, 32\)"):
        open_inputs([tmp_path / "a", tmp_path / "b"])


def test_a_result_is_never_written_over_an_input(tmp_path):
    a, b = models(2, tmp_path)
    before = (b / WEIGHTS).read_bytes()
    (tmp_path / "link").symlink_to(b)
    for out in (b, tmp_path / "link", tmp_path):
        with pytest.raises(InputError, match="choose another --out"):
            merge_to(out, open_inputs([a, b]), UniformSoup())
    with pytest.raises(InputError, match="choose another --out"):
        merge_to(b, open_inputs([a, b / WEIGHTS]), UniformSoup())
    assert (b / WEIGHTS).read_bytes() == before


def test_a_folder_of_something_else_is_not_replaced(tmp_path):
    a, b = models(2, tmp_path)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"x")
    with pytest.raises(InputError, match="is not replaced"):
        merge_to(tmp_path / "photos", open_inputs([a, b]), UniformSoup())
    assert (tmp_path / "photos" / "cat.jpg").exists()


def test_weights_files_alone_make_no_model(tmp_path):
    a, b = models(2, tmp_path)
    files = [p / WEIGHTS for p in (a, b)]
    with pytest.raises(InputError, match="without a configuration"):
        merge_to(tmp_path / "out", open_inputs(files), UniformSoup())
    out = merge_to(tmp_path / "out", open_inputs(files, base=a), UniformSoup())
    assert load(str(out)).data.model_config == load(str(a)).data.model_config


# -- whole or absent -------------------------------------------------------------------------------------------------


def test_the_writer_makes_a_file_that_safetensors_reads_aligned_and_in_order(tmp_path):
    tensors = {
        "b.half": torch.randn(3, 5).half(), "a.float": torch.randn(2, 3), "scalar": torch.tensor(2.5),
        "empty": torch.ones(0, 4),
        "flag": torch.tensor([True, False, True]), "long": torch.arange(3), "brain": torch.randn(4).bfloat16(),
        "strided": torch.randn(4, 6).T, "double": torch.randn(2).double(),
    }  # fmt: skip
    path = tmp_path / "t.safetensors"
    with SafetensorsWriter(path, {k: (tuple(v.shape), v.dtype) for k, v in tensors.items()}, {"note": "ü"}) as writer:
        for key in reversed(list(tensors)):
            writer.write(key, torch.zeros_like(tensors[key]))
            writer.write(key, tensors[key])
    found = load_file(path)
    assert found.keys() == tensors.keys() and all(torch.equal(found[k], v) for k, v in tensors.items())
    assert {k: v.dtype for k, v in found.items()} == {k: v.dtype for k, v in tensors.items()}
    (length,) = struct.unpack("<Q", path.read_bytes()[:8])
    assert length % 8 == 0
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt", "note": "ü"}
    assert [p.name for p in tmp_path.iterdir()] == ["t.safetensors"]


def test_the_writer_refuses_what_the_header_does_not_say_and_leaves_the_old_file(tmp_path):
    path = tmp_path / "t.safetensors"
    path.write_bytes(b"old")
    entries = {"a": ((2,), torch.float32), "b": ((1,), torch.float32)}
    with pytest.raises(ValueError, match="b was never written"), SafetensorsWriter(path, entries) as writer:
        writer.write("a", torch.ones(2))
    with pytest.raises(ValueError, match="instead of"), SafetensorsWriter(path, entries) as writer:
        writer.write("a", torch.ones(2).half())
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["t.safetensors"]


def test_a_disk_that_is_full_in_the_middle_leaves_the_old_export(tmp_path):
    a, b = models(2, tmp_path)
    out = merge_to(tmp_path / "out", open_inputs([a, b]), UniformSoup())
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # the weights are 260 kB
    try:
        with pytest.raises(ClipgraftError, match=r"could not be written: .*; the old one, if any, is unchanged"):
            merge_to(out, open_inputs([b, a, a]), UniformSoup())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m0", "m1", "out"]


def test_a_disk_without_room_is_found_before_anything_is_written(tmp_path, monkeypatch):
    a, b = models(2, tmp_path)
    usage = type("Usage", (), {"free": 1000})()
    monkeypatch.setattr("clipgraft_merging.weights.writer.shutil.disk_usage", lambda path: usage)
    with pytest.raises(ClipgraftError, match="doesn't fit on its disk"):
        merge_to(tmp_path / "out", open_inputs([a, b]), UniformSoup())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m0", "m1"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_merge_that_is_interrupted_leaves_the_old_export(error, tmp_path):
    a, b = models(2, tmp_path)
    out = merge_to(tmp_path / "out", open_inputs([a, b]), UniformSoup())
    before = {p.name: p.read_bytes() for p in out.iterdir()}

    class Stops(UniformSoup):
        count = 0

        def merge(self, key, inputs):
            self.count += 1
            if self.count == 20:
                raise error
            return super().merge(key, inputs)

    with pytest.raises(error):
        merge_to(out, open_inputs([a, a]), Stops())
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m0", "m1", "out"]


SLOW_MERGE = """
import sys, time
from clipgraft_merging.soup.uniform import UniformSoup
from clipgraft_merging.weights.engine import merge_to, open_inputs
class Slow(UniformSoup):
    def merge(self, key, inputs):
        print(key, flush=True)
        time.sleep(0.02)
        return super().merge(key, inputs)
merge_to(sys.argv[1], open_inputs(sys.argv[2:]), Slow())
"""


@pytest.mark.slow
def test_a_merge_that_is_killed_leaves_the_old_export_and_the_next_one_cleans_up(tmp_path):
    a, b = models(2, tmp_path)
    out = merge_to(tmp_path / "out", open_inputs([a, b]), UniformSoup())
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    for tensors in (1, 30, 61):
        command = [sys.executable, "-c", SLOW_MERGE, str(out), str(a), str(a)]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert child.stdout is not None
        for _ in range(tensors):
            assert child.stdout.readline()
        child.send_signal(signal.SIGKILL)
        child.wait()
        assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    merge_to(out, open_inputs([a, a]), UniformSoup())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m0", "m1", "out"]
    assert torch.equal(load_file(out / WEIGHTS)["visual.proj"], load_file(a / WEIGHTS)["visual.proj"])


# -- memory ----------------------------------------------------------------------------------------------------------

PEAK = """
import sys, threading
from pathlib import Path
from clipgraft_merging.weights.engine import merge_to, open_inputs
from clipgraft_merging.soup.uniform import UniformSoup
import torch, transformers, open_clip
torch.set_num_threads(1)
peak, stop = 0, threading.Event()
def look():
    global peak
    while not stop.wait(0.001):
        text = Path("/proc/self/status").read_text()
        peak = max(peak, int(text.split("RssAnon:")[1].split()[0]))
watch = threading.Thread(target=look, daemon=True)
inputs = open_inputs(sys.argv[2:])
watch.start()
merge_to(sys.argv[1], inputs, UniformSoup())
stop.set()
watch.join()
print(peak)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's account of memory")
def test_peak_memory_at_8_models_is_within_5_percent_of_2(tmp_path):
    write_export(tiny_clip(0, width=512, depth=4, vocab=8192), tmp_path / "m")
    assert (tmp_path / "m" / WEIGHTS).stat().st_size > 100e6
    peaks = []
    for count in (2, 8):
        command = [sys.executable, "-c", PEAK, str(tmp_path / "out"), *[str(tmp_path / "m")] * count]
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        peaks.append(int(done.stdout.split()[-1]))
    assert abs(peaks[1] - peaks[0]) < 0.05 * peaks[0], peaks


@pytest.mark.parametrize("piece", [1, 7, 64])
def test_the_size_of_pieces_changes_nothing(piece, tmp_path, monkeypatch):
    """Pieces end within fused projections, whose parts are three tensors in Hugging Face's layout."""
    for seed in range(3):
        write_huggingface(tiny_clip(seed, width=8, depth=1, embed=4), tmp_path / f"{seed}")
    inputs = open_inputs([tmp_path / "1", tmp_path / "2"], base=tmp_path / "0")
    whole = [merged(inputs, merger) for merger in (UniformSoup(), TaskArithmetic(), Ties(density=0.4))]
    monkeypatch.setattr("clipgraft_merging.weights.linear.PIECE", piece)
    for expected, merger in zip(whole, (UniformSoup(), TaskArithmetic(), Ties(density=0.4)), strict=True):
        found = merged(inputs, merger)
        assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_a_file_that_is_cut_short_during_the_merge_is_named(tmp_path):
    a, b = models(2, tmp_path)
    inputs = open_inputs([a, b])
    (b / WEIGHTS).write_bytes((b / WEIGHTS).read_bytes()[:9000])
    with pytest.raises(InputError, match=rf"{b}/{WEIGHTS} ends within .*: it was cut short"):
        merge_to(tmp_path / "out", inputs, UniformSoup())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m0", "m1"]
