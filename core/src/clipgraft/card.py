"""Model cards: what a model is, how it came to be, what was measured, what that cost, its licence and its limits.

A run hands over what it knows as plain JSON (``told_by``), which ``clipgraft.json`` keeps under ``card``; ``render``
makes Markdown of it with the front matter that the Hugging Face hub reads. So a later export can write the card again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal

import yaml

from clipgraft import retention
from clipgraft.errors import ClipgraftError
from clipgraft.evaluation.comparison import Row

if TYPE_CHECKING:
    from clipgraft.runner import Run

Form = Literal["clipgraft", "transformers", "onnx"]

KNOWN_LICENSE = re.compile(
    r"apache-2\.0|mit|bsd(-[23]-clause)?|isc|zlib|unlicense|wtfpl|mpl-2\.0|afl-3\.0|artistic-2\.0|(a|l)?gpl-3\.0|gpl(-2\.0)?"
    r"|lgpl(-2\.1)?|openrail|creativeml-openrail-m|odbl|odc-by|pddl|cc|cc0-1\.0|cc-by(-nc)?(-sa|-nd)?-[34]\.0"
)
"""Identifiers that the hub knows; any other name is written as ``other`` with that name."""

UNSTATED = "not stated"


def told_by(run: Run, kept: Sequence[Row]) -> dict[str, Any]:
    """What a finished run tells of itself; ``kept``: what it should not have cost."""
    from clipgraft.config.load import dump_yaml
    from clipgraft.evaluation import comparison, records

    before, after = run.measure("before"), run.measure("after")
    both = [name for name in after if name in before]  # a head that the run trained may bring metrics of its own
    rows = [Row(*name.rpartition(".")[::2], before[name], after[name], after[name] - before[name]) for name in both]
    with suppress(ClipgraftError):  # no samples were kept: values without a test
        folder = run.path / "evaluation"
        rows = comparison.compare(records.read(folder / "before"), records.read(folder / "after"), log=run.log)
    component, wanted = run.recipe.component, run.config.card
    return {
        "recipe": run.recipe.name,
        "summary": component.summary,
        "paper": component.paper,
        "model": run.config.model.from_,
        "data": run.config.data.from_,
        "seed": run.seed,
        "settings": dump_yaml(run.config),
        "measured": [row.as_dict() for row in rows],
        "kept": [row.as_dict() for row in kept],
        "license": wanted.license,
        "sources": wanted.sources,
        "limits": wanted.limits,
    }


def render(manifest: Mapping[str, Any], *, form: Form = "clipgraft", where: str = "DIR") -> str:
    """README.md of an export whose ``clipgraft.json`` is ``manifest``. ``where``: the folder or the hub's ORG/NAME."""
    card = manifest.get("card") or {}
    ran = "recipe" in card
    lineage, base = manifest["lineage"], card.get("model") or manifest["encoder"]["uri"]
    title = f"{card['recipe']} on {base}" if ran else f"A CLIP from {base}"
    parts = [
        _front_matter(manifest, card, form),
        f"# {title}",
        card.get("summary", ""),
        f"Method: {card['paper']}" if card.get("paper") else "",
        f"Architecture {manifest['encoder']['architecture']}, portability {manifest['level']}. "
        f"Grafts: {', '.join(g['use'] for g in manifest['grafts']) or 'none'}. "
        f"Components: {', '.join(c['name'] for c in manifest['components']) or 'none'}.",
        "## Use",
        *_use(manifest, form, where),
        "## How it came to be",
        "\n".join(_lineage(lineage)) or "Nothing was recorded.",
        f"Data: `{card['data']}`. Seed {card['seed']}." if ran else "",
        f"<details><summary>Settings</summary>\n\n```yaml\n{card['settings']}```\n\n</details>" if ran else "",
        *(_measured(card) if ran else ()),
        "## Licence",
        f"This model: {card.get('license') or UNSTATED}. Of its sources, the base model and the data: "
        f"{_worded(card.get('sources'))}. The terms of the sources go on to apply.",
        "## Limits",
        *_limits(manifest, card),
    ]
    return _public("\n\n".join(part for part in parts if part)) + "\n"


def _worded(sources: str | Mapping[str, str] | None) -> str:
    """Licences of sources as one text."""
    if isinstance(sources, Mapping):
        return "; ".join(f"{name}: {license}" for name, license in sources.items())
    return sources or UNSTATED


def hub_name(reference: str) -> str:
    """The hub's ORG/NAME that a model reference stands for; empty when it stands for none."""
    scheme, _, rest = reference.partition(":")
    if scheme in ("hf", "hf-hub"):
        return rest.partition("@")[0]
    if scheme == "open_clip" and "/" in rest:
        from open_clip.pretrained import get_pretrained_cfg

        return str((get_pretrained_cfg(*rest.split("/", 1)) or {}).get("hf_hub", "")).strip("/")
    return ""


def _front_matter(manifest: Mapping[str, Any], card: Mapping[str, Any], form: Form) -> str:
    """What the hub reads: ids only where they are true and it knows them."""
    library = {"clipgraft": "clipgraft" if manifest["reason"] else "open_clip", "transformers": "transformers"}
    names = [entry.get("recipe") or entry.get("merge") or "" for entry in manifest["lineage"]]
    bases = [hub_name(str(entry.get("base", ""))) for entry in manifest["lineage"][:1]]
    bases = bases or [hub_name(manifest["encoder"]["uri"])]
    license = str(card.get("license") or "").strip()
    matter: dict[str, Any] = {
        "library_name": library.get(form, form),
        "pipeline_tag": "zero-shot-image-classification" if manifest["tokenizer"] else "image-feature-extraction",
        "tags": list(dict.fromkeys(["clip", "clipgraft", *(n.rpartition("/")[2] for n in names if n)])),
    }
    if license:
        name = re.sub(r"[^a-z0-9.]+", "-", license.lower()).strip("-")
        matter |= {"license": name} if KNOWN_LICENSE.fullmatch(name) else {"license": "other", "license_name": name}
    matter |= {"base_model": bases[0]} if bases[0] else {}
    return f"---\n{yaml.safe_dump(matter, sort_keys=False, allow_unicode=True)}---"


def _use(manifest: Mapping[str, Any], form: Form, where: str) -> Iterator[str]:
    """How to open it, in every library that can."""
    hub = where != "DIR" and "/" in where
    size = manifest["preprocess"]["size"]
    if form == "transformers":
        kind = manifest["transformers"]
        lines = [f"from transformers import AutoProcessor, {kind}", f'model = {kind}.from_pretrained("{where}")']
        yield _code(*lines, f'processor = AutoProcessor.from_pretrained("{where}")')
        yield _code("import clipgraft", f'encoder = clipgraft.load("{"hf:" if hub else ""}{where}")')
        return
    if form == "onnx":
        yield f"`towers.json` names inputs and outputs. Images are {size[0]} x {size[1]} pixels in [0, 1]."
        return
    if not manifest["reason"]:
        name = f"{'hf-hub' if hub else 'local-dir'}:{where}"
        yield _code(
            "import open_clip",
            f'model, _, preprocess = open_clip.create_model_and_transforms("{name}")',
            f'tokenizer = open_clip.get_tokenizer("{name}")',
        )
    lines = ["import clipgraft", f'encoder = clipgraft.load("{"hf-hub:" if hub else ""}{where}")']
    yield _code(*lines)
    if manifest["reason"]:
        yield f"open_clip can't hold it: {manifest['reason']}."
    needed = {p["distribution"] for p in (*manifest["grafts"], *manifest["components"]) if p.get("distribution")}
    if needed := needed - {"clipgraft"}:
        yield f"What it brings beyond a plain CLIP needs {', '.join(f'`{name}`' for name in sorted(needed))}."


def _code(*lines: str) -> str:
    return "\n".join(["```python", *lines, "```"])


def _lineage(lineage: Sequence[Mapping[str, Any]], indent: str = "") -> Iterator[str]:
    """A line per step, those of merged models below it."""
    for entry in lineage:
        what = entry.get("recipe") or entry.get("merge") or f"`{json.dumps({k: entry[k] for k in entry})}`"
        digest = str(entry.get("base_sha256", ""))[:12]
        facts = [f"from `{entry['base']}`" if entry.get("base") else "", f"sha256 {digest}…" if digest else ""]
        facts += [f"data `{entry['data']}`" if entry.get("data") else ""]
        facts += [f"seed {entry['seed']}" if "seed" in entry else ""]
        yield f"{indent}- {', '.join([what, *filter(None, facts)])}"
        for model in entry.get("models", ()):
            yield f"{indent}    - merges `{model['uri']}`, sha256 {str(model['sha256'])[:12]}…"
            yield from _lineage(model.get("lineage", ()), indent + "        ")


def _measured(card: Mapping[str, Any]) -> Iterator[str]:
    """What was measured before and after the run, and what was kept."""
    yield "## What was measured"
    rows = [Row.from_dict(row) for row in card["measured"]]
    told = "Before and after, on the same samples (p adjusted over the table, Holm):"
    kept = [Row.from_dict(row) for row in card["kept"]]
    nothing = "Only what the model could do before was measured." if kept else "Nothing was measured in this run."
    yield retention.as_markdown(rows, told).strip() or nothing
    yield "## What it cost"
    yield retention.as_markdown(kept).strip() or "What the model could do before and may have lost was not measured."


def _limits(manifest: Mapping[str, Any], card: Mapping[str, Any]) -> Iterator[str]:
    """What follows from the record, and what its maker says."""
    size, text = manifest["preprocess"]["size"], manifest["model_config"].get("text_cfg", {})
    lines = [f"- It reads images of {size[0]} x {size[1]} pixels; others are resized."]
    if text.get("context_length"):
        lines += [f"- It reads texts of up to {text['context_length']} tokens; what is beyond is cut."]
    lines += ["- What isn't in a table above was not measured. Biases of the base model and of the data stay."]
    yield "\n".join(lines)
    yield str(card.get("limits") or "")


def _public(text: str) -> str:
    """Absolute paths of this machine without the folders above them."""
    return re.sub(r"(^|[\s\"'`(\[{,=]|folder:|csv:|wds:)(?:/[\w.~+-]+)+/([\w.+-]+)", r"\1\2", text, flags=re.MULTILINE)
