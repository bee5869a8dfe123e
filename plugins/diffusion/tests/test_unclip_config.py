from importlib import resources

import pytest
from pydantic import ValidationError

from clipgraft.config.load import load_recipe
from clipgraft.registry import Registry
from clipgraft_diffusion.unclip.config import InverterConfig, OwnDecoderConfig, Un2ClipConfig
from clipgraft_diffusion.unclip.recipe import Un2Clip

REGISTRY = Registry.discover(allow=["diffusion"])
TRAIN = {"steps": 2, "batch_size": 4, "lr": 1e-3}
BASE = {"model": {"from": "x"}, "data": {"from": "folder:y"}, "clip": {"train": TRAIN}}
FILES = [p.name for p in resources.files("clipgraft_diffusion.unclip_recipes").iterdir()]
PRESETS = sorted(name.removesuffix(".yaml") for name in FILES if name.endswith(".yaml"))
PUBLIC = {
    "openai-vit-l-14": ("ViT-L-14-quickgelu/openai", "unclip-small"),
    "openai-vit-l-14-336": ("ViT-L-14-336-quickgelu/openai", "unclip-small"),
    "vit-h-14-laion2b": ("ViT-H-14/laion2b_s32b_b79k", "unclip"),
}
OWN = {
    "metaclip-l-14": "ViT-L-14-quickgelu/metaclip_fullcc",
    "metaclip-h-14": "ViT-H-14-quickgelu/metaclip_fullcc",
    "siglip-so400m-224": "ViT-SO400M-14-SigLIP/webli",
    "siglip-so400m-384": "ViT-SO400M-14-SigLIP-384/webli",
    "dfn-h-14": "ViT-H-14-quickgelu/dfn5b",
    "dfn-h-14-378": "ViT-H-14-378-quickgelu/dfn5b",
}


def preset(name):
    given = [] if name == "tiny" else ["data.from=folder:y"]
    return load_recipe(f"diffusion/un2clip:{name}", overrides=given, registry=REGISTRY)[1]


def test_the_presets_are_these():
    assert {"un2clip", "un2clip-tiny", *(f"un2clip-{name}" for name in [*PUBLIC, *OWN])} == set(PRESETS)
    default = load_recipe("diffusion/un2clip", overrides=["data.from=folder:y", "model.from=x"], registry=REGISTRY)[1]
    assert default.denoiser.kind == "train"
    assert not Un2Clip(default)._level_problems()


@pytest.mark.parametrize("name", PUBLIC)
def test_backbones_with_a_public_decoder_take_it(name):
    import open_clip

    c, (model, decoder) = preset(name), PUBLIC[name]
    assert c.model.from_ == f"open_clip:{model}"
    assert tuple(model.split("/")) in open_clip.list_pretrained()
    assert (c.denoiser.kind, c.denoiser.size) == ("diffusers", 768)
    assert c.denoiser.from_.endswith(f"stable-diffusion-2-1-{decoder}")
    assert (c.noise.beta, c.noise.start, c.noise.end, c.noise.steps) == ("scaled_linear", 0.00085, 0.012, 1000)
    assert (c.noise.low, c.noise.high, c.noise.error, c.condition.noise_level) == (0, None, "noise", 0)
    assert [p.name for p in Un2Clip(c).plan()] == ["clip"]


@pytest.mark.parametrize("name", OWN)
def test_other_backbones_train_a_decoder_at_the_levels_that_are_asked(name):
    import open_clip

    c = preset(name)
    assert c.model.from_ == f"open_clip:{OWN[name]}"
    assert tuple(OWN[name].split("/")) in open_clip.list_pretrained()
    assert (c.denoiser.kind, c.decoder.noise_level, c.clip.tune) == ("train", "uniform", "lora")
    assert [p.name for p in Un2Clip(c).plan()] == ["decoder", "clip"]
    assert not Un2Clip(c)._level_problems()


@pytest.mark.parametrize("name", [*PUBLIC, *OWN])
def test_a_preset_says_that_its_numbers_are_ours(name):
    text = resources.files("clipgraft_diffusion.unclip_recipes").joinpath(f"un2clip-{name}.yaml").read_text()
    assert "training settings were not available to us" in text.replace("\n# ", " ")


def test_tiny_learns_on_the_train_split_and_is_measured_on_test():
    c = preset("tiny")
    assert (c.denoiser.kind, c.denoiser.random, c.condition.shuffled) == ("train", False, False)
    assert "split=train" in c.data.from_
    assert c.decoder.data is None
    assert all("split=test" in node.data for node in c.evaluate.on)


def test_the_anchor_only_control_has_one_stage():
    anchored = {"train": TRAIN, "weight": 0, "anchor": {"weight": 1}}
    assert [p.name for p in Un2Clip(Un2ClipConfig(**BASE | {"clip": anchored})).plan()] == ["clip"]


def test_contradictions_are_refused():
    with pytest.raises(ValidationError, match="nothing would be trained"):
        Un2ClipConfig(**BASE | {"clip": {"train": TRAIN, "weight": 0}})
    with pytest.raises(ValidationError, match="needs from"):
        InverterConfig(kind="diffusers")
    with pytest.raises(ValidationError, match="needs head"):
        InverterConfig(kind="head", head="toyworld/generator")
    with pytest.raises(ValidationError, match="sha256"):
        InverterConfig(kind="diffusers", weights="random", sha256={"unet": "0" * 64}, **{"from": "x"})
    with pytest.raises(ValidationError, match="noise_level"):
        OwnDecoderConfig(noise_level=1000)
    with pytest.raises(ValidationError, match="noise_level"):
        Un2ClipConfig(**BASE, condition={"noise_level": "some"})


def test_off_on_the_command_line_is_no_noise():
    c = load_recipe("diffusion/un2clip:tiny", overrides=["condition.noise_level=off"], registry=REGISTRY)[1]
    assert c.condition.noise_level == "off"
