"""The manifest of ``data``: datasets that are opened by scheme, as strings."""

from __future__ import annotations

from clipgraft.spec import CommandSpec, Component, hookimpl

_PACKAGE = "clipgraft_data"


@hookimpl
def clipgraft_datasets() -> list[Component]:
    """Data sources, opened as ``name:PATH?key=value``."""
    rows = (
        ("wds", "shards:Shards", "Webdataset tar shards: wds:DIR, wds:FILE.tar or wds:DIR/{000..009}.tar"),
        ("hf", "hub:HuggingFace", "Hugging Face datasets: hf:ORG/NAME, hf:DIR (save_to_disk) or hf:FILE.parquet"),
        ("table", "tables:table", "Parquet or JSONL manifest: images by path or in the file, captions, weights"),
        ("karpathy", "coco:karpathy", "Karpathy's splits of COCO and Flickr30k with five captions per image"),
        ("coco", "coco:coco", "COCO caption annotations"),
        ("mix", "mix:Mix", "A YAML list of sources with their shares of an epoch"),
    )
    return [
        Component(
            name=name, target=f"{_PACKAGE}.{where}", config=f"{_PACKAGE}.config:{name.title()}Config", summary=summary
        )
        for name, where, summary in rows
    ]


@hookimpl
def clipgraft_commands() -> list[CommandSpec]:
    """`clipgraft data`."""
    return [CommandSpec(name="data", target=f"{_PACKAGE}.commands:app", help="Look for what is wrong with a data set.")]
