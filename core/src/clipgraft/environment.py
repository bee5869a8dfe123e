"""What a run's result depends on beside its config: recorded, compared when a run is repeated, made deterministic."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from clipgraft import distributed, files
from clipgraft.errors import ClipgraftError

if TYPE_CHECKING:
    from clipgraft.runner import Run

LIBRARIES = (
    "clipgraft", "torch", "torchvision", "accelerate", "open_clip_torch", "safetensors", "numpy", "pillow", "timm",
    "transformers", "tokenizers",
)  # fmt: skip
ENVIRONMENT, PLUGINS, DATA, REPEAT = "env.json", "plugins.json", "data.json", "repeat.json"
"""Files of a run directory: machine and versions, plugins, what it trained on, which run it repeats."""


def environment(run: Run) -> dict[str, Any]:
    """Versions and hardware, to tell why two runs differ."""
    versions: dict[str, str | None] = {}
    for name in LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    cuda = run.device.type == "cuda"
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu(),
        "vector_instructions": torch.backends.cpu.get_cpu_capability(),
        "device": str(run.device),
        "accelerator": torch.cuda.get_device_name(run.device) if cuda else None,
        "cuda": torch.version.cuda if cuda else None,
        "cudnn": torch.backends.cudnn.version() if cuda else None,  # type: ignore[no-untyped-call]
        "matmul_precision": torch.get_float32_matmul_precision(),
        "processes": distributed.world_size(),
        "threads": torch.get_num_threads(),
        "versions": versions,
    }


def differences(folder: Path, run: Run) -> list[str]:
    """A line for each thing that the run in ``folder`` recorded and that is otherwise now.

    Plugins that have come since then can't have taken part and are left out.
    """
    from clipgraft.config.load import read_yaml

    values = run.config.model_dump(mode="json", by_alias=True)
    lines = [f"setting {line}" for line in _unlike(read_yaml(folder / "config.yaml"), values)]
    lines += _unlike(_read(folder / ENVIRONMENT, dict), environment(run))
    then = {p.get("name"): p.get("version") for p in _read(folder / PLUGINS, list) if isinstance(p, dict)}
    now = {p["name"]: p["version"] for p in run.registry.freeze()}
    return lines + [f"plugin {line}" for line in _unlike(then, now)]


def compare_results(run: Run) -> list[str]:
    """For a run that repeats another one: whether its export has the same weights, and if not what is known of why.

    Writes the answer into ``repeat.json`` as ``same_weights`` (None when the other run left no export).
    """
    told = _read(run.path / REPEAT, dict)
    if "of" not in told:
        return []
    other = Path(str(told["of"]))
    (then, base_then), (now, base_now) = (
        _weights(folder / "export" / "clipgraft.json") for folder in (other, run.path)
    )
    same = then == now if then and now else None
    files.write_json(run.path / REPEAT, {**told, "same_weights": same})
    if same is None:
        return [f"{other} left no export to compare with"]
    if same:
        return [f"the weights are those of {other}, bit for bit"]
    found = [*map(str, told.get("differences") or ())]
    found += [f"data {line}" for line in _unlike(_read(other / DATA, dict), _read(run.path / DATA, dict))]
    found += _unlike({"base weights": base_then}, {"base weights": base_now})
    return [f"the weights differ from those of {other}; {'; '.join(found) or 'nothing that is recorded differs'}"]


@contextmanager
def determinism(wanted: bool) -> Iterator[None]:
    """With ``wanted`` torch takes only kernels that give the same bits every time; the old settings come back.

    An operation without such a kernel is a ``ClipgraftError`` that names it.
    """
    if not wanted:
        yield
        return
    cudnn, usual = torch.backends.cudnn, torch.are_deterministic_algorithms_enabled()
    flags = torch.is_deterministic_algorithms_warn_only_enabled(), cudnn.deterministic, cudnn.benchmark
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts, which is later
    torch.use_deterministic_algorithms(True)
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    except RuntimeError as error:
        found = re.match(r"(\S+) does not have a deterministic implementation", str(error))
        if found is None:
            raise
        raise ClipgraftError(
            f"deterministic: the operation {found[1]} has no deterministic kernel here; run on another device, leave "
            "out what needs it, or set deterministic=false"
        ) from error
    finally:
        torch.use_deterministic_algorithms(usual, warn_only=flags[0])
        cudnn.deterministic, cudnn.benchmark = flags[1:]


def _cpu() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _unlike(then: Any, now: Any, *, where: str = "") -> list[str]:
    """ "KEY: A then, B now" for every leaf of ``then`` that ``now`` has otherwise."""
    if isinstance(then, dict) and isinstance(now, Mapping):
        inner = [_unlike(value, now.get(key), where=f"{where}.{key}".lstrip(".")) for key, value in then.items()]
        return [line for lines in inner for line in lines]
    return [] if then == now else [f"{where}: {_short(then)} then, {_short(now)} now"]


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str) if not isinstance(value, str) else value
    return text if len(text) <= 80 else f"{text[:77]}..."


def _read(file: Path, kind: type[Any]) -> Any:
    """A JSON file of a run, a ``kind``; an empty one when it isn't there or can't be read: then nothing is known."""
    try:
        found = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return kind()
    return found if isinstance(found, kind) else kind()


def _weights(manifest: Path) -> tuple[dict[str, str], str | None]:
    """The hash of every weights file of an export, and that of the base model's weights."""
    told = _read(manifest, dict)
    try:
        hashes = {name: str(entry["sha256"]) for name, entry in told["files"].items() if name.endswith(".safetensors")}
        return hashes, (told["lineage"] or [{}])[-1].get("base_sha256")
    except (AttributeError, KeyError, TypeError):
        return {}, None
