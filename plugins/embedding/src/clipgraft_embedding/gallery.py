"""A page of hits with their images, one file without links to anything."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from io import BytesIO
from pathlib import Path
from typing import Any

from clipgraft.data import open_source
from clipgraft.data.base import BadSample
from clipgraft.data.images import ImageFiles
from clipgraft.errors import InputError
from clipgraft.files import write_text
from clipgraft_embedding.store import Embeddings

SIDE = 192
"""Largest side of a thumbnail [pixels]."""

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 15px/1.4 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem }}
ol {{ display: flex; flex-wrap: wrap; gap: 1rem; list-style: none; padding: 0 }}
li {{ width: {side}px }} img {{ max-width: 100%; border-radius: 4px }}
small {{ color: #555; overflow-wrap: anywhere }}
</style>
<h1>{title}</h1>
{body}
</html>
"""


def write_gallery(page: Path, found: Embeddings, results: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Write ``page`` with the hits of every query; their images are read from the data that ``found`` was made of."""
    source = open_source(found.about.source)
    if not isinstance(source, ImageFiles):
        raise InputError(f"--html needs the images as files, and {found.about.source} has none; leave --html out")
    if source.fingerprint != found.about.fingerprint:
        raise InputError(f"{found.about.source} has changed since {found.path} was made; embed it again")
    index = {name: k for k, name in enumerate(source.ids)}
    texts = found.about.kind == "texts"

    def item(hit: Mapping[str, Any]) -> str:
        name = str(hit["id"]).rpartition("#")[0] if texts else str(hit["id"])
        caption = f"<br>{escape(hit['caption'])}" if hit.get("caption") else ""
        label = f"<b>{hit['score']:.3f}</b> <small>{escape(str(hit['id']))}</small>{caption}"
        return f"<li>{_thumbnail(source, index[name])}<br>{label}</li>"

    body = "\n".join(
        f"<h2>{escape(query)}</h2>\n<ol>\n" + "\n".join(map(item, hits)) + "\n</ol>" for query, hits in results.items()
    )
    write_text(page, PAGE.format(title=escape(f"Hits in {found.path.name}"), side=SIDE, body=body))


def _thumbnail(source: ImageFiles, index: int) -> str:
    try:
        image = source[index].image
    except BadSample as error:
        return f"<small>{escape(error.reason)}</small>"
    image.thumbnail((SIDE, SIDE))  # type: ignore[union-attr]
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=85)  # type: ignore[union-attr]
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}">'
