"""Configuration: strict scalars, layers, presets, nodes, and errors that name the key and the fix."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Annotated, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field

from clipgraft.config.describe import describe
from clipgraft.config.load import assign, dump_yaml, gather, load_recipe, load_run, merge, parse_yaml, validate
from clipgraft.config.schema import Config, GraftRef, LossRef, RunConfig, TrainConfig
from clipgraft.errors import InputError, PluginError
from clipgraft.registry import KNOWN_PLUGINS, Registry

PACKAGE = "clipgraft_sampleconfig"
FILES = {
    "__init__.py": "",
    "plugin.py": f"""
from clipgraft.spec import Component, hookimpl

def part(name, **more):
    return Component(name=name, target="{PACKAGE}.parts:make", presets="{PACKAGE}.recipes", **more)

@hookimpl
def clipgraft_recipes():
    config = "{PACKAGE}.parts:SampleConfig"
    return [part("sharpen", config=config), part("sharpen-more", config=config),
            part("needy", config=config, needs=("absent-package",))]

@hookimpl
def clipgraft_losses():
    return [part("pull", config="{PACKAGE}.parts:Pull"), part("bare")]
""",
    "parts.py": """
from pydantic import Field
from clipgraft.config.schema import Config, LossRef, RunConfig, TrainConfig

class Pull(Config):
    strength: float = Field(0.5, gt=0, description="how hard [newton]")
    layers: tuple[int, ...] = (1, 2)

class SampleConfig(RunConfig):
    losses: tuple[LossRef, ...] = ()
    named: dict[str, LossRef] = {}
    train: TrainConfig = TrainConfig(steps=5, batch_size=2, lr=1e-3)

def make(config):
    return config
""",
    "recipes/sharpen.yaml": """
model: {from: toy}
data: {from: 'folder:x'}
train: {steps: 10, batch_size: 4, lr: 1e-4}
""",
    "recipes/sharpen-tiny.yaml": "extends: sharpen\ntrain: {steps: 2}\nlosses: [{use: pull, strength: 2}]\n",
    "recipes/sharpen-loop.yaml": "extends: sharpen:loop\n",
    "recipes/sharpen-more.yaml": "model: {from: toy}\ndata: {from: 'folder:x'}\nseed: 7\n",
    "recipes/sharpen-more-tiny.yaml": "extends: sampleconfig/sharpen-more\nseed: 8\n",
    "recipes/other.txt": "",
}


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    """A registry of one sample plugin with recipes, presets and losses."""
    for name, text in FILES.items():
        path = tmp_path / "site" / PACKAGE / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")
    info = tmp_path / "site" / "clipgraft_sampleconfig-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: clipgraft-sampleconfig\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[clipgraft.v1]\nsampleconfig = {PACKAGE}.plugin\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setitem(KNOWN_PLUGINS, "sampleknown", "")
    for module in [m for m in sys.modules if m.startswith(PACKAGE)]:
        del sys.modules[module]
    return Registry.discover(allow=["sampleconfig"], strict=True)


def load(registry: Registry, reference: str = "sharpen", *overrides: str, files: tuple[Path, ...] = ()) -> Any:
    return load_recipe(reference, files=files, overrides=overrides, registry=registry)[1]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4), ("1E5", 1e5), ("-1.5e+3", -1500.0), (".5", 0.5), ("1.", 1.0), ("-.inf", -math.inf),
        ("3", 3), ("-3", -3), ("010", 10), ("0x1f", 31), ("0o17", 15),
        ("true", True), ("False", False), ("~", None), ("null", None), ("", None),
        ("no", "no"), ("yes", "yes"), ("on", "on"), ("off", "off"), ("y", "y"), ("1_000", "1_000"),
        ("12:30:00", "12:30:00"),
        ("2020-01-01", "2020-01-01"), ("1e", "1e"), ("e5", "e5"), ("'1e-4'", "1e-4"), ("0.1.2", "0.1.2"), ("-", None),
    ],
)  # fmt: skip
def test_scalars(text: str, value: object) -> None:
    if text == "-":
        assert parse_yaml(text, origin="t") == [None]
        return
    found = parse_yaml(text, origin="t")
    assert found == value and type(found) is type(value)


def test_anchors_and_merge_keys_work() -> None:
    found = parse_yaml("base: &b {x: 1, y: 2}\nother: {<<: *b, y: 3}", origin="t")
    assert found["other"] == {"x": 1, "y": 3}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", r"t line 3, column 1: key 'a' is given twice"),
        ("x: {a: 1, a: 2}", r"t line 1.*given twice"),
        ("a: [1", r"t line 1"),
        ("!!python/object/apply:os.system ['true']", r"could not determine a constructor"),
        ("a: 1\n---\nb: 2", r"expected a single document"),
    ],
)
def test_bad_yaml_is_one_line_with_its_place(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_yaml(text, origin="t")


class Everything(Config):
    """A config with every type that plugins use."""

    text: str
    number: float
    many: tuple[int, ...] = ()
    maybe: str | None = None
    nested: dict[str, dict[str, list[float]]] = Field({})


TEXTS = st.one_of(
    st.text(max_size=8), st.sampled_from(["1e-4", "no", "null", "~", "010", "<<", "1.", "true", "", " x", "a: b"])
)


@settings(max_examples=60, deadline=None)
@given(
    st.builds(
        Everything,
        text=TEXTS,
        number=st.floats(allow_nan=False),
        many=st.lists(st.integers(-5, 5), max_size=3).map(tuple),
        maybe=st.none() | TEXTS,
        nested=st.dictionaries(
            TEXTS, st.dictionaries(TEXTS, st.lists(st.floats(allow_nan=False), max_size=2), max_size=2)
        ),
    )
)
def test_a_dump_loads_back_to_the_same_config(config: Everything) -> None:
    assert validate(Everything, parse_yaml(dump_yaml(config), origin="t")) == config


def test_merging() -> None:
    base = {"a": {"x": 1, "y": [1, 2]}, "n": {"use": "p", "k": 1}, "keep": 1}
    assert merge(base, {"a": {"y": [3]}, "n": {"use": "p", "j": 2}}) == {
        "a": {"x": 1, "y": [3]},
        "n": {"use": "p", "k": 1, "j": 2},
        "keep": 1,
    }
    assert merge(base, {"n": {"use": "q", "j": 2}})["n"] == {"use": "q", "j": 2}  # settings of p mean nothing to q
    assert merge(base, {"a": None})["a"] is None
    assert base["a"] == {"x": 1, "y": [1, 2]}


def test_assignments() -> None:
    values: dict[str, Any] = {"losses": ["pull", {"use": "push"}], "a": 1}
    for text in (
        "train.lr=1e-4",
        "losses.0.strength=3",
        "losses.1.use=bare",
        "a.b.c=[1, {x: no}]",
        "m.from=@step",
        "e=",
    ):
        assign(values, text)
    assert values == {
        "losses": [{"use": "pull", "strength": 3}, {"use": "bare"}],
        "a": {"b": {"c": [1, {"x": "no"}]}},
        "train": {"lr": 1e-4},
        "m": {"from": "@step"},
        "e": None,
    }
    for text, message in (
        ("a", "KEY=VALUE"),
        ("=1", "KEY=VALUE"),
        ("a..b=1", "KEY=VALUE"),
        ("losses.7=1", "list of 2"),
    ):
        with pytest.raises(InputError, match=message):
            assign(values, text)


def test_layers_in_order(registry: Registry, tmp_path: Path) -> None:
    assert load(registry).train.steps == 10 and load(registry).train.lr == 1e-4
    tiny = load(registry, "sampleconfig/sharpen:tiny")
    assert (tiny.train.steps, tiny.train.batch_size, tiny.losses[0].settings["strength"]) == (2, 4, 2)
    file = tmp_path / "user.yaml"
    file.write_text("train: {batch_size: 8}\nseed: 3\n")
    both = load(registry, "sharpen:tiny", "seed=4", "train.lr=0.5", files=(file,))
    assert (both.train.steps, both.train.batch_size, both.seed, both.train.lr) == (2, 8, 4, 0.5)


def test_extends_in_a_user_file(registry: Registry, tmp_path: Path) -> None:
    file, other = tmp_path / "user.yaml", tmp_path / "other.yaml"
    file.write_text("extends: sharpen:tiny\nseed: 3\n")
    assert load(registry, files=(file,)).train.steps == 2
    assert load(registry, "sharpen:tiny", files=(file,)).train.steps == 2
    other.write_text("extends: sharpen-more:tiny\n")
    with pytest.raises(InputError, match="not the recipe that runs, sampleconfig/sharpen"):
        load(registry, files=(other,))
    other.write_text("extends: sharpen:more\n")
    with pytest.raises(InputError, match="different presets; keep one"):
        load(registry, "sharpen:tiny", files=(other,))
    with pytest.raises(InputError, match="extends itself"):
        load(registry, "sharpen:loop")


def test_presets_belong_to_the_longest_recipe_name(registry: Registry) -> None:
    assert (load(registry, "sharpen-more").seed, load(registry, "sharpen-more:tiny").seed) == (7, 8)
    with pytest.raises(InputError, match="unknown sampleconfig/sharpen preset 'tinny'; did you mean tiny"):
        load(registry, "sharpen:tinny")


def test_nodes_get_full_names_and_all_settings(registry: Registry) -> None:
    config = load(registry, "sharpen", "losses=[pull, sampleconfig/bare]", "named={a: {use: pull, layers: [3]}}")
    assert config.losses[0].model_dump() == {"use": "sampleconfig/pull", "strength": 0.5, "layers": [1, 2]}
    assert config.losses[1].settings == {} and config.named["a"].settings["layers"] == [3]
    text = dump_yaml(config)
    assert "layers: [1, 2]" in text and "from: toy" in text and "lr: 0.0001" in text


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["losses=[pul]"], r"losses\.0: unknown loss 'pul'; did you mean pull\?"),
        (["losses=[sampleknown/x]"], r"losses\.0: .*pip install clipgraft-sampleknown"),
        (["losses=[{use: pull, strngth: 1}]"], r"unknown key losses\.0\.strngth; did you mean losses\.0\.strength\?"),
        (["losses=[{use: pull, strength: -1}]"], r"losses\.0\.strength must be greater than 0, got -1"),
        (["named={q: {use: pull, layers: x}}"], r"named\.q\.layers must be a list, got 'x'"),
        (["losses=[{use: bare, x: 1}]"], r"losses\.0: sampleconfig/bare has no settings, got x"),
        (["train.stesp=1"], r"unknown key train\.stesp; did you mean train\.steps"),
        (["train.steps='10'"], r"train\.steps: expected integer, got '10'"),
        (["train.steps=true"], r"train\.steps: expected integer, got True"),
        (["train.steps=ten"], r"train\.steps must be a valid integer, got 'ten'"),
        (["train.betas=[0.9]"], r"train\.betas\.1 is not set"),
        (["train.optimizer=adam"], r"train\.optimizer must be 'adamw' or 'sgd', got 'adam'"),
        (["model=x"], r"model must be a mapping, got 'x'"),
        (["model.from="], r"model\.from must be a valid string, got None"),
        (["evaluate={on: 3}"], r"evaluate\.on must be a list, got 3"),
    ],
)
def test_errors_name_the_key_and_the_fix(registry: Registry, overrides: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load(registry, "sharpen", *overrides)
    assert "\n" not in str(caught.value)


def test_missing_values_are_one_line(registry: Registry, tmp_path: Path) -> None:
    empty = tmp_path / "empty.yaml"
    with pytest.raises(InputError, match=r"not set: model\.from, data\.from; give each with --set KEY=VALUE"):
        load_recipe("core/finetune", overrides=["losses=[]"], registry=registry)
    with pytest.raises(
        InputError, match=r"model\.from is not set; give it with --set model\.from=VALUE .*registered enc"
    ):
        load_recipe("core/finetune", overrides=["data.from=x", "losses=[clip]"], registry=registry)
    with pytest.raises(PluginError, match="absent-package, which is not installed"):
        load(registry, "needy")
    for path in (tmp_path / "absent.yaml", tmp_path):
        with pytest.raises(InputError, match="can't read"):
            load(registry, files=(path,))
    empty.write_text("- 1\n")
    with pytest.raises(InputError, match="expected 'key: value' lines"):
        load(registry, files=(empty,))


def test_gather_checks_nothing(registry: Registry) -> None:
    recipe, values = gather("sharpen:tiny", overrides=["anything.goes=1"], registry=registry)
    assert recipe.name == "sampleconfig/sharpen" and values["anything"] == {"goes": 1} and "extends" not in values


def test_a_run_directory_loads_back(registry: Registry, tmp_path: Path) -> None:
    config = load(registry, "sharpen:tiny")
    (tmp_path / "config.yaml").write_text(dump_yaml(config))
    with pytest.raises(InputError, match="no run directory"):
        load_run(tmp_path, registry=registry)
    (tmp_path / "status.json").write_text('{"recipe": "sampleconfig/sharpen", "status": "running"}')
    recipe, again = load_run(tmp_path, registry=registry)
    assert recipe.name == "sampleconfig/sharpen" and again == config


class Described(RunConfig):
    """For ``describe``."""

    train: TrainConfig = TrainConfig(steps=7, batch_size=2, lr=0.1)
    size: tuple[int, int] = Field((1, 2), description="height and width [pixels]")
    nodes: tuple[Annotated[GraftRef, Field()], ...] = ()
    one: LossRef | None = None


def test_describe_rows() -> None:
    rows = {row.key: row for row in describe(Described)}
    assert rows["model.from"].required and rows["model.from"].default is None
    assert rows["train.steps"].default == 7 and not rows["train.steps"].required
    assert (rows["size"].type, rows["size"].unit, rows["size"].description) == (
        "[integer, integer]",
        "pixels",
        "height and width",
    )
    assert (rows["nodes"].type, rows["one"].type) == ("list of graft", "loss | null")
    assert rows["train.optimizer"].type == '"adamw" | "sgd"' and rows["evaluate.on"].default == []
    assert rows["train.warmup"].unit == "steps" and rows["train.warmup"].description == "linear warm-up"
