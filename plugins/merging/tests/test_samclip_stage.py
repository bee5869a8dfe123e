"""The stages: what learns in each, the step of two backward passes, and the same step in two processes."""

from __future__ import annotations

import copy
import weakref
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

from clipgraft.config.schema import GraftNode, TrainConfig
from clipgraft.data.base import Sample
from clipgraft.data.loader import TrainLoader
from clipgraft.encoders import apply_grafts
from clipgraft.files import tensors_digest, write_tensors
from clipgraft.optim import build_optimizer
from clipgraft.registry import Registry
from clipgraft.testing.ranks import run_ranks
from clipgraft.testing.tiny import tiny_clip
from clipgraft.types import Batch
from clipgraft_merging.sam.opening import sam_parts
from clipgraft_merging.samclip.config import MaskStream
from clipgraft_merging.samclip.masked_source import MaskedSource
from clipgraft_merging.samclip.recipe import start_from
from clipgraft_merging.samclip.stages import HeadStage, MultiTaskStage
from clipgraft_merging.samclip.streams import taken
from clipgraft_merging.samclip.teachers import ClipTeacher, MaskTeacher, resized

CONFIG = TrainConfig(steps=4, batch_size=4, lr=1e-3, weight_decay=0.0)


@dataclass
class Squares:
    """n noisy pictures with a bright rectangle each, and its mask."""

    n: int = 12
    name = fingerprint = "squares"
    classes = templates = ()
    attributes: ClassVar = {}

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        g = torch.Generator().manual_seed(index)
        image = torch.randint(0, 120, (3, 64, 64), dtype=torch.uint8, generator=g)
        mask = torch.zeros(2, 64, 64, dtype=torch.uint8)
        y, x = torch.randint(0, 30, (2,), generator=g).tolist()
        image[:, y : y + 24, x : x + 30] += 120
        mask[0, y : y + 24, x : x + 30] = 1
        return Sample(str(index), image, extra={"instances": mask})


def lively_student(sizes, model):
    torch.manual_seed(1)
    node = GraftNode(use="merging/sam-image", sam=sizes.model_dump(mode="json"), size=64)
    encoder = apply_grafts(tiny_clip(), [node], Registry.discover(allow=["merging"]))
    start_from(encoder.image, sam_parts(copy.deepcopy(model)))
    return encoder


def head_stage(sam, model, **more):
    encoder = lively_student(sam, model)
    settings = {"train": CONFIG, "source": Squares(), "encoder": encoder, "teacher": ClipTeacher(tiny_clip(3))}
    return HeadStage("probe", **{**settings, "sizes": (32, 64), "final_size": 64} | more)


def two_streams(sizes, model, *, rank=0, world=1, train=CONFIG, lively=True, **stream):
    encoder = lively_student(sizes, model)
    settings = {"weight": 10.0, "batch_size": 4, "points": 2, "boxes": 1, **stream}
    source = MaskedSource(Squares(), size=64, cells=32, masks=2, fit="pad", fill=(0.4, 0.4, 0.4))
    teacher = MaskTeacher(sam_parts(copy.deepcopy(model)), preprocess=encoder.preprocess)
    loader = TrainLoader(
        source, preprocess=encoder.preprocess, batch_size=4 // world, seed=7, rank=rank, world=world, crop=None
    )
    stage = MultiTaskStage(
        "multitask",
        stream=MaskStream(**settings),
        second=loader if settings["weight"] else None,
        mask_teacher=teacher if settings["weight"] else None,
        masks_given=True,
        train=train,
        source=Squares(),
        encoder=encoder,
        teacher=ClipTeacher(tiny_clip(3)),
        sizes=(64,),
        final_size=64,
    )
    return stage.train()


def batch(n=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    return Batch(torch.rand(n, 3, 64, 64, generator=g), ids=[str(i) for i in range(n)])


def test_fact_3_stage_one_leaves_sam_as_it_is_to_the_bit(sam_sizes, sam_model):
    stage = head_stage(sam_sizes, sam_model).train()
    student = stage.student
    before = [tensors_digest(m.state_dict()) for m in (student.sam, student.promptable, stage.encoder.text)]
    head = tensors_digest(student.head.state_dict())
    optimizer = build_optimizer(stage, CONFIG)
    for step in range(2):
        stage.begin(step)
        optimizer.zero_grad()
        stage(batch(seed=step)).loss.backward()
        optimizer.step()
    assert before == [tensors_digest(m.state_dict()) for m in (student.sam, student.promptable, stage.encoder.text)]
    assert tensors_digest(student.head.state_dict()) != head
    assert all(
        name.startswith("student.head") or "encoder.image.head" in name for name, _ in stage.must_receive_gradient()
    )
    assert not any(".sam." in name or "text" in name or "teacher" in name for name in stage.trained_state())


def test_fact_4_each_stream_reaches_its_own_head(sam_sizes, sam_model):
    stage = two_streams(sam_sizes, sam_model)
    student = stage.student
    stage.begin(0)
    stage.clip_loss(batch()).backward()
    assert all(p.grad is None for p in student.promptable.parameters())
    assert all(p.grad is None for p in student.sam.encoder.neck.parameters())
    head = [p.grad.clone() for p in student.head.parameters()]
    tower = student.sam.encoder.layers[0].attn.qkv.weight.grad.clone()
    stage.mask_terms(stage._share())[0].backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(student.head.parameters(), head, strict=True))
    assert all(p.grad is not None for p in student.promptable.mask_decoder.parameters())
    assert not torch.equal(student.sam.encoder.layers[0].attn.qkv.weight.grad, tower)


def test_fact_5_learning_rates_are_ten_to_one_to_one(sam_sizes, sam_model):
    stage = two_streams(sam_sizes, sam_model)
    groups = {g["name"]: g for g in stage.param_groups()}
    assert {name: g["lr_scale"] for name, g in groups.items()} == {"head": 1.0, "tower": 0.1, "decoder": 0.1}
    listed = [id(p) for g in groups.values() for p in g["params"]]
    assert len(listed) == len(set(listed)) and set(listed) == {id(p) for p in stage.parameters() if p.requires_grad}
    rates = {g["lr"] for g in build_optimizer(stage, CONFIG).param_groups}
    assert sorted(rates) == pytest.approx([1e-4, 1e-3])


def gradients(stage):
    return {n: p.grad.clone() for n, p in stage.named_parameters() if p.requires_grad}


def test_fact_11_two_backward_passes_are_one_of_the_sum(sam_sizes, sam_model):
    stage = two_streams(sam_sizes, sam_model)
    torch.manual_seed(0)
    stage.begin(0)
    out = stage(batch())
    out.loss.backward()
    found = gradients(stage)
    stage.zero_grad(set_to_none=True)
    torch.manual_seed(0)
    stage.begin(0)
    clip = stage.clip_loss(batch())
    masks, _ = stage.mask_terms(stage._share())
    (clip + 10 * masks).backward()
    torch.testing.assert_close(out.loss, (clip + 10 * masks).detach())
    assert found.keys() == gradients(stage).keys()
    for name, gradient in gradients(stage).items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-4)


def test_the_first_streams_graph_is_gone_when_the_second_begins(sam_sizes, sam_model, monkeypatch):
    """What the graph of the CLIP stream kept for its backward is freed: the tower's tokens are nowhere any more."""
    stage, tokens = two_streams(sam_sizes, sam_model), []
    read, masks = stage.student.head.patches, stage.mask_terms

    def patches(x, grid):
        tokens.append(weakref.ref(x))
        return read(x, grid)

    def mask_terms(part):
        assert len(tokens) == 1 and tokens[0]() is None
        return masks(part)

    monkeypatch.setattr(stage.student.head, "patches", patches)
    monkeypatch.setattr(stage, "mask_terms", mask_terms)
    stage.begin(0)
    stage(batch()).loss.backward()


def test_known_gradients_scale_with_what_comes_in_and_meet_others():
    a, b = nn.Parameter(torch.tensor([1.0, 2.0])), nn.Parameter(torch.tensor(3.0))
    loss = taken((a * a).sum(), [a, b])
    ((loss + (a * b).sum()) / 4).backward()
    torch.testing.assert_close(a.grad, (2 * a.detach() + 3) / 4)
    torch.testing.assert_close(b.grad, torch.tensor(3 / 4))
    assert float(loss.detach()) == 5


def test_fact_13_prompts_texts_and_teachers_do_not_move(sam_sizes, sam_model):
    stage = two_streams(sam_sizes, sam_model)
    held = [stage.student.promptable.prompt_encoder, stage.encoder.text, stage.teacher, stage.mask_teacher]
    before = [tensors_digest(m.state_dict()) for m in held]
    assert not any(p.requires_grad for m in held for p in m.parameters()) and not any(m.training for m in held)
    moving = (
        tensors_digest(stage.student.sam.state_dict()),
        tensors_digest(stage.student.promptable.mask_decoder.state_dict()),
    )
    optimizer = build_optimizer(stage, CONFIG)
    for step in range(2):
        stage.begin(step)
        optimizer.zero_grad()
        stage(batch(seed=step)).loss.backward()
        optimizer.step()
    assert before == [tensors_digest(m.state_dict()) for m in held]
    now = (
        tensors_digest(stage.student.sam.state_dict()),
        tensors_digest(stage.student.promptable.mask_decoder.state_dict()),
    )
    assert all(a != b for a, b in zip(moving, now, strict=True))


def test_an_untouched_student_has_no_mask_loss(sam_sizes, sam_model):
    """The student starts as its teacher, so soft targets leave it alone; and every parameter is reached."""
    stage = two_streams(sam_sizes, sam_model)
    stage.begin(0)
    out = stage(batch())
    assert float(out.terms["masks"].detach()) < 1e-5 < float(out.terms["clip"].detach())
    out.loss.backward()
    assert all(p.grad is not None for p in stage.parameters() if p.requires_grad)


def test_losses_of_twenty_steps(sam_sizes, sam_model):
    """Golden: what both streams came to when this was written."""
    stage = two_streams(sam_sizes, sam_model, train=CONFIG.model_copy(update={"lr": 3e-3}))
    optimizer, found = build_optimizer(stage, stage.train_config), []
    torch.manual_seed(0)
    for step in range(20):
        stage.begin(step)
        optimizer.zero_grad()
        out = stage(batch(seed=step % 3))
        out.loss.backward()
        optimizer.step()
        found.append([float(out.terms["clip"].detach()), float(out.terms["masks"].detach())])
    golden = [[1.02655, 0.0], [0.29458, 0.0024], [0.01731, 0.00394]]
    assert [found[k] for k in (0, 5, 19)] == [pytest.approx(row, rel=0.02, abs=1e-4) for row in golden]


def test_without_the_mask_stream_neck_and_decoder_stay(sam_sizes, sam_model):
    stage = two_streams(sam_sizes, sam_model, weight=0.0)
    stage.begin(0)
    stage(batch()).loss.backward()
    assert not any(p.requires_grad for p in stage.student.promptable.parameters())
    assert not any(p.requires_grad for p in stage.student.sam.encoder.neck.parameters())
    assert all(p.grad is not None for p in stage.parameters() if p.requires_grad)


def test_chunks_take_equal_shares_of_both_streams(sam_sizes, sam_model):
    """Two chunks: half of either batch each, and their mean is the whole batch's loss."""
    halves = two_streams(sam_sizes, sam_model, train=CONFIG.model_copy(update={"accumulate": 2}), points=0, noise=0.0)
    halves.begin(3)
    first, second = halves._share(), halves._share()
    whole = two_streams(sam_sizes, sam_model)
    whole.begin(3)
    assert first.ids + second.ids == whole._share().ids and len(first) == 2


def test_the_second_stream_is_a_function_of_the_step(sam_sizes, sam_model):
    a, b = two_streams(sam_sizes, sam_model), two_streams(sam_sizes, sam_model)
    for step in range(4):
        a.begin(step)
    b.begin(3)
    assert a._batch.ids == b._batch.ids and torch.equal(a._batch.pixels, b._batch.pixels)


def test_sizes_are_drawn_by_step_and_the_teacher_sees_its_own(sam_sizes, sam_model):
    stage = head_stage(sam_sizes, sam_model)
    drawn = []
    for step in range(20):
        stage.begin(step)
        drawn.append(stage.size)
    assert set(drawn) == {32, 64}
    again = head_stage(sam_sizes, sam_model)
    again.begin(7)
    assert again.size == drawn[7]
    assert stage.encoder.preprocess.size == (64, 64) and stage.teacher.preprocess.size == (32, 32)
    small = head_stage(sam_sizes, sam_model, sizes=(32,))
    assert small.encoder.preprocess.size == (32, 32)
    assert small.current_encoder().preprocess.size == (64, 64)


def test_trap_i_every_model_gets_pixels_as_it_knows_them(sam_sizes, sam_model):
    stage, seen = head_stage(sam_sizes, sam_model), {}
    stage.student.sam.register_forward_pre_hook(lambda m, a: seen.update(sam=a[0]))
    stage.teacher.image.register_forward_pre_hook(lambda m, a: seen.update(clip=a[0]))
    tokens = stage.student.sam.tokens
    stage.student.sam.tokens = lambda x, layers=(): (seen.update(sam=x), tokens(x, layers))[1]
    pixels = batch()
    stage(pixels)
    mean, std = torch.tensor([0.485, 0.456, 0.406])[:, None, None], torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    torch.testing.assert_close(seen["sam"], (pixels.pixels - mean) / std)
    torch.testing.assert_close(seen["clip"], (resized(pixels.pixels, (32, 32)) - 0.5) / 0.5)


def _rank(folder):
    from accelerate import Accelerator
    from safetensors.torch import load_file
    from torch import distributed

    from clipgraft_merging.sam.settings import SamSettings

    rank, world = distributed.get_rank(), distributed.get_world_size()
    sizes = SamSettings.model_validate_json((folder / "sizes.json").read_text())
    model = sizes.model()
    model.load_state_dict(load_file(folder / "model.safetensors"))
    stage = two_streams(sizes, model, rank=rank, world=world, points=0, boxes=2, noise=0.0)

    class Step(nn.Module):
        def __init__(self):
            super().__init__()
            self.stage = stage

        def forward(self, b):
            return self.stage(b)

    accelerator = Accelerator(cpu=True)
    wrapped = accelerator.prepare(Step())
    for step in range(2):  # DDP builds its buckets anew after the first
        stage.zero_grad(set_to_none=True)
        stage.begin(step)
        size = 4 // world
        accelerator.backward(wrapped(batch(seed=step)[slice(rank * size, (rank + 1) * size)]).loss)
    return {name: gradient.numpy() for name, gradient in gradients(stage).items()}


@pytest.mark.slow
def test_two_processes_average_to_one(sam_sizes, sam_model, tmp_path):
    """Box prompts without noise draw only which of one mask, so both worlds see the same prompts."""
    (tmp_path / "sizes.json").write_text(sam_sizes.model_dump_json())
    write_tensors(tmp_path / "model.safetensors", sam_model.state_dict())
    (alone,) = run_ranks(_rank, 1, tmp_path)
    both = run_ranks(_rank, 2, tmp_path)
    for name, gradient in alone.items():
        for rank in both:
            torch.testing.assert_close(torch.tensor(rank[name]), torch.tensor(gradient), atol=1e-6, rtol=1e-3)
