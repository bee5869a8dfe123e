"""Conformance of an export: the features of the model that was trained, without the plugin where it says so."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from clipgraft.errors import ClipgraftError
from clipgraft.manifests import one_line
from clipgraft.registry import use
from clipgraft.testing.ranks import run_ranks
from clipgraft.testing.subject import NotApplicable, Violation, other_packages
from clipgraft.testing.trial import Trial
from clipgraft.testing.watch import PROBE_TEXTS, probe, probe_pixels

CLOSE = 1e-4
"""Of unit embeddings; another order of additions costs less."""


def exports_as_it_says(trial: Trial) -> str:
    """L0 and L1 open in open_clip alone, in a process that can import no plugin; L2 opens here. Returns the level.

    Features equal those of the encoder in memory, and components that name a head can be built and filled again.
    """
    from clipgraft.checkpoint import read_component, read_manifest
    from clipgraft.encoders import load

    run, watch = trial.whole
    folder = run / "export"
    manifest, name = read_manifest(folder), trial.recipe.name
    level = manifest["level"]
    if not watch.features:
        raise NotApplicable(f"{name} opens no encoder")
    if not manifest["reason"]:
        blocked = ["clipgraft_", trial.subject.package(), *sorted(other_packages(trial.subject))]
        try:
            found: dict[str, list[list[float]]] = run_ranks(opened_alone, 1, str(folder), blocked)[0]
        except RuntimeError as error:
            last = str(error).strip().splitlines()[-1]
            raise Violation(f"{name}: the export says {level}, but open_clip alone can't open it: {last}") from error
        features = {kind: torch.tensor(rows) for kind, rows in found.items()}
    else:
        try:
            with use(trial.registry):
                features = probe(load(str(folder), registry=trial.registry))
        except Exception as error:
            raise Violation(f"{name}: its {level} export can't be opened: {one_line(error)}") from error
    for kind, ours in watch.features.items():
        theirs = features.get(kind, ours.new_empty(0))
        off = float((ours - theirs).abs().max()) if ours.shape == theirs.shape else float("inf")
        if not off <= CLOSE:
            raise Violation(
                f"{name}: the export says {level}, but its {kind} features differ from those of the trained model by "
                f"{off:.2g}; what changes them must be in the weights, or a graft that is not portable"
            )
    for component in manifest["components"]:
        if component["use"]:
            try:
                head = trial.registry.build("head", component["use"], component["config"])
                head.load_state_dict(read_component(folder, component["name"]))
            except (ClipgraftError, RuntimeError) as error:
                raise Violation(f"{name}: component {component['name']} can't be rebuilt: {one_line(error)}") from error
    return str(level)


class Blocked:
    """Refuses to import packages whose names start with one of ``prefixes``."""

    def __init__(self, prefixes: list[str]) -> None:
        self.prefixes = tuple(prefixes)

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        """Nothing, or an error."""
        if name.startswith(self.prefixes):
            raise ImportError(f"{name} belongs to a plugin")


def opened_alone(folder: str, blocked: list[str]) -> dict[str, list[list[float]]]:
    """Unit embeddings of the probe by open_clip, as lists."""
    sys.meta_path.insert(0, Blocked(blocked))
    import open_clip

    config = json.loads((Path(folder) / "open_clip_config.json").read_text("utf-8"))["preprocess_cfg"]
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    size = config["size"]
    pixels = probe_pixels((size, size) if isinstance(size, int) else tuple(size))
    mean, std = (torch.tensor(config[key])[:, None, None] for key in ("mean", "std"))
    with torch.no_grad():
        images = model.eval().encode_image((pixels - mean) / std, normalize=True)
        texts = model.encode_text(open_clip.get_tokenizer(f"local-dir:{folder}")(PROBE_TEXTS), normalize=True)
    return {"image": images.float().tolist(), "text": texts.float().tolist()}
