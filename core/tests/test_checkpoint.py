"""Exports: stock open_clip reads them, damage is named, a crash never leaves half of one."""

from __future__ import annotations

import json
import os
import stat
from dataclasses import dataclass
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from clipgraft import files
from clipgraft.checkpoint import open_export, read_component, read_manifest, write_export
from clipgraft.config.schema import GraftNode
from clipgraft.encoders import apply_grafts, load
from clipgraft.encoders.base import AppliedGraft, Encoder
from clipgraft.errors import ClipgraftError, InputError
from clipgraft.files import whole_folder, write_tensors
from clipgraft.registry import Registry
from clipgraft.testing.tiny import tiny_clip

PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
TEXTS = ["a photo of a red circle", "zebra"]
KINDS = ["vit", "custom-text", "siglip-timm"]


@pytest.fixture(scope="module")
def registry() -> Registry:
    return Registry.discover(allow=())


@torch.no_grad()
def run(encoder: Encoder) -> torch.Tensor:
    image, text = encoder.eval()(PIXELS, encoder.tokenizer(TEXTS))
    return torch.cat([image.pooled, text.pooled])


def same(one: Encoder, two: Encoder) -> bool:
    a, b = one.state_dict(), two.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["vit", "custom-text"])
def test_stock_open_clip_opens_the_export(tmp_path: Path, kind: str) -> None:
    encoder, folder = tiny_clip(kind=kind), tmp_path / "export"
    write_export(encoder, folder)
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenizer, model = open_clip.get_tokenizer(f"local-dir:{folder}"), model.eval()
    assert torch.equal(tokenizer(TEXTS), encoder.tokenizer(TEXTS))
    expected = torch.cat([model.encode_image(PIXELS), model.encode_text(tokenizer(TEXTS))])
    assert torch.equal(run(encoder), expected)
    assert transform.transforms[-1].mean == (0.5, 0.5, 0.5) or transform.transforms[-1].mean == [0.5, 0.5, 0.5]


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip(tmp_path: Path, registry: Registry, kind: str) -> None:
    encoder = tiny_clip(kind=kind)
    write_export(encoder, tmp_path / "export", lineage=[{"recipe": "core/finetune", "steps": 3}])
    again = load(str(tmp_path / "export"), registry=registry)
    assert same(encoder, again) and torch.equal(run(again), run(encoder))
    assert again.preprocess == encoder.preprocess and again.data.model_config == encoder.data.model_config
    manifest = read_manifest(tmp_path / "export")
    weights = "encoder.safetensors" if kind == "siglip-timm" else "open_clip_model.safetensors"
    assert manifest["level"] == ("L2" if kind == "siglip-timm" else "L0") and manifest["encoder"]["weights"] == weights
    assert again.data.origin.sha256 == manifest["files"][weights]["sha256"]
    assert again.data.origin.lineage == ({"recipe": "core/finetune", "steps": 3},)
    write_export(again, tmp_path / "next", lineage=[{"recipe": "diffusion/diva"}])
    assert [s["recipe"] for s in read_manifest(tmp_path / "next")["lineage"]] == ["core/finetune", "diffusion/diva"]


def test_what_open_clip_cannot_hold_says_why(tmp_path: Path) -> None:
    write_export(tiny_clip(kind="siglip-timm"), tmp_path / "export")
    names = {f.name for f in (tmp_path / "export").iterdir()}
    assert "open_clip_config.json" not in names and "open_clip_model.safetensors" not in names
    assert "timm image tower differs" in read_manifest(tmp_path / "export")["reason"]
    assert "open_clip can't hold it" in (tmp_path / "export" / "README.md").read_text()


def test_adapters_are_merged_on_a_copy(tmp_path: Path, registry: Registry) -> None:
    nodes = [GraftNode(use="lora", rank=2), GraftNode(use="resize-positions", size=32)]
    encoder = apply_grafts(tiny_clip(), nodes, registry)
    for name, parameter in encoder.named_parameters():
        if name.endswith(".b"):
            nn.init.normal_(parameter, std=0.3)
    before = run(encoder)
    write_export(encoder, tmp_path / "export")
    again = open_export(tmp_path / "export", registry=registry)
    torch.testing.assert_close(run(again), before, atol=1e-5, rtol=1e-5)
    assert again.state_dict().keys() == tiny_clip().state_dict().keys() and again.data.grafts == []
    # the live encoder still trains its adapters
    assert torch.equal(run(encoder), before) and len(encoder.data.grafts) == 2
    encoder.image(PIXELS).pooled.sum().backward()
    assert all(p.grad is not None for n, p in encoder.image.named_parameters() if n.endswith((".a", ".b")))
    manifest = read_manifest(tmp_path / "export")
    lora = manifest["grafts"][0]
    assert manifest["level"] == "L0" and (lora["use"], lora["merged"], lora["config"]["rank"]) == ("core/lora", True, 2)
    assert lora["distribution"] == "clipgraft" and lora["version"]


def test_half_precision_export(tmp_path: Path, registry: Registry) -> None:
    encoder = tiny_clip()
    write_export(encoder, tmp_path / "export", dtype=torch.float16)
    stored = load_file(tmp_path / "export" / "open_clip_model.safetensors")
    assert {v.dtype for v in stored.values()} == {torch.float16}
    again = open_export(tmp_path / "export", registry=registry)
    assert torch.equal(again.image.tower.proj, encoder.image.tower.proj.half().float())


def test_components(tmp_path: Path, registry: Registry) -> None:
    head = nn.Linear(4, 2)
    head.registered = ("core/linear-probe", {"classes": 2})
    write_export(tiny_clip(), tmp_path / "export", components={"probe": head, "temporal": nn.LayerNorm(3)})
    manifest = read_manifest(tmp_path / "export")
    assert manifest["level"] == "L1"
    probe, temporal = manifest["components"]
    assert (
        probe["use"] == "core/linear-probe"
        and probe["config"] == {"classes": 2}
        and probe["distribution"] == "clipgraft"
    )
    assert temporal["file"] == "temporal.safetensors"
    assert torch.equal(read_component(tmp_path / "export", "probe")["weight"], head.weight)
    with pytest.raises(InputError, match="has no component 'prob'; it has probe, temporal"):
        read_component(tmp_path / "export", "prob")
    # an L1 export is still an ordinary CLIP
    assert same(open_export(tmp_path / "export", registry=registry), tiny_clip())
    open_clip.create_model(f"local-dir:{tmp_path / 'export'}")


@pytest.mark.parametrize("name", ["../out", "encoder", "Upper", "open_clip_model", ""])
def test_component_names_that_are_no_file_names(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="a component can't be named"):
        write_export(tiny_clip(), tmp_path / "export", components={name: nn.Linear(1, 1)})
    assert list(tmp_path.iterdir()) == []


class Shift(nn.Module):
    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.inner, self.shift = tower, nn.Parameter(torch.zeros(tower.embed_dim))
        self.width, self.embed_dim, self.depth, self.grid = tower.width, tower.embed_dim, tower.depth, tower.grid

    def forward(self, pixels: torch.Tensor, *want: object) -> object:
        from dataclasses import replace

        found = self.inner(pixels, *want)
        return replace(found, pooled=found.pooled + self.shift)


@dataclass
class ShiftGraft:
    """A change that no plain CLIP can hold."""

    scale: float = 1.0
    portable = False

    def apply(self, encoder: Encoder) -> Encoder:
        encoder.image = Shift(encoder.image)
        return encoder

    def merge(self, encoder: Encoder) -> Encoder:
        return encoder


PLUGIN = """
from clipgraft.spec import Component, hookimpl

@hookimpl
def clipgraft_grafts():
    return [Component(name="shift", target="{module}:ShiftGraft", config="{module}:ShiftConfig")]
"""


def test_grafts_that_cannot_be_merged_are_applied_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    import types

    from clipgraft.config.schema import Config

    module = types.ModuleType("shifting")
    module.ShiftGraft, module.ShiftConfig = (
        ShiftGraft,
        type("ShiftConfig", (Config,), {"__annotations__": {"scale": float}}),
    )
    monkeypatch.setitem(sys.modules, "shifting", module)
    (tmp_path / "shifty.py").write_text(PLUGIN.format(module="shifting"))
    registry = Registry.discover(allow=(), files=[tmp_path / "shifty.py"])
    encoder = apply_grafts(
        tiny_clip(), [GraftNode(use="core/lora", rank=1), GraftNode(use="shift", scale=2.0)], registry
    )
    nn.init.normal_(encoder.image.shift)
    write_export(encoder, tmp_path / "export")
    manifest = read_manifest(tmp_path / "export")
    assert manifest["level"] == "L2" and "the graft shifty/shift changes the architecture" in manifest["reason"]
    assert [(g["use"], g["merged"]) for g in manifest["grafts"]] == [("core/lora", True), ("shifty/shift", False)]
    again = load(str(tmp_path / "export"), registry=registry)
    torch.testing.assert_close(run(again), run(encoder), atol=1e-5, rtol=1e-5)
    assert [g.name for g in again.data.grafts] == ["shifty/shift"]
    assert again.data.grafts[0].config == {"scale": 2.0}
    with pytest.raises(InputError, match="unknown graft 'shifty/shift'"):
        load(str(tmp_path / "export"), registry=Registry.discover(allow=()))


def test_every_file_is_hashed_and_the_damaged_one_named(tmp_path: Path, registry: Registry) -> None:
    folder = tmp_path / "export"
    write_export(tiny_clip(), folder, components={"head": nn.Linear(2, 2)})
    files = {f.name for f in folder.iterdir()} - {"clipgraft.json"}
    assert set(read_manifest(folder)["files"]) == files
    for name in sorted(files - {"README.md"}):
        good = (folder / name).read_bytes()
        flipped = bytearray(good)
        flipped[len(good) // 2] ^= 1
        for bad, message in ((bytes(flipped), "damaged"), (good[:-5], "damaged"), (None, "is missing")):
            (folder / name).unlink() if bad is None else (folder / name).write_bytes(bad)
            with pytest.raises(InputError, match=message) as caught:
                open_export(folder, registry=registry)
            assert name in str(caught.value) and "\n" not in str(caught.value)
        (folder / name).write_bytes(good)
    (folder / "README.md").write_text("edited by its owner")
    assert same(open_export(folder, registry=registry), tiny_clip())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "clipgraft.json is damaged"),
        ("[]", "clipgraft.json is damaged"),
        ('{"schema": 1}', "clipgraft.json is damaged"),
        ('{"schema": 99, "files": {}, "clipgraft": "9.0"}', r"written by a later clipgraft \(9.0\); upgrade"),
    ],
)
def test_unreadable_manifests(tmp_path: Path, registry: Registry, content: str, message: str) -> None:
    write_export(tiny_clip(), tmp_path / "export")
    (tmp_path / "export" / "clipgraft.json").write_text(content)
    with pytest.raises(InputError, match=message):
        load(str(tmp_path / "export"), registry=registry)


def test_not_an_export(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not an export of clipgraft"):
        open_export(tmp_path / "nowhere")


def test_files_get_the_permissions_of_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        write_export(tiny_clip(), tmp_path / "export")
    finally:
        os.umask(old)
    modes = {f.name: stat.S_IMODE(f.stat().st_mode) for f in (tmp_path / "export").iterdir()}
    assert set(modes.values()) == {0o640} and stat.S_IMODE((tmp_path / "export").stat().st_mode) == 0o750


def test_an_export_is_replaced_and_nothing_else_is(tmp_path: Path, registry: Registry) -> None:
    folder = tmp_path / "export"
    write_export(tiny_clip(seed=0), folder, components={"old": nn.Linear(1, 1)})
    write_export(tiny_clip(seed=1), folder)
    assert same(open_export(folder, registry=registry), tiny_clip(seed=1)) and not (folder / "old.safetensors").exists()
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "text.tex").write_text("years of work")
    with pytest.raises(InputError, match="is not replaced; choose another folder"):
        write_export(tiny_clip(), tmp_path / "thesis")
    assert (tmp_path / "thesis" / "text.tex").read_text() == "years of work"
    assert sorted(f.name for f in tmp_path.iterdir()) == ["export", "thesis"]


def test_a_failing_write_leaves_the_old_export(
    tmp_path: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "export"
    write_export(tiny_clip(seed=0), folder)

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "_sync", full)
    with pytest.raises(ClipgraftError, match=r"could not be written: .*No space left"):
        write_export(tiny_clip(seed=1), folder)
    assert same(open_export(folder, registry=registry), tiny_clip(seed=0))
    assert [f.name for f in tmp_path.iterdir()] == ["export"]


def dead_process() -> int:
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    return child


def test_a_writer_killed_between_the_renames_loses_nothing(tmp_path: Path, registry: Registry) -> None:
    folder, dead = tmp_path / "export", dead_process()
    write_export(tiny_clip(seed=0), folder)
    folder.rename(tmp_path / f".export.old-{dead}")
    (tmp_path / f".export.new-{dead}").mkdir()
    (tmp_path / ".other.tmp").mkdir()
    assert same(open_export(folder, registry=registry), tiny_clip(seed=0))
    assert sorted(f.name for f in tmp_path.iterdir()) == [".other.tmp", "export"]


def test_a_running_writers_draft_is_left_alone(tmp_path: Path) -> None:
    draft = tmp_path / f".export.new-{os.getppid()}"
    draft.mkdir()
    write_export(tiny_clip(), tmp_path / "export")
    assert draft.is_dir()


def test_a_folder_that_fails_inside_the_block_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="boom"), whole_folder(tmp_path / "x", marker="m") as draft:
        (draft / "m").write_text("half")
        raise RuntimeError("boom")
    assert list(tmp_path.iterdir()) == []


def test_tied_and_strided_tensors_are_saved_whole(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    state = {"whole": base, "tied": base, "transposed": base.T, "rows": base[1:], "row": base[0]}
    write_tensors(tmp_path / "t.safetensors", state)
    assert all(torch.equal(v, state[k]) for k, v in load_file(tmp_path / "t.safetensors").items())


def test_model_card(tmp_path: Path, registry: Registry) -> None:
    write_export(tiny_clip(), tmp_path / "a", card="# Mine\n")
    assert (tmp_path / "a" / "README.md").read_text() == "# Mine\n"
    encoder = apply_grafts(tiny_clip(), [GraftNode(use="lora", rank=1)], registry)
    write_export(encoder, tmp_path / "b", lineage=[{"recipe": "core/finetune"}])
    card = (tmp_path / "b" / "README.md").read_text()
    assert "core/lora" in card and "core/finetune" in card and 'create_model_and_transforms("local-dir:' in card


def test_manifest_is_plain_json_without_class_paths(tmp_path: Path, registry: Registry) -> None:
    write_export(apply_grafts(tiny_clip(), [GraftNode(use="lora")], registry), tmp_path / "export")
    text = (tmp_path / "export" / "clipgraft.json").read_text()
    assert json.loads(text)["schema"] == 1 and "clipgraft.encoders" not in text and "Lora" not in text


def test_grafts_of_the_encoder_are_not_shared_with_its_copy(tmp_path: Path) -> None:
    encoder = tiny_clip()
    graft = ShiftGraft()
    encoder.data.grafts.append(AppliedGraft(name="core/none", config={}, graft=graft))
    write_export(encoder, tmp_path / "export")
    assert encoder.data.grafts[0].graft is graft
