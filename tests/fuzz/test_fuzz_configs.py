"""YAML and settings of any kind: a config, or one line that says what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from clipgraft.config import load
from clipgraft.config.describe import describe
from clipgraft.config.schema import RunConfig
from clipgraft.registry import Registry, current

pytestmark = [pytest.mark.fuzz, pytest.mark.timeout(3600)]
many, some, few = (settings.get_profile(f"fuzz-{name}") for name in ("many", "some", "few"))

WORDS = st.sampled_from(
    """use from model data seed train steps lr null true .nan .inf -.inf 1e400 0x 0o9 1_000 ~ << yes 2024-01-01 010
    core/finetune clipgraft_canary:run clipgraft_canary.run os.system os:system __class__ {} [] !!set !!omap !!bool
    !!python/object/apply:os.system !!python/name:clipgraft_canary.x !!binary !!timestamp !!int !!float !!null !custom
    &a *a ? : - > | # % @ ` ---""".split()  # noqa: SIM905
)
SCALARS = st.one_of(
    WORDS,
    st.text(max_size=20),
    st.integers().map(str),
    st.sampled_from(["9" * 5000, "0x" + "f" * 5000]),
    st.floats().map(str),
    st.sampled_from(["\x00", "\x85", "\u2028", "\ufeff", "\t", "'", '"', "\\", "é", "\U0001f600"]),
)
LINES = st.lists(st.tuples(st.integers(0, 6), st.lists(SCALARS, max_size=4)), max_size=12).map(
    lambda rows: "\n".join(" " * indent + " ".join(words) for indent, words in rows)
)
DEEP = st.builds(
    lambda opening, depth: opening * depth, st.sampled_from("[{-?"), st.sampled_from([50, 500, 5000, 50_000])
)
JSONS: st.SearchStrategy[Any] = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=12), WORDS),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.one_of(st.text(max_size=8), WORDS), inner, max_size=4)
    ),
    max_leaves=8,
)


def laughs(width: int, depth: int, *, mapping: bool) -> str:
    """Aliases that stand for width ** depth values."""
    rows = ["a0: &a0 [1, 2]"]
    for k in range(1, depth):
        inner = [f"*a{k - 1}"] * width
        rows.append(
            f"a{k}: &a{k} "
            + (f"{{{', '.join(f'k{i}: {v}' for i, v in enumerate(inner))}}}" if mapping else f"[{', '.join(inner)}]")
        )
    return "\n".join(rows)


BOMBS = [
    laughs(10, 12, mapping=False),
    laughs(10, 12, mapping=True),
    "a: &a [*a]",
    "a: &a {b: *a}",
    "&a [*a, *a]",
    "a: &a {<<: *a}",
    "\n".join(f"k{i}: {i}" for i in range(15_000)),
    "a: " + "9" * 5000,
    "a: " + "[" * 100_000,
    "? " * 3000,
    "a: !!timestamp x",
    "a: !!bool perhaps",
    "a: !!int many",
    "a: !!float 1:2:x",
    "a: !!binary '*'",
    "a: !!python/object/apply:os.system ['true']",
    "a: !!python/object/new:clipgraft_canary.X {}",
    "!!python/module:clipgraft_canary ''",
    "? [a, b]\n: c",
    "? {a: b}\n: c",
    "1: a\n~: b\ntrue: c\n1.5: d",
    "a: \u0007",
    "%YAML 9.9\n---\na: 1",
    "a: 1\n---\nb: 2",
    "hooks: " + json.dumps([[]] * 2000),
]


@pytest.mark.parametrize("text", BOMBS, ids=range(len(BOMBS)))
@pytest.mark.parametrize("key", ["", "hooks"])
def test_every_known_bomb_is_defused(arena, text, key):
    if key:
        text = f"{key}:\n" + "\n".join(f"  {line}" for line in text.splitlines())
    check(arena, text)


@many
@given(text=st.one_of(LINES, DEEP, st.text(max_size=200), JSONS.map(json.dumps), JSONS.map(yaml.safe_dump)))
def test_any_text_is_a_config_or_one_line(arena, text):
    check(arena, text)


def check(arena: Any, text: str) -> None:
    def attempt() -> None:
        values = load.parse_yaml(text, origin="f.yaml")
        if isinstance(values, dict):
            load.load_recipe("core/finetune", overrides=[], files=[written], registry=current())

    written = arena.work / "f.yaml"
    written.write_text(text, "utf-8", "surrogatepass")
    arena.call(attempt)


@some
@given(content=st.binary(max_size=200))
def test_any_bytes_are_a_config_or_one_line(arena, content):
    file = arena.work / "f.yaml"
    file.write_bytes(content)
    arena.call(lambda: load.load_recipe("core/finetune", files=[file], registry=current()))


@pytest.fixture(scope="module")
def registry() -> Registry:
    return current()


@many
@given(data=st.data())
def test_any_value_of_any_setting_of_any_recipe_is_taken_or_refused(arena, registry, data):
    recipe = data.draw(st.sampled_from(registry.list("recipe")))
    keys = [row.key for row in describe(registry.config_class("recipe", recipe.name) or RunConfig)]
    keys += [
        "model",
        "data",
        "train",
        "grafts.0.use",
        "hooks.0",
        "evaluate.on.0.data",
        "extends",
        "",
        ".",
        "x..y",
        "-1",
    ]
    presets = ["", *load.presets(recipe, registry=registry)]
    pairs = data.draw(st.lists(st.tuples(st.sampled_from(keys), st.one_of(SCALARS, JSONS.map(json.dumps))), max_size=3))
    reference = f"{recipe.name}:{preset}" if (preset := data.draw(st.sampled_from(presets))) else recipe.name
    overrides = ["model.from=core/none", "data.from=folder:.", *(f"{key}={value}" for key, value in pairs)]

    def attempt() -> None:
        _, config = load.load_recipe(reference, overrides=overrides, registry=registry)
        again = load.parse_yaml(load.dump_yaml(config), origin="again")
        assert load.complete(recipe, again, registry=registry) == config or "nan" in load.dump_yaml(config)

    arena.call(attempt)


@some
@given(reference=st.one_of(SCALARS, st.text(max_size=30)), query=st.text(max_size=30))
def test_any_data_reference_is_opened_or_refused(arena, registry, reference, query):
    from clipgraft.data import open_source

    for text in (reference, f"{reference}:{query}", f"{reference}?{query}", f"folder:{query}", f"csv:{query}"):
        arena.call(lambda text=text: open_source(text, registry=registry))


@some
@given(text=st.one_of(SCALARS, st.text(max_size=40)), kind=st.sampled_from(["model", "evaluator", "suite"]))
def test_any_name_of_a_model_or_evaluator_is_refused_in_one_line(arena, registry, text, kind):
    from clipgraft.config.schema import evaluator_named
    from clipgraft.encoders import load as load_model
    from clipgraft.evaluation.suites import check_requested

    if kind == "model":
        arena.call(lambda: load_model(text, registry=registry))
    elif kind == "evaluator":
        arena.call(lambda: (evaluator_named(text), check_requested([text], None, registry=registry)))
    else:
        arena.call(lambda: check_requested([], text, registry=registry))


@some
@given(content=st.one_of(LINES, JSONS.map(yaml.safe_dump)))
def test_any_suite_file_is_taken_or_refused(arena, registry, content):
    from clipgraft.evaluation.suites import check_requested

    file: Path = arena.work / "suite.yaml"
    file.write_text(content, "utf-8", "surrogatepass")
    arena.call(lambda: check_requested([], str(file), registry=registry))
