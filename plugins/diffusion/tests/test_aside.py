"""What is frozen stays outside the wrapper: no process sends it to another."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from clipgraft.config.schema import TrainConfig
from clipgraft.data.base import Sample
from clipgraft.testing.ranks import run_ranks
from clipgraft.testing.tiny import tiny_clip
from clipgraft.trainer import Step
from clipgraft.types import Batch
from clipgraft_diffusion.aside import set_aside
from clipgraft_diffusion.condition import GlobalCondition
from clipgraft_diffusion.denoiser import FluxDenoiser
from clipgraft_diffusion.diva.stage import Critique, DivaStage
from clipgraft_diffusion.eps import EpsObjective, NoiseSchedule
from clipgraft_diffusion.feedback import Feedback
from clipgraft_diffusion.flow import Uniform
from clipgraft_diffusion.generator import FlowGenerator
from clipgraft_diffusion.genhancer.stages import ClipStage, GeneratorStage
from clipgraft_diffusion.latent import TokenLatent
from clipgraft_diffusion.prompt import CrossCondition
from clipgraft_diffusion.recap import Recap
from clipgraft_diffusion.target import Target


class Noise:
    """Nothing is read from it here."""

    name, fingerprint, templates, attributes, classes = "noise", "noise", (), {}, ()

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return Sample(str(index), torch.zeros(3, 32, 32, dtype=torch.uint8))


class Flow(nn.Module):
    """A generator of one layer with a buffer."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(32 + 16, 32)
        self.register_buffer("shift", torch.zeros(32))

    def standardise(self, tokens):
        return tokens - self.shift

    def forward(self, noisy, time, condition):
        told = condition[:, None].expand(-1, noisy.shape[1], -1)
        return self.layer(torch.cat([noisy, told], -1)) * (1 - time)[:, None, None]


TRAIN = TrainConfig(steps=2, batch_size=4, lr=1e-3)
SETTINGS = {"train": TRAIN, "source": Noise()}


def diva():
    torch.manual_seed(0)
    schedule = NoiseSchedule()
    generator = FlowGenerator(Flow(), tiny_clip(seed=1).eval(), schedule=schedule)
    condition = CrossCondition(16, 16, prompt=None, combine="none", unit=True)
    critique = Critique(Recap(kind="cls"), condition, EpsObjective(schedule, generator, low=500))
    return DivaStage("clip", encoder=tiny_clip().eval(), base=tiny_clip().eval(), critique=critique, **SETTINGS)


def genhancer(kind="clip", *, learns=False):
    torch.manual_seed(0)
    base = tiny_clip().eval()
    latent = TokenLatent(None, like=base.image, preprocess=base.preprocess)
    sizes = {"vec_dim": 16, "txt_dim": 16}
    denoiser = FluxDenoiser(latent.channels, latent.grid, width=32, heads=2, depth=1, single_depth=1, **sizes)
    feedback = Feedback(GlobalCondition(16, **sizes), denoiser, times=Uniform(0.5, 1.0))
    more = {"target": Target(base, latent), "feedback": feedback, "held_out": torch.rand(3, 3, 32, 32), **SETTINGS}
    if kind == "generator":
        return GeneratorStage("generator", **more)
    return ClipStage("clip", encoder=tiny_clip().eval(), anchor=None, train_generator=learns, **more)


def own(stage):
    return {name.split(".")[0] for name, _ in [*stage.named_parameters(), *stage.named_buffers()]}


def test_only_what_learns_and_its_encoder_are_a_stages_own():
    assert own(diva()) == {"encoder", "condition"}
    assert own(genhancer("generator")) == {"feedback"}
    assert own(genhancer()) == {"encoder"}
    assert own(genhancer(learns=True)) == {"encoder", "feedback"}
    assert not dict(genhancer("generator").named_buffers()).keys() & {"held_out"}


@pytest.mark.parametrize("make", [diva, genhancer])
def test_what_is_aside_is_frozen_and_stays_in_eval_mode(make):
    stage = make()
    parts = [stage.base, stage.objective] if make is diva else [stage.target, stage.feedback]
    for part in parts:
        part.train()
    stage.train()
    for part in parts:
        assert not any(m.training for m in part.modules())
        assert not any(p.requires_grad for p in part.parameters())


def test_an_aside_module_is_an_attribute_and_nothing_more():
    owner, part = nn.Module(), nn.Linear(2, 2)
    set_aside(owner, "part", part)
    assert owner.part is part
    assert not [*owner.parameters(), *owner.modules()][1:]


def ranked():
    """What DistributedDataParallel sends, and the gradients of this rank's half of the batch."""
    from torch import distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    stage = diva()
    stage.train()
    wrapped = DistributedDataParallel(Step(stage))
    half = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
    pixels = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))[half]
    torch.manual_seed(dist.get_rank())
    wrapped(Batch(pixels, ["0", "1"])).loss.backward()
    buffers = sum(b.numel() for b in wrapped.modules_buffers)
    grads = {name: p.grad for name, p in stage.named_parameters() if p.grad is not None}
    return buffers, grads


@pytest.mark.slow
def test_two_processes_average_the_tower_and_send_nothing_of_the_generator():
    found = run_ranks(ranked, 2)
    stage, wanted = diva(), {}
    stage.train()
    for rank in range(2):
        pixels = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))[2 * rank : 2 * rank + 2]
        stage.zero_grad()
        torch.manual_seed(rank)
        stage(Batch(pixels, ["0", "1"])).loss.backward()
        for name, p in stage.named_parameters():
            if p.grad is not None:
                wanted[name] = wanted.get(name, 0) + p.grad / 2
    alphas = len(NoiseSchedule())
    for buffers, grads in found:
        assert buffers < alphas  # neither the schedule nor the generator's shift nor the base
        assert grads.keys() == wanted.keys()
        for name, grad in grads.items():
            torch.testing.assert_close(grad, wanted[name], rtol=1e-5, atol=1e-7)
