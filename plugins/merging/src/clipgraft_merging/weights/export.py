"""The result of a merge as an ordinary export: weights as they are merged, configuration, tokenizer, its history."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from clipgraft.files import sha256_of, whole_folder, write_json
from clipgraft_merging.weights.checkpoints import Checkpoint
from clipgraft_merging.weights.inputs import Inputs
from clipgraft_merging.weights.layouts import to_own
from clipgraft_merging.weights.writer import SafetensorsWriter

if TYPE_CHECKING:
    from clipgraft_merging.weights.engine import Merger


def lineage(inputs: Inputs, merger: Merger) -> dict[str, Any]:
    """Method, settings, and every input in order, with its hash and how it came to be itself where that is known."""
    models = [
        {"uri": c.ref, "sha256": c.sha256} | ({"lineage": list(c.facts.lineage)} if c.facts and c.facts.lineage else {})
        for c in inputs.models
    ]
    base = {} if inputs.base is None else {"base": inputs.base.ref, "base_sha256": inputs.base.sha256}
    return {"merge": merger.name, "settings": merger.settings(), **base, "models": models}


@contextmanager
def merged_folder(out: Path, inputs: Inputs, merger: Merger) -> Iterator[Callable[[str, Tensor], None]]:
    """Yields ``write(canonical name, tensor)``; ``out`` is replaced when the block ends without an error."""
    from clipgraft import checkpoint
    from clipgraft.card import render
    from clipgraft.encoders.openclip import CONFIG, WEIGHTS

    source = inputs.described
    data, facts = source.data, source.facts
    assert facts is not None
    record = lineage(inputs, merger)
    weights = checkpoint.OWN_WEIGHTS if facts.reason else WEIGHTS
    preprocess, config = data.preprocess.as_dict(), facts.model_config
    manifest = {
        "schema": checkpoint.SCHEMA,
        "clipgraft": checkpoint._maker("core")["version"],
        "level": "L2" if facts.reason else "L0",
        "reason": facts.reason,
        "encoder": {
            "uri": facts.uri if facts.reason else source.ref,
            "architecture": facts.architecture,
            "weights": weights,
        },
        "model_config": config,
        "preprocess": preprocess,
        "tokenizer": "huggingface" if config.get("text_cfg", {}).get("hf_tokenizer_name") else "bpe",
        "grafts": [dict(graft) | checkpoint._maker(graft["use"]) for graft in facts.grafts],
        "components": [],
        "lineage": [*facts.lineage, record],
    }
    names = {key: name_in_file(key, source) for key in inputs.reference.places}
    entries = {names[key]: (shape_in_file(key, inputs), inputs.dtype(key)) for key in names}
    with whole_folder(Path(out), marker=checkpoint.MANIFEST) as draft:
        with SafetensorsWriter(draft / weights, entries, {"clipgraft.merge": json.dumps(record)}) as writer:

            def write(key: str, tensor: Tensor) -> None:
                for each, value in inputs.under_each_name(key, tensor):
                    writer.write(names[each], value.reshape(shape_in_file(each, inputs)))

            yield write
        if not facts.reason:
            write_json(draft / CONFIG, {"model_cfg": config, "preprocess_cfg": preprocess | {"mode": "RGB"}})
        if data.tokenizer is not None:
            data.tokenizer.save(str(draft))
        (draft / checkpoint.CARD).write_text(render(manifest), encoding="utf-8")
        files = {str(f.relative_to(draft)): f for f in sorted(draft.rglob("*")) if f.is_file()}
        hashes = {name: {"sha256": sha256_of(f), "bytes": f.stat().st_size} for name, f in files.items()}
        write_json(draft / checkpoint.MANIFEST, manifest | {"files": hashes})


def name_in_file(key: str, source: Checkpoint) -> str:
    """The name that open_clip expects for the configuration of ``source``, or the encoder's own where it can't."""
    facts = source.facts
    assert facts is not None
    if facts.reason:
        return source.places[key].names[0] if source.layout == "own" else to_own(key)
    custom = facts.model_config.get("custom_text") or "hf_model_name" in facts.model_config.get("text_cfg", {})
    return key if custom else key.removeprefix("text.")


def shape_in_file(key: str, inputs: Inputs) -> tuple[int, ...]:
    """Scales are scalars, unless the configuration asks for vectors of one."""
    source = inputs.described
    facts = source.facts
    assert facts is not None
    if source.layout == "own":
        return source.stored_shape(key)
    vector = key.startswith("logit_") and facts.model_config.get("nonscalar_logit_scale")
    return (1,) if vector else inputs.shape(key)
