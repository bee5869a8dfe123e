"""The conformance suite fails where a plugin is broken: one good plugin, and one change to it per rule."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from clipgraft.registry import Registry
from clipgraft.testing.declared import (
    configs_are_strict,
    help_lists_the_command,
    imports_no_other_plugin,
    manifest_is_light,
    presets_survive_yaml,
    targets_resolve,
)
from clipgraft.testing.opened import exports_as_it_says
from clipgraft.testing.subject import NotApplicable, Subject, Violation
from clipgraft.testing.trial import Trial, resumes_exactly, trains_as_declared, trains_under_bf16, write_pictures
from clipgraft.testing.two_ranks import ranks_agree

PLUGIN = """
from clipgraft.spec import CommandSpec, Component, hookimpl


@hookimpl
def clipgraft_recipes():
    return [
        Component(
            name="sample",
            target="clipgraft_sample.recipe:Sample",
            config="clipgraft_sample.recipe:SampleConfig",
            presets="clipgraft_sample.recipes",
        )
    ]


@hookimpl
def clipgraft_commands():
    return [CommandSpec(name="sample", target="clipgraft_sample.commands:app", help="Say hello.")]
"""

COMMANDS = '''
import typer

app = typer.Typer(no_args_is_help=True)


@app.callback()
def sample() -> None:
    """Say hello."""


@app.command()
def hello() -> None:
    """Say it."""
'''

RECIPE = '''
from copy import deepcopy

import torch
from pydantic import Field
from torch import nn
from torch.nn import functional as F

from clipgraft.config.schema import Config, RunConfig, TrainConfig
from clipgraft.distributed import gather_with_grad
from clipgraft.recipe import StagePlan
from clipgraft.stage import ContrastiveStage


class NoiseConfig(Config):
    scale: float = Field(0.1, ge=0, description="of the noise")


class SampleConfig(RunConfig):
    noise: NoiseConfig = NoiseConfig()
    train: TrainConfig


class Sample:
    def __init__(self, config):
        self.config = config

    def plan(self):
        return [StagePlan("learn", self.build)]

    def check(self, run):
        return []

    def build(self, run):
        return Learn(run.encoder, self.config, run.train_source())


class Learn(ContrastiveStage):
    """Contrast with dropout, and a queue of the last embeddings to stay away from."""

    wants_text = True

    def __init__(self, encoder, config, source):
        super().__init__("learn", train=config.train, source=source)
        self.encoder, self.dropout = encoder, nn.Dropout(0.2)
        self.teacher = self.freeze(deepcopy(encoder))
        self.freeze(encoder.text)
        self.register_buffer("last", torch.zeros(encoder.image.embed_dim))

    def encode(self, batch):
        pixels = self.encoder.preprocess.normalize(batch.pixels)
        image, text = self.encoder(pixels, batch.text)
        return self.dropout(image.pooled.float()), text.pooled.float(), self.teacher.image(pixels).pooled.float()

    def loss_from(self, features, batch):
        from clipgraft.types import StepOutput

        image, text, taught = (gather_with_grad(F.normalize(x, dim=-1)) for x in features)
        logits = self.encoder.logit_scale.exp() * image @ text.T
        loss = F.cross_entropy(logits, torch.arange(len(logits))) + (image - taught).square().mean()
        loss = loss + 0.1 * (image @ self.last).mean()
        if self.training:
            self.last = image.mean(0).detach()
        return StepOutput(loss, {"all": loss.detach()}, len(batch))

    def current_encoder(self):
        return self.encoder
'''

TINY = """
model: {from: MODEL}
data: {from: "csv:PICTURES"}
train: {steps: 100, batch_size: 8, lr: 1.0e-3, clip_norm: null}
"""

CURRENT = "    def current_encoder"
Make = Callable[..., Subject]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Install ``clipgraft-sample`` with (file, old text, new text) changes, for this process and those it starts."""
    from clipgraft.checkpoint import write_export
    from clipgraft.testing.tiny import tiny_clip

    def install(*changes: tuple[str, str, str]) -> Subject:
        tiny = TINY.replace("MODEL", str(write_export(tiny_clip(), tmp_path / "model")))
        tiny = tiny.replace("PICTURES", str(write_pictures(tmp_path / "pictures")))
        files = {"plugin.py": PLUGIN, "commands.py": COMMANDS, "recipe.py": RECIPE, "recipes/sample-tiny.yaml": tiny}
        for name, old, new in changes:
            assert old in files[name], f"{name} no longer holds {old!r}"
            files[name] = files[name].replace(old, new)
        site = tmp_path / "site"
        for name, text in {"__init__.py": "", **files}.items():
            path = site / "clipgraft_sample" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, "utf-8")
        info = site / "clipgraft_sample-0.1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: clipgraft-sample\nVersion: 0.1\n", "utf-8")
        (info / "entry_points.txt").write_text("[clipgraft.v1]\nsample = clipgraft_sample.plugin\n", "utf-8")
        monkeypatch.syspath_prepend(str(site))
        monkeypatch.setenv("CLIPGRAFT_PLUGINS", "sample")
        importlib.invalidate_caches()
        return Subject("sample")

    yield install
    for name in [name for name in sys.modules if name.partition(".")[0] == "clipgraft_sample"]:
        del sys.modules[name]


def trial(subject: Subject, folder: Path) -> Trial:
    return Trial(subject, "sample/sample", folder / "trial")


# -- declarations --------------------------------------------------------------------------------------------------


def test_a_good_plugin_declares_well(make):
    subject = make()
    registry = subject.registry()
    manifest_is_light(subject)
    assert targets_resolve(subject, registry) == [] and presets_survive_yaml(subject, registry) == []
    configs_are_strict(subject, registry)
    help_lists_the_command(subject, registry)
    imports_no_other_plugin(subject)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("from clipgraft.spec", "import torch\nfrom clipgraft.spec", "the manifest imports torch"),
        ("    return [\n        Comp", "    import yaml\n    return [\n        Comp", "the manifest imports yaml"),
        ("from clipgraft.spec", "from clipgraft_sample.recipe import Sample\nfrom clipgraft.spec", "imports torch"),
    ],
)
def test_a_heavy_manifest_is_found(make, old, new, said):
    with pytest.raises(Violation, match=said):
        manifest_is_light(make(("plugin.py", old, new)))


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [
        ("plugin.py", 'recipe:Sample"', 'recipe:Simple"', "recipe sample/sample: .*no attribute 'Simple'"),
        ("plugin.py", "recipe:SampleConfig", "receipt:SampleConfig", "No module named 'clipgraft_sample.receipt'"),
        ("plugin.py", "recipe:SampleConfig", "recipe:Sample", "is no pydantic model"),
        ("plugin.py", "clipgraft_sample.recipes", "clipgraft_sample.presets", "no sample.*yaml in .*packaged"),
        ("plugin.py", "commands:app", "commands:typo", "command sample: .*no attribute 'typo'"),
        ("recipe.py", "    def check(self, run):\n        return []\n", "", "has no check"),
    ],
)
def test_a_target_that_does_not_resolve_is_found(make, file, old, new, said):
    subject = make((file, old, new))
    with pytest.raises(Violation, match=said):
        targets_resolve(subject, subject.registry())


def test_a_claim_over_a_recipe_that_is_not_there_is_found(make):
    hook = (
        "\n@hookimpl\ndef clipgraft_claims():\n"
        "    return [Component(name='better', target='clipgraft_sample.claims:BETTER')]\n\n\n"
        "@hookimpl\ndef clipgraft_comm"
    )
    claims = (
        "from clipgraft.claims import Arm, Claim, Gain\n"
        "BETTER = Claim(name='better', statement='', paper='', bases=('x',), budget=1, controls=(), kept=(),\n"
        "    method=Arm(name='m', recipe='sample:tny'), gains=(Gain(metric='a.b', over='before', at_least=0),))\n"
    )
    subject = make(("plugin.py", "\n@hookimpl\ndef clipgraft_comm", hook))
    (Path(sys.path[0]) / "clipgraft_sample" / "claims.py").write_text(claims, "utf-8")
    with pytest.raises(Violation, match=r"claim better, arm m: unknown sample/sample preset 'tny'"):
        targets_resolve(subject, subject.registry())


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (
            "class NoiseConfig(Config)",
            "from pydantic import BaseModel\n\n\nclass NoiseConfig(BaseModel)",
            "NoiseConfig",
        ),
        ("SampleConfig(RunConfig):", "SampleConfig(RunConfig, extra='ignore'):", "SampleConfig accepts a key"),
        ("Field(0.1, ge=0", "Field(-0.1, ge=0", "the default -0.1 of scale is refused"),
        ("scale: float = Field(0.1", "scale: float = Field(None", "the default None of scale is refused"),
    ],
)
def test_a_loose_config_is_found(make, old, new, said):
    subject = make(("recipe.py", old, new))
    with pytest.raises(Violation, match=said):
        configs_are_strict(subject, subject.registry())


def test_presets_that_do_not_load_or_change_are_found(make):
    subject = make(("recipes/sample-tiny.yaml", "train:", "trian: {steps: 1}\ntrain:"))
    with pytest.raises(Violation, match=r"preset sample/sample:tiny: unknown key trian"):
        presets_survive_yaml(subject, subject.registry())


GROWS = """
    twice: float = 1.0

    @model_validator(mode="before")
    def grow(cls, values):
        return {**values, "twice": 2.0 * values.get("twice", 1.0)}
"""


def test_a_value_that_yaml_changes_is_found(make):
    subject = make(
        ("recipe.py", "import Field", "import Field, model_validator"),
        ("recipe.py", "    noise: NoiseConfig = NoiseConfig()\n", "    noise: NoiseConfig = NoiseConfig()\n" + GROWS),
    )
    with pytest.raises(Violation, match=r"changes on its way through YAML: twice was 2\.0, became 4\.0"):
        presets_survive_yaml(subject, subject.registry())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ([("plugin.py", "\n@hookimpl\ndef clipgraft_commands", "\ndef not_a_hook")], "is offered by no hook"),
        ([("plugin.py", 'help="Say hello."', 'help=""')], "its CommandSpec has no help"),
        ([("commands.py", "@app.command()", "@app.command(hidden=True)")], "does not list hello"),
        ([("commands.py", '    """Say it."""', "    return")], "hello says nothing in its help"),
        ([("commands.py", "import typer", "import torch\nimport typer")], "imports torch"),
        ([("commands.py", "import typer", "import typer\n\nraise OSError('gone')")], "exits with 1: .*gone"),
    ],
)
def test_help_that_lacks_the_command_is_found(make, changes, said):
    subject = make(*changes)
    with pytest.raises(Violation, match=said):
        help_lists_the_command(subject, subject.registry())


@pytest.mark.parametrize(
    "line",
    [
        "import clipgraft_other",
        "def late():\n    from clipgraft_other.parts import head",
        "def late():\n    import importlib\n    return importlib.import_module('clipgraft_other.parts')",
    ],
)
def test_the_import_of_another_plugin_is_found(make, line):
    with pytest.raises(Violation, match=r"recipe\.py line \d+ imports clipgraft_other"):
        imports_no_other_plugin(make(("recipe.py", "import torch\n", f"import torch\n\n{line}\n\n")))


def test_a_broken_or_absent_plugin_is_no_subject(make):
    subject = make(("plugin.py", 'name="sample",\n            target', 'name="Sample",\n            target'))
    with pytest.raises(Violation, match="plugin sample is broken: "):
        subject.registry()
    with pytest.raises(Exception, match="plugin 'absent' is not installed"):
        Subject("absent").registry()


# -- runs ----------------------------------------------------------------------------------------------------------


def test_a_good_recipe_runs_well(make, tmp_path):
    good = trial(make(), tmp_path)
    trains_as_declared(good)
    trains_under_bf16(good)
    resumes_exactly(good)
    assert not good.replaced and good.whole[1].steps == 4


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (  # the teacher learns although it was frozen
            "    def current_encoder",
            f"    def after_update(self, step):\n        self.teacher.logit_scale.data.add_(1)\n\n{CURRENT}",
            r"Encoder\.0\.logit_scale changed, and it is frozen",
        ),
        (  # running statistics of a frozen module
            "        self.freeze(encoder.text)\n",
            "        self.freeze(encoder.text)\n        self.norm = self.freeze(nn.BatchNorm1d(16))\n"
            "        self.norm.train = lambda mode=True: nn.Module.train(self.norm, True)\n        self.norm.train()\n",
            "frozen module BatchNorm1d is in train mode",
        ),
        (  # a tensor without gradient that the forward changes
            "        pixels = self.encoder.preprocess",
            "        self.encoder.image.tower.class_embedding.requires_grad_(False)\n"
            "        self.encoder.image.tower.class_embedding.data.mul_(0.9)\n"
            "        pixels = self.encoder.preprocess",
            "class_embedding changed, and it has no gradient",
        ),
        (
            "        self.freeze(encoder.text)\n",
            "        self.freeze(encoder.text)\n        self.unused = nn.Linear(2, 2)\n",
            r"no gradient reached unused\.weight",
        ),
        (
            "        loss = loss + 0.1 * (image",
            "        loss = loss + 0 * self.unused.weight.sum()\n        loss = loss + 0.1 * (image",
            r"the gradient of unused\.weight was zero in each of 4 steps",
        ),
        (
            "    def current_encoder",
            "    def param_groups(self):\n        return [{'params': [*self.encoder.image.parameters()]}]\n\n"
            "    def current_encoder",
            r"encoder\.logit_scale has a gradient but no optimizer group",
        ),
        ('{"all": loss.detach()}', '{"all": loss.detach() * float("nan")}', "all is nan in step 1"),
        ("        return StepOutput(loss,", "        return StepOutput(loss.log() - loss.log() / 0,", "not finite"),
        ("    def build(self, run):\n", "    def build(self, run):\n        raise KeyError('weights')\n", "KeyError"),
    ],
)
def test_a_stage_that_does_not_do_what_it_declares_is_found(make, tmp_path, old, new, said):
    changes = [("recipe.py", old, new)]
    if "unused.weight.sum" in new:
        extra = "        self.freeze(encoder.text)\n"
        changes.insert(0, ("recipe.py", extra, f"{extra}        self.unused = nn.Linear(2, 2, bias=False)\n"))
    with pytest.raises(Violation, match=said):
        trains_as_declared(trial(make(*changes), tmp_path))


def test_a_loss_that_is_not_finite_in_bf16_is_found(make, tmp_path):
    """1e-45 is a number in fp32 and nothing in bf16."""
    line = "        loss = loss + 0.1 * (image"
    worse = (
        "        if torch.is_autocast_enabled('cpu'):\n"
        "            loss = loss + 0 * (image.detach().bfloat16() * 1e-45).sum().log()\n"
    )
    bad = trial(make(("recipe.py", line, worse + line)), tmp_path)
    trains_as_declared(bad)
    with pytest.raises(Violation, match="the loss is nan at step 1"):
        trains_under_bf16(bad)


def test_state_that_a_resume_loses_is_found(make, tmp_path):
    """The queue as an attribute that nobody saves."""
    bad = trial(make(("recipe.py", 'self.register_buffer("last", ', "self.last = (")), tmp_path)
    trains_as_declared(bad)
    with pytest.raises(Violation, match=r"after a resume export.* differs"):
        resumes_exactly(bad)


def test_a_draw_from_a_generator_of_its_own_is_found(make, tmp_path):
    own = "        self.own = torch.Generator().manual_seed(0)\n        self.freeze(encoder.text)\n"
    noise = "        image = image + 0.1 * torch.randn(image.shape, generator=self.own)\n        logits ="
    bad = trial(
        make(("recipe.py", "        self.freeze(encoder.text)\n", own), ("recipe.py", "        logits =", noise)),
        tmp_path,
    )
    with pytest.raises(Violation, match="after a resume"):
        resumes_exactly(bad)


LIES = '''

class Louder(nn.Module):
    """The tower's own names and weights, and features that they don't give."""

    def __init__(self, image):
        super().__init__()
        self.__dict__.update(image.__dict__)
        self.inner = (image,)

    def forward(self, *given):
        from dataclasses import replace

        found = self.inner[0](*given)
        return replace(found, pooled=found.pooled + 1.0)
'''


def test_an_export_that_lies_about_l0_is_found(make, tmp_path):
    """The encoder that the stage leaves computes what its weights alone don't."""
    line = "        return self.encoder\n"
    lie = "        found = deepcopy(self.encoder)\n        found.image = Louder(found.image)\n        return found\n"
    bad = trial(make(("recipe.py", line, lie + LIES)), tmp_path)
    with pytest.raises(Violation, match="the export says L0, but its image features differ"):
        exports_as_it_says(bad)


@pytest.mark.slow
def test_a_good_export_opens_without_the_plugin(make, tmp_path):
    assert exports_as_it_says(trial(make(), tmp_path)) == "L0"


@pytest.mark.slow
def test_a_good_recipe_agrees_on_two_ranks(make, tmp_path):
    ranks_agree(trial(make(), tmp_path))


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (
            "        loss = loss + 0.1 *",
            "        loss = loss * (1 + rank())\n        loss = loss + 0.1 *",
            "of the whole batch",
        ),
        pytest.param(
            "gather_with_grad(F.normalize(x, dim=-1))",
            "F.normalize(x, dim=-1)",
            "of the whole batch; gather",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_rank_dependent_gradient_is_found(make, tmp_path, old, new, said):
    imported = ("recipe.py", "import gather_with_grad", "import gather_with_grad, rank")
    with pytest.raises(Violation, match=f"on two ranks: .*{said}"):
        ranks_agree(trial(make(imported, ("recipe.py", old, new)), tmp_path))


@pytest.mark.slow
def test_weights_that_depend_on_the_rank_are_found(make, tmp_path):
    more = f"    def after_update(self, step):\n        self.encoder.logit_scale.data.add_(rank())\n\n{CURRENT}"
    imported = ("recipe.py", "import gather_with_grad", "import gather_with_grad, rank")
    with pytest.raises(Violation, match="the ranks end a step with other weights"):
        ranks_agree(trial(make(imported, ("recipe.py", "    def current_encoder", more)), tmp_path))


# -- what doesn't apply --------------------------------------------------------------------------------------------


def test_tiny_settings_of_a_plugin_that_is_not_there_are_replaced_or_skipped(make, tmp_path):
    subject = make(("recipes/sample-tiny.yaml", "csv:", "toyworld/images?n=8&x="))
    replaced = trial(subject, tmp_path)
    trains_as_declared(replaced)
    assert replaced.replaced


def test_a_recipe_that_needs_a_part_of_an_absent_plugin_is_skipped(make, tmp_path):
    subject = make(
        ("recipes/sample-tiny.yaml", "train:", "teacher: toyworld/teacher\ntrain:"),
        ("recipe.py", "    train: TrainConfig", "    teacher: str = 'none'\n    train: TrainConfig"),
    )
    with pytest.raises(NotApplicable, match=r"plugin toyworld in teacher; pip install clipgraft-toyworld"):
        trains_as_declared(trial(subject, tmp_path))


def test_a_plugin_in_one_file_is_a_subject(tmp_path, monkeypatch):
    monkeypatch.setenv("CLIPGRAFT_PLUGINS", "")
    path = tmp_path / "lone_loss.py"
    text = "from clipgraft.spec import Component, hookimpl\n\n\n@hookimpl\ndef clipgraft_losses():\n"
    path.write_text(
        f"{text}    return [Component(name='x', target='clipgraft.losses.contrastive:ClipLoss')]\n", "utf-8"
    )
    subject = Subject.of(str(path))
    manifest_is_light(subject)
    assert targets_resolve(subject, subject.registry()) == []
    imports_no_other_plugin(subject)
    with pytest.raises(NotApplicable, match="lone-loss offers no command"):
        help_lists_the_command(subject, subject.registry())


# -- pytest --------------------------------------------------------------------------------------------------------


def run_pytest(*arguments: str) -> subprocess.CompletedProcess[str]:
    """pytest in a process of its own, at a place without any file of ours."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "clipgraft.testing.pytest_plugin"]
    if "clipgraft.testing.pytest_plugin" in str(importlib.metadata.entry_points(group="pytest11")):
        command = command[:-2]
    return subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_the_suite_needs_no_file(make, tmp_path, monkeypatch):
    make(("plugin.py", 'recipe:Sample"', 'recipe:Simple"'))
    monkeypatch.chdir(tmp_path)
    done = run_pytest(
        "--pyargs", "clipgraft.testing.conformance", "--clipgraft-plugin", "sample", "-k", "manifest or resolve"
    )
    assert "1 failed, 1 passed" in done.stdout, done.stdout + done.stderr
    assert "recipe sample/sample: clipgraft_sample.recipe:Simple can't be imported" in done.stdout


def test_the_suite_asks_for_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run_pytest("--pyargs", "clipgraft.testing.conformance")
    assert done.returncode and "--clipgraft-plugin NAME" in done.stdout + done.stderr


@pytest.mark.slow
def test_all_eleven_checks_pass_and_an_absent_plugin_fails_them(make, tmp_path, monkeypatch):
    make()
    monkeypatch.chdir(tmp_path)
    arguments = ["--pyargs", "clipgraft.testing.conformance", "--clipgraft-plugin"]
    assert "11 passed" in run_pytest(*arguments, "sample").stdout
    absent = run_pytest(*arguments, "absent")
    assert "11 failed" in absent.stdout and "plugin 'absent' is not installed" in absent.stdout


def test_discovery_is_left_as_it_was(make):
    make()
    assert [info.name for info in Registry.discover().plugins if info.status == "ok"] == ["core", "sample"]
