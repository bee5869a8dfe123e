"""``clipgraft export MODEL --out DIR --format onnx-towers``: both towers of any CLIP as graphs that onnxruntime runs.

DIR gets ``image.onnx`` (pixels in [0, 1] -> pooled, unit), ``text.onnx`` (token ids -> the same), the tokenizer's
files, ``towers.json`` and a model card. Any batch size; standard operators of opset 18. What onnxruntime answers is
compared with torch before anything is kept. B samples, D joint embedding, L tokens of a text.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipgraft import files
from clipgraft.card import render
from clipgraft.checkpoint import CARD, described
from clipgraft.encoders import load, merge_grafts
from clipgraft.encoders.base import Encoder
from clipgraft.errors import ClipgraftError, InputError
from clipgraft.log import RunLog
from clipgraft.registry import Registry

ABOUT, OPSET, TOLERANCE = "towers.json", 18, 1e-4
"""``TOLERANCE``: largest difference of a component of a unit embedding between onnxruntime and torch."""
WHOLE = 1_900_000_000
"""Bytes of weights that fit into one file, which protobuf limits to 2 GiB; more lie beside it."""
INPUTS = {"image": "pixels", "text": "ids"}


class Embedded(NamedTuple):
    """``pooled`` (B, D) as the tower gives it, ``unit`` (B, D) of length one."""

    pooled: Tensor
    unit: Tensor


class ImageGraph(nn.Module):
    """Pixels (B, 3, H, W') in [0, 1]; standardising is inside."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.tower = encoder.image
        self.register_buffer("mean", torch.tensor(encoder.preprocess.mean)[:, None, None])
        self.register_buffer("std", torch.tensor(encoder.preprocess.std)[:, None, None])

    def forward(self, pixels: Tensor) -> Embedded:
        """As the class says."""
        pooled = self.tower((pixels - self.mean) / self.std).pooled
        return Embedded(pooled, F.normalize(pooled, dim=-1))


class TextGraph(nn.Module):
    """Token ids (B, L) int64, padded as the tokenizer pads."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.tower = encoder.text

    def forward(self, ids: Tensor) -> Embedded:
        """As the class says."""
        pooled = self.tower(ids).pooled
        return Embedded(pooled, F.normalize(pooled, dim=-1))


def export_towers(model: str, out: Path, *, registry: Registry) -> dict[str, Any]:
    """The exporter ``embedding/onnx-towers``; 'MODEL?tower=image' writes one tower alone."""
    reference, _, query = model.partition("?tower=") if "?tower=" in model else (model, "", "")
    if query not in ("", *INPUTS):
        raise InputError(f"{model}: tower is {query!r}; write ?tower=image or ?tower=text, or leave it out for both")
    encoder = load(reference, registry=registry).eval().requires_grad_(False).float().cpu()
    if encoder.data.grafts:
        encoder = merge_grafts(copy.deepcopy(encoder))
    towers = [query] if query else list(INPUTS) if encoder.text is not None else ["image"]
    if "text" in towers and (problem := why_no_text_graph(encoder)):
        raise InputError(f"{reference}: {problem}; export the image tower alone: '{reference}?tower=image'")
    parity = {}
    with RunLog().progress("exporting to ONNX", len(towers) + 1) as bar, files.whole_folder(out, marker=ABOUT) as draft:
        for tower in towers:
            graph = (ImageGraph if tower == "image" else TextGraph)(encoder).eval()
            write_graph(graph, probes(encoder, tower)[1], draft / f"{tower}.onnx")
            parity[tower] = compare(graph, draft / f"{tower}.onnx", probes(encoder, tower))
            bar.advance(note=f"{tower} differs by {parity[tower]:.1g}")
        _beside(encoder, draft, towers=towers, parity=parity)
        bar.advance()
    return {"export": str(out), "towers": towers, "opset": OPSET, "parity": parity}


def why_no_text_graph(encoder: Encoder) -> str:
    """Why the text tower is no graph of token ids; empty when it is."""
    if encoder.text is None:
        return "it has no text tower"
    try:
        ids = encoder.tokenizer(["a"])
        fits = ids.dtype == torch.long and ids.shape == (1, encoder.text.context_length)
    except (ClipgraftError, KeyError, AttributeError):
        fits = False
    return "" if fits else f"its text tower ({type(encoder.text).__name__}) doesn't read token ids of one length"


def probes(encoder: Encoder, tower: str) -> list[Tensor]:
    """Inputs of one and of three samples, always the same."""
    draws = torch.Generator().manual_seed(0)
    if tower == "image":
        height, width = encoder.preprocess.size
        noise = torch.rand(4, 3, height, width, generator=draws)
        return [noise[:1], torch.cat([noise[1:3], torch.zeros_like(noise[:1])])]
    ids = encoder.tokenizer(["a photo of a cat", "a", "", "two small red squares left of a large blue circle"])
    return [ids[:1], ids[1:]]


def write_graph(graph: nn.Module, given: Tensor, path: Path) -> None:
    """``path``, with ``path``.data beside it when the weights exceed one file."""
    import onnx

    name = INPUTS[path.stem]
    held = sum(tensor.nbytes for tensor in graph.state_dict().values())
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program: Any = torch.onnx.export(
                graph,
                (given,),
                dynamo=True,
                opset_version=OPSET,
                input_names=[name],
                output_names=["pooled", "unit"],
                dynamic_shapes={name: {0: torch.export.Dim("batch")}},
                verbose=False,
            )
    except Exception as error:  # torch's exporter raises what the tower's code makes it raise
        told = " ".join(str(error).split())[:200]
        raise ClipgraftError(f"torch {torch.__version__} can't write this {path.stem} tower as ONNX: {told}") from error
    finally:
        logging.disable(before)
    program.save(str(path), external_data=held > WHOLE)
    written = onnx.load(str(path), load_external_data=False)
    if odd := sorted({node.domain for node in written.graph.node} - {"", "ai.onnx"}):
        raise ClipgraftError(f"torch {torch.__version__} wrote operators of {', '.join(odd)}; report this")
    if not written.graph.input[0].type.tensor_type.shape.dim[0].dim_param:
        raise ClipgraftError(
            f"torch {torch.__version__} wrote the {path.stem} tower for one batch size only; report this"
        )


def compare(graph: nn.Module, path: Path, given: Sequence[Tensor]) -> float:
    """Largest difference of unit embeddings between onnxruntime and torch; ``ClipgraftError`` above ``TOLERANCE``."""
    run, worst = Session(path), 0.0
    for each in given:
        with torch.no_grad():
            ours: Embedded = graph(each)
        theirs = run(each)
        if ours.pooled.shape != theirs.pooled.shape:
            raise ClipgraftError(f"onnxruntime answers {tuple(theirs.pooled.shape)}, torch {tuple(ours.pooled.shape)}")
        gap = float((ours.unit - theirs.unit).abs().max())
        worst = max(worst, gap) if gap == gap else float("inf")
    if worst > TOLERANCE:
        raise ClipgraftError(
            f"onnxruntime and torch differ by {worst:.2g} in {path.stem} embeddings, more than {TOLERANCE:g}; "
            "nothing was written"
        )
    return worst


class Session:
    """One tower in onnxruntime, on the CPU."""

    def __init__(self, path: Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self.inner = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.input = INPUTS[path.stem]

    def __call__(self, given: Tensor) -> Embedded:
        """Pixels (B, 3, H, W') or ids (B, L) -> both outputs."""
        pooled, unit = self.inner.run(["pooled", "unit"], {self.input: given.cpu().numpy()})
        return Embedded(torch.from_numpy(pooled), torch.from_numpy(unit))


def _beside(encoder: Encoder, folder: Path, *, towers: Sequence[str], parity: dict[str, float]) -> None:
    """``towers.json``, the tokenizer's files, the card."""
    manifest = described(encoder)
    if "text" in towers:
        encoder.tokenizer.save(str(folder))
    inputs: dict[str, Any] = {}
    if "image" in towers:
        inputs["image"] = {
            "name": "pixels",
            "shape": ["batch", 3, *encoder.preprocess.size],
            "range": [0, 1],
            "order": "RGB",
        }
    if "text" in towers and encoder.text is not None:
        inputs["text"] = {"name": "ids", "shape": ["batch", encoder.text.context_length], "type": "int64"}
    (folder / CARD).write_text(render(manifest, form="onnx"), encoding="utf-8")
    written = {f.name: files.sha256_of(f) for f in sorted(folder.iterdir()) if f.is_file() and f.name != CARD}
    about = {
        "schema": 1,
        "inputs": inputs,
        "outputs": {"pooled": ["batch", encoder.image.embed_dim], "unit": ["batch", encoder.image.embed_dim]},
        "logit_scale": float(encoder.logit_scale.exp()),
        "logit_bias": None if encoder.logit_bias is None else float(encoder.logit_bias),
        "preprocess": manifest["preprocess"] | {"inside_the_graph": ["mean", "std"]},
        "text_cfg": encoder.data.model_config.get("text_cfg", {}),
        "lineage": manifest["lineage"],
        "opset": OPSET,
        "parity": parity,
        "sha256": written,
        "versions": {name: version(name) for name in ("clipgraft", "torch", "onnx", "onnxruntime", "onnxscript")},
    }
    files.write_json(folder / ABOUT, about)
