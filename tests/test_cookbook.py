"""The plugin of the documentation's examples: short, found like any installed one, and every part of it works."""

from __future__ import annotations

import json
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import clipgraft
from clipgraft.checkpoint import write_export
from clipgraft.cli import main
from clipgraft.encoders import apply_grafts, load
from clipgraft.errors import InputError
from clipgraft.losses.base import LossInputs
from clipgraft.registry import Registry, use
from clipgraft.testing.tiny import tiny_clip

COOKBOOK = Path(__file__).parent.parent / "docs" / "examples" / "clipgraft-cookbook"


@pytest.fixture
def cookbook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry]:
    """The registry with the package installed, as far as Python's own machinery can tell, in an empty folder."""
    project = tomllib.loads((COOKBOOK / "pyproject.toml").read_text("utf-8"))["project"]
    record = tmp_path / "site" / f"clipgraft_cookbook-{project['version']}.dist-info"
    record.mkdir(parents=True)
    (record / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    ((group, points),) = project["entry-points"].items()
    lines = [f"[{group}]", *(f"{name} = {target}" for name, target in points.items())]
    (record / "entry_points.txt").write_text("\n".join(lines) + "\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.syspath_prepend(str(COOKBOOK / "src"))
    monkeypatch.chdir(tmp_path)
    found = Registry.discover(allow=["cookbook"])
    with use(found):
        yield found
    for name in [name for name in sys.modules if name.split(".")[0] == "clipgraft_cookbook"]:
        del sys.modules[name]


@pytest.fixture
def photos(cookbook: Registry) -> str:
    """Eight pictures of two classes that differ in brightness, and a tiny CLIP in the folder `clip`."""
    from PIL import Image

    for number in range(8):
        file = Path("photos", ("dark", "light")[number % 2], f"{number}.png")
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40), (20 + 180 * (number % 2) + number,) * 3).save(file)
    write_export(tiny_clip(), Path("clip"))
    return "folder:photos"


@pytest.mark.parametrize("file", sorted(path.name for path in (COOKBOOK / "src" / "clipgraft_cookbook").glob("*.py")))
def test_every_file_is_short(file: str) -> None:
    text = (COOKBOOK / "src" / "clipgraft_cookbook" / file).read_text("utf-8")
    assert len(text.splitlines()) < 60


def test_it_is_found_by_its_entry_point_and_offers_a_part_of_every_kind(cookbook: Registry) -> None:
    (info,) = [plugin for plugin in cookbook.plugins if plugin.name == "cookbook"]
    assert (info.status, info.distribution) == ("ok", "clipgraft-cookbook")
    kinds = {kind for kind in ("loss", "head", "graft", "recipe", "evaluator", "run-hook")
             if any(r.plugin == "cookbook" for r in cookbook.list(kind))}  # fmt: skip
    assert len(kinds) == 6
    assert "cookbook" in {command.name for command in cookbook.commands()}


def test_only_the_hardest_wrong_pair_counts(cookbook: Registry) -> None:
    loss = cookbook.build("loss", "hardest", {"margin": 0.2})
    image = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    text = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.8, 0.6]])
    found = loss(LossInputs(image=image, text=text))
    # scores: rows (1, 0, .8), (0, 1, .6), (.6, .8, .96); the nearest wrong caption is at .8, .6, .8
    assert found["captions"].item() == pytest.approx((0 + 0 + 0.04) / 3, abs=1e-6)
    assert found["images"].item() == pytest.approx((0 + 0 + 0.04) / 3, abs=1e-6)


def test_blocks_are_taken_out_and_open_clip_opens_the_rest(photos: str, cookbook: Registry) -> None:
    import open_clip

    from clipgraft.config.schema import GraftNode

    node = GraftNode(use="drop-blocks", count=1)
    encoder = apply_grafts(load("clip", registry=cookbook), (node,), registry=cookbook)
    assert encoder.image.depth == 1
    write_export(encoder, Path("shallow"))
    model = open_clip.create_model("local-dir:shallow").eval()
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model.encode_image(pixels), encoder.eval().image(pixels).pooled)
    with pytest.raises(InputError, match="take out fewer"):
        cookbook.build("graft", "drop-blocks", {"count": 9}).apply(encoder)


def test_the_recipe_learns_and_folds_what_it_learnt(photos: str, cookbook: Registry) -> None:
    settings = ["model.from=clip", f"data.from={photos}", "train.steps=30", "train.batch_size=4", "train.lr=1e-2",
                "hooks=[throughput]", "evaluate={on: [zero-shot, cookbook/sure], data: 'folder:photos'}"]  # fmt: skip
    result = clipgraft.run("fold", overrides=settings, out="out", registry=cookbook)
    measured = json.loads((result.run / "evaluations.json").read_text("utf-8"))
    before, after = measured["before"], measured["after"]
    assert after["core/zero-shot"]["top1"] == 1.0
    assert after["cookbook/sure"]["lead"] > before["cookbook/sure"]["lead"]
    rate = json.loads((result.run / "stages" / "00-head" / "throughput.json").read_text("utf-8"))
    assert rate["images_per_second"] > 0
    # the folded model gives what base and head give together
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    base, folded = load("clip", registry=cookbook).eval(), load(str(result.export), registry=cookbook).eval()
    head = cookbook.build("head", "residual", {"dim": base.image.embed_dim})
    from safetensors.torch import load_file

    head.load_state_dict(load_file(result.run / "stages" / "00-head" / "result" / "residual.safetensors"))
    assert head.change.weight.abs().max() > 0
    with torch.no_grad():
        expected = head(base.image(pixels).pooled)
        torch.testing.assert_close(folded.image(pixels).pooled, expected, rtol=1e-4, atol=1e-5)


def test_the_recipe_says_which_models_it_takes(photos: str, cookbook: Registry) -> None:
    write_export(tiny_clip(kind="siglip-timm"), Path("siglip"))
    with pytest.raises(InputError, match="open_clip ViT with a projection"):
        clipgraft.run("fold", overrides=["model.from=siglip", f"data.from={photos}", "train.steps=1",
                                         "train.batch_size=4", "train.lr=1e-2"], out="out",
                      registry=cookbook)  # fmt: skip


def test_the_command_counts_weights(
    photos: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLIPGRAFT_PLUGINS", "cookbook")
    with pytest.raises(SystemExit) as done:
        main(["cookbook", "size", "clip", "--json"])
    assert not done.value.code
    told = json.loads(capsys.readouterr().out)["weights"]
    assert told["all"] == sum(p.numel() for p in tiny_clip().parameters())
