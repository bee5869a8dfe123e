from importlib import resources

import pytest
from pydantic import ValidationError

from clipgraft.config.load import load_recipe
from clipgraft.registry import Registry
from clipgraft_diffusion.diva.config import CriticConfig, DivaConfig, NoiseConfig
from clipgraft_diffusion.diva.recipe import Diva

REGISTRY = Registry.discover(allow=["diffusion"])
TRAIN = {"steps": 2, "batch_size": 4, "lr": 1e-3}
BASE = {"model": {"from": "x"}, "data": {"from": "folder:y"}, "train": TRAIN}
FILES = [p.name for p in resources.files("clipgraft_diffusion.recipes").iterdir()]
PRESETS = sorted(name.removesuffix(".yaml") for name in FILES if name.startswith("diva"))

# backbone: open_clip name, patches, condition tokens, combination (the official code's table)
TABLE = {
    "openai-vit-l-14": ("ViT-L-14-quickgelu/openai", 256, 77, "add"),
    "openai-vit-l-14-336": ("ViT-L-14-336-quickgelu/openai", 576, 77, "add"),
    "metaclip-l-14": ("ViT-L-14-quickgelu/metaclip_fullcc", 256, 257, "mean-add"),
    "metaclip-h-14": ("ViT-H-14-quickgelu/metaclip_fullcc", 256, 257, "mean-add"),
    "siglip-so400m-224": ("ViT-SO400M-14-SigLIP/webli", 256, 43, "mean-add"),
    "siglip-so400m-384": ("ViT-SO400M-14-SigLIP-384/webli", 729, 73, "mean-add"),
    "dfn-h-14": ("ViT-H-14-quickgelu/dfn5b", 256, 257, "mean-add"),
    "dfn-h-14-378": ("ViT-H-14-378-quickgelu/dfn5b", 729, 365, "mean-add"),
}


def preset(name):
    given = [] if name.startswith("tiny") else ["data.from=folder:y"]
    return load_recipe(f"diffusion/diva:{name}", overrides=given, registry=REGISTRY)[1]


def test_every_backbone_of_the_paper_has_a_preset():
    assert {"diva", "diva-own", "diva-tiny", "diva-tiny-own", *(f"diva-{name}" for name in TABLE)} == set(PRESETS)
    default = load_recipe("diffusion/diva", overrides=["data.from=folder:y", "model.from=x"], registry=REGISTRY)[1]
    assert default.recap.kind == "all"


@pytest.mark.parametrize("name", TABLE)
def test_paper_presets_hold_the_official_setting(name):
    import open_clip

    c, (model, patches, tokens, combine) = preset(name), TABLE[name]
    assert c.model.from_ == f"open_clip:{model}"
    assert tuple(model.split("/")) in open_clip.list_pretrained()
    assert (1 + c.recap.build().count(patches), c.condition.combine) == (tokens, combine)
    t = c.train
    assert (t.optimizer, t.lr, t.momentum, t.weight_decay, t.clip_norm) == ("sgd", 1e-4, 0.9, 0.0, 1.0)
    assert (t.steps, t.batch_size, t.accumulate, t.warmup, t.schedule) == (4600, 16 * 8 * 5, 5, 23, "cosine")
    assert (c.noise.beta, c.noise.start, c.noise.end, c.noise.steps) == ("scaled_linear", 0.00085, 0.012, 1000)
    assert (c.noise.low, c.noise.high, c.noise.error, c.passes, c.denoiser.size) == (0, None, "noise", 2, 512)
    assert (c.anchor.weight, c.condition.unit, c.condition.train, c.condition.captions) == (0, False, True, None)
    assert (c.crop, c.precision, c.compat) == ((0.9, 1.0), "bf16", "fixed")


def test_tiny_is_a_frozen_registered_generator_on_the_train_split_measured_on_test():
    c = preset("tiny")
    assert (c.denoiser.kind, c.denoiser.random, c.condition.shuffled) == ("head", False, False)
    assert "split=train" in c.data.from_
    assert "split=train" in c.condition.captions
    assert all("split=test" in node.data for node in c.evaluate.on)


def test_tiny_own_pretrains_on_other_pictures_of_the_train_split_and_keeps_tinys_second_stage():
    c, tiny = preset("tiny-own"), preset("tiny")
    assert (c.denoiser.kind, c.denoiser.random, c.condition.shuffled) == ("train", False, False)
    assert "split=train" in c.data.from_ and "seed" not in c.data.from_
    assert "split=train" in c.decoder.data and "seed=1" in c.decoder.data
    for name in ("train", "noise", "passes", "anchor", "recap", "weight", "evaluate"):
        assert getattr(c, name) == getattr(tiny, name)


def test_plan_is_one_stage_or_two_where_the_run_pretrains_its_generator():
    assert [p.name for p in Diva(DivaConfig(**BASE)).plan()] == ["clip"]
    own = BASE | {"denoiser": {"kind": "train"}, "anchor": {"weight": 1}}
    assert [p.name for p in Diva(DivaConfig(**own)).plan()] == ["decoder", "clip"]
    assert [p.name for p in Diva(DivaConfig(**own, weight=0)).plan()] == ["clip"]


def test_contradictions_are_refused():
    with pytest.raises(ValidationError, match="nothing would be trained"):
        DivaConfig(**BASE, weight=0)
    with pytest.raises(ValidationError, match="needs head"):
        CriticConfig(kind="head", head="toyworld/generator")
    with pytest.raises(ValidationError, match="below"):
        NoiseConfig(low=900, high=900)
    with pytest.raises(ValidationError, match="at most"):
        NoiseConfig(high=1001)
