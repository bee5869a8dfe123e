"""The recipe agglomerate from a folder of pictures to an export: tiny, resumed, refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clipgraft.checkpoint import read_component, read_manifest, write_export
from clipgraft.encoders import load
from clipgraft.errors import InputError, Interrupted
from clipgraft.execution import run_recipe
from clipgraft.registry import Registry
from clipgraft.runhooks import RunHooks
from clipgraft.spec import runhook
from clipgraft.testing.tiny import tiny_clip
from clipgraft_merging.sam.settings import Decoder, Prompt, SamSettings, Vision

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def registry() -> Registry:
    return Registry.discover()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_export(tiny_clip(0).eval(), tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def sam(tmp_path_factory: pytest.TempPathFactory) -> Path:
    vision = Vision(hidden_size=32, output_channels=16, num_hidden_layers=2, num_attention_heads=2, image_size=32,
                    patch_size=8, window_size=2, global_attn_indexes=(1,), num_pos_feats=8)  # fmt: skip
    prompt = Prompt(hidden_size=16, image_size=32, patch_size=8, mask_input_channels=4)
    decoder = Decoder(hidden_size=16, mlp_dim=32, num_attention_heads=2, iou_head_hidden_dim=16)
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("sam")
    SamSettings(vision=vision, prompt=prompt, decoder=decoder).model().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> str:
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for k in range(12):
        Image.fromarray(rng.integers(0, 255, (40, 48, 3), dtype=np.uint8)).save(root / f"{k:02}.png")
    return f"folder:{root}"


def settings(base: Path, pictures: str, sam: Path, **more: object) -> dict[str, object]:
    return {
        "model.from": str(base), "data.from": pictures, "evaluate.retention": "none",
        "teachers.itself": {
            "from": str(base), "spatial": 0, "summary_from": "pooled", "summary_adaptor": {"hidden": 0},
        },
        "teachers.masks": {"from": str(sam), "summary": 0, "spatial_adaptor": {"hidden": 8}},
        "statistics.samples": 10, "statistics.batch_size": 4,
        "train.steps": 4, "train.batch_size": 4, "train.lr": 0.001, "train.log_every": 1, "train.schedule": "constant",
    } | more  # fmt: skip


def test_a_run_teaches_a_plain_vit_that_open_clip_opens(
    base: Path, pictures: str, sam: Path, registry: Registry, tmp_path: Path
) -> None:
    import open_clip

    out = tmp_path / "run"
    run_recipe("merging/agglomerate", overrides=settings(base, pictures, sam), out=out, registry=registry)
    manifest = read_manifest(out / "export")
    assert manifest["level"] == "L1" and [c["use"] for c in manifest["components"]] == ["merging/adaptors"]
    rows = [json.loads(line) for line in (out / "stages/01-distil/metrics.jsonl").read_text().splitlines()]
    assert set(rows[0]["terms"]) == {"itself-summary", "masks-spatial"} and rows[0]["terms"]["itself-summary"] < 1e-5
    after, before = load(str(out / "export")), load(str(base))
    moved = {n for n, p in after.named_parameters() if not torch.equal(p, before.get_parameter(n))}
    assert moved and all(name.startswith("image.") for name in moved)
    stock, _, _ = open_clip.create_model_and_transforms(f"local-dir:{out / 'export'}")
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(stock.eval().encode_image(pixels), after.eval().image(pixels).pooled, atol=1e-5)
    tensors = read_component(out / "export", "adaptors")
    normaliser = {k.rpartition(".")[2]: v for k, v in tensors.items() if k.startswith("normalisers.masks-spatial")}
    square = normaliser["matrix"].double() @ normaliser["matrix"].double().T
    assert torch.allclose(square / square[0, 0], torch.eye(32, dtype=torch.float64), atol=1e-4)
    assert torch.allclose(normaliser["inverse"] @ normaliser["matrix"], torch.eye(32), atol=1e-3)


def test_without_adaptors_and_normalisation_one_stage_leaves_plain_weights(
    base: Path, pictures: str, sam: Path, registry: Registry, tmp_path: Path
) -> None:
    more = {"keep_adaptors": False, "teachers.masks.spatial_normalise": "none", "student.positions": "crop"}
    groups = [{"size": 32, "teachers": ["itself"], "share": 1}, {"size": 48, "teachers": ["masks", "itself"]}]
    given = settings(base, pictures, sam, **more, groups=groups)
    run_recipe("merging/agglomerate", overrides=given, out=tmp_path / "run", registry=registry)
    assert read_manifest(tmp_path / "run/export")["level"] == "L0"
    assert read_manifest(tmp_path / "run/export")["preprocess"]["size"] == [32, 32]
    assert not (tmp_path / "run/stages/01-distil").exists()
    rows = [json.loads(x) for x in (tmp_path / "run/stages/00-distil/metrics.jsonl").read_text().splitlines()]
    assert [bool(row["terms"]["masks-spatial"]) for row in rows] == [False, True, False, True]  # groups take turns


class _Stop:
    """Stops a run after its second step."""

    @runhook
    def after_step(self, run, step) -> None:  # type: ignore[no-untyped-def]
        if step == 1:
            run.stop_requested = True


def test_a_stopped_run_goes_on_to_the_same_weights(
    base: Path, pictures: str, sam: Path, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = [{"size": 32, "teachers": ["itself"]}, {"size": 48}]
    given = settings(base, pictures, sam, groups=groups, **{"student.positions": "crop"})
    run_recipe("merging/agglomerate", overrides=given, out=tmp_path / "whole", registry=registry)
    made = RunHooks.__init__

    def with_stop(self, *args, **kwargs) -> None:  # type: ignore[no-untyped-def]
        made(self, *args, **kwargs)
        self.register(_Stop(), "stop")

    with monkeypatch.context() as patch:
        patch.setattr(RunHooks, "__init__", with_stop)
        with pytest.raises(Interrupted):
            run_recipe("merging/agglomerate", overrides=given, out=tmp_path / "cut", registry=registry)
    run_recipe(resume=tmp_path / "cut", registry=registry)
    one, two = load(str(tmp_path / "whole/export")), load(str(tmp_path / "cut/export"))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_sam_clip_is_a_configuration(base: Path, pictures: str, sam: Path, registry: Registry, tmp_path: Path) -> None:
    given = settings(base, pictures, sam) | {
        "teachers.masks": {
            "from": str(sam), "summary": 0, "spatial_from": "tower", "spatial_adaptor": {"hidden": 0},
            "spatial_normalise": "none",
        },
        "student.sam": {"from": str(sam), "size": 32, "blocks": 1}, "student.tower_lr": 1.0, "train.lr": 0.01,
    }  # fmt: skip
    run_recipe("merging/agglomerate", overrides=given, out=tmp_path / "run", registry=registry)
    rows = [json.loads(x) for x in (tmp_path / "run/stages/00-distil/metrics.jsonl").read_text().splitlines()]
    first_gap, last_gap = (row["terms"]["masks-spatial"] for row in (rows[0], rows[-1]))
    assert first_gap < 1e-6 and last_gap > first_gap  # it starts as that SAM, and moves
    student = load(str(tmp_path / "run/export")).image
    from transformers import SamModel

    first = SamModel.from_pretrained(sam)
    kept = [
        (student.sam.encoder.neck, first.vision_encoder.neck),
        (student.promptable.mask_decoder, first.mask_decoder),
    ]
    for ours, theirs in kept:
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    tower = zip(student.sam.encoder.layers.parameters(), first.vision_encoder.layers.parameters(), strict=True)
    assert not all(torch.equal(a, b) for a, b in tower)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"teachers.masks.summary": 1}, "a SAM has no summary"),
        ({"teachers.itself.from": "./nowhere"}, "neither a registered model nor a directory"),
        ({"groups": [{"size": 36}]}, "no multiple of the student's patch of 8 pixels; take 32"),
        ({"groups": [{"teachers": ["itself"]}]}, "'masks' belongs to no group"),
        ({"groups": [{"teachers": ["eyes"]}]}, "'eyes' is no teacher"),
        ({"balance": "ranks", "groups": [{"size": 32}, {"size": 48}]}, "set it to split or alternate"),
        ({"teachers.itself.summary_from": "cls"}, "give the adaptor a hidden width"),
        ({"teachers.itself.summary": 0}, "teaches nothing"),
        ({"teachers.itself.size": 64}, "takes 32 x 32 pixels and nothing else"),
        ({"teachers.masks.size": 36}, "no multiple of the teacher's patch"),
    ],
)
def test_bad_settings_are_told_in_one_line(
    base: Path, pictures: str, sam: Path, registry: Registry, tmp_path: Path, more: dict[str, object], said: str
) -> None:
    given = settings(base, pictures, sam) | more
    with pytest.raises(InputError, match=said) as error:
        run_recipe("merging/agglomerate", overrides=given, out=tmp_path / "run", registry=registry)
    assert "\n" not in str(error.value)
