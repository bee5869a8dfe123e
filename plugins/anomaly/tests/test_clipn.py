"""CLIPN's facts N1 to N8 on tiny random towers: the branch, the losses, two processes, accumulation."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from clipgraft.config.schema import TrainConfig
from clipgraft.errors import InputError
from clipgraft.testing.ranks import run_ranks
from clipgraft.testing.tiny import tiny_clip
from clipgraft.types import Batch
from clipgraft_anomaly.clipn.branch import NoBranch, NoConfig, TextShape
from clipgraft_anomaly.clipn.config import LossWeights
from clipgraft_anomaly.clipn.negation import PAIRS, Filled, check_pairs
from clipgraft_anomaly.clipn.objective import opposite
from clipgraft_anomaly.clipn.stage import NoStage

torch.set_num_threads(1)
CAPTIONS = [
    "a red circle",
    "two small cats on the left",
    "blue star",
    "a photo of a dog and a cat",
    "five",
    "a green car",
]
WRITTEN = {
    "offsets": 0,
    "pairs": (("a photo of {}", "an image {} on the left"), ("{}", "the {}"), ("one {}", "two {} up")),
}
GROUPS = ("transformer", "token_embedding", "positional_embedding", "ln_final", "text_projection")


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def branch_of(encoder, *, moved=0.0, **no):
    branch = NoBranch.copy_of(encoder, no=NoConfig(**no))
    if moved:
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(1)
            for p in branch.parameters():
                p.add_(moved * torch.randn_like(p))
    return branch


def stage_of(*, accumulate=1, no=None, **more):
    encoder = tiny_clip().eval()
    branch = branch_of(encoder, **(no or {"offsets": 4, "moved": 0.1}))
    train = TrainConfig(steps=1, batch_size=6, lr=1e-3, accumulate=accumulate)
    return NoStage(
        "no", train=train, source=None, encoder=encoder, branch=branch, loss=LossWeights(), **more
    ).train()  # fmt: skip


def batch_for(stage, rows=slice(None)):
    pixels = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    return Batch(pixels, [str(k) for k in range(6)], text=stage.encoder.tokenizer(CAPTIONS))[rows]


@pytest.mark.parametrize("kind", ["vit", "custom-text"])
def test_n01_at_first_no_is_yes_and_the_losses_are_ln_2_and_1_99(kind):
    encoder = tiny_clip(kind=kind).eval()
    branch = branch_of(encoder).eval()
    ids = encoder.tokenizer(CAPTIONS)
    with torch.no_grad():
        text, no = encoder.text(encoder.text.trim(ids)).pooled, branch(ids)
    assert torch.equal(text, no)
    t = F.normalize(text, dim=-1)
    found = opposite(unit(6, 16), t, t, scale=100.0)
    assert found.match.item() == pytest.approx(math.log(2), abs=1e-6)
    assert found.mismatch.item() == pytest.approx(math.log(2), abs=1e-6)
    assert found.semantic.item() == pytest.approx(2 - math.sqrt(1e-4), abs=1e-6)


def official(image, text, no, scale):
    """The formulas as published: a softmax over yes and no, then its logarithm."""
    both = torch.stack([scale * image @ text.T, scale * image @ no.T], -1).softmax(-1)
    n, own = len(image), torch.eye(len(image), dtype=both.dtype)
    logs = -(own * both[..., 0] + (1 - own) * both[..., 1]).log()
    distance = (2 - 2 * (text * no).sum(-1) + 1e-4).sqrt()
    return (own * logs).sum() / n, ((1 - own) * logs).sum() / (n**2 - n), (2 - distance).mean()


def test_n02_softplus_gives_the_published_losses_and_stays_finite_in_16_bits():
    image, text, no = (unit(8, 16, seed=k) for k in range(3))
    found = opposite(image, text, no, scale=20.0)
    for mine, theirs in zip(
        (found.match, found.mismatch, found.semantic), official(image, text, no, 20.0), strict=True
    ):
        assert mine.item() == pytest.approx(theirs.item(), abs=1e-5)
    for dtype in (torch.bfloat16, torch.float16):
        i, t, n = image.to(dtype), text.to(dtype), -text.to(dtype)
        leaf = n.clone().requires_grad_()
        found = opposite(-t, t, leaf, scale=100.0)
        total = found.match + found.mismatch + found.semantic
        total.backward()
        assert torch.isfinite(total) and torch.isfinite(leaf.grad).all()
        assert not torch.isfinite(sum(official(-t, t, n, 100.0)))  # a chance rounds to 0, its logarithm is infinite
        assert torch.isfinite(opposite(i, t, t, scale=100.0).semantic)


def test_n03_the_semantic_loss_is_1_99_for_equal_and_0_for_opposite_texts():
    t = F.normalize(unit(5, 16).double(), dim=-1)
    assert opposite(t, t, t, scale=1.0).semantic.item() == pytest.approx(1.99, abs=1e-9)
    assert opposite(t, t, -t, scale=1.0).semantic.item() == pytest.approx(-2.5e-5, abs=1e-8)


def test_n04_six_groups_are_trained_and_nothing_else_moves():
    stage = stage_of()
    names = [n.removeprefix("branch.") for n, p in stage.named_parameters() if p.requires_grad]
    assert {n.split(".")[0] if n == "prompt" else n.split(".")[2] for n in names} == {*GROUPS, "prompt"}
    listed = {id(p) for group in stage.param_groups() for p in group["params"]}
    assert listed == {id(p) for p in stage.branch.parameters()} and id(stage.encoder.logit_scale) not in listed
    before = copy.deepcopy(stage.state_dict())
    optimizer = torch.optim.AdamW(stage.param_groups(), lr=1e-2)
    stage(batch_for(stage)).loss.backward()
    assert all(p.grad is None for p in stage.encoder.parameters())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in stage.branch.parameters())
    optimizer.step()
    for name, value in stage.state_dict().items():
        assert torch.equal(value, before[name]) == name.startswith("encoder."), name
    assert set(stage.trained_state()) == {f"branch.{n}" for n in names}


def test_the_offsets_that_train_are_zeros_of_the_papers_size_and_the_tower_is_64_million_numbers():
    shape = TextShape(vocabulary=49408, context=77, width=512, heads=8, layers=12, mlp=2048)
    with torch.device("meta"):
        tower = shape.build(embed_dim=512)
    count = sum(p.numel() for p in tower.parameters()) + 16 * 77 * 512
    assert count == pytest.approx(64.06e6, abs=0.005e6)
    branch = branch_of(tiny_clip())
    assert branch.prompt.shape == (16, 16, 32) and not branch.prompt.any()


def test_n06_training_draws_one_of_17_offsets_per_caption_and_evaluation_takes_the_mean():
    encoder = tiny_clip().eval()
    branch = branch_of(encoder, moved=0.5)
    ids = encoder.tokenizer(["two small cats"]).repeat(400, 1)
    with torch.no_grad():
        torch.manual_seed(0)
        drawn, again = branch.train()(ids), branch(ids)
        mean, twice = branch.eval()(ids), branch(ids)
        shared = copy.deepcopy(branch)
        shared.prompt.copy_(branch.prompt.mean(0).expand_as(branch.prompt))
        each = []
        for offset in [*branch.prompt, branch.prompt.mean(0)]:  # the definition, one offset at a time
            tower = branch.text.tower
            x = tower.token_embedding(ids[:1]) + offset + tower.positional_embedding
            x = tower.ln_final(tower.transformer(x, attn_mask=tower.attn_mask))
            each.append(x[0, ids[0].argmax()] @ tower.text_projection)
    assert not torch.allclose(drawn, again) and torch.equal(mean, twice)
    assert torch.allclose(mean, shared(ids), atol=1e-5) and torch.allclose(mean[0], each[-1], atol=1e-5)
    nearest = torch.cdist(drawn, torch.stack(each), compute_mode="donot_use_mm_for_euclid_dist")
    assert nearest.amin(1).max() < 1e-4
    counts = nearest.argmin(1).bincount(minlength=17)
    assert counts.min() >= 8 and counts.max() <= 48  # 400 / 17 = 23.5 each, sd 4.7


def losses_of(images, texts, noes):
    """The stage's three losses of these features on this process, and the gradient of its loss."""
    stage = stage_of(no=WRITTEN)
    leaf = noes.clone().requires_grad_()
    out = stage.loss_from((images, texts, leaf), batch_for(stage, slice(len(images))))
    out.loss.backward()
    return [v.item() for v in (out.loss, *out.terms.values())], leaf.grad.tolist()


def _two_ranks(*features):
    from torch import distributed as dist

    return losses_of(*(x[dist.get_rank() * 3 : dist.get_rank() * 3 + 3] for x in features))


def test_n07_two_processes_have_the_losses_and_the_gradient_of_one():
    features = [torch.randn(6, 8, generator=torch.Generator().manual_seed(k)) for k in range(3)]
    one, gradient = losses_of(*features)
    (first, low), (second, high) = run_ranks(_two_ranks, 2, *features)
    assert first == second == pytest.approx(one, abs=1e-5)
    assert torch.allclose(torch.tensor(low + high) / 2, torch.tensor(gradient), atol=1e-6)  # DDP averages parameters'


def test_n08_the_order_of_pairs_does_not_matter_and_their_pairing_does():
    image, text, no = (unit(7, 16, seed=k) for k in range(3))
    order = torch.randperm(7, generator=torch.Generator().manual_seed(5))
    one, other = opposite(image, text, no, scale=9.0), opposite(image[order], text[order], no[order], scale=9.0)
    for name in ("match", "mismatch", "semantic"):
        assert getattr(one, name).item() == pytest.approx(getattr(other, name).item(), abs=1e-6)
    wrong = opposite(image, text.roll(1, 0), no.roll(1, 0), scale=9.0)
    assert wrong.match.item() != pytest.approx(one.match.item(), abs=1e-3)
    assert wrong.semantic.item() == pytest.approx(one.semantic.item(), abs=1e-6)
    assert opposite(image[:1], text[:1], no[:1], scale=9.0).mismatch.item() == 0


@pytest.mark.parametrize("no", [{"offsets": 4, "moved": 0.1}, {**WRITTEN, "moved": 0.1}])
def test_chunks_with_kept_features_give_the_gradient_of_the_whole_batch(no):
    """The trainer's order of work: features chunk by chunk, the loss on all, then each chunk with its gradients."""
    stage = stage_of(no=no)
    parts = [batch_for(stage, slice(k, k + 2)) for k in (0, 2, 4)]

    def seeded(k):
        torch.manual_seed(100 + k)
        return stage.encode(parts[k])

    whole = tuple(torch.cat(column) for column in zip(*(seeded(k) for k in range(3)), strict=True))
    stage.loss_from(whole, batch_for(stage)).loss.backward()
    expected = {n: p.grad.clone() for n, p in stage.branch.named_parameters()}
    stage.zero_grad()
    leaves = tuple(x.detach().requires_grad_() for x in whole)
    grads = torch.autograd.grad(stage.loss_from(leaves, batch_for(stage)).loss, leaves)
    for k in range(3):
        sum((f * g[2 * k : 2 * k + 2]).sum() for f, g in zip(seeded(k), grads, strict=True)).backward()
    for name, p in stage.branch.named_parameters():
        assert torch.allclose(p.grad, expected[name], atol=1e-6), name


def test_the_stage_adds_up_its_losses_and_shuffling_gives_pictures_other_captions():
    stage, shuffled = (
        stage_of(no={**WRITTEN, "moved": 0.3}),
        stage_of(no={**WRITTEN, "moved": 0.3}, shuffled=True),
    )
    stage.loss = LossWeights(binary=0.7, semantic=0.2)
    stage.filled = shuffled.filled = ()  # captions as they are, so that nothing is drawn
    batch = batch_for(stage)
    image, text, no = (F.normalize(x, dim=-1) for x in stage.encode(batch))
    expected = opposite(image, text, no, scale=stage.encoder.logit_scale.exp())
    out = stage(batch)
    assert out.loss.item() == pytest.approx(
        (0.7 * (expected.match + expected.mismatch) + 0.2 * expected.semantic).item(), abs=1e-6
    )
    assert set(out.terms) == {"match", "mismatch", "semantic"} and out.size == 6
    other = shuffled.encode(batch)
    assert torch.allclose(other[1].roll(-1, 0), stage.encode(batch)[1], atol=1e-6)
    assert torch.equal(other[0], stage.encode(batch)[0])


def test_written_negations_are_the_texts_that_the_tokenizer_would_give():
    encoder, pairs = tiny_clip(context=24), WRITTEN["pairs"]
    ids = encoder.tokenizer(CAPTIONS)
    for side in range(2):
        filled = Filled(encoder, [pair[side] for pair in pairs])
        choice = [k % len(pairs) for k in range(6)]
        expected = [pairs[k][side].format(text) for k, text in zip(choice, CAPTIONS, strict=True)]
        assert torch.equal(filled(ids, choice), encoder.tokenizer(expected))
    short = tiny_clip(context=8)
    long = short.tokenizer(["a red circle and a blue star"])
    row = Filled(short, ["the {} up"])(long, [0])[0]  # room for six words, two of them around
    assert torch.equal(row, short.tokenizer(["the a red circle and up"])[0])
    with pytest.raises(InputError, match="shorten it"):
        Filled(short, ["a photo of a cat and a dog without {}"])


def test_written_negations_reach_the_towers_as_pairs():
    stage = stage_of(no=WRITTEN)
    assert stage.branch.prompt is None
    torch.manual_seed(0)
    ids = batch_for(stage).text
    yes, no = stage.sides(ids)
    torch.manual_seed(0)
    choice = torch.randint(3, (6,)).tolist()
    assert torch.equal(yes, stage.filled[0](ids, choice)) and torch.equal(no, stage.filled[1](ids, choice))
    assert len(set(choice)) > 1 and not torch.equal(yes, no)


def test_pairs_that_make_no_sense_are_refused():
    check_pairs(PAIRS)
    assert NoConfig(offsets=0).written == PAIRS and not NoConfig().written
    for pairs in ((("{}", "no{}"),), (("{}", "not"),), (("{} {}", "no {}"),)):
        with pytest.raises(ValueError, match="template"):
            NoConfig(offsets=0, pairs=pairs)
    with pytest.raises(ValueError, match="one of them"):
        NoConfig(offsets=16, pairs=(("{}", "no {}"),))


def test_a_branch_is_rebuilt_from_its_settings_and_a_wrong_tower_is_refused():
    encoder = tiny_clip(kind="custom-text").eval()
    branch = branch_of(encoder, moved=0.1).eval()
    use, settings = branch.registered
    again = NoBranch(no=NoConfig(**settings["no"]), scale=settings["scale"], text=TextShape(**settings["text"]),
                     fits=type(branch.fits)(**settings["fits"])).eval()  # fmt: skip
    again.load_state_dict(branch.state_dict())
    ids = encoder.tokenizer(CAPTIONS)
    assert use == "anomaly/clipn" and torch.equal(again(ids), branch(ids))
    with pytest.raises(InputError, match="SigLIP"):
        branch_of(tiny_clip(kind="siglip-timm"))
    encoder.text = None
    with pytest.raises(InputError, match="this model has none"):
        branch_of(encoder)
    odd = tiny_clip(kind="custom-text")
    del odd.text.tower.text_projection
    odd.text.tower.text_projection = nn.Linear(32, 16, bias=True)
    assert torch.equal(branch_of(odd).eval()(ids), odd.text(odd.text.trim(ids)).pooled)
    odd.text.tower.extra = nn.Parameter(torch.zeros(2))
    with pytest.raises(InputError, match=r"extra"):
        branch_of(odd)
    with pytest.raises(InputError, match="recipe clipn"):
        NoBranch(no=NoConfig(), scale=100.0, text=TextShape(), fits=type(branch.fits)())


def test_quickgelu_is_copied_too():
    from open_clip.transformer import QuickGELU

    encoder = tiny_clip().eval()
    for block in encoder.text.tower.transformer.resblocks:
        block.mlp.gelu = QuickGELU()
    assert TextShape.of(encoder.text).activation == "quickgelu"
    ids = encoder.tokenizer(CAPTIONS)
    assert torch.equal(branch_of(encoder).eval()(ids), encoder.text(encoder.text.trim(ids)).pooled)
