"""Each promise of SECURITY.md has its test here or in the file that SECURITY.md names beside it.

The attacks are real: pickles whose reducer would create the canary file, folders that ask transformers to run their
code, archives that leave their folder. The arena fails a test when the canary is there, when anything was written
outside of the output folder, and when a process was started.
"""

from __future__ import annotations

import ast
import io
import json
import os
import pickle
import re
import shutil
import struct
import tarfile
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from clipgraft.checkpoint import write_export
from clipgraft.encoders import load
from clipgraft.encoders.openclip import WEIGHT_FILES, read_weights
from clipgraft.testing.tiny import tiny_clip

pytestmark = pytest.mark.timeout(1200)
ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted([*ROOT.glob("core/src/**/*.py"), *ROOT.glob("plugins/*/src/**/*.py")])


class Touch:
    """Creates the canary when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.canary), "w")


def poisons(canary: Path) -> dict[str, bytes]:
    """Files that run code in a reader that trusts them, by how they are made."""
    touch = Touch(canary)
    zipped, inside = io.BytesIO(), io.BytesIO()
    torch.save({"logit_scale": torch.ones(()), "x": touch}, zipped)
    torch.save({"state_dict": touch}, inside, _use_new_zipfile_serialization=False)
    return {
        "a pickle": pickle.dumps(touch),
        "torch's archive": zipped.getvalue(),
        "torch's old format": inside.getvalue(),
    }


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of a tiny CLIP."""
    return write_export(tiny_clip(), tmp_path_factory.mktemp("models") / "clip")


@pytest.fixture
def work(arena: Any, clip: Path) -> Path:
    """An empty folder with a table of two pictures and a good model."""
    for place in (arena.work, arena.out):
        shutil.rmtree(place)
        place.mkdir()
    (arena.work / "pictures").mkdir()
    for name, colour in (("a", "red"), ("b", "blue")):
        Image.new("RGB", (20, 20), colour).save(arena.work / "pictures" / f"{name}.png")
    rows = "image,caption,label\npictures/a.png,red,0\npictures/b.png,blue,1\n"
    (arena.work / "pairs.csv").write_text(rows, "utf-8")
    (arena.work / "labels.txt").write_text("red\nblue\n", "utf-8")
    shutil.copytree(clip, arena.work / "good")
    return Path(arena.work)


def plain(source: Path, target: Path) -> Path:
    """The same model as open_clip's folder, without our manifest."""
    shutil.copytree(source, target)
    (target / "clipgraft.json").unlink()
    return target


# -- weights -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["a pickle", "torch's archive", "torch's old format"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth", ".bin", ".pkl", ""])
def test_a_pickle_never_runs_whatever_its_name(arena, work, kind, suffix):
    file = work / f"weights{suffix}"
    file.write_bytes(poisons(arena.canary)[kind])
    _, said = arena.call(lambda: read_weights(file))
    assert "not loaded" in said or "is no weights file" in said


def test_the_poison_is_one(tmp_path):
    """Without this the tests around it could pass with harmless files."""
    canary = tmp_path / "canary"
    for kind, content in poisons(canary).items():
        file = io.BytesIO(content)
        pickle.load(file) if kind == "a pickle" else torch.load(file, weights_only=False)
        assert canary.exists()
        canary.unlink()


COMMANDS = [
    "eval {bad} --on zero-shot --data csv:pairs.csv",
    "export {bad} --out {out}/e",
    "export {bad} --out {out}/e --format open_clip",
    "export {bad} --out {out}/e --format huggingface",
    "run finetune --set model.from={bad} --set data.from=csv:pairs.csv --set train.steps=1 --set train.batch_size=2 "
    "--out {out}/r",
    "compare good {bad} --on zero-shot --data csv:pairs.csv",
    "embed {bad} --data csv:pairs.csv --out {out}/e.safetensors",
    "search {bad}/open_clip_model.safetensors --query red",
    "classify {bad} --images pictures --labels red,blue",
    "data check csv:pairs.csv --model {bad}",
    "merging soup good {bad} --out {out}/m",
    "merging wise-ft {bad} --base good --out {out}/m",
    "merging wise-ft good --base {bad} --out {out}/m",
    "merging task-arithmetic {bad} --base good --out {out}/m",
    "merging ties {bad} --base good --out {out}/m",
    "merging opcm good {bad} --base good --out {out}/m",
    "merging path good {bad} --out {out}/m --data csv:pairs.csv",
    "merging greedy good {bad} --out {out}/m --on zero-shot --data csv:pairs.csv",
    "merging segment {bad} --out {out}/m --images pictures --classes labels.txt",
    "merging fuse good --second {bad} --out {out}/m",
    "merging collapse {bad} --out {out}/m",
    "anomaly predict {bad} --images pictures --out {out}/a --class-name thing",
    "anomaly reject {bad} --images pictures --classes red",
    "anomaly import {bad}/weights.pth --out {out}/a --model good",
    "llm import-long-clip {bad}/weights.pth --out {out}/l --arch ViT-B-16",
    "llm cache {bad} --data csv:pairs.csv --out {out}/c",
    "llm reinforce-data csv:pairs.csv --teacher {bad} --out {out}/r",
    "video classify {bad} --videos pictures --labels red,blue",
    "video search {bad} --videos pictures --query red",
]


@pytest.mark.parametrize("command", COMMANDS, ids=[" ".join(c.split()[:2]) for c in COMMANDS])
@pytest.mark.parametrize("how", ["named safetensors", "as a pickle", "in an export"])
def test_no_command_runs_a_poisoned_checkpoint(arena, work, clip, command, how):
    bad = work / "bad"
    if how == "in an export":  # with the right hashes, as an attacker would write them
        shutil.copytree(clip, bad)
    else:
        plain(clip, bad)
    for name in WEIGHT_FILES:
        (bad / name).unlink(missing_ok=True)
    named = "open_clip_pytorch_model.bin" if how == "as a pickle" else "open_clip_model.safetensors"
    content = poisons(arena.canary)["torch's archive"]
    for name in (named, "weights.pth"):
        (bad / name).write_bytes(content)
    if how == "in an export":
        import hashlib

        manifest = json.loads((bad / "clipgraft.json").read_text("utf-8"))
        entry = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
        manifest["files"]["open_clip_model.safetensors"] = entry
        (bad / "clipgraft.json").write_text(json.dumps(manifest), "utf-8")
    words = [word.format(bad="bad", out=arena.out) for word in command.split()]
    if words[0] not in known_commands():
        pytest.skip(f"the plugin of {words[0]} is not here")
    outcome = arena.command(*words)
    assert outcome.code in (1, 2), f"{command}: nothing was refused\n{outcome.out}\n{outcome.err}"


def known_commands() -> set[str]:
    from clipgraft.registry import current

    return {spec.name for spec in current().commands()}


def header(content: bytes, body: bytes = b"") -> bytes:
    return struct.pack("<Q", len(content)) + content + body


TENSOR = '{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}'
SAFETENSORS = {
    "empty": b"",
    "a header of 2^60 bytes": struct.pack("<Q", 2**60) + b"{}",
    "a header longer than the file": struct.pack("<Q", 5000) + b"{}",
    "no JSON": header(b"{" * 50),
    "deep JSON": header(b'{"a":' * 50_000),
    "overlapping": header(f'{TENSOR}, "b": {TENSOR[6:]}}}'.encode(), b"\0" * 8),
    "beyond the end": header(b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 800]}}', b"\0" * 8),
    "a hole": header(b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}}', b"\0" * 16),
    "the wrong size": header(b'{"a": {"dtype": "F32", "shape": [2000000], "data_offsets": [0, 8]}}', b"\0" * 8),
    "a size that overflows": header(
        b'{"a": {"dtype": "F32", "shape": [4294967296, 4294967296, 4], "data_offsets": [0, 8]}}', b"\0" * 8
    ),
    "a negative shape": header(b'{"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}', b"\0" * 8),
    "an unknown type": header(b'{"a": {"dtype": "X9", "shape": [2], "data_offsets": [0, 8]}}', b"\0" * 8),
    "trailing bytes": header(f"{TENSOR}}}".encode(), b"\0" * 80),
    "a name twice": header(f'{TENSOR}, "a": {TENSOR[6:]}}}'.encode(), b"\0" * 16),
    "metadata that is none": header(b'{"__metadata__": {"a": [1]}}'),
}


@pytest.mark.parametrize("name", SAFETENSORS)
def test_a_malformed_safetensors_file_is_refused(arena, work, name):
    file = work / "x.safetensors"
    file.write_bytes(SAFETENSORS[name])
    _, said = arena.call(lambda: read_weights(file))
    assert "was not loaded" in said


def test_a_compressed_checkpoint_is_refused_before_it_swells(arena, work):
    """A quarter of a gigabyte of zeros in a small file; torch never compresses."""
    file = work / "bomb.pt"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("archive/data.pkl", "w") as data:
        for _ in range(16):
            data.write(b"\0" * 2**24)
    _, said = arena.call(lambda: read_weights(file))
    assert "is compressed" in said


def test_shards_of_weights_lie_beside_their_index(arena, work, clip):
    bad = plain(clip, work / "bad")
    for place in ("../good/open_clip_model.safetensors", "/etc/passwd", "a\0b.safetensors", 7):
        (bad / "open_clip_model.safetensors").unlink(missing_ok=True)
        (bad / "x.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": place}}), "utf-8")
        _, said = arena.call(lambda: load(str(bad)))
        assert "shards must be .safetensors files beside it" in said or place == "a\0b.safetensors"


# -- code in model folders -----------------------------------------------------------------------------------------


def test_a_model_folder_can_not_switch_on_its_own_code(arena, work, clip):
    """open_clip hands ``tokenizer_kwargs`` to transformers, whose ``trust_remote_code`` runs the folder's Python."""
    bad = plain(clip, work / "bad")
    (bad / "evil.py").write_text(f"open({str(arena.canary)!r}, 'w').close()\nclass Evil: ...\n", "utf-8")
    told = json.loads((bad / "tokenizer_config.json").read_text("utf-8"))
    told |= {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    (bad / "tokenizer_config.json").write_text(json.dumps(told), "utf-8")
    for more in ({"trust_remote_code": True}, {"trust_remote_code": 1, "clean": "lower"}, {"use_fast": False}):
        config = json.loads((bad / "open_clip_config.json").read_text("utf-8"))
        config["model_cfg"]["text_cfg"]["tokenizer_kwargs"] = more
        (bad / "open_clip_config.json").write_text(json.dumps(config), "utf-8")
        _, said = arena.call(lambda: load(str(bad)).tokenizer(["red"]))
        assert "are not supported" in said


def test_a_tokenizer_with_code_is_refused_without_a_question(arena, work, clip, monkeypatch):
    """transformers would ask on the terminal; a run that waits for an answer hangs."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question"))
    bad = plain(clip, work / "bad")
    (bad / "evil.py").write_text(f"open({str(arena.canary)!r}, 'w').close()\nclass Evil: ...\n", "utf-8")
    told = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    (bad / "tokenizer_config.json").write_text(json.dumps(told), "utf-8")
    arena.call(lambda: load(str(bad)).tokenizer(["red"]))


def test_a_text_model_with_code_is_refused_without_a_question(arena, work, clip, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question"))
    bad = plain(clip, work / "bad")
    inner = work / "inner"
    inner.mkdir()
    (inner / "evil.py").write_text(f"open({str(arena.canary)!r}, 'w').close()\nclass Evil: ...\n", "utf-8")
    (inner / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}}))
    config = json.loads((bad / "open_clip_config.json").read_text("utf-8"))
    config["model_cfg"]["text_cfg"] = {"hf_model_name": str(inner), "hf_tokenizer_name": str(inner)}
    (bad / "open_clip_config.json").write_text(json.dumps(config), "utf-8")
    _, said = arena.call(lambda: load(str(bad)))
    assert said


def test_a_model_folder_names_no_files_or_addresses_for_timm(arena, work, clip):
    """timm's create_model opens checkpoint_path, older ones as a pickle, and downloads what pretrained_cfg names."""
    bad = plain(clip, work / "bad")
    (bad / "x.pth").write_bytes(poisons(arena.canary)["torch's archive"])
    for timm in (
        {"timm_kwargs": {"checkpoint_path": str(bad / "x.pth")}},
        {"timm_kwargs": {"pretrained": True, "pretrained_cfg": {"file": str(bad / "x.pth")}}},
        {"timm_kwargs": [1]},
        {"timm_model_name": "hf-hub:someone/something"},
    ):
        config = json.loads((bad / "open_clip_config.json").read_text("utf-8"))
        usual = {"timm_model_name": "vit_base_patch16_siglip_224", "timm_pool": "map", "timm_proj": "none"}
        config["model_cfg"]["vision_cfg"] = {"image_size": 32, **usual, **timm}
        (bad / "open_clip_config.json").write_text(json.dumps(config), "utf-8")
        _, said = arena.call(lambda: load(str(bad)))
        assert "are not supported" in said or "is an address" in said


@pytest.mark.parametrize("name", ["clipgraft.json", "open_clip_config.json", "config.json", "x.safetensors.index.json"])
@pytest.mark.parametrize("content", ["[" * 100_000, '{"a":' * 100_000, "9" * 10_000, "{", "\udcff", "null", "[]"])
def test_a_json_bomb_is_refused(arena, work, clip, name, content):
    bad = plain(clip, work / "bad")
    if name == "config.json":
        (bad / "open_clip_config.json").unlink()
    if name == "x.safetensors.index.json":
        (bad / "open_clip_model.safetensors").unlink()
    (bad / name).write_text(content, "utf-8", "surrogateescape")
    _, said = arena.call(lambda: load(str(bad)))
    assert name in said or content in ("null", "[]")


def test_an_export_names_only_files_inside_itself(arena, work):
    manifest = json.loads((work / "good" / "clipgraft.json").read_text("utf-8"))
    (work / "secret").write_text("s", "utf-8")
    for name in ("../secret", str(work / "secret"), "a/../../secret", "a\0b"):
        changed = {**manifest, "files": {**manifest["files"], name: {"bytes": 1, "sha256": "0"}}}
        (work / "good" / "clipgraft.json").write_text(json.dumps(changed), "utf-8")
        _, said = arena.call(lambda: load(str(work / "good")))
        assert said
        assert "which is no file of that folder" in said or name == "a\0b"


def test_an_export_of_itself_ends(arena, work):
    """An encoder without a configuration is opened through the reference in its manifest."""
    other = Path(shutil.copytree(work / "good", work / "other"))
    for here, there in ((work / "good", other), (other, work / "good")):
        manifest = json.loads((here / "clipgraft.json").read_text("utf-8"))
        manifest |= {"reason": "x", "model_config": {}}
        manifest["encoder"]["uri"] = str(there)
        (here / "clipgraft.json").write_text(json.dumps(manifest), "utf-8")
    _, said = arena.call(lambda: load(str(work / "good")))
    assert "refers to itself" in said


def test_names_of_components_are_never_import_paths(arena, work):
    from clipgraft.config.load import load_recipe
    from clipgraft.registry import current

    for name in (
        "clipgraft_canary:run",
        "clipgraft_canary.run",
        "clipgraft_canary",
        "os:system",
        "os.system",
        "builtins:exec",
    ):
        for key in (
            "grafts.0.use",
            "hooks.0.use",
            "evaluate.on.0.use",
            "losses.0.use",
            "evaluate.retention",
            "extends",
        ):
            overrides = [*["model.from=x", "data.from=folder:.", "train.steps=1"], f"{key}={name}"]
            _, said = arena.call(
                lambda overrides=overrides: load_recipe("core/finetune", overrides=overrides, registry=current())
            )
            assert said or key == "evaluate.retention"
        arena.call(lambda name=name: load(name))
        manifest = json.loads((work / "good" / "clipgraft.json").read_text("utf-8"))
        manifest |= {"reason": "x", "grafts": [{"use": name, "config": {}, "merged": False}]}
        (work / "good" / "clipgraft.json").write_text(json.dumps(manifest), "utf-8")
        _, said = arena.call(lambda: load(str(work / "good")))
        assert "unknown graft" in said


# -- data ----------------------------------------------------------------------------------------------------------


def shard(path: Path, *members: tuple[tarfile.TarInfo, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for info, content in members:
            info.size = len(content) if info.isreg() else 0
            tar.addfile(info, io.BytesIO(content) if info.isreg() else None)


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


@pytest.mark.parametrize(
    "info",
    [
        member("../a.png"), member("/etc/a.png"), member("a/../../a.png"), member("..\\a.png"),
        member("a.png", tarfile.SYMTYPE, "/etc/passwd"), member("a.png", tarfile.LNKTYPE, "../x"),
        member("a.png", tarfile.CHRTYPE), member("a.png", tarfile.FIFOTYPE),
    ],
    ids=lambda info: f"{info.name} {info.type.decode('latin-1')}",
)  # fmt: skip
def test_a_shard_with_a_member_that_leaves_it_is_refused(arena, work, info):
    pytest.importorskip("clipgraft_data")
    from clipgraft.data import open_source

    shard(work / "x.tar", (member("b.png"), b"x"), (info, b"y"))
    _, said = arena.call(lambda: open_source("wds:x.tar"))
    assert "refused" in said


def test_a_shard_pattern_is_never_a_command_or_an_address_or_endless(arena, work):
    pytest.importorskip("clipgraft_data")
    from clipgraft.data import open_source

    shard(work / "x.tar", (member("b.png"), b"x"))
    for path in (
        f"pipe:touch {arena.canary}", "pipe:cat x.tar", "https://example.org/x.tar", "file://x.tar", "s3://b/x.tar",
        f"x.tar::pipe:touch {arena.canary}", "gs://x", "{0..99999999999}.tar", "{0..9}{0..999999}{0..999999}.tar",
        "x.tar;touch y", "$(touch y).tar", "`touch y`.tar",
    ):  # fmt: skip
        _, said = arena.call(lambda path=path: open_source(f"wds:{path}"))
        assert said, path


def test_links_out_of_a_data_folder_are_not_followed(arena, work):
    from clipgraft.data import open_source
    from clipgraft.data.base import BadSample

    (work / "secret.png").write_bytes((work / "pictures" / "a.png").read_bytes())
    (work / "pictures" / "link.png").symlink_to(work / "secret.png")
    (work / "pictures" / "loop.png").symlink_to("loop.png")
    (work / "pictures" / "gone.png").symlink_to("nowhere.png")
    source = open_source(f"folder:{work / 'pictures'}")
    readable = []
    for index in range(len(source)):
        for read in (source.__getitem__, source.content):
            value, _ = arena.call(lambda read=read, index=index: read(index), refusals=(BadSample,))
            readable += [source.ids[index]] if value is not None else []
    assert set(readable) == {"a.png", "b.png"}
    (work / "pictures" / "folder").symlink_to(ROOT, target_is_directory=True)
    _, said = arena.call(lambda: open_source(f"folder:{work / 'pictures'}"))
    assert "links to a folder outside" in said


@pytest.mark.parametrize("path", ["../secret.png", "{work}/secret.png", "a/../../secret.png", "link.png"])
@pytest.mark.parametrize("kind", ["csv", "table"])
def test_a_table_reads_no_picture_outside_its_folder(arena, work, path, kind):
    from clipgraft.data import open_source
    from clipgraft.data.base import BadSample

    if kind == "table":
        pytest.importorskip("clipgraft_data")
    shutil.copy(work / "pictures" / "a.png", work / "secret.png")
    (work / "inner").mkdir()
    (work / "inner" / "link.png").symlink_to(work / "secret.png")
    path = path.format(work=work)
    text = f"image,caption\n{path},x\n" if kind == "csv" else json.dumps({"image": path, "caption": "x"})
    file = work / "inner" / ("t.csv" if kind == "csv" else "t.jsonl")
    file.write_text(text, "utf-8")
    source, said = arena.call(lambda: open_source(f"{kind}:{file}"))
    assert source is not None, said
    _, said = arena.call(lambda: source[0], refusals=(BadSample,))
    assert "leaves the data folder" in said


# -- what the source itself may not do -----------------------------------------------------------------------------


@cache
def calls(path: Path) -> list[tuple[str, ast.Call]]:
    """Every call of a file with its dotted name."""
    nodes = [node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Call)]
    return [(ast.unparse(node.func), node) for node in nodes]


def keyword(node: ast.Call, name: str) -> Any:
    """The constant that a call passes under ``name``; Ellipsis when it passes none or no constant."""
    value = next((k.value for k in node.keywords if k.arg == name), None)
    return value.value if isinstance(value, ast.Constant) else ...


def violations(rule: Callable[[str, ast.Call], bool]) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}:{node.lineno} {name}"
        for path in SOURCES
        for name, node in calls(path)
        if rule(name, node)
    ]


def test_torch_load_is_always_weights_only():
    def rule(name: str, node: ast.Call) -> bool:
        return name.endswith("torch.load") and keyword(node, "weights_only") is not True

    assert not violations(rule)
    assert sum(1 for path in SOURCES for name, _ in calls(path) if name == "torch.load") >= 1, "the scan sees calls"


def test_remote_code_is_never_trusted():
    def rule(name: str, node: ast.Call) -> bool:
        opens = re.search(r"\bAuto\w*\.from_(pretrained|config)$", name) is not None
        said = [k for k in node.keywords if k.arg == "trust_remote_code"]
        return (opens and not said) or (bool(said) and keyword(node, "trust_remote_code") is not False)

    assert not violations(rule)
    assert not [p for p in SOURCES if re.search(r"['\"]trust_remote_code['\"]\s*:", p.read_text("utf-8"))]


def test_nothing_evaluates_text_or_unpickles_or_starts_a_shell():
    banned = re.compile(
        r"^(eval|exec|compile|__import__|os\.(system|popen|exec\w*|spawn\w*|posix_spawn)"
        r"|(pickle|cPickle|_pickle|dill|cloudpickle|marshal|shelve|joblib)\.\w+|runpy\.\w+"
        r"|yaml\.(load|load_all|unsafe_load|full_load|unsafe_load_all|full_load_all)|pd\.read_pickle|tempfile\.mktemp"
        r"|tarfile\.\w+\.extract(all)?|shutil\.unpack_archive|zipfile\.\w+\.extract(all)?)$"
    )

    def rule(name: str, node: ast.Call) -> bool:
        shell = keyword(node, "shell") is True
        numpy = name in ("np.load", "numpy.load") and keyword(node, "allow_pickle") is not False
        return bool(banned.match(name)) or shell or numpy or name.endswith((".extractall", ".unpack_archive"))

    assert not violations(rule)


def test_pickle_is_imported_for_its_errors_at_most():
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = (
                [a.name for a in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", "") or ""]
            )
            if isinstance(node, ast.Import | ast.ImportFrom):
                assert not {n.partition(".")[0] for n in names} & {"dill", "cloudpickle", "marshal", "shelve", "joblib"}
        used = set(re.findall(r"\bpickle\.(\w+)", path.read_text("utf-8")))
        assert used <= {"UnpicklingError"}, f"{path}: {used}"


def test_processes_are_started_where_security_md_says():
    """Each such file runs our own command line with its own interpreter, never a text that a shell would read."""
    found = {
        str(path.relative_to(ROOT))
        for path in SOURCES
        for name, _ in calls(path)
        if name.startswith("subprocess.") and not name.endswith("Error")
    }
    named = set(re.findall(r"`((?:core|plugins)/[\w/.-]+\.py)`", (ROOT / "SECURITY.md").read_text("utf-8")))
    assert found <= named, f"SECURITY.md names {sorted(named)}"


# -- the page itself -----------------------------------------------------------------------------------------------


def test_every_test_that_security_md_names_exists():
    text = (ROOT / "SECURITY.md").read_text("utf-8")
    named = re.findall(r"`((?:core|plugins|tests)/[\w/.-]+\.py)(?:::(\w+))?`", text)
    assert len([name for _, name in named if name]) >= 20
    for file, function in named:
        source = ROOT / file
        assert source.is_file(), f"SECURITY.md names {file}"
        assert not function or re.search(rf"^def {function}\(", source.read_text("utf-8"), re.MULTILINE), function


def test_every_promise_of_security_md_names_a_test():
    table = (ROOT / "SECURITY.md").read_text("utf-8").partition("## Promises")[2].partition("\n## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ") and not line.startswith(("| promise", "|---"))]
    assert len(rows) >= 12
    assert not [row for row in rows if not re.search(r"`(core|plugins|tests)/[\w/.-]+\.py::test_\w+`", row)]


def test_files_are_written_with_the_permissions_that_the_user_chose(arena, work):
    before = os.umask(0o027)
    try:
        write_export(tiny_clip(), arena.out / "x")
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in (arena.out / "x").iterdir()}
    assert modes == {0o640}
