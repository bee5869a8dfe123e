"""The loop: exact resume, refusal of broken steps, accumulation, averages, schedules."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

from clipgraft import files
from clipgraft.config.schema import DataConfig, DistributedConfig, ModelConfig, RunConfig, TrainConfig
from clipgraft.data.base import Sample
from clipgraft.errors import ClipgraftError, InputError, Interrupted, NonFiniteLossError
from clipgraft.finetune import FinetuneStage
from clipgraft.log import RunLog
from clipgraft.losses.contrastive import ClipLoss
from clipgraft.optim import Average, build_optimizer, learning_rate
from clipgraft.registry import Registry
from clipgraft.runner import Run
from clipgraft.spec import runhook
from clipgraft.stage import TrainStage
from clipgraft.state import TrainState
from clipgraft.testing.tiny import tiny_clip
from clipgraft.trainer import Trainer
from clipgraft.types import Batch, StepOutput


class Blobs:
    """16 noise images in memory."""

    name, fingerprint, classes, templates, attributes = "blobs", "blobs", (), (), {}

    def __init__(self) -> None:
        self.pixels = torch.randint(
            0, 256, (16, 3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
        )

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> Sample:
        return Sample(f"blob-{index}", self.pixels[index], captions=(f"a blob {index}", f"blob number {index} again"))


class Probe(TrainStage):
    """Image tower, dropout and a layer that predicts the mean colour: enough randomness to catch a bad resume."""

    wants_text = True

    def __init__(self, train: TrainConfig, poison: int | None = None) -> None:
        super().__init__("probe", train=train, source=Blobs())
        self.encoder = tiny_clip()
        self.freeze(self.encoder.text)
        self.encoder.logit_scale.requires_grad_(False)
        self.dropout, self.out = nn.Dropout(0.3), nn.Linear(self.encoder.image.embed_dim, 3)
        self.poison, self.calls = poison, 0

    def forward(self, batch: Batch) -> StepOutput:
        z = self.encoder.image(self.encoder.preprocess.normalize(batch.pixels)).pooled
        noise = torch.randn_like(z)
        loss = (self.out(self.dropout(z + 0.1 * noise)) - batch.pixels.mean((2, 3))).pow(2).mean()
        loss = loss + 1e-3 * batch.text.float().mean()
        self.calls += 1
        return StepOutput(loss * (float("nan") if self.calls == self.poison else 1), {"plain": loss}, len(batch))


class StopAt:
    def __init__(self, *steps: int) -> None:
        self.steps = steps

    @runhook
    def after_step(self, run, stage, step, output) -> None:
        run.stop_requested = step + 1 in self.steps


def make_run(path: Path, *hooks: object, workers: int = 0) -> Run:
    settings = RunConfig(model=ModelConfig(from_="tiny"), data=DataConfig(from_="blobs", workers=workers))
    registry = Registry.discover(allow=[])
    run = Run(path, settings, registry.get("recipe", "core/finetune"), registry, RunLog())
    run.encoder = tiny_clip()
    for index, hook in enumerate(hooks):
        run.hooks.register(hook, f"hook-{index}")
    return run


CONFIG = dict(batch_size=5, lr=3e-3, log_every=1, warmup=2, ema=0.9, save_every=0)


def fit(path: Path, steps: int, *hooks: object, workers: int = 0, **more: object) -> Probe:
    torch.manual_seed(1)
    stage = Probe(TrainConfig(steps=steps, **{**CONFIG, **more}))
    Trainer(stage.train_config).fit(make_run(path, *hooks, workers=workers), stage)
    return stage


def rows(path: Path) -> list[dict]:
    lines = (path / "stages" / "00-probe" / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_is_bit_exact_at_every_step(tmp_path, workers):
    """Three epochs of three steps; stopped once at every step and resumed, and stopped and resumed twice."""
    steps = 9
    whole = fit(tmp_path / "whole", steps, workers=workers)
    points = [(k,) for k in range(1, steps)] + [(1, 4), (3, 6), (5, 8)]
    for stops in points if workers == 0 else [(2,), (3, 7)]:
        path = tmp_path / "-".join(map(str, stops))
        for stop in stops:
            with pytest.raises(Interrupted, match=f"after step {stop}"):
                fit(path, steps, StopAt(stop), workers=workers)
        again = fit(path, steps, workers=workers)
        assert same(whole, again), stops
        assert rows(tmp_path / "whole") == rows(path), stops


def test_the_optimizer_is_restored_bit_for_bit(tmp_path):
    whole = make_run(tmp_path / "a")
    config = TrainConfig(steps=6, **{**CONFIG, "save_every": 6})
    for path, stops in ((tmp_path / "a", ()), (tmp_path / "b", (2, 5))):
        for stop in (*stops, None):
            torch.manual_seed(1)
            stage = Probe(config)
            hooks = [] if stop is None else [StopAt(stop)]
            try:
                Trainer(config).fit(make_run(path, *hooks), stage)
            except Interrupted:
                assert stop is not None
    a, b = (sorted((p / "stages/00-probe/state").glob("step-*"))[-1] for p in (tmp_path / "a", tmp_path / "b"))
    for name in ("optimizer.safetensors", "stage.safetensors", "average.safetensors", "rng-0.safetensors"):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    assert whole.is_main


def test_a_damaged_state_is_passed_over(tmp_path):
    """The newest whole state counts; a flipped byte falls back to the one before."""
    with pytest.raises(Interrupted):
        fit(tmp_path, 9, StopAt(5), save_every=2)
    newest = tmp_path / "stages/00-probe/state/step-00000005/stage.safetensors"
    data = bytearray(newest.read_bytes())
    data[-1] ^= 1
    newest.write_bytes(data)
    assert same(fit(tmp_path, 9, save_every=2), fit(tmp_path / "whole", 9, save_every=2))
    assert rows(tmp_path) == rows(tmp_path / "whole")


def test_another_number_of_processes_is_refused(tmp_path):
    """A rank's random state belongs to that rank: fewer processes draw other numbers, which the config must allow."""
    with pytest.raises(Interrupted):
        fit(tmp_path, 4, StopAt(2))
    state = tmp_path / "stages/00-probe/state/step-00000002"
    with files.whole_folder(tmp_path / "two") as new:
        for file in state.iterdir():
            if file.name != files.MANIFEST:
                shutil.copy(file, new)
        shutil.copy(state / "rng-0.safetensors", new / "rng-1.safetensors")
    shutil.rmtree(state)
    (tmp_path / "two").rename(state)
    with pytest.raises(InputError, match=r"by 2 processes and 1 came up; resume with torchrun --nproc_per_node 2"):
        fit(tmp_path, 4)
    run, config = make_run(tmp_path), TrainConfig(steps=4, **CONFIG)
    run.config = run.config.model_copy(update={"distributed": DistributedConfig(processes=1)})
    torch.manual_seed(1)
    Trainer(config).fit(run, Probe(config))
    whole = fit(tmp_path / "whole", 4)
    found, expected = rows(tmp_path), rows(tmp_path / "whole")
    assert whole and found[:2] == expected[:2] and len(found) == 4 and found[2]["lr"] == expected[2]["lr"]
    assert found[3]["loss"] != expected[3]["loss"], "other dropout, as was said"


def test_a_non_finite_loss_stops_before_the_update(tmp_path):
    config = TrainConfig(steps=9, **CONFIG)
    torch.manual_seed(1)
    stage = Probe(config, poison=4)
    with pytest.raises(NonFiniteLossError, match="step 4"):
        Trainer(config).fit(make_run(tmp_path), stage)
    found = json.loads((tmp_path / "stages/00-probe/nonfinite-0.json").read_text())
    assert len(found["ids"]) == 5 and all(i.startswith("blob-") for i in found["ids"])
    assert all(torch.isfinite(p).all() for p in stage.parameters())
    assert same(fit(tmp_path, 9), fit(tmp_path / "whole", 9)), "the last good state was not left behind"


def test_a_parameter_without_gradient_is_an_error(tmp_path):
    class Dead(Probe):
        def __init__(self, train: TrainConfig) -> None:
            super().__init__(train)
            self.unused = nn.Linear(2, 2)

    stage = Dead(TrainConfig(steps=2, **CONFIG))
    with pytest.raises(ClipgraftError, match=r"no gradient reached unused\.weight"):
        Trainer(stage.train_config).fit(make_run(tmp_path), stage)


class Double(FinetuneStage):
    def encode(self, batch: Batch) -> tuple[torch.Tensor, ...]:
        return super().encode(replace(batch, pixels=batch.pixels.double()))


def contrastive(accumulate: int) -> FinetuneStage:
    torch.manual_seed(0)
    config = TrainConfig(steps=1, batch_size=8, lr=1e-3, accumulate=accumulate)
    encoder = tiny_clip().double()
    return Double("train", train=config, source=Blobs(), encoder=encoder, losses=[ClipLoss()], weights=(1.0,))


class Keep:
    """Gradients as the optimizer would see them."""

    def __init__(self) -> None:
        self.grads: dict[str, torch.Tensor] = {}

    @runhook
    def before_optimizer(self, run, stage, step) -> None:
        self.grads = {n: p.grad.clone() for n, p in stage.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("chunks", [2, 4])
def test_the_feature_cache_gives_the_gradients_of_the_whole_batch(tmp_path, chunks):
    """Including logit_scale, which open_clip's accumulation multiplies by the number of chunks."""
    found = []
    for accumulate in (1, chunks):
        stage, keep = contrastive(accumulate), Keep()
        Trainer(stage.train_config).fit(make_run(tmp_path / str(accumulate), keep), stage)
        found.append(keep.grads)
    assert found[0].keys() == found[1].keys() and "encoder.logit_scale" in found[0]
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, rtol=1e-9, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


def test_a_batch_coupled_stage_without_a_cache_refuses_accumulation(tmp_path):
    class Coupled(Probe):
        batch_coupled = True

    stage = Coupled(TrainConfig(steps=2, batch_size=4, lr=1e-3, accumulate=2))
    with pytest.raises(InputError, match="another objective"):
        Trainer(stage.train_config).fit(make_run(tmp_path), stage)


def test_frozen_means_frozen(tmp_path):
    torch.manual_seed(1)
    stage = Probe(TrainConfig(steps=3, **CONFIG))
    before = {k: v.clone() for k, v in stage.encoder.text.state_dict().items()}
    stage.train()
    assert not stage.encoder.text.training and stage.encoder.image.training
    optimizer = build_optimizer(stage, stage.train_config)
    text = {id(p) for p in stage.encoder.text.parameters()}
    assert not text & {id(p) for g in optimizer.param_groups for p in g["params"]}
    assert not [k for k in stage.trained_state() if k.startswith("encoder.text.")]
    Trainer(stage.train_config).fit(make_run(tmp_path), stage)
    assert all(torch.equal(v, before[k]) for k, v in stage.encoder.text.state_dict().items())


def test_layer_decay_slows_lower_blocks():
    stage = Probe(TrainConfig(steps=3, **{**CONFIG, "layer_decay": 0.5}))
    optimizer = build_optimizer(stage, stage.train_config)
    scale = {id(p): g["lr_scale"] for g in optimizer.param_groups for p in g["params"]}
    found = {n: scale[id(p)] for n, p in stage.named_parameters() if id(p) in scale}
    blocks = sorted({v for n, v in found.items() if ".resblocks." in n})
    assert blocks == [0.5, 1.0]
    assert found["out.weight"] == 1.0
    assert next(v for n, v in found.items() if "conv1" in n) == 0.25


def test_decay_is_for_matrices_only():
    stage = Probe(TrainConfig(steps=3, **{**CONFIG, "weight_decay": 0.1}))
    for group in build_optimizer(stage, stage.train_config).param_groups:
        for p in group["params"]:
            assert (group["weight_decay"] > 0) == (p.ndim >= 2)


def test_the_learning_rate_is_a_function_of_the_step():
    config = TrainConfig(steps=10, batch_size=1, lr=1.0, warmup=2)
    rates = [learning_rate(config, k) for k in range(10)]
    assert rates[:3] == [0.5, 1.0, 1.0] and rates[-1] > 0 and all(a >= b for a, b in pairwise(rates[2:]))
    assert learning_rate(config.model_copy(update={"schedule": "constant"}), 9) == 1.0


def test_averages_follow_and_swap_back():
    stage = Probe(TrainConfig(steps=3, **CONFIG))
    average = Average(stage, 0.5)
    start = stage.out.weight.detach().clone()
    with torch.no_grad():
        stage.out.weight += 1
    average.update()
    torch.testing.assert_close(average.shadow["out.weight"], start + 0.5)
    average.swap()
    torch.testing.assert_close(stage.out.weight.detach(), start + 0.5)
    average.swap()
    torch.testing.assert_close(stage.out.weight.detach(), start + 1)


def test_a_state_of_another_configuration_is_refused(tmp_path):
    stage = Probe(TrainConfig(steps=3, **CONFIG))
    optimizer = build_optimizer(stage, stage.train_config)
    TrainState(tmp_path, stage, optimizer, None).save(1, keep=1, extra={})
    stage.extra = nn.Linear(2, 2)
    with pytest.raises(ClipgraftError, match="another configuration"):
        TrainState(tmp_path, stage, optimizer, None).load_newest()
