"""``clipgraft export MODEL --out DIR --format onnx``: an inspection graph that onnxruntime runs without us.

DIR gets ``model.onnx`` (pixels -> score, map; the standard operators of opset 18) and ``detector.json``, which says how
a picture becomes its input. What onnxruntime answers is compared with torch before anything is kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl

import torch
from torch import Tensor
from torch.nn import functional as F

from clipgraft import files
from clipgraft.errors import ClipgraftError, InputError
from clipgraft.log import RunLog
from clipgraft.registry import Registry
from clipgraft_anomaly.detector import Detection, Detector, detect, open_detector

if TYPE_CHECKING:
    from clipgraft_anomaly.onnx_graph import InspectionGraph

MODEL, ABOUT = "model.onnx", "detector.json"
OPSET = 18
"""The lowest that torch writes without converting, and that has every operator; onnxruntime 1.14 and later run it."""
TOLERANCE = 1e-4
"""Largest difference of a score or a map's pixel between onnxruntime and torch."""
WHOLE = 1_900_000_000
"""Bytes of weights that fit into one file, which protobuf limits to 2 GiB; more go to ``model.onnx.data``."""


def export_onnx(model: str, out: Path, *, registry: Registry) -> dict[str, Any]:
    """The exporter ``anomaly/onnx``.

    ``model`` is a run or export with a detector, 'RUN?branch=query' for GenCLIP's, or 'MODEL?method=prompts&name=NAME'.
    """
    check_packages()
    reference, asked = _asked(model)
    method, name = asked.get("method"), asked.get("name")
    with RunLog().progress("exporting to ONNX", 3) as bar:
        trained = method is None
        detector = (
            _trained(reference, registry) if trained else open_detector(reference, registry=registry, method=method)
        )
        if "branch" in asked:
            detector = _query_only(detector, asked["branch"])
        bar.advance()
        with files.whole_folder(out, marker=ABOUT) as draft:
            write_graph(detector, draft, name=name)
            bar.advance()
            parity = compare(draft / MODEL, detector, name=name)
            about = _about(detector, draft, reference=reference, name=name) | {"parity": parity}
            files.write_json(draft / ABOUT, about)
            bar.advance()
    return {"export": str(out), "method": detector.method, "size": detector.size, "opset": OPSET, "parity": parity}


def check_packages() -> None:
    """Raise unless everything that an export needs is installed."""
    lacking = [package for package in ("onnx", "onnxruntime", "onnxscript") if find_spec(package) is None]
    if lacking:
        raise InputError(f"--format onnx needs {', '.join(lacking)}; type: pip install 'clipgraft-anomaly[onnx]'")


def _asked(model: str) -> tuple[str, dict[str, str]]:
    """Reference and keys of 'MODEL?method=METHOD&name=NAME'."""
    reference, _, query = model.partition("?")
    keys = dict(parse_qsl(query, keep_blank_values=True))
    if unknown := sorted(set(keys) - {"branch", "method", "name"}):
        raise InputError(f"{model}: unknown key {unknown[0]}; known are branch, method and name")
    return reference, keys


def _query_only(detector: Detector, branch: str) -> Detector:
    """GenCLIP's branch whose texts are the same for every picture."""
    from clipgraft_anomaly.genclip.branches import GenClipDetector

    if branch != "query" or not isinstance(detector, GenClipDetector):
        raise InputError(f"branch={branch} of {detector.method}: only genclip has a branch to choose, branch=query")
    return detector.query_only().requires_grad_(False).eval()


def _trained(reference: str, registry: Registry) -> Detector:
    """A run's or export's own detector."""
    try:
        return open_detector(reference, registry=registry)
    except InputError as error:
        if "--method" not in str(error):
            raise
        raise InputError(
            f"{reference} holds no detector; give a run or export of anomalyclip, or hand-written prompts about a "
            f"named object: '{reference}?method=prompts&name=NAME'; for the towers of any CLIP: --format onnx-towers"
        ) from None


def write_graph(detector: Detector, folder: Path, *, name: str | None = None) -> None:
    """``model.onnx`` in ``folder``, with ``model.onnx.data`` beside it when the weights exceed one file.

    Raises when torch can't write the graph with a free batch size and standard operators alone.
    """
    import onnx

    from clipgraft_anomaly.onnx_graph import baked

    graph = baked(detector, name=name)
    held = sum(tensor.nbytes for tensor in graph.state_dict().values())
    _traced(graph).save(str(folder / MODEL), external_data=held > WHOLE)
    written = onnx.load(str(folder / MODEL), load_external_data=False)
    odd = sorted({node.domain for node in written.graph.node} - {"", "ai.onnx"})
    if odd or written.functions:
        raise ClipgraftError(f"torch {torch.__version__} wrote operators of {', '.join(odd) or 'its own'}; report this")
    if not written.graph.input[0].type.tensor_type.shape.dim[0].dim_param:
        raise ClipgraftError(f"torch {torch.__version__} wrote a graph for one batch size only; report this")


def _traced(graph: InspectionGraph) -> Any:
    """torch's ``ONNXProgram``, quietly."""
    import logging
    import warnings

    pixels = torch.zeros(2, 3, graph.size, graph.size)
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.onnx.export(
                graph,
                (pixels,),
                dynamo=True,
                opset_version=OPSET,
                input_names=["pixels"],
                output_names=["score", "map"],
                dynamic_shapes={"pixels": {0: torch.export.Dim("batch")}},
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        told = str(error).strip().splitlines()
        raise ClipgraftError(f"torch {torch.__version__} can't write this tower as ONNX: {told[0]}") from error
    finally:
        logging.disable(before)


def compare(path: Path, detector: Detector, *, name: str | None = None) -> dict[str, float]:
    """Largest differences of scores and maps between onnxruntime on the file and torch.

    ``ClipgraftError`` when one exceeds ``TOLERANCE``.
    """
    worst = {"score": 0.0, "map": 0.0}
    run = Session(path)
    for pixels in probes(detector.size):
        ours = detect(detector, pixels, None if name is None else [name] * len(pixels))
        theirs = run(pixels)
        for part, mine, other in (("score", ours.score, theirs.score), ("map", ours.map, theirs.map)):
            if mine.shape != other.shape:
                raise ClipgraftError(f"{part}: onnxruntime answers {tuple(other.shape)}, torch {tuple(mine.shape)}")
            gap = float((mine.float().cpu() - other).abs().max())
            worst[part] = max(worst[part], gap) if gap == gap else float("inf")
    if max(worst.values()) > TOLERANCE:
        raise ClipgraftError(
            f"onnxruntime and torch differ by {worst['score']:.2g} in scores and {worst['map']:.2g} in maps, more than "
            f"{TOLERANCE:g}; nothing was written"
        )
    return worst


class Session:
    """onnxruntime on the CPU: pixels (B, 3, S, S) in [0, 1] -> ``Detection``."""

    def __init__(self, path: Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self.inner = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def __call__(self, pixels: Tensor) -> Detection:
        """As the class says."""
        score, found = self.inner.run(["score", "map"], {"pixels": pixels.float().cpu().numpy()})
        return Detection(torch.from_numpy(score), torch.from_numpy(found))


def probes(size: int) -> list[Tensor]:
    """Batches of one and of three made pictures (B, 3, S, S): noise; noise, soft blobs, black. Always the same."""
    draws = torch.Generator().manual_seed(0)
    noise = torch.rand(2, 3, size, size, generator=draws)
    blobs = F.interpolate(torch.rand(1, 3, 4, 4, generator=draws), (size, size), mode="bilinear")
    return [noise[:1], torch.cat([noise[1:], blobs, torch.zeros_like(blobs)])]


def _about(detector: Detector, folder: Path, *, reference: str, name: str | None) -> dict[str, Any]:
    """``detector.json``: what the graph takes and gives, what it was made from, and hashes."""
    from clipgraft_anomaly.thresholds import identity

    side, whole = detector.size, identity(detector)
    how = detector.preprocess
    return {
        "schema": 1,
        **detector.header(),
        "class_name": name,
        "input": {"name": "pixels", "shape": ["batch", 3, side, side], "range": [0, 1], "order": "RGB"},
        "outputs": {"score": ["batch"], "map": ["batch", side, side]},
        "preprocess": {
            "size": [side, side],
            "resize_mode": how.resize_mode,
            "interpolation": how.interpolation,
            "divide_by": 255,
            "normalisation": {"inside_the_graph": True, "mean": list(how.mean), "std": list(how.std)},
        },
        "opset": OPSET,
        **_thresholds(reference, whole, name=name),
        "model": {"architecture": detector.encoder.data.origin.architecture, "from": Path(reference).name},
        "sha256": {"detector": whole} | {file.name: files.sha256_of(file) for file in sorted(folder.iterdir())},
        "versions": {p: version(p) for p in ("clipgraft-anomaly", "torch", "onnx", "onnxruntime", "onnxscript")},
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def _thresholds(reference: str, sha256: str, *, name: str | None) -> Mapping[str, Any]:
    """The detector's stored thresholds; null with the reason when those there are don't belong to this graph."""
    from clipgraft_anomaly.thresholds import check_model, place, read_thresholds

    path = place(reference)
    if path is None or not path.is_file():
        return {"thresholds": None, "why_no_thresholds": "none are stored; clipgraft anomaly threshold makes them"}
    found = read_thresholds(path)
    try:
        check_model(found, sha256, path=path)
    except InputError:
        return {"thresholds": None, "why_no_thresholds": "those stored are for other weights, settings or tiles"}
    if found.class_name != name and name is not None:
        return {"thresholds": None, "why_no_thresholds": f"those stored are for {found.class_name}, not {name}"}
    return {"thresholds": found.model_dump(mode="json", by_alias=True)}
