"""GenHancer on real input, with nothing changed but names: photographs, digits, ViT-B-32 in both formats."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
FEW = [f"--set={stage}.train.{key}" for stage in ("generator", "clip") for key in ("steps=2", "batch_size=4")]


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Real photographs as files: those that scikit-image and scikit-learn bring along."""
    skimage, sklearn = pytest.importorskip("skimage"), pytest.importorskip("sklearn")
    folder = tmp_path_factory.mktemp("photos")
    places = [Path(skimage.__file__).parent / "data", Path(sklearn.__file__).parent / "datasets" / "images"]
    files = [f for place in places for f in sorted(place.iterdir()) if f.suffix in (".png", ".jpg")]
    for file in files:
        (folder / file.name).write_bytes(file.read_bytes())
    assert len(files) >= 16
    return folder


@pytest.fixture(scope="module")
def vit_b_32(tmp_path_factory) -> dict[str, Path]:
    """ViT-B-32 with random weights as an open_clip directory and as a Hugging Face one."""
    import open_clip
    import torch
    from safetensors.torch import save_file
    from transformers import CLIPConfig, CLIPModel

    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    model, config = open_clip.create_model("ViT-B-32"), open_clip.get_model_config("ViT-B-32")
    ours = folder / "open_clip"
    ours.mkdir()
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, ours / "open_clip_model.safetensors")
    preprocess = {k: v for k, v in open_clip.get_model_preprocess_cfg(model).items() if k != "mode"}
    (ours / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    theirs = folder / "huggingface"
    CLIPModel(CLIPConfig()).save_pretrained(theirs)
    processor = {"size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224}, "do_center_crop": True}
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    processor |= {"image_mean": mean, "image_std": std, "resample": 3, "image_processor_type": "CLIPImageProcessor"}
    (theirs / "preprocessor_config.json").write_text(json.dumps(processor))
    return {"open_clip": ours, "huggingface": theirs}


def genhancer(*arguments: str) -> dict:
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-m", "clipgraft", "run", "genhancer", *arguments, *FEW, "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("form", ["open_clip", "huggingface"])
def test_vit_b_32_on_photographs(photos, vit_b_32, tmp_path, form):
    import open_clip
    import torch

    from clipgraft import load

    sets = [f"--set=model.from={vit_b_32[form]}", f"--set=data.from=folder:{photos}", "--set=data.max_bad=0.2"]
    result = genhancer(*sets, "--out", str(tmp_path / "run"))
    assert result["status"] == "done" and result["steps"] == 4
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{result['export']}")
    before, after = load(str(vit_b_32[form])).eval(), load(result["export"]).eval()
    pixels = torch.rand(1, 3, 224, 224)
    with torch.no_grad():
        moved = after.image(pixels).pooled
        torch.testing.assert_close(model.eval().encode_image(pixels), moved)
        assert not torch.equal(moved, before.image(pixels).pooled)
    for name, value in before.text.state_dict().items():
        assert torch.equal(after.text.state_dict()[name], value), f"the text tower moved: {name}"


@pytest.mark.parametrize("data", ["toyworld/photos", "toyworld/digits"])
def test_real_images_that_come_with_the_toy_world(tmp_path, data):
    sets = ["--set=model.from=toyworld/clip", f"--set=data.from={data}"]
    result = genhancer(*sets, "--out", str(tmp_path / "run"))
    assert result["status"] == "done" and (Path(result["export"]) / "open_clip_model.safetensors").exists()
