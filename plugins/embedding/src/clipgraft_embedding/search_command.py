"""``clipgraft search``: what in an embedding file fits a text or an image."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from clipgraft.cli.output import JsonFlag, emit


class IndexName(StrEnum):
    """How rows are found."""

    exact = "exact"
    faiss = "faiss"


def search(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Written by clipgraft embed.")],
    query: Annotated[list[str] | None, typer.Option(metavar="TEXT", help="What to look for; may be repeated.")] = None,
    image: Annotated[
        list[Path] | None, typer.Option(metavar="X", help="An image to look for; may be repeated.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Where the model of FILE is now; by default where it was.")
    ] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="Hits per query.")] = 10,
    index: Annotated[IndexName, typer.Option(help="faiss is approximate from 100,000 rows on.")] = IndexName.exact,
    html: Annotated[
        Path | None, typer.Option(metavar="PAGE", help="Also write a page with the images of the hits.")
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Search embeddings, e.g. clipgraft search photos.safetensors --query "a red heart" """
    from clipgraft.errors import InputError

    if not query and not image:
        raise InputError("nothing to search for; give --query TEXT or --image FILE")
    with redirect_stdout(sys.stderr):  # whatever libraries print
        import torch

        from clipgraft.log import RunLog
        from clipgraft.registry import current
        from clipgraft_embedding.processes import on_device
        from clipgraft_embedding.queries import check_model, encode_images, encode_texts
        from clipgraft_embedding.search import FaissIndex
        from clipgraft_embedding.store import Embeddings

        found = Embeddings.open(file)
        encoder = on_device(model or found.about.model, registry=current())
        check_model(found, encoder, images=bool(image))
        parts = [encode_texts(encoder, query)] if query else []
        parts += [encode_images(encoder, image)] if image else []
        names, vectors = [*(query or []), *map(str, image or [])], torch.cat(parts)
        recall, lists = None, 0
        if index is IndexName.faiss:
            built = FaissIndex(found)
            scores, rows = built.search(vectors, k)
            recall, lists = built.recall(vectors, k), built.lists
        else:
            scores, rows = found.search(vectors, k)
        found_hits = [_hits(found, *pair) for pair in zip(scores.tolist(), rows.tolist(), strict=True)]
        if html is not None:
            from clipgraft_embedding.gallery import write_gallery

            write_gallery(html, found, dict(zip(names, found_hits, strict=True)))
            RunLog().info(f"{html} shows the hits")
    if json:
        results = [{"query": name, "hits": hits} for name, hits in zip(names, found_hits, strict=True)]
        document = {"file": str(file), "model": found.about.model, "rows": len(found), "results": results}
        emit(document | ({"recall": recall, "lists": lists} if recall is not None else {}))
        return
    for name, hits in zip(names, found_hits, strict=True):
        if len(names) > 1:
            print(name)
        for hit in hits:
            caption = f"  {hit['caption']}" if hit.get("caption") else ""
            print(f"{hit['rank']:>3}  {hit['score']:.4f}  {hit['id']}{caption}")
    if recall is not None:
        print(f"recall of the {k} exact hits: {recall:.3f}" + (f" ({lists} lists)" if lists else ""))


def _hits(found: Any, scores: list[float], rows: list[int]) -> list[dict[str, Any]]:
    hits = []
    for rank, (score, row) in enumerate(zip(scores, rows, strict=True), 1):
        if row < 0:  # faiss visited too few lists
            break
        hit = {"rank": rank, "score": score, "id": found.ids[row]}
        hits.append(hit | ({"caption": found.captions[row]} if found.captions else {}))
    return hits
