"""What trains the shipped models: the losses, the frozen text tower, the optimizer's two halves."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from clipgraft_toyworld.measure import album, statements
from clipgraft_toyworld.schedule import Optimizer
from clipgraft_toyworld.towers import build_clip, load_clip, read, save_clip, see
from clipgraft_toyworld.train_image import (
    TokenReader,
    attribute_loss,
    class_loss,
    detail_loss,
    train_lazy,
    train_sight,
    train_teacher,
)
from clipgraft_toyworld.train_text import AttributeNetwork, contrast, train_text_tower
from clipgraft_toyworld.world import DETAIL_NAMES

pytestmark = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="building needs torch.optim.Muon")


@pytest.fixture(scope="module")
def pool():
    return album("train", blocks=1)


def test_contrast_is_the_symmetric_cross_entropy() -> None:
    first, second = torch.nn.functional.normalize(torch.randn(2, 6, 4), dim=-1)
    logits = 10 * first @ second.T
    by_hand = -(logits.log_softmax(1).diagonal().mean() + logits.log_softmax(0).diagonal().mean()) / 2
    assert torch.allclose(contrast(first, second, 10.0), by_hand, atol=1e-6)


def test_losses_are_what_guessing_costs_at_the_start_and_nothing_for_an_oracle(pool) -> None:
    clip = build_clip(0)
    table = statements(clip)
    scene = pool.scene[:64]
    guess = [torch.zeros(64, size) for size in (8, 8, 2, 2, 2, 3, 4, 4, 3, 4, 2)]
    assert torch.allclose(attribute_loss(guess, scene), torch.tensor(1.0))
    # random statements: an embedding equal to the true statement's is right whatever the tower says
    name = "glyph"
    truth = table.details[name][scene.coarse(), scene.value(name)]
    spread = copy.deepcopy(table)
    for detail in DETAIL_NAMES:
        noise = torch.randn_like(spread.details[detail])
        spread.details[detail].copy_(torch.nn.functional.normalize(noise, dim=-1))
    truth = torch.stack([spread.details[d][scene.coarse(), scene.value(d)] for d in DETAIL_NAMES]).sum(0)
    right = detail_loss(torch.nn.functional.normalize(truth, dim=-1), scene, spread)
    wrong = detail_loss(-torch.nn.functional.normalize(truth, dim=-1), scene, spread)
    assert right < 0.1 * wrong
    assert class_loss(table.coarse[scene.coarse()], scene, table) < class_loss(
        -table.coarse[scene.coarse()], scene, table
    )


def test_the_reader_looks_where_objects_are() -> None:
    reader, tokens = TokenReader(), torch.randn(2, 16, 128)
    coverage = torch.zeros(2, 4, 4)
    coverage[:, 1, 2] = 1
    moved = tokens.clone()
    moved[:, 6] += 1
    elsewhere = tokens.clone()
    elsewhere[:, 0] += 1
    base = torch.cat(reader(tokens, coverage), 1)
    near = (torch.cat(reader(moved, coverage), 1) - base).norm()
    assert near > 20 * (torch.cat(reader(elsewhere, coverage), 1) - base).norm()


def test_image_training_leaves_the_text_tower_alone_and_moves_the_image_tower(pool) -> None:
    clip = build_clip(3)
    clip.requires_grad_(False)
    clip.visual.requires_grad_(True)
    before = {name: value.clone() for name, value in clip.state_dict().items()}
    reader = train_sight(clip, pool, seed=0, steps=2)
    train_lazy(clip, reader, pool, seed=0, steps=2)
    train_teacher(clip, pool, seed=0, steps=2)
    for name, value in clip.state_dict().items():
        assert name.startswith("visual.") or torch.equal(value, before[name]), name
    changed = [name for name, value in clip.state_dict().items() if not torch.equal(value, before[name])]
    assert {"visual.conv1.weight", "visual.proj", "visual.transformer.resblocks.0.mlp.c_fc.weight"} <= set(changed)


def test_text_training_lowers_its_loss_and_repeats() -> None:
    results = []
    for _ in range(2):
        clip = build_clip(4)
        oracle = train_text_tower(clip, seed=4, steps=3)
        assert isinstance(oracle, AttributeNetwork)
        results.append(read(clip, ["a red arrow upright"]).detach())
    assert torch.equal(*results)
    assert not torch.allclose(results[0], read(build_clip(4), ["a red arrow upright"]), atol=1e-3)


def test_muon_gets_the_matrices_of_blocks_and_adamw_the_rest() -> None:
    clip = build_clip(0)
    optimizer = Optimizer([clip.visual], steps=10)
    adamw, muon = ({id(p) for group in o.param_groups for p in group["params"]} for o in optimizer._optimizers)
    matrices = {id(p) for n, p in clip.visual.named_parameters() if p.ndim == 2 and "resblocks" in n}
    assert muon == matrices and not adamw & muon
    assert len(adamw | muon) == len(list(clip.visual.parameters()))


def test_a_saved_clip_comes_back_rounded_to_half_precision(tmp_path: Path, pool) -> None:
    clip = build_clip(7).eval()
    save_clip(clip, tmp_path)
    back = load_clip(tmp_path)
    for name, value in clip.state_dict().items():
        assert torch.equal(back.state_dict()[name], value.half().float()), name
    with torch.no_grad():
        assert torch.allclose(see(clip, pool.pixels[:4]).tokens, see(back, pool.pixels[:4]).tokens, atol=0.03)
    assert (tmp_path / "open_clip_model.safetensors").stat().st_mode & 0o777 == 0o644


def test_the_generator_learns_from_its_condition_only(pool) -> None:
    pytest.importorskip("diffusers")
    from clipgraft_toyworld.train_generator import Bench, Generator, train_generator

    clip = build_clip(0)
    latent = torch.randn(256, 16, 128, generator=torch.Generator().manual_seed(0)) * 3 + 1
    trained = train_generator(clip, Bench(latent=latent, scene=pool.scene), seed=0, steps=2)
    standard = trained.standardise(latent)
    assert standard.mean(0).abs().max() < 1e-4 and abs(standard.std() - 1) < 0.05
    fresh = Generator()
    one, two = torch.nn.functional.normalize(torch.randn(2, 8, 64), dim=-1)
    noise, time = torch.randn(8, 16, 128), torch.ones(8)
    with torch.no_grad():
        assert not torch.allclose(fresh(noise, time, one), fresh(noise, time, two), atol=1e-4)
        clean = torch.randn(8, 16, 128)
        # at t = 1 the latent itself is out of sight: only the target changes
        first = fresh.loss(clean, one, time, noise)
        guess = fresh(noise, time, one)
    assert torch.allclose(first, ((guess - clean) ** 2).mean((1, 2)), atol=1e-5)


def test_prompts_lie_in_their_masks() -> None:
    from clipgraft_toyworld.prompts import bounding_box, inner_point, intersection_over_union, random_point

    mask = torch.zeros(2, 32, 32, dtype=torch.bool)
    mask[0, 4:13, 6:15] = True
    mask[1, 20:30, 3:5] = True
    assert torch.equal(bounding_box(mask), torch.tensor([[6.0, 4, 14, 12], [3, 20, 4, 29]]))
    assert torch.equal(inner_point(mask)[0], torch.tensor([10.0, 8.0]))
    torch.manual_seed(0)
    for point in (inner_point(mask), random_point(mask)):
        x, y = point.long().unbind(1)
        assert mask[torch.arange(2), y, x].all()
    assert intersection_over_union(mask, mask).eq(1).all() and intersection_over_union(mask, mask.flip(0)).eq(0).all()
    nothing = torch.zeros(1, 8, 8, dtype=torch.bool)
    assert intersection_over_union(nothing, nothing).item() == 1.0


def test_the_mask_loss_takes_the_best_candidate_and_is_small_when_that_is_right() -> None:
    from clipgraft_toyworld.prompts import Masks
    from clipgraft_toyworld.sam_teacher import SIZE, mask_loss

    truth = torch.zeros(1, SIZE, SIZE, dtype=torch.bool)
    truth[:, 16:48, 16:48] = True
    right = torch.nn.functional.interpolate(truth[:, None].float() * 2 - 1, size=(32, 32), mode="area") * 20
    sure = torch.tensor([[1.0, 0.0]])
    both = Masks(torch.cat([right, -right], 1), sure)
    alone = Masks(right, sure[:, :1])
    assert torch.allclose(mask_loss(both, truth), mask_loss(alone, truth), atol=0.02)
    assert mask_loss(alone, truth) < 0.05 < mask_loss(Masks(-right, sure[:, 1:]), truth)
    # what is said about the overlap counts too
    assert mask_loss(Masks(right, sure[:, 1:]), truth) > 0.8


def test_a_sam_teacher_is_trained_saved_and_opened(tmp_path: Path) -> None:
    from clipgraft_toyworld.sam_teacher import (
        build_sam_teacher,
        load_sam_teacher,
        save_sam_teacher,
        standardise,
        train_sam_teacher,
    )

    first, again = (train_sam_teacher(seed=3, steps=2, batch=4, pool=256) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    fresh = build_sam_teacher(3)
    moved = [n for n, p in first.named_parameters() if not torch.equal(p, fresh.get_parameter(n))]
    assert any("vision_encoder" in n for n in moved) and any("mask_decoder" in n for n in moved)
    assert not any("shared" in n for n in moved)  # frequencies of positions stay as drawn
    save_sam_teacher(first, tmp_path)
    opened = load_sam_teacher(tmp_path)
    pixels = standardise(torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8))
    with torch.no_grad():
        one, two = (m.vision_encoder(pixels).last_hidden_state for m in (first, opened))
    assert torch.allclose(one, two, atol=0.05)
