from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from clipgraft.checkpoint import write_export
from clipgraft.cli import main
from clipgraft.data.folder import open_folder
from clipgraft.encoders.base import Encoder
from clipgraft.errors import InputError
from clipgraft.files import write_tensors
from clipgraft.testing.tiny import tiny_clip
from clipgraft_embedding.embed import embed
from clipgraft_embedding.parts import PartRows, Parts, Plan
from clipgraft_embedding.search import FaissIndex
from clipgraft_embedding.store import Embeddings, join


@pytest.fixture(scope="module")
def file(encoder: Encoder, model: str, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The photographs' embeddings."""
    out = tmp_path_factory.mktemp("found") / "photos.safetensors"
    return embed(encoder, open_folder(photos), out=out, model=model, workers=0).path


def written(rows: torch.Tensor, folder: Path, *, name: str = "rows.safetensors", per_part: int = 1000) -> Embeddings:
    """A file with these rows (n, D), named r0, r1, ..."""
    out = folder / name
    plan = Plan("images", "m", "0" * 64, "s", "f", {}, len(rows), "fp32", "fp32", 1, per_part)
    with Parts(out) as parts:
        parts.begin(plan)
        for part, start in enumerate(range(0, len(rows), per_part)):
            some = rows[start : start + per_part]
            ids = [f"r{k}" for k in range(start, start + len(some))]
            made = PartRows([some], ids, [None] * len(some), [""] * len(some))
            parts.write(part, made, dim=rows.shape[1], dtype="fp32")
        files = [parts.path(k) for k in range(-(-len(rows) // per_part))]
        join(out, plan, files, classes=(), draft=parts.folder / "draft")
        parts.remove()
    return Embeddings.open(out)


def brute_force(rows: torch.Tensor, queries: torch.Tensor, k: int) -> tuple[list[list[int]], list[list[float]]]:
    """Sort everything, ties by row."""
    scores = (F.normalize(queries, dim=-1) @ rows.T).tolist()
    order = [sorted(range(len(line)), key=lambda i, line=line: (-line[i], i))[:k] for line in scores]
    return order, [[line[i] for i in best] for line, best in zip(scores, order, strict=True)]


@pytest.mark.parametrize("suffix", ["safetensors", "parquet"])
@pytest.mark.parametrize("k", [1, 7, 100])
def test_search_is_brute_force(tmp_path: Path, suffix: str, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    rows = F.normalize(torch.randn(500, 8), dim=-1)
    rows[123] = rows[45] = rows[477]  # equal rows in different chunks
    found = written(rows, tmp_path, name=f"rows.{suffix}", per_part=64)
    chunks = Embeddings.chunks
    monkeypatch.setattr(Embeddings, "chunks", lambda self: chunks(self, 90))
    assert len(list(found.chunks())) > 5
    queries = torch.cat([torch.randn(3, 8) * 5, rows[45:46]])
    scores, index = found.search(queries, k)
    expected, values = brute_force(rows, queries, k)
    assert index[3, :3].tolist() == [45, 123, 477][: min(k, 3)], "equal scores in row order"
    torch.testing.assert_close(scores, torch.tensor(values), rtol=0, atol=1e-5)
    gap = torch.tensor(values).diff(dim=1).abs().min() if k > 1 else 1
    if k < 100 or gap > 1e-5:
        assert index.tolist() == expected


def test_more_hits_than_rows_are_all_rows(tmp_path: Path) -> None:
    found = written(F.normalize(torch.randn(5, 4), dim=-1), tmp_path)
    assert sorted(found.search(torch.randn(1, 4), 10)[1][0].tolist()) == [0, 1, 2, 3, 4]
    assert found.ids == ["r0", "r1", "r2", "r3", "r4"]
    with pytest.raises(InputError, match="k is 0"):
        found.search(torch.randn(1, 4), 0)
    with pytest.raises(InputError, match=r"shape \(1, 3\).* holds embeddings of 4 numbers"):
        found.search(torch.randn(1, 3))


def test_a_mapped_file_is_not_read_into_memory(tmp_path: Path) -> None:
    found = written(F.normalize(torch.randn(40_000, 256), dim=-1), tmp_path, per_part=8000)  # 41 MB

    def private() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) * 1024

    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc")
    before, total = private(), float(found.embeddings.sum())
    assert private() - before < 10e6 and total == total


def test_faiss_is_exact_below_its_limit_and_says_its_recall_above(tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    torch.manual_seed(1)
    rows = F.normalize(torch.randn(3000, 16), dim=-1)
    found, queries = written(rows, tmp_path), torch.randn(20, 16)
    flat = FaissIndex(found)
    exact_scores, exact_rows = found.search(queries, 5)
    scores, index = flat.search(queries, 5)
    assert flat.lists == 0 and torch.equal(index, exact_rows) and flat.recall(queries, 5) == 1
    torch.testing.assert_close(scores, exact_scores, rtol=0, atol=1e-5)
    ivf = FaissIndex(found, ivf_from=1000, probes=8)
    own = ivf.search(queries, 5)[1]
    shared = [len(set(a) & set(b)) / 5 for a, b in zip(own.tolist(), exact_rows.tolist(), strict=True)]
    assert ivf.lists == 219 and ivf.recall(queries, 5) == pytest.approx(sum(shared) / 20)
    assert 0.1 < ivf.recall(queries, 5) < 1, "few lists are visited here"
    assert FaissIndex(found, ivf_from=1000, probes=219).recall(queries, 5) == 1


def test_faiss_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    with pytest.raises(InputError, match=r"pip install 'clipgraft-embedding\[faiss\]'"):
        FaissIndex(written(torch.eye(3), tmp_path))


def run(capsys: pytest.CaptureFixture[str], *args: str | Path, code: int = 0) -> tuple[str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(["search", *map(str, args)])
    shown = capsys.readouterr()
    assert stopped.value.code == code, shown.err
    return shown.out, shown.err


def test_texts_and_images_find_rows(
    file: Path, photos: Path, encoder: Encoder, capsys: pytest.CaptureFixture[str]
) -> None:
    assert encoder.text is not None
    image = photos / "017.jpg"
    out, _ = run(capsys, file, "--query", "a red heart", "--query", "dog", "--image", image, "-k", "3", "--json")
    document: Any = json.loads(out)
    assert [result["query"] for result in document["results"]] == ["a red heart", "dog", str(image)]
    assert document["results"][2]["hits"][0]["id"] == "017.jpg"
    assert document["results"][2]["hits"][0]["score"] == pytest.approx(1, abs=1e-5)
    found = Embeddings.open(file)
    with torch.no_grad():
        query = encoder.text(encoder.tokenizer(["a red heart"])).unit()
    rows, scores = brute_force(found.embeddings, query, 3)
    hits = document["results"][0]["hits"]
    assert [hit["id"] for hit in hits] == [found.ids[row] for row in rows[0]]
    assert [hit["score"] for hit in hits] == pytest.approx(scores[0], abs=1e-5)
    assert [hit["rank"] for hit in hits] == [1, 2, 3]
    out, _ = run(capsys, file, "--query", "a red heart", "-k", "2")
    assert [line.split() for line in out.splitlines()] == [
        [str(rank), f"{score:.4f}", found.ids[row]]
        for rank, score, row in zip((1, 2), scores[0], rows[0], strict=False)
    ]


def test_captions_are_found_by_an_image(
    encoder: Encoder, model: str, captioned: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from clipgraft.data import open_source

    source: Any = open_source(captioned)
    found = embed(encoder, source, out=tmp_path / "t.safetensors", kind="texts", model=model)
    out, _ = run(capsys, found.path, "--image", photos / "003.jpg", "-k", "1")
    assert "square number" in out and "#" in out


def test_a_page_shows_the_hits(
    encoder: Encoder, model: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import base64
    import io
    import re

    from PIL import Image

    found = embed(encoder, open_folder(photos), out=tmp_path / "a.safetensors", model=model, workers=0)
    run(capsys, found.path, "--query", "a <red> heart", "-k", "4", "--html", tmp_path / "hits.html")
    page = (tmp_path / "hits.html").read_text()
    images = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', page)
    assert len(images) == 4 and "a &lt;red&gt; heart" in page and "http" not in page
    assert max(Image.open(io.BytesIO(base64.b64decode(images[0]))).size) <= 192


def test_what_does_not_fit_is_one_line(
    file: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def error(*args: str | Path) -> str:
        lines = [line for line in run(capsys, *args, code=2)[1].splitlines() if line.startswith("error: ")]
        assert len(lines) == 1
        return lines[0]

    assert "give --query TEXT or --image FILE" in error(file)
    assert "is empty" in error(file, "--query", " ")
    assert "give an image file" in error(file, "--image", photos / "011.jpg")
    assert "missing file" in error(file, "--image", photos / "nowhere.jpg")
    assert "there is no file" in error(tmp_path / "a.safetensors", "--query", "dog")
    write_tensors(tmp_path / "a.safetensors", {"embeddings": torch.eye(3)})
    (tmp_path / "b.parquet").write_bytes(b"PAR1")
    for name in ("a.safetensors", "b.parquet"):
        assert "was not written by clipgraft embed" in error(tmp_path / name, "--query", "dog")
    other = write_export(tiny_clip(seed=9), tmp_path / "other")
    assert "are not those that made" in error(file, "--query", "dog", "--model", str(other))
    wide = write_export(tiny_clip(seed=9, embed=24), tmp_path / "wide")
    assert "are not those that made" in error(file, "--query", "dog", "--model", str(wide))


def test_a_moved_model_and_another_text_tower_search(
    file: Path, encoder: Encoder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from copy import deepcopy

    tuned = deepcopy(encoder)
    with torch.no_grad():
        tuned.text.tower.text_projection += 0.1  # type: ignore[union-attr]
    moved = write_export(tuned, tmp_path / "moved")
    out, _ = run(capsys, file, "--query", "dog", "--model", str(moved), "-k", "1", "--json")
    with torch.no_grad():
        query = tuned.text(tuned.tokenizer(["dog"])).unit()  # type: ignore[misc]
    found = Embeddings.open(file)
    assert json.loads(out)["results"][0]["hits"][0]["id"] == found.ids[brute_force(found.embeddings, query, 1)[0][0][0]]
