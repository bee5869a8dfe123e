from importlib import resources

import pytest
from pydantic import ValidationError

from clipgraft.config.load import load_recipe
from clipgraft.registry import Registry
from clipgraft_diffusion.flow import LogitNormal, Uniform
from clipgraft_diffusion.genhancer.config import FlowConfig, GenHancerConfig
from clipgraft_diffusion.genhancer.recipe import GenHancer

REGISTRY = Registry.discover(allow=["diffusion"])
TRAIN = {"steps": 2, "batch_size": 4, "lr": 1e-3}
BASE = {"model": {"from": "x"}, "data": {"from": "folder:y"}, "generator": {"train": TRAIN}, "clip": {"train": TRAIN}}
FILES = [p.name for p in resources.files("clipgraft_diffusion.recipes").iterdir()]
PRESETS = sorted(name for name in FILES if name.startswith("genhancer") and name.endswith(".yaml"))
PAPER = [p for p in PRESETS if any(word in p for word in ("openai", "metaclip", "siglip"))]


def preset(name):
    stem = name.removeprefix("genhancer").removeprefix("-").removesuffix(".yaml")
    recipe = f"diffusion/genhancer:{stem}" if stem else "diffusion/genhancer"
    given = [] if stem == "tiny" else ["data.from=folder:y", *([] if stem else ["model.from=x"])]
    return load_recipe(recipe, overrides=given, registry=REGISTRY)[1]


def config(**changes):
    return GenHancerConfig(**{**BASE, **changes})


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid(name):
    preset(name)


def test_every_backbone_of_the_paper_has_a_preset():
    stems = {p.removeprefix("genhancer-").removesuffix(".yaml") for p in PAPER}
    assert stems == {
        "openai-vit-l-14",
        "openai-vit-l-14-336",
        "metaclip-l-14",
        "metaclip-h-14",
        "siglip-so400m-224",
        "siglip-so400m-384",
    }


@pytest.mark.parametrize("name", PAPER)
def test_paper_presets_hold_the_papers_setting(name):
    c = preset(name)
    assert (c.denoiser.width, c.denoiser.heads, c.denoiser.depth, c.denoiser.single_depth) == (3072, 24, 2, 4)
    assert (c.condition.vec_dim, c.condition.txt_dim) == (768, 4096)
    assert (c.flow.law, c.flow.scale, c.denoiser.prediction, c.denoiser.positions) == (
        "logit-normal",
        1.0,
        "velocity",
        0,
    )
    assert (c.generator.train.steps, c.generator.train.lr, c.generator.train.batch_size) == (100_000, 1e-4, 256)
    assert (c.clip.train.steps, c.clip.train.lr, c.clip.train.batch_size) == (5000, 1e-5, 256)
    assert (c.clip.lora.rank, c.clip.lora.alpha, c.clip.lora.dropout, c.clip.lora.biases) == (16, 16, 0.1, True)
    assert ("projection" in c.clip.lora.targets) == ("siglip" not in name)
    assert {"q", "k", "v", "o", "mlp"} <= set(c.clip.lora.targets)
    assert c.clip.anchor.weight == 0
    assert c.generator.train.schedule == c.clip.train.schedule == "constant"
    assert c.latent.kind == "vae"


def test_plan_is_known_before_anything_is_built():
    assert [p.name for p in GenHancer(config()).plan()] == ["generator", "clip"]
    anchor_only = config(clip={"train": TRAIN, "weight": 0, "anchor": {"weight": 0.2}})
    assert [p.name for p in GenHancer(anchor_only).plan()] == ["clip"]


def test_training_nothing_is_refused():
    with pytest.raises(ValidationError, match="nothing would be trained"):
        config(clip={"train": TRAIN, "weight": 0})


def test_laws():
    assert FlowConfig(scale=0.5).build() == LogitNormal(0.5)
    assert FlowConfig(law="uniform", low=0.98).build() == Uniform(0.98, 1.0)
    with pytest.raises(ValidationError, match="below"):
        FlowConfig(law="uniform", low=0.9, high=0.9)
