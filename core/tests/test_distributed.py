"""Two and three gloo processes give the gradients of one, for every loss, in float64, scalars included."""

from __future__ import annotations

import os

import pytest
import torch
from torch import nn

from clipgraft.config.schema import TrainConfig
from clipgraft.distributed import any_rank, gather_with_grad, mean_over_ranks, rank, to_main, world_size
from clipgraft.finetune import FinetuneStage
from clipgraft.losses.contrastive import ClipLoss
from clipgraft.losses.distill import CosineDistill, FeatureDistill, SoftContrastiveDistill
from clipgraft.losses.sigmoid import SigLipLoss
from clipgraft.testing.ranks import run_ranks
from clipgraft.testing.tiny import tiny_clip
from clipgraft.trainer import Step
from clipgraft.types import Batch

LOSSES = {
    "clip": lambda: ClipLoss(),
    "siglip": lambda: SigLipLoss(),
    "distill-cosine": lambda: CosineDistill(),
    "distill-feature": lambda: FeatureDistill(),
    "distill-contrastive": lambda: SoftContrastiveDistill(),
}


def _stage(name: str) -> FinetuneStage:
    encoder, teacher = tiny_clip(0).double(), tiny_clip(1).double()
    if name == "siglip":
        encoder.logit_bias = nn.Parameter(torch.tensor(-3.0, dtype=torch.float64))
    train = TrainConfig(steps=1, batch_size=6, lr=1e-3)
    stage = FinetuneStage(
        "train",
        train=train,
        source=None,
        encoder=encoder,
        losses=[LOSSES[name]()],
        weights=(1.0,),
        teacher=teacher if name.startswith("distill") else None,
    )
    if name == "distill-feature":  # compares image features alone; DDP must not wait for gradients that never come
        encoder.text.requires_grad_(False)
    return stage.double()


def _batch() -> Batch:
    g = torch.Generator().manual_seed(0)
    pixels = torch.rand(6, 3, 32, 32, generator=g, dtype=torch.float64)
    encoder = tiny_clip(0)
    return Batch(pixels, list("abcdef"), text=encoder.tokenizer([f"word {c} again" for c in "abcdef"]))


def gradients(names: tuple[str, ...]) -> dict[str, dict[str, torch.Tensor]]:
    found = {}
    world, me = world_size(), rank()
    for name in names:
        stage = _stage(name)
        module: nn.Module = Step(stage)
        if world > 1:
            module = nn.parallel.DistributedDataParallel(module)
        size = 6 // world
        module(_batch()[slice(me * size, (me + 1) * size)]).loss.backward()
        found[name] = {n: p.grad for n, p in stage.named_parameters() if p.grad is not None}
    return found


@pytest.mark.parametrize("world", [2, 3])
def test_gradients_equal_one_process(world):
    whole = gradients(tuple(LOSSES))
    for found in run_ranks(gradients, world, tuple(LOSSES)):
        for loss, grads in whole.items():
            assert grads.keys() == found[loss].keys(), loss
            for name, grad in grads.items():
                error = (found[loss][name] - grad).abs().max() / grad.abs().max().clamp(min=1e-12)
                assert error < 1e-10, (loss, name, float(error))
    assert "encoder.logit_scale" in whole["clip"] and "encoder.logit_bias" in whole["siglip"]


def _talk() -> tuple:
    x = torch.full((1, 2), float(rank()), requires_grad=True)
    gathered = gather_with_grad(x)
    (gathered * torch.tensor([[1.0], [10.0]])).sum().backward()
    flags = (any_rank(rank() == 1), any_rank(False))
    return gathered.detach(), x.grad, flags, mean_over_ranks({"a": torch.tensor(float(rank()))}), to_main(rank())


def test_gathering_flags_and_means():
    first, second = run_ranks(_talk, 2)
    assert torch.equal(first[0], torch.tensor([[0.0, 0.0], [1.0, 1.0]])) and torch.equal(first[0], second[0])
    assert torch.equal(first[1], torch.full((1, 2), 2.0)) and torch.equal(second[1], torch.full((1, 2), 20.0))
    assert first[2] == second[2] == (True, False)
    assert first[3] == {"a": 0.5}
    assert (first[4], second[4]) == ([0, 1], [])


def _fail() -> None:
    if rank() == 1:
        raise ValueError("rank one gives up")


def variables():
    return {name: value for name, value in os.environ.items() if name.startswith("CLIPGRAFT_")}


def test_ranks_have_the_variables_of_now(monkeypatch):
    monkeypatch.setenv("CLIPGRAFT_PLUGINS", "first")
    assert run_ranks(variables, 2) == [variables()] * 2 and variables()["CLIPGRAFT_PLUGINS"] == "first"
    monkeypatch.delenv("CLIPGRAFT_PLUGINS")
    assert run_ranks(variables, 2) == [variables()] * 2 and "CLIPGRAFT_PLUGINS" not in variables()


def test_a_failing_rank_is_reported():
    with pytest.raises(RuntimeError, match="rank one gives up"):
        run_ranks(_fail, 2)
