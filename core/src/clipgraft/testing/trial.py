"""A recipe of a plugin, run for a few steps on small data: what the checks of its stages look at.

The settings are those of the recipe's preset ``tiny``, with few steps and small batches. A recipe without one, or whose
tiny model and data come from a plugin that is not in use, gets a random CLIP of 60,000 weights and 96 pictures with
captions and labels.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clipgraft.errors import InputError, Interrupted
from clipgraft.manifests import Registered, one_line
from clipgraft.registry import KNOWN_PLUGINS, Registry, unmet, use
from clipgraft.testing.subject import NotApplicable, Subject, Violation
from clipgraft.testing.watch import StopAfter, Watch

if TYPE_CHECKING:
    from clipgraft.config.schema import RunConfig

BATCH, SAMPLES = 32, 512
WHOLE, HALF = 4, 2
"""Steps of a whole run, and where it is stopped."""


class Trial:
    """One recipe in one folder. ``replaced``: model and data are the suite's own, not those of the recipe."""

    def __init__(self, subject: Subject, recipe: str, folder: Path, registry: Registry | None = None) -> None:
        self.subject, self.folder = subject, folder
        self.registry = registry or subject.registry()
        self.recipe: Registered = self.registry.get("recipe", recipe)
        self.replaced = False
        self._whole: tuple[Path, Watch] | Exception | None = None

    def config(self, *, steps: int, **more: Any) -> RunConfig:
        """The settings of a run of ``steps`` per stage."""
        from clipgraft.config.load import complete, gather, presets

        if missing := [n for n in self.recipe.component.needs if unmet(n)]:
            raise NotApplicable(f"{self.recipe.name} needs {missing[0]}, which {unmet(missing[0])}")
        tiny = "tiny" in presets(self.recipe, registry=self.registry)
        _, values = gather(self.recipe.name + (":tiny" if tiny else ""), registry=self.registry)
        if lacking := [r for r in values.get("requires", ()) if unmet(r)]:
            raise NotApplicable(f"{self.recipe.name}:tiny requires {lacking[0]}, which {unmet(lacking[0])}")
        foreign = _absent(values, self.registry)
        if beyond := [path for path in foreign if path not in ("model.from", "data.from")]:
            plugin = foreign[beyond[0]]
            how = f"pip install clipgraft-{plugin}"
            raise NotApplicable(f"{self.recipe.name}:tiny names something of plugin {plugin} in {beyond[0]}; {how}")
        self.replaced = bool(foreign) or not tiny
        if self.replaced:
            own = {"model": {"from": str(self.model)}, "data": {"from": f"csv:{self.pictures}"}}
            values |= {key: {**values.get(key, {}), **value} for key, value in own.items()}
        values["evaluate"] = {"on": [], "retention": "none"}
        values |= {"threads": 1, **more}
        try:
            first = complete(self.recipe, _few_samples(values, self.registry), registry=self.registry)
            return complete(self.recipe, _few_steps(values, first, steps, self.registry), registry=self.registry)
        except InputError as error:
            if tiny and not self.replaced:
                raise Violation(f"{self.recipe.name}:tiny: {error}") from error
            raise NotApplicable(
                f"{self.recipe.name} needs settings of yours, give it a preset tiny: {error}"
            ) from error

    @cached_property
    def model(self) -> Path:
        """A random CLIP as an export."""
        from clipgraft.checkpoint import write_export
        from clipgraft.testing.tiny import tiny_clip

        folder = self.folder / "model"
        return folder if folder.exists() else write_export(tiny_clip(), folder)

    @cached_property
    def pictures(self) -> Path:
        """96 pictures with captions and labels as a table."""
        table = self.folder / "pictures" / "table.csv"
        return table if table.exists() else write_pictures(table.parent)

    def run(self, name: str, config: RunConfig, *hooks: object, resuming: bool = False) -> Path:
        """Run or continue the recipe with ``hooks`` switched on, in the folder ``name``, which is returned.

        Every error of the recipe but ``Interrupted`` becomes a ``Violation``.
        """
        from clipgraft import execution
        from clipgraft.log import RunLog
        from clipgraft.runner import Run
        from clipgraft.state import rng_state, set_rng_state

        path, threads, held = self.folder / name, torch.get_num_threads(), rng_state()
        try:
            torch.set_num_threads(1)
            with use(self.registry):
                maker = self.registry.resolve(self.recipe.component.target)(config)
                run = Run(path, config, self.recipe, self.registry, RunLog())
                for index, hook in enumerate(hooks):
                    run.hooks.register(hook, f"conformance-{index}")
                if problems := maker.check(run):
                    raise InputError("; ".join(problems))
                execution._prepare_folder(run, resuming=resuming)
                execution._execute(run, maker)
        except (Interrupted, Violation):
            raise
        except Exception as error:
            if isinstance(error, InputError) and self.replaced:
                raise NotApplicable(f"{self.recipe.name} doesn't take ordinary pictures: {error}") from error
            raise Violation(f"{self.recipe.name}: {one_line(error)}") from error
        finally:
            torch.set_num_threads(threads)
            set_rng_state(held)
        return path

    @property
    def whole(self) -> tuple[Path, Watch]:
        """The run directory of an uninterrupted run, and what was seen in it; made once, failing alike ever after."""
        if self._whole is None:
            watch = Watch()
            try:
                self._whole = self.run("whole", self.config(steps=WHOLE), watch), watch
            except (Violation, NotApplicable) as error:
                self._whole = error
        if isinstance(self._whole, Exception):
            raise self._whole.with_traceback(None)
        return self._whole


def trains_as_declared(trial: Trial) -> None:
    """Every stage: finite losses, gradients exactly where declared, frozen tensors bitwise unchanged."""
    _, watch = trial.whole
    if not watch.seen:
        raise NotApplicable(f"{trial.recipe.name} ran; it has no training stage")


def trains_under_bf16(trial: Trial) -> None:
    """The same under bf16 autocast."""
    watch = Watch()
    trial.run("bf16", trial.config(steps=HALF, precision="bf16"), watch)
    if not watch.seen:
        raise NotApplicable(f"{trial.recipe.name} ran; it has no training stage")


def resumes_exactly(trial: Trial) -> None:
    """Four steps equal two, a stop, a new process's start, and two: the same weights, losses and export."""
    whole, watch = trial.whole
    if not watch.seen:
        raise NotApplicable(f"{trial.recipe.name} has no training stage")
    config, stopped, made, again = trial.config(steps=WHOLE), set[str](), 0, False
    while True:
        stop = StopAfter(HALF, stopped)
        try:
            trial.run("resumed", config, stop, resuming=again)
            made += stop.made
            break
        except Interrupted:
            made, again = made + stop.made, True
    resumed = trial.folder / "resumed"
    theirs, ours = dict(_results(whole)), dict(_results(resumed))
    if theirs.keys() != ours.keys():
        raise Violation(f"{trial.recipe.name}: a resumed run leaves other files: {min(theirs.keys() ^ ours.keys())}")
    if differing := [name for name, tensor in theirs.items() if not _same(tensor, ours[name])]:
        share = f"{len(differing)} of {len(ours)} tensors"
        raise Violation(
            f"{trial.recipe.name}: after a resume {differing[0]} differs ({share}); what a step reads must be a "
            "parameter, a buffer, the batch, or drawn from torch's global generator"
        )
    if not stopped:
        raise Violation(f"{trial.recipe.name}: no stage could be stopped after {HALF} steps")
    if made != watch.steps:
        raise Violation(f"{trial.recipe.name}: a resumed run made {made} steps instead of {watch.steps}")


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | ((a != a) & (b != b))).all())


def _results(run: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that a run's stages and its export hold, and the losses, by name."""
    from safetensors.torch import load_file

    for file in sorted([*run.glob("stages/*/result/**/*.safetensors"), *run.glob("export/*.safetensors")]):
        yield from ((f"{file.relative_to(run)}: {name}", tensor) for name, tensor in load_file(file).items())
    for file in sorted(run.glob("stages/*/metrics.jsonl")):
        losses = [json.loads(line)["loss"] for line in file.read_text("utf-8").splitlines()]
        yield f"{file.relative_to(run)}: loss", torch.tensor(losses, dtype=torch.float64)


def write_pictures(folder: Path, count: int = 96) -> Path:
    """Pictures of noise around four colours as a table ``table.csv`` with captions and labels; returns the table."""
    from PIL import Image

    colours = {"red": (220, 40, 40), "green": (40, 190, 40), "blue": (40, 40, 220), "yellow": (220, 220, 40)}
    folder.mkdir(parents=True, exist_ok=True)
    generator, rows = torch.Generator().manual_seed(0), ["image,caption,label"]
    for index in range(count):
        name = list(colours)[index % len(colours)]
        noise = torch.randn(40, 36, 3, generator=generator) * 40 + torch.tensor(colours[name])
        Image.fromarray(noise.clamp(0, 255).to(torch.uint8).numpy()).save(folder / f"{index}.png")
        rows.append(f"{index}.png,a {name} picture with the number {index},{name}")
    (folder / "table.csv").write_text("\n".join(rows) + "\n", "utf-8")
    return folder / "table.csv"


def _walk(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Every text in plain values with its dotted path."""
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _walk(inner, f"{path}.{key}".lstrip("."))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _walk(inner, f"{path}.{index}")


def _absent(values: dict[str, Any], registry: Registry) -> dict[str, str]:
    """{path: plugin} of references to plugins that are not in use; what would be measured doesn't count."""
    used = {info.name for info in registry.plugins if info.status == "ok"}
    gone = (set(KNOWN_PLUGINS) | {info.name for info in registry.plugins}) - used
    found = {}
    for path, text in _walk({key: value for key, value in values.items() if key != "evaluate"}):
        match = re.match(r"(?:[a-z]+:)?([a-z0-9][a-z0-9.-]*)/[a-z0-9]", text)
        if match and match[1] in gone:
            found[path] = match[1]
    return found


def _few_samples(values: Any, registry: Registry) -> Any:
    """Data references whose dataset has a setting ``n`` (samples) with a small one."""

    datasets = {r.name for r in registry.list("dataset")}

    def shorter(text: str) -> str:
        name, _, query = text.partition("?")
        cls = registry.config_class("dataset", name) if name in datasets else None
        if cls is None or "n" not in cls.model_fields:
            return text
        return f"{name}?" + re.sub(r"(?<![^&])n=(\d+)", lambda m: f"n={min(SAMPLES, int(m[1]))}", query)

    return _mapped(values, shorter)


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: _mapped(inner, change) for key, inner in value.items()}
    return [_mapped(inner, change) for inner in value] if isinstance(value, list) else value


def _few_steps(values: dict[str, Any], config: RunConfig, steps: int, registry: Registry) -> dict[str, Any]:
    """``values`` with every training stage of ``config`` cut to ``steps`` and a small batch."""
    from clipgraft.config.load import assign

    changed = copy.deepcopy(_few_samples(values, registry))
    for path, train in _stages(config):
        small = {"steps": steps, "batch_size": min(train.batch_size, max(BATCH, 2 * train.accumulate)), "log_every": 1}
        small |= {"warmup": 0, "save_every": 0, "evaluate_every": 0}
        assign(changed, f"{path}={json.dumps(train.model_dump(mode='json', by_alias=True) | small)}")
    return changed  # type: ignore[no-any-return]


def _stages(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every ``TrainConfig`` inside a config, with its dotted path."""
    from pydantic import BaseModel

    from clipgraft.config.schema import TrainConfig

    if isinstance(value, TrainConfig):
        yield path, value
    elif isinstance(value, BaseModel):
        for name, info in type(value).model_fields.items():
            yield from _stages(getattr(value, name), f"{path}.{info.alias or name}".lstrip("."))
    elif isinstance(value, tuple | list):
        for index, inner in enumerate(value):
            yield from _stages(inner, f"{path}.{index}")
