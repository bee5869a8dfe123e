from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch.nn import functional as F

from clipgraft.cli import main
from clipgraft.data import open_source
from clipgraft.data.base import Sample
from clipgraft.data.folder import open_folder
from clipgraft.encoders import load
from clipgraft.encoders.base import Encoder
from clipgraft.errors import InputError
from clipgraft.evaluation.features import EncoderFeatures
from clipgraft.testing.tiny import tiny_clip
from clipgraft_embedding.embed import embed
from clipgraft_embedding.store import Embeddings

SMALL = {"batch_size": 4, "shard_size": 10, "workers": 0}


def command(*args: str | Path, code: int = 0) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([str(arg) for arg in args])
    assert stopped.value.code == code


def error_of(capsys: pytest.CaptureFixture[str], *args: str | Path) -> str:
    capsys.readouterr()
    command(*args, code=2)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def test_rows_are_the_encoders_and_the_file_is_plain_safetensors(
    encoder: Encoder, photos: Path, tmp_path: Path
) -> None:
    source = open_folder(photos)
    found = embed(encoder, source, out=tmp_path / "a.safetensors", **SMALL)  # type: ignore[arg-type]
    features = EncoderFeatures(encoder)
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        rows, about = file.get_tensor("embeddings"), json.loads(file.metadata()["clipgraft"])
        ids = json.loads(file.get_tensor("ids_json").numpy().tobytes())
    torch.testing.assert_close(rows, features.images(source), rtol=0, atol=1e-6)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(39))
    assert ids == [sample.id for sample in features.samples(source)] == Embeddings.open(found.path).ids
    assert (about["rows"], about["total"], about["skipped"], about["dim"]) == (39, 40, 1, 16)
    assert about["fingerprint"] == source.fingerprint and len(about["tower_sha256"]) == 64
    assert about["preprocess"]["size"] == [32, 32] and about["model"] == encoder.data.origin.uri
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"], "nothing is left beside it"
    mask = os.umask(0)
    os.umask(mask)
    assert found.path.stat().st_mode & 0o777 == 0o666 & ~mask


def test_parquet_has_labels_and_captions(encoder: Encoder, captioned: str, photos: Path, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    source: Any = open_source(captioned)
    embed(encoder, source, out=tmp_path / "a.parquet", **SMALL)  # type: ignore[arg-type]
    table = parquet.read_table(tmp_path / "a.parquet")
    assert table.column_names == ["id", "embedding", "label", "caption"]
    assert (
        str(table.schema.field("embedding").type).replace("element", "item").startswith("fixed_size_list<item: float")
    )
    rows = torch.tensor(table["embedding"].to_pylist())
    torch.testing.assert_close(rows, EncoderFeatures(encoder).images(source), rtol=0, atol=1e-6)
    assert table["caption"][1].as_py() == "a green square number 0" and table["label"][0].as_py() is None
    opened = Embeddings.open(tmp_path / "a.parquet")
    torch.testing.assert_close(opened.embeddings, rows, rtol=0, atol=0)
    assert opened.captions is not None and opened.captions[0] == "a red square number 0"
    nested = tmp_path / "nested"
    for name, k in (("cat", 1), ("dog", 2)):
        (nested / name).mkdir(parents=True)
        (nested / name / "x.jpg").write_bytes((photos / f"{k:03}.jpg").read_bytes())
    embed(encoder, open_folder(nested), out=tmp_path / "b.parquet", dtype="fp16", **SMALL)  # type: ignore[arg-type]
    table = parquet.read_table(tmp_path / "b.parquet")
    assert table["label"].to_pylist() == ["cat", "dog"]
    assert "halffloat" in str(table.schema.field("embedding").type)
    half = Embeddings.open(tmp_path / "b.parquet").embeddings
    torch.testing.assert_close(half, rows[[1, 2]], rtol=0, atol=1e-3)


def test_half_the_numbers_halve_the_file(encoder: Encoder, photos: Path, tmp_path: Path) -> None:
    source = open_folder(photos)
    full = embed(encoder, source, out=tmp_path / "a.safetensors", **SMALL)  # type: ignore[arg-type]
    half = embed(encoder, source, out=tmp_path / "b.safetensors", dtype="fp16", **SMALL)  # type: ignore[arg-type]
    rows = Embeddings.open(full.path).embeddings
    assert torch.equal(Embeddings.open(half.path).embeddings, rows.half())
    assert full.path.stat().st_size - half.path.stat().st_size == pytest.approx(39 * 16 * 2, abs=16)


def test_captions_are_rows_of_their_own(encoder: Encoder, captioned: str, tmp_path: Path) -> None:
    source: Any = open_source(captioned)
    found = embed(encoder, source, out=tmp_path / "t.safetensors", kind="texts", **SMALL)  # type: ignore[arg-type]
    opened = Embeddings.open(found.path)
    texts = [caption for name in source.ids for caption in source.captions[name]]
    assert len(opened) == 50 and opened.captions == texts
    assert opened.ids[:3] == ["images/000.jpg#0", "images/000.jpg#1", "images/001.jpg#0"]
    torch.testing.assert_close(opened.embeddings, EncoderFeatures(encoder).texts(texts), rtol=0, atol=1e-6)


@pytest.mark.parametrize("suffix", [".safetensors", ".parquet"])
def test_bytes_do_not_depend_on_workers(encoder: Encoder, photos: Path, tmp_path: Path, suffix: str) -> None:
    source = open_folder(photos)
    for workers in (0, 2):
        embed(encoder, source, out=tmp_path / f"{workers}{suffix}", batch_size=4, shard_size=10, workers=workers)
    assert (tmp_path / f"0{suffix}").read_bytes() == (tmp_path / f"2{suffix}").read_bytes()


KILLED = """
import os, signal, sys
from clipgraft.cli import main
from clipgraft_embedding.parts import Parts
write, made = Parts.write, []

def dying(self, part, rows, **rest):
    write(self, part, rows, **rest)
    made.append(part)
    if len(made) == 2:
        (self.folder / "part-000002.safetensors").write_bytes(b"a torn part")
        (self.folder / "part-000003.tmp").write_bytes(b"a draft")
        os.kill(os.getpid(), signal.SIGKILL)

Parts.write = dying
main(sys.argv[1:])
"""


def test_a_killed_command_continues_and_ends_with_the_same_bytes(
    model: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--data", f"folder:{photos}", "--batch-size", "4", "--shard-size", "10", "--workers", "0", "--json")
    whole, cut = tmp_path / "whole.safetensors", tmp_path / "cut.safetensors"
    command("embed", model, *options, "--out", whole)
    env = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    line = [sys.executable, "-c", textwrap.dedent(KILLED), "embed", model, *options, "--out", str(cut)]
    assert subprocess.run(line, env=env, capture_output=True, timeout=60, check=False).returncode == -9
    working = tmp_path / ".cut.safetensors.parts"
    assert not cut.exists() and len(list(working.glob("part-*.safetensors"))) == 3
    first = (working / "part-000000.safetensors").stat().st_mtime_ns
    # what differs is refused in one line that names it, and nothing is lost
    for change, named in ((("--batch-size", "5"), "--batch-size"), (("--dtype", "fp16"), "--dtype")):
        message = error_of(capsys, "embed", model, *options, *change, "--out", cut)
        assert f"{named} differs" in message and "--restart" in message
    assert (working / "part-000000.safetensors").stat().st_mtime_ns == first
    capsys.readouterr()
    command("embed", model, *options, "--out", cut)
    document = json.loads(capsys.readouterr().out)
    assert document["encoded"] == 20, "two of four parts were there"
    assert document["rows"] == 39 and document["skipped"] == 1
    assert cut.read_bytes() == whole.read_bytes()
    assert not working.exists()
    # once it is there, the command does nothing
    stamp = cut.stat().st_mtime_ns
    command("embed", model, *options, "--out", cut)
    assert cut.stat().st_mtime_ns == stamp


def test_another_model_or_changed_data_is_refused_until_restart(encoder: Encoder, photos: Path, tmp_path: Path) -> None:
    source, out = open_folder(photos), tmp_path / "a.safetensors"
    embed(encoder, source, out=out, **SMALL)  # type: ignore[arg-type]
    other = tiny_clip(seed=4).eval()
    with pytest.raises(InputError, match=r"the model's weights differs; use --restart"):
        embed(other, source, out=out, **SMALL)  # type: ignore[arg-type]
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("001.jpg", "002.jpg"):
        (copy / name).write_bytes((photos / name).read_bytes())
    with pytest.raises(InputError, match=r"the data differs"):
        embed(encoder, open_folder(copy), out=out, **SMALL)  # type: ignore[arg-type]
    embed(other, source, out=out, restart=True, **SMALL)  # type: ignore[arg-type]
    expected = EncoderFeatures(other).images(source)
    torch.testing.assert_close(Embeddings.open(out).embeddings, expected, rtol=0, atol=1e-6)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "copy"]


def test_an_interruption_keeps_the_parts(
    model: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from clipgraft_embedding.tower import Tower

    call, calls = Tower.__call__, []

    def stop(self: Tower, batch: Any) -> Any:
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return call(self, batch)

    monkeypatch.setattr(Tower, "__call__", stop)
    options = ("--data", f"folder:{photos}", "--batch-size", "4", "--shard-size", "10", "--workers", "0")
    command("embed", model, *options, "--out", tmp_path / "a.safetensors", code=130)
    assert "parts made in this call and kept: 1;" in capsys.readouterr().err
    monkeypatch.undo()
    command("embed", model, *options, "--out", tmp_path / "a.safetensors")
    assert "continuing: 1 of 4 parts" in capsys.readouterr().err


def _rank(model: str, photos: Path, out: Path) -> tuple[int, int, list[str]]:
    """One of several ranks: embed, then a failure that only rank 1 has. Returns what each saw."""
    import clipgraft_embedding.embed as module
    from clipgraft.distributed import rank
    from clipgraft.errors import ClipgraftError

    encoder, source = load(model).eval(), open_folder(photos)
    found = embed(encoder, source, out=out, batch_size=4, shard_size=6, workers=0)
    made, fill = list[str](), module._fill

    def failing(*args: Any, **rest: Any) -> None:
        if rank() == 1:
            raise ClipgraftError("disk full")
        fill(*args, **rest)

    module._fill = failing
    try:
        embed(encoder, source, out=out.with_name("b.safetensors"), batch_size=4, shard_size=6, workers=0)
    except ClipgraftError as error:
        made.append(str(error))
    module._fill = fill
    other = tiny_clip(seed=rank()).eval()
    try:
        embed(other, source, out=out.with_name("c.safetensors"), batch_size=4, shard_size=6, workers=0)
    except InputError as error:
        made.append(str(error))
    return found.about.rows, found.encoded, made


def test_ranks_share_the_parts_and_fail_together(encoder: Encoder, model: str, photos: Path, tmp_path: Path) -> None:
    from clipgraft.testing.ranks import run_ranks

    for rows, encoded, errors in run_ranks(_rank, 2, model, photos, tmp_path / "two.safetensors"):
        assert (rows, encoded) == (39, 40)
        assert errors[0] == "disk full" and "the processes hold different models" in errors[1]
    source, options = open_folder(photos), {"batch_size": 4, "shard_size": 6, "workers": 0}
    one, two = tmp_path / "b.safetensors", tmp_path / "two.safetensors"
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:  # continues from the parts that rank 0 made before rank 1 failed
        found = embed(load(model).eval(), source, out=one, **options)  # type: ignore[arg-type]
    finally:
        torch.set_num_threads(before)
    assert found.encoded == 18, "rank 1 had three parts of seven"
    assert one.read_bytes() == two.read_bytes()
    expected = EncoderFeatures(encoder).images(source)
    torch.testing.assert_close(Embeddings.open(two).embeddings, expected, rtol=0, atol=1e-6)


def _shared(model: str, photos: Path, out: Path) -> list[int]:
    """Rows that one of several ranks sees, in seven parts and in one, which leaves ranks without any."""
    encoder, source = load(model).eval(), open_folder(photos)
    sizes = {6: out / "seven.safetensors", 64: out / "one.safetensors"}
    options = {"batch_size": 4, "workers": 0}
    return [embed(encoder, source, out=path, shard_size=n, **options).about.rows for n, path in sizes.items()]  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.distributed
def test_three_processes_write_every_row_once(model: str, photos: Path, tmp_path: Path) -> None:
    from clipgraft.testing.ranks import run_ranks

    (tmp_path / "alone").mkdir()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert _shared(model, photos, tmp_path / "alone") == [39, 39]
    finally:
        torch.set_num_threads(before)
    assert run_ranks(_shared, 3, model, photos, tmp_path) == [[39, 39]] * 3
    for name in ("seven", "one"):
        file = f"{name}.safetensors"
        assert (tmp_path / file).read_bytes() == (tmp_path / "alone" / file).read_bytes()


@pytest.mark.slow
def test_torchrun_writes_the_same_bytes(
    model: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """torchrun with two gloo ranks and one thread each against one process with one thread."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "-m",
        "clipgraft",
    ]
    options = ["embed", model, "--data", f"folder:{photos}", "--batch-size", "4", "--shard-size", "6", "--workers", "0"]
    out = {name: tmp_path / f"{name}.safetensors" for name in ("one", "two")}
    done = subprocess.run(
        [*torchrun, *options, "--out", str(out["two"]), "--json"],
        env=env,
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    document = json.loads(done.stdout)
    assert (document["rows"], document["skipped"], document["encoded"]) == (39, 1, 40)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        command(*options, "--out", out["one"])
    finally:
        torch.set_num_threads(before)
    assert out["one"].read_bytes() == out["two"].read_bytes()


class Nothing:
    """Samples none of which can be read, and of minimal pairs' kind on demand."""

    name, fingerprint, classes, templates, attributes = "nothing", "v1", (), (), {}

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Sample:
        from clipgraft.data.base import BadSample

        raise BadSample(str(index), "gone")


def test_what_has_nothing_to_embed_is_an_error(encoder: Encoder, tmp_path: Path, photos: Path) -> None:
    with pytest.raises(InputError, match=r"nothing has nothing to embed: 3 of 3 samples can't be read"):
        embed(encoder, Nothing(), out=tmp_path / "a.safetensors")
    pairs = Nothing()
    pairs.patterns = ("quantity",)  # type: ignore[attr-defined]
    with pytest.raises(InputError, match="minimal pairs"):
        embed(encoder, pairs, out=tmp_path / "b.safetensors")
    with pytest.raises(InputError, match="nothing to embed"):
        embed(encoder, open_folder(photos), out=tmp_path / "c.safetensors", kind="texts")


def test_wrong_files_are_refused(
    model: str, encoder: Encoder, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ("--data", f"folder:{photos}")
    assert "let its name end in" in error_of(capsys, "embed", model, *data, "--out", tmp_path / "a.npy")
    foreign = tmp_path / "a.safetensors"
    foreign.write_bytes(b"not ours")
    message = error_of(capsys, "embed", model, *data, "--out", foreign, "--restart")
    assert "was not written by clipgraft embed" in message and foreign.read_bytes() == b"not ours"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors"]
    encoder_without_text = tiny_clip()
    encoder_without_text.text, encoder_without_text.data.tokenizer = None, None
    with pytest.raises(InputError, match="has no text tower"):
        embed(encoder_without_text, open_folder(photos), out=tmp_path / "t.safetensors", kind="texts")
    assert Path(model).is_dir()


def test_a_second_process_waits_outside(encoder: Encoder, photos: Path, tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    from clipgraft_embedding.parts import Parts

    out = tmp_path / "a.safetensors"
    with Parts(out), pytest.raises(InputError, match="another process is filling"):
        embed(encoder, open_folder(photos), out=out, **SMALL)  # type: ignore[arg-type]


def test_chosen_precision_is_reported(
    model: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], encoder: Encoder
) -> None:
    options = ("--data", f"folder:{photos}", "--out", tmp_path / "a.safetensors", "--json")
    command("embed", model, *options, "--precision", "bf16")
    shown = capsys.readouterr()
    document = json.loads(shown.out)
    assert document["precision"] == "bf16" and 0 < document["max_cosine_error"] < 1e-3
    assert "max cosine error of bf16 to fp32" in shown.err
    rows = Embeddings.open(tmp_path / "a.safetensors").embeddings
    exact = EncoderFeatures(encoder).images(open_folder(photos))
    assert 1e-9 < float((1 - F.cosine_similarity(rows.double(), exact.double())).max()) < 1e-3
    command("embed", model, *options, "--precision", "auto")  # content with what is there
    assert json.loads(capsys.readouterr().out)["encoded"] == 0
    assert "--precision differs" in error_of(capsys, "embed", model, *options)
