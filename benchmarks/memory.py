"""Private memory and CPU seconds of opening, exporting, converting and merging a ViT-B-32, each against a peer.

Random weights are written once; every case runs in a process of its own, cases take turns, and libraries are imported
before the clock starts. Memory is the peak of RssAnon above its value at the start, in MB and in models (605 MB of fp32
each): weights mapped from a file are not private. CPU seconds are those of the working thread; the best of the repeats
counts. The first case of each work is the peer:

    open      open_clip.create_model with a weights file; with its folder; clipgraft's load of the folder; clipgraft's
              load of its own export, where the sha256 of every file is verified. Every parameter is read once.
    export    create_model and open_clip's save_for_hf (safetensors); load and write_export, which hashes its files.
    convert   to transformers' CLIPModel: create_model, rename the state dict, CLIPModel.save_pretrained (open_clip and
              transformers ship no converter, so this one is written here); load and write_huggingface.
    merge     the mean of two models: both state dicts in memory; clipgraft's stream (see merge_memory.py for more).

What two cases of one work write must be equal (merged: to 1e-6), else the program ends.

    python benchmarks/memory.py [--work open export convert merge] [--repeats 3] [--json | --markdown]
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from merge_memory import agree, loaded, write_models
from open_clip_loop import alone
from table import table
from usage import Peak

ARCH, WEIGHTS = "ViT-B-32", "open_clip_model.safetensors"
CASES = {
    "open": (
        "open_clip.create_model, a file",
        "open_clip.create_model, a folder",
        "clipgraft, a folder",
        "clipgraft, its export",
    ),
    "export": ("open_clip.save_for_hf", "clipgraft"),
    "convert": ("transformers by hand", "clipgraft"),
    "merge": ("load all", "clipgraft"),
}
WRITTEN = {"export": WEIGHTS, "convert": "model.safetensors", "merge": WEIGHTS}
"""The file of weights that a work leaves."""
IMPORTS = (
    "open_clip.push_to_hf_hub",
    "transformers.models.clip.modeling_clip",
    "clipgraft.checkpoint",
    "clipgraft.card",
    "clipgraft.encoders.huggingface",
    "clipgraft_merging.soup.uniform",
    "clipgraft_merging.weights.engine",
)
"""What cases import on the way is not their work."""


def opening(case: str, folder: Path) -> Any:
    """A model in memory, read to the last weight."""
    import open_clip

    from clipgraft.encoders import load
    from clipgraft.registry import Registry

    registry, plain = Registry.discover(allow=()), folder / "plain"
    model: Any = {
        "open_clip.create_model, a file": lambda: open_clip.create_model(ARCH, pretrained=str(plain / WEIGHTS)),
        "open_clip.create_model, a folder": lambda: open_clip.create_model(f"local-dir:{plain}"),
        "clipgraft, a folder": lambda: load(f"local-dir:{plain}"),
        "clipgraft, its export": lambda: load(str(folder / "model-0"), registry=registry),
    }[case]()
    return model, sum(float(p.sum()) for p in model.parameters())


def exporting(case: str, folder: Path) -> None:
    """A folder of open_clip's from one."""
    out, plain = folder / f"export-{case}", f"local-dir:{folder / 'plain'}"
    if case == "clipgraft":
        from clipgraft.checkpoint import write_export
        from clipgraft.encoders import load

        write_export(load(plain), out)
        return
    import open_clip
    from open_clip.push_to_hf_hub import save_for_hf

    class Nothing:
        """The tokenizer of this architecture has no files."""

        def save_pretrained(self, folder: object) -> None:
            pass

    tokenizer: Any = Nothing()
    config = open_clip.get_model_config(ARCH)
    assert config is not None
    save_for_hf(open_clip.create_model(plain), tokenizer, config, str(out), safe_serialization=True)


def converting(case: str, folder: Path) -> None:
    """A folder of transformers' CLIPModel from one of open_clip's."""
    out, plain = folder / f"convert-{case}", f"local-dir:{folder / 'plain'}"
    if case == "clipgraft":
        from clipgraft.encoders import load
        from clipgraft.encoders.huggingface import write_huggingface

        write_huggingface(load(plain), out)
        return
    import open_clip
    from transformers import CLIPConfig, CLIPModel

    vision = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "patch_size": 32}
    config = CLIPConfig(vision_config=vision | {"hidden_act": "gelu"}, text_config={"hidden_act": "gelu"})
    model = CLIPModel(config)
    model.load_state_dict(renamed(open_clip.create_model(plain).state_dict()))
    model.save_pretrained(out)


def renamed(state: Mapping[str, Any]) -> dict[str, Any]:
    """open_clip's names as transformers', as one writes it by hand."""
    plain = {
        "logit_scale": "logit_scale",
        "text_projection": "text_projection.weight",
        "visual.proj": "visual_projection.weight",
        "positional_embedding": "text_model.embeddings.position_embedding.weight",
        "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
        "visual.class_embedding": "vision_model.embeddings.class_embedding",
        "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
        "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    }
    parts = {
        "visual.transformer.resblocks": "vision_model.encoder.layers",
        "transformer.resblocks": "text_model.encoder.layers",
        "visual.ln_pre": "vision_model.pre_layrnorm",
        "visual.ln_post": "vision_model.post_layernorm",
        "ln_final": "text_model.final_layer_norm",
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
        "attn.out_proj": "self_attn.out_proj",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
    }
    found = {}
    for name, value in state.items():
        if name in plain:
            found[plain[name]] = value.T.contiguous() if name in ("text_projection", "visual.proj") else value
            continue
        for old, new in parts.items():
            name = name.replace(old, new)
        if "attn.in_proj_" not in name:
            found[name] = value
            continue
        for letter, part in zip("qkv", value.chunk(3), strict=True):
            found[name.replace("attn.in_proj_", f"self_attn.{letter}_proj.")] = part
    return found


def merging(case: str, folder: Path) -> None:
    """The mean of two models."""
    out, models = folder / f"merge-{case}", [folder / "model-1", folder / "model-2"]
    if case == "clipgraft":
        from clipgraft_merging.soup.uniform import UniformSoup
        from clipgraft_merging.weights.engine import merge_to, open_inputs

        merge_to(out, open_inputs(models, base=None), UniformSoup())
        return
    out.mkdir(exist_ok=True)
    loaded([model / WEIGHTS for model in models], models[0] / WEIGHTS, out / WEIGHTS, "soup")


def measure(work: str, case: str, folder: Path) -> dict[str, float]:
    """One case in this process."""
    import torch

    for name in IMPORTS:
        import_module(name)
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    does: Callable[[str, Path], Any] = {
        "open": opening, "export": exporting, "convert": converting, "merge": merging
    }[work]  # fmt: skip
    gc.collect()
    gc.freeze()  # a full collection over the imported libraries costs as much as loading and falls on either side
    with Peak() as peak:
        start = time.thread_time()  # this thread's: the watcher's own reading doesn't count
        found = does(case, folder)
        seconds = time.thread_time() - start
    total = found[1] if work == "open" else 0.0
    return {"cpu_seconds": seconds, "private_mb": max(peak.value - peak.start, 0.0), "sum": total}


def main() -> None:
    """Run every case ``--repeats`` times, interleaved, and keep the best CPU time and the smallest peak of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", nargs="+", default=[*CASES], choices=[*CASES])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--case", nargs=3, metavar=("WORK", "NAME", "DIR"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        work, case, where = options.case
        print(json.dumps(measure(work, case, Path(where))))
        return
    works: dict[str, dict[str, dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_models(folder, arch=ARCH, count=3 if "merge" in options.work else 1)
        model_mb = (folder / "model-0" / WEIGHTS).stat().st_size / 1e6
        (folder / "plain").mkdir()
        for file in ("open_clip_config.json", WEIGHTS):
            (folder / "plain" / file).hardlink_to(folder / "model-0" / file)
        for work in options.work:
            runs: dict[str, list[dict[str, float]]] = {case: [] for case in CASES[work]}
            for _ in range(options.repeats):
                for case, found in runs.items():
                    found.append(alone(__file__, "--case", work, case, folder))
            if len({round(r["sum"], 1) for found in runs.values() for r in found}) != 1:
                sys.exit("the cases opened different weights")
            if work in WRITTEN:
                first, *others = (folder / f"{work}-{case}" / WRITTEN[work] for case in CASES[work])
                if (worst := max(agree(first, other) for other in others)) > (1e-6 if work == "merge" else 0):
                    sys.exit(f"what the cases of {work} wrote differs by {worst:.1e}")
            best = {k: {key: min(r[key] for r in found) for key in found[0]} for k, found in runs.items()}
            peer = next(iter(best.values()))
            works[work] = {
                case: {
                    "cpu_seconds": round(row["cpu_seconds"], 3),
                    "cpu_ratio": round(row["cpu_seconds"] / peer["cpu_seconds"], 3),
                    "private_mb": round(row["private_mb"], 1),
                    "models": round(row["private_mb"] / model_mb, 3),
                    "memory_ratio": round(row["private_mb"] / peer["private_mb"], 3),
                }
                for case, row in best.items()
            }
    if options.json:
        print(json.dumps({"model_mb": round(model_mb, 1), "works": works}))
        return
    header = ("work", "CPU s", "ratio", "private MB", "models", "ratio")
    rows = [(f"{work}: {case}", *row.values()) for work, part in works.items() for case, row in part.items()]
    print(table(header, rows, markdown=options.markdown))


if __name__ == "__main__":
    main()
