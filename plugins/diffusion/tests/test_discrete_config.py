from importlib import resources

import pytest
from pydantic import ValidationError

from clipgraft.config.load import load_recipe
from clipgraft.registry import Registry
from clipgraft_diffusion.genhancer.discrete import genhancer_discrete
from clipgraft_diffusion.genhancer.discrete_config import DiscreteConfig, MaskConfig
from clipgraft_diffusion.genhancer.recipe import GenHancer
from clipgraft_diffusion.masked import MaskLaw

REGISTRY = Registry.discover(allow=["diffusion"])
TRAIN = {"steps": 2, "batch_size": 4, "lr": 1e-3}
BASE = {"model": {"from": "x"}, "data": {"from": "folder:y"}, "generator": {"train": TRAIN}, "clip": {"train": TRAIN}}
FILES = sorted(p.name for p in resources.files("clipgraft_diffusion.discrete_recipes").iterdir())
STEMS = [f.removeprefix("genhancer-discrete").removeprefix("-").removesuffix(".yaml") for f in FILES]
PAPER = [s for s in STEMS if s not in ("", "tiny")]


def preset(recipe, stem):
    given = [] if stem == "tiny" else ["data.from=folder:y", *([] if stem else ["model.from=x"])]
    return load_recipe(f"diffusion/{recipe}{':' if stem else ''}{stem}", overrides=given, registry=REGISTRY)[1]


def config(**changes):
    return DiscreteConfig(**{**BASE, **changes})


def test_there_is_a_preset_for_every_backbone_of_the_continuous_one():
    continuous = {p.name for p in resources.files("clipgraft_diffusion.recipes").iterdir()}
    assert {f"genhancer{'-' if s else ''}{s}.yaml" for s in STEMS} == {
        f for f in continuous if f.startswith("genhancer")
    }


@pytest.mark.parametrize("stem", STEMS)
def test_presets_are_valid(stem):
    assert isinstance(preset("genhancer-discrete", stem), DiscreteConfig)


@pytest.mark.parametrize("stem", PAPER)
def test_backbones_share_model_stages_and_adapters_with_the_continuous_preset(stem):
    """The paper uses "the same" stages, rates, adapters and data for both denoisers."""
    ours, theirs = preset("genhancer-discrete", stem), preset("genhancer", stem)
    assert (ours.model, ours.crop, ours.precision) == (theirs.model, theirs.crop, theirs.precision)
    assert ours.generator == theirs.generator
    assert ours.clip.model_dump(exclude={"mask"}) == theirs.clip.model_dump(exclude={"flow"})
    assert (ours.perceiver.layers, ours.mask.low, ours.mask.high, ours.codes.kind) == (6, 0.5, 0.9, "vq")
    assert ours.clip.mask is None


def test_the_config_alone_does_not_choose_the_wrong_denoiser():
    with pytest.raises(TypeError, match="genhancer_discrete"):
        GenHancer(config())


def test_plan_is_known_before_anything_is_built():
    assert [p.name for p in genhancer_discrete(config()).plan()] == ["generator", "clip"]
    anchor_only = config(clip={"train": TRAIN, "weight": 0, "anchor": {"weight": 0.2}})
    assert [p.name for p in genhancer_discrete(anchor_only).plan()] == ["clip"]


def test_training_nothing_is_refused():
    with pytest.raises(ValidationError, match="nothing would be trained"):
        config(clip={"train": TRAIN, "weight": 0})


def test_masks():
    assert MaskConfig().build() == MaskLaw(0.5, 0.9)
    assert MaskConfig(low=0.9, high=0.9).build() == MaskLaw(0.9, 0.9)
    with pytest.raises(ValidationError, match="above"):
        MaskConfig(low=0.9, high=0.5)
    with pytest.raises(ValidationError):
        MaskConfig(high=1.0)


def test_a_flow_has_no_place_here():
    with pytest.raises(ValidationError):
        config(clip={"train": TRAIN, "flow": {"scale": 1.0}})
