"""Two and three processes measure what one measures, exactly; nobody waits for a rank that has nothing or fails."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from clipgraft.config.schema import EvaluatorNode
from clipgraft.data.base import BadSample, Pair, Sample
from clipgraft.distributed import rank
from clipgraft.errors import InputError
from clipgraft.evaluation import evaluate, sharding
from clipgraft.evaluation.features import EncoderFeatures
from clipgraft.evaluation.pairs import Pairs
from clipgraft.log import RunLog
from clipgraft.registry import Registry
from clipgraft.testing.ranks import run_ranks
from clipgraft.testing.tiny import tiny_clip

CLASSES = ("red", "green", "blue", "yellow")


@dataclass
class Drawn:
    """n drawn pictures; those in ``broken`` can't be read, reading those in ``fatal`` is an error."""

    n: int
    broken: frozenset[int] = frozenset()
    fatal: frozenset[int] = frozenset()
    name: str = "drawn"
    reads: int = 0
    classes = CLASSES
    templates = ("a photo of a {}",)

    def __post_init__(self) -> None:
        self.fingerprint = f"{self.n}/{sorted(self.broken)}/{sorted(self.fatal)}"
        self.attributes = dict[str, Any]()

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> Sample:
        self.reads += 1
        if index in self.fatal:
            raise InputError(f"place {index} is beyond repair")
        if index in self.broken:
            raise BadSample(f"s{index}", "torn")
        captions = tuple(f"a {CLASSES[(index + k) % 4]} circle {index}" for k in range(1 + index % 3))
        return Sample(f"s{index}", picture(index), captions, index % 4)


@dataclass
class DrawnPairs:
    """n drawn minimal pairs."""

    n: int
    name: str = "pairs"
    fingerprint: str = "pairs"
    patterns = ("color", "count")

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> Pair:
        images = picture(2 * index), picture(2 * index + 1)
        return Pair(f"p{index}", images, (f"a red star {index}", f"a blue star {index}"), self.patterns[index % 2])


def picture(seed: int) -> torch.Tensor:
    return torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def measured(folder: str, batch_size: int) -> dict[str, Any]:
    """Evaluators on files, with everything that ranks could get wrong."""
    probe = EvaluatorNode(use="linear-probe", data=f"folder:{folder}", on="tokens", solver="ridge")
    zero_shot = EvaluatorNode(use="zero-shot", data=f"folder:{folder}", per_class=True)
    nodes = [zero_shot, f"retrieval@csv:{folder}.csv", probe]
    return evaluate(tiny_clip(), nodes, registry=Registry.discover(allow=()), batch_size=batch_size)


def on_ranks(folder: str) -> dict[str, Any]:
    """Whatever is compared with one process."""
    found: dict[str, Any] = {size: measured(folder, size) for size in (4, 64)}  # 64: one batch, a rank has none
    drawn = Drawn(24, frozenset(range(4, 12)) | frozenset({20}))  # a rank finds nothing that can be read
    out = io.StringIO()
    features = EncoderFeatures(tiny_clip(), batch_size=4, log=RunLog(stream=out, is_main=rank() == 0))
    found |= {
        "images": features.images(drawn),
        "tokens": features.tokens(drawn),
        "texts": features.texts(list("abcab")),
    }
    found |= {"ids": [s.id for s in features.samples(drawn)], "captions": [s.captions for s in features.samples(drawn)]}
    found |= {"skipped": features.skipped(drawn), "said": out.getvalue(), "reads": drawn.reads}
    found["classifier"] = EncoderFeatures(tiny_clip(), batch_size=1).classifier(CLASSES, ("a {}", "the {} one"))
    found["pairs"] = Pairs()(EncoderFeatures(tiny_clip(), batch_size=3), DrawnPairs(10))
    for name, source in {"error": Drawn(24, fatal=frozenset({23})), "nothing": Drawn(24, frozenset(range(24)))}.items():
        with pytest.raises(InputError) as caught:
            EncoderFeatures(tiny_clip(), batch_size=4).images(source)
        found[name] = str(caught.value)
    return found


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder, rows = tmp_path_factory.mktemp("ranks") / "data", ["image,caption"]
    for index in range(40):
        path = folder / CLASSES[index % 4] / f"{index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(index).permute(1, 2, 0).numpy()).resize((40, 36)).save(path)
        rows += [f"data/{path.parent.name}/{path.name},a {path.parent.name} square {index} {k}" for k in range(2)]
        if index % 11 == 3:
            path.write_bytes(path.read_bytes()[:60])
    folder.with_suffix(".csv").write_text("\n".join(rows))
    return str(folder)


@pytest.fixture(scope="module")
def alone(files: str) -> dict[str, Any]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return on_ranks(files)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_measure_what_one_process_measures(world: int, files: str, alone: dict[str, Any]) -> None:
    assert alone[4]["core/zero-shot"].metrics["skipped"] == 4
    assert alone[4]["core/zero-shot"].intervals.keys() > {"top1", "mean_per_class", "class/red"}
    ranks = run_ranks(on_ranks, world, files)
    assert [found["reads"] for found in ranks] == {2: [24, 24], 3: [16, 16, 16]}[world]  # without tokens, then with
    assert alone["reads"] == 48
    for place, found in enumerate(ranks):
        for size in (4, 64):
            assert found[size].keys() == alone[size].keys()
            for name, evaluation in found[size].items():
                assert evaluation == alone[size][name]  # metrics, counts, records, statistics and intervals
        for name in ("images", "tokens", "texts", "classifier"):
            assert torch.allclose(found[name], alone[name], atol=1e-6, rtol=0)
        for name in ("ids", "captions", "skipped", "pairs", "nothing"):
            assert found[name] == alone[name]
        assert found["said"] == (alone["said"] if place == 0 else "")
        assert found["error"].endswith("place 23 is beyond repair")
    assert alone["skipped"] == 9 and len(alone["ids"]) == 15
    assert "drawn: 9 of 24 samples can't be read: s4: torn; s5: torn; s6: torn; ...; skipped" in alone["said"]


def gathered(chunk: int) -> list[Any]:
    """Rows of uneven ranks, the middle one empty."""
    sharding.CHUNK = chunk
    mine = None if rank() == 1 else torch.arange(7 + rank()).float()[:, None].expand(-1, 3) + 100 * rank()
    return [sharding.all_rows(mine), sharding.all_rows(None)]


def test_uneven_rows_arrive_in_rank_order_whatever_is_sent_at_a_time() -> None:
    expected = torch.cat([torch.arange(7), torch.arange(9) + 200]).float()[:, None].expand(-1, 3)
    for rows, nothing in run_ranks(gathered, 3, 6):
        assert torch.equal(rows, expected) and nothing is None


def cached(folder: str, cache: str) -> list[Any]:
    """Twice with a cache, the second time from it."""
    nodes = [f"zero-shot@folder:{folder}"]
    options: dict[str, Any] = {"registry": Registry.discover(allow=()), "cache": cache, "batch_size": 4}
    return [evaluate(tiny_clip(), nodes, **options)["core/zero-shot"] for _ in range(2)]


def test_ranks_share_a_cache(files: str, tmp_path: Path) -> None:
    first, second = run_ranks(cached, 2, files, str(tmp_path / "cache"))
    assert first[0] == first[1] == second[0] == second[1]
    assert len(list((tmp_path / "cache").glob("*/*/manifest.json"))) == 2
