"""FSDP2 on a CPU mesh: two ranks that hold half each give one process's weights, and four go on with what two saved."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import distributed as dist
from torch import nn

from clipgraft.checkpoint import open_export, write_export
from clipgraft.distributed import rank, world_size
from clipgraft.errors import Interrupted
from clipgraft.execution import run_recipe
from clipgraft.registry import Registry
from clipgraft.sharding import Shards, clip_norm, local, read_shards, stored_shapes, write_shards
from clipgraft.spec import runhook
from clipgraft.testing.equality import traced, worst
from clipgraft.testing.ranks import Ranks, run_ranks
from clipgraft.testing.tiny import tiny_clip


@pytest.fixture(scope="module")
def pair() -> Iterator[Ranks]:
    with Ranks(2) as ranks:
        yield ranks


class Tower(nn.Module):
    """Two blocks, one of them frozen, a scalar, and a first axis that two ranks can't halve."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.blocks[0].requires_grad_(False)
        self.odd, self.scale = nn.Linear(4, 3), nn.Parameter(torch.tensor(2.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x).tanh()
        return self.scale * self.odd(x).square().mean()


def _tower(folder: str) -> dict[str, Any]:
    torch.manual_seed(0)
    tower, x = Tower(), torch.randn(4, 4)
    optimizer = torch.optim.AdamW(tower.parameters(), lr=0.1)
    shards = None
    if world_size() > 1:
        shards = Shards(tower, device=torch.device("cpu"))
        shards.adopt(optimizer)
        x = x.chunk(world_size())[rank()]
    held = sum(local(p).numel() for p in tower.parameters())
    for _ in range(2):
        tower(x).backward()
        grads = [p.grad for p in tower.parameters() if p.grad is not None]
        if shards:
            shards.reduce_single()
            norm = clip_norm(grads, limit=0.01)
        else:
            norm = nn.utils.clip_grad_norm_(tower.parameters(), 0.01)
        optimizer.step()
        optimizer.zero_grad()
        if shards:
            with shards.whole(), torch.no_grad():
                tower(x[:1]) if rank() == 0 else None  # the next step must not remember it
    alone = None
    if shards:
        write_shards(Path(folder), {n: p.detach() for n, p in tower.named_parameters()})
        dist.barrier()
        copies = {n: torch.zeros(size, dtype=dtype) for n, (size, dtype) in stored_shapes(Path(folder)).items()}
        read_shards(Path(folder), copies)
        with shards.whole(), torch.no_grad():
            if rank() == 0:  # no other rank is needed in here
                alone = float(tower(torch.ones(1, 4)))
                assert all(torch.equal(tower.state_dict()[n], x) for n, x in copies.items())
        assert all(hasattr(p, "to_local") for n, p in tower.named_parameters() if n != "scale")
        shards.end()
    else:
        with torch.no_grad():
            alone = float(tower(torch.ones(1, 4)))
    assert type(tower) is Tower and type(tower.blocks[0]) is nn.Linear
    tower.load_state_dict({n: x.clone() for n, x in tower.state_dict().items()})
    return {"held": held, "norm": float(norm), "alone": alone, "weights": tower.state_dict()}


def test_two_ranks_hold_half_each_and_give_a_plain_module_back(pair: Ranks, tmp_path: Path) -> None:
    whole, (first, second) = _tower(""), pair.call(_tower, str(tmp_path))
    assert first["held"] + second["held"] == whole["held"] + 1, "all but the scalar is split"
    assert first["norm"] == pytest.approx(whole["norm"], rel=1e-5)
    assert first["alone"] == pytest.approx(whole["alone"], rel=1e-5)
    for name, value in whole["weights"].items():
        torch.testing.assert_close(first["weights"][name], value, rtol=1e-5, atol=1e-6)
        assert torch.equal(first["weights"][name], second["weights"][name])


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder, rows = tmp_path_factory.mktemp("world"), ["image,caption"]
    write_export(tiny_clip(), folder / "clip")
    for i in range(26):
        pixels = torch.randint(0, 256, (40, 40, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(i))
        Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
        rows.append(f"{i}.png,a picture of thing{i}")
    (folder / "pairs.csv").write_text("\n".join(rows) + "\n")
    train = {"steps": 4, "batch_size": 8, "warmup": 0, "lr": 1e-3, "log_every": 1, "clip_norm": 0.5, "ema": 0.5}
    return {
        "model.from": str(folder / "clip"),
        "data.from": f"csv:{folder / 'pairs.csv'}",
        "evaluate.on": ["core/retrieval"],
        "evaluate.data": f"csv:{folder / 'pairs.csv'}",
        "evaluate.batch_size": 5,
        **{f"train.{k}": v for k, v in train.items()},
    }


def test_a_sharded_run_trains_measures_and_exports_like_one_process(
    pair: Ranks, settings: dict[str, Any], tmp_path: Path
) -> None:
    """With clipping, averaged weights, the feature cache, and a measurement on the way with unequal parts."""
    more = settings | {"train.accumulate": 2, "train.evaluate_every": 2}
    one = traced("core/finetune", more, tmp_path / "one")
    many = pair.call(traced, "core/finetune", more | {"distributed.shard": True}, tmp_path / "two")
    assert many[0]["train"].digest() == many[1]["train"].digest()
    found = worst(one, many[0])
    assert found.gradients < 1e-4 and found.weights < 1e-3, found
    a, b = (open_export(tmp_path / name / "export").state_dict() for name in ("one", "two"))
    for name, value in a.items():
        torch.testing.assert_close(b[name], value, rtol=1e-4, atol=1e-5)
    said = [(tmp_path / name / "stages/00-train/evaluations.jsonl").read_text() for name in ("one", "two")]
    assert said[0] == said[1] and "core/retrieval" in said[0]


class StopAt:
    @runhook
    def after_step(self, run: Any, step: int) -> None:
        run.stop_requested = step + 1 == 2


def _run(out: str, sets: dict[str, Any] | None) -> str:
    """Run until step 2, or without ``sets`` go on; what was said."""
    from unittest import mock

    from clipgraft.runner import Run

    registry = Registry.discover(allow=[])
    if sets is None:
        run_recipe(resume=out, registry=registry)
        return "done"
    begin = Run.__post_init__

    def stopped(self: Run) -> None:
        begin(self)
        self.hooks.register(StopAt(), "stop")

    with mock.patch.object(Run, "__post_init__", stopped), pytest.raises(Interrupted):
        run_recipe("core/finetune", overrides=sets, out=out, registry=registry)
    return "stopped"


@pytest.mark.slow
@pytest.mark.distributed
def test_a_state_of_two_ranks_goes_on_in_four_and_in_two(pair: Ranks, settings: dict[str, Any], tmp_path: Path) -> None:
    sets = settings | {"distributed.shard": True}
    registry = Registry.discover(allow=[])
    run_recipe("core/finetune", overrides=settings, out=tmp_path / "whole", registry=registry)
    assert pair.call(_run, str(tmp_path / "run"), sets) == ["stopped"] * 2
    state = tmp_path / "run/stages/00-train/state/step-00000002"
    assert {p.suffix for p in state.rglob("*") if p.is_file()} == {".safetensors", ".json"}, "no pickle"
    assert len(list((state / "shards").iterdir())) == 2
    with pytest.raises(RuntimeError, match="was saved by 2 processes and 4 came up"):
        run_ranks(_run, 4, str(tmp_path / "run"), None)
    config = tmp_path / "run/config.yaml"
    config.write_text(config.read_text().replace("processes: null", "processes: 4"))
    with pytest.raises(RuntimeError, match="asks for 4 processes but 2 came up"):
        pair.call(_run, str(tmp_path / "run"), None)
    run_ranks(_run, 4, str(tmp_path / "run"), None)
    a, b = (open_export(tmp_path / name / "export").state_dict() for name in ("whole", "run"))
    for name, value in a.items():
        torch.testing.assert_close(b[name], value, rtol=1e-4, atol=2e-5, msg=lambda m, name=name: f"{name}: {m}")
