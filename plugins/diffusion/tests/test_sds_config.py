from importlib import resources

import pytest
from pydantic import ValidationError

from clipgraft.config.load import load_recipe
from clipgraft.registry import Registry
from clipgraft_diffusion.sds.config import SdsClipConfig, TeacherConfig
from clipgraft_diffusion.sds.recipe import SdsClip

REGISTRY = Registry.discover(allow=["diffusion"])
TRAIN = {"steps": 2, "batch_size": 4, "lr": 1e-3}
BASE = {"model": {"from": "x"}, "data": {"from": "csv:y"}, "train": TRAIN}
FILES = [p.name for p in resources.files("clipgraft_diffusion.recipes").iterdir()]
PRESETS = sorted(name.removesuffix(".yaml") for name in FILES if name.startswith("sds-clip"))
BACKBONES = {
    "openai-vit-b-32": "ViT-B-32-quickgelu/openai",
    "openai-vit-b-16": "ViT-B-16-quickgelu/openai",
    "openai-vit-l-14": "ViT-L-14-quickgelu/openai",
    "openai-vit-l-14-336": "ViT-L-14-336-quickgelu/openai",
}


def preset(name):
    given = [] if name == "tiny" else ["data.from=csv:y"]
    return load_recipe(f"diffusion/sds-clip:{name}", overrides=given, registry=REGISTRY)[1]


def test_presets():
    assert {"sds-clip", "sds-clip-tiny", *(f"sds-clip-{name}" for name in BACKBONES)} == set(PRESETS)
    default = load_recipe("diffusion/sds-clip", overrides=["data.from=csv:y", "model.from=x"], registry=REGISTRY)[1]
    assert default.trainable == "layer-norms"


@pytest.mark.parametrize("name", BACKBONES)
def test_backbones_follow_the_method(name):
    import open_clip

    c, model = preset(name), BACKBONES[name]
    assert c.model.from_ == f"open_clip:{model}"
    assert tuple(model.split("/")) in open_clip.list_pretrained()
    assert (c.trainable, c.contrastive, c.mapper.warmup, c.sds.jacobian) == ("layer-norms", 1.0, None, "full")
    assert (c.sds.error, c.sds.weighting, c.sds.low, c.sds.high) == ("noise", "one", 0, None)
    assert (c.sds.beta, c.sds.start, c.sds.end, c.sds.steps) == ("scaled_linear", 0.00085, 0.012, 1000)
    assert c.train.batch_size % c.train.accumulate == 0
    assert [p.name for p in SdsClip(c).plan()] == ["clip"]


def test_tiny_learns_on_the_train_split_and_measures_on_test():
    c = preset("tiny")
    assert [p.name for p in SdsClip(c).plan()] == ["decoder", "mapper", "clip"]
    assert "split=train" in c.data.from_
    assert "split=train" in c.decoder.data
    assert c.decoder.data != c.data.from_  # the generator has seen other pictures
    assert all("split=test" in node.data for node in c.evaluate.on)


def test_contradictions_are_refused():
    with pytest.raises(ValidationError, match="nothing would be trained"):
        SdsClipConfig(**BASE, weight=0, contrastive=0)
    with pytest.raises(ValidationError, match="needs head"):
        TeacherConfig(kind="head", head="toyworld/generator-own")
    with pytest.raises(ValidationError, match="random map"):
        SdsClipConfig(**BASE, mapper={"train": False})
    with pytest.raises(ValidationError, match="weights random"):
        TeacherConfig(weights="random", sha256={"unet": "0" * 64})
