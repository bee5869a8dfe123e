"""What SDS-CLIP trains, what stays, and that its two losses are what they say; facts S2 to S5, S9 and S10."""

from __future__ import annotations

import copy

import open_clip
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from clipgraft.config.schema import TrainConfig
from clipgraft.data.base import Sample
from clipgraft.data.loader import TrainLoader
from clipgraft.distributed import rank, world_size
from clipgraft.errors import ClipgraftError, InputError
from clipgraft.launching import Layout
from clipgraft.losses.base import LossInputs
from clipgraft.losses.contrastive import ClipLoss
from clipgraft.testing.ranks import run_ranks
from clipgraft.testing.tiny import tiny_clip
from clipgraft.trainer import Step
from clipgraft.types import Batch
from clipgraft_diffusion.sds.captions import KEY, TwiceRead, other_ids, refuse_strangers
from clipgraft_diffusion.sds.loss import sds_loss
from clipgraft_diffusion.sds.mapper import LatentMapper
from clipgraft_diffusion.sds.stage import Distillation, MapperStage, SdsStage, layer_norms, make_trainable
from clipgraft_diffusion.sds.told import open_told_diffusion

TRAIN = TrainConfig(steps=2, batch_size=4, lr=1e-3)
TEXTS = ("a red cat", "two blue dogs", "a hat on a box", "the moon")


class Linear(nn.Module):
    """A denoiser of latents (B, 2, 4) told CLIP's own ids."""

    latent, read = (2, 4), None

    def __init__(self, dtype=torch.float32):
        super().__init__()
        g = torch.Generator().manual_seed(3)
        self.one = nn.Parameter(torch.randn(8, 8, generator=g, dtype=dtype) / 3)
        self.two = nn.Parameter(torch.randn(16, 8, generator=g, dtype=dtype) / 30)

    def tell(self, ids):
        return ids.to(self.two.dtype)

    def forward(self, x_t, t, condition):
        return (x_t.flatten(1) @ self.one + condition @ self.two).tanh().view_as(x_t)


def batch(encoder, texts=TEXTS, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    pixels = torch.rand(len(texts), 3, 32, 32, generator=g, dtype=dtype)
    return Batch(pixels, [str(i) for i in range(len(texts))], text=encoder.tokenizer(list(texts)))


def stage(*, weight=1.0, contrastive=1.0, trainable="layer-norms", teacher=None, dtype=torch.float32, **loss):
    encoder, base = tiny_clip().to(dtype).eval(), tiny_clip().to(dtype).eval()
    make_trainable(encoder, trainable)
    teacher = Linear(dtype) if teacher is None else teacher
    torch.manual_seed(0)
    mapper = LatentMapper(encoder.image.embed_dim, latent=teacher.latent).to(dtype)
    parts = Distillation(mapper, sds_loss(**loss), teacher) if weight else None
    return SdsStage(
        "clip",
        train=TRAIN,
        source=None,
        encoder=encoder,
        base=base,
        distillation=parts,
        weight=weight,
        contrastive=contrastive,
        held_out=[batch(encoder)],
    )


def gradients(s, data=None):
    torch.manual_seed(0)
    s.zero_grad()
    s.train()
    s(batch(s.encoder) if data is None else data).loss.backward()
    return {name: p.grad for name, p in s.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("name", "image", "text"), [("ViT-L-14", 102_400, 38_400), ("ViT-B-16", 39_936, 25_600)])
def test_s02_layer_norms_of_the_papers_backbones(name, image, text):
    config = open_clip.get_model_config(name)
    with torch.device("meta"):
        model = open_clip.CLIP(**config)
    assert sum(p.numel() for p in layer_norms(model.visual)) == image
    assert sum(p.numel() for p in layer_norms(model)) - image == text


def test_s02_exactly_the_layer_norms_and_the_map_are_trained():
    s = stage()
    norms = {id(p) for p in layer_norms(s.encoder)}
    trained = {name: p for name, p in s.named_parameters() if p.requires_grad}
    assert {n for n, p in trained.items() if id(p) in norms} == {n for n in trained if n.startswith("encoder.")}
    assert len(norms) == 2 * (2 * 2 + 2) + 2 * (2 * 2 + 1)  # ln_pre, ln_post; ln_final; two blocks each
    assert {n for n in trained if not n.startswith("encoder.")} == {"mapper.linear.weight", "mapper.linear.bias"}
    assert gradients(s).keys() == trained.keys()
    listed = [id(p) for g in s.param_groups() for p in g["params"]]
    assert sorted(listed) == sorted(map(id, trained.values()))


def test_trainable_all_and_given():
    s = stage(trainable="all")
    assert {n for n, p in s.named_parameters() if not p.requires_grad} == set()
    encoder = tiny_clip()
    encoder.requires_grad_(False)
    with pytest.raises(InputError, match="nothing to train"):
        make_trainable(encoder, "given")
    encoder.image.tower.ln_post.weight.requires_grad_(True)
    make_trainable(encoder, "given")
    assert [n for n, p in encoder.named_parameters() if p.requires_grad] == ["image.tower.ln_post.weight"]


def test_a_resnet_has_no_norms_for_the_feedback():
    from clipgraft.encoders.openclip import build

    vision = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8}
    text = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
    base = tiny_clip()
    encoder = build(
        {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text},
        None,
        preprocess={"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)},
        tokenizer=base.tokenizer,
        origin=base.data.origin,
    )
    with pytest.raises(InputError, match="ResNet"):
        make_trainable(encoder, "layer-norms")
    make_trainable(encoder, "all")


def test_s03_generator_and_its_text_encoder_get_no_gradient_and_are_not_the_stages(tiny_diffusion):
    teacher = open_told_diffusion(str(tiny_diffusion))
    s = stage(teacher=teacher)
    data = batch(s.encoder)
    data.extra[KEY] = torch.cat([data.text, teacher.read(TEXTS)], 1)[:, None]
    grads = gradients(s, data)
    assert all(g.any() for n, g in grads.items() if n.startswith("mapper"))
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert not any(m.training for m in teacher.modules())
    assert {n.split(".")[0] for n, _ in s.named_parameters()} == {"encoder", "mapper"}
    assert {n.split(".")[0] for n in s.trained_state()} <= {"encoder", "mapper"}


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_s04_lambda_0_is_the_plain_contrastive_loss_bit_for_bit(weight):
    s = stage(weight=weight)
    data = batch(s.encoder)
    torch.manual_seed(0)
    found = s(data)
    image = s.encoder.image(s.encoder.preprocess.normalize(data.pixels)).pooled
    text = s.encoder.text(data.text).pooled
    wanted = ClipLoss()(LossInputs(image=image, text=text, logit_scale=s.encoder.logit_scale.exp()))["loss"]
    assert torch.equal(found.loss if weight == 0 else found.terms["contrastive"], wanted)
    assert set(found.terms) == ({"contrastive"} if weight == 0 else {"contrastive", "sds", "latent"})
    if weight:
        torch.testing.assert_close(found.loss, wanted + found.terms["sds"])


@pytest.mark.parametrize("jacobian", ["full", "none"])
def test_s05_the_distillation_gives_the_text_tower_nothing(jacobian):
    grads = gradients(stage(contrastive=0.0, jacobian=jacobian))
    assert {n.split(".")[1] for n in grads if n.startswith("encoder.")} == {"image"}
    assert all(g.any() for g in grads.values())
    assert any(n.startswith("encoder.text.") for n in gradients(stage(jacobian=jacobian)))


def test_s09_the_loss_doesnt_know_the_order_of_pairs():
    s = stage(weight=0)
    data, order = batch(s.encoder), torch.tensor([2, 0, 3, 1])
    other = Batch(data.pixels[order], [data.ids[i] for i in order], text=data.text[order])
    torch.testing.assert_close(s(data).loss, s(other).loss)


def test_s10_captions_are_cut_by_both_tokenizers(tiny_diffusion):
    long = "red cat " * 200
    read = open_told_diffusion(str(tiny_diffusion)).read
    ids = read([long, "a cat"])
    assert ids.shape == (2, 77)
    assert ids[0, -1] == ids[1].max()  # the end token, which also pads
    assert open_clip.tokenize([long]).shape == (1, 77)
    states = open_told_diffusion(str(tiny_diffusion)).tell(ids)
    assert states.shape == (2, 77, 16)
    assert not states.requires_grad


def test_the_condition_is_the_last_states_of_the_models_own_text_encoder(tiny_diffusion):
    from transformers import CLIPTextModel, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(tiny_diffusion / "tokenizer")
    ids = tokenizer(["a cat"], padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    states = CLIPTextModel.from_pretrained(tiny_diffusion / "text_encoder")(ids).last_hidden_state
    teacher = open_told_diffusion(str(tiny_diffusion))
    torch.testing.assert_close(teacher.tell(teacher.read(["a cat"])), states)
    assert teacher.latent == (4, 8, 8)


class Captioned:
    """Images with one to three captions, the second drawn three times as often."""

    name, fingerprint, templates, attributes, classes = "captioned", "captioned", (), {}, ()

    def __len__(self):
        return 12

    def __getitem__(self, index):
        image = torch.full((3, 32, 32), index, dtype=torch.uint8)
        captions = tuple(f"{w} {index}" for w in ("a red cat", "two dogs", "the big hat")[: 1 + index % 3])
        return Sample(f"c{index}", image, captions=captions, caption_weights=(1.0, 3.0, 1.0)[: len(captions)])


class Letters:
    """Another tokenizer: characters."""

    def __call__(self, texts):
        return torch.tensor([[ord(c) for c in t.ljust(20)] for t in texts])


def read(ids):
    return ["".join(chr(c) for c in row).strip() for row in ids.tolist()]


def test_both_readers_get_the_caption_that_the_loader_drew():
    encoder = tiny_clip()
    twice = TwiceRead(Captioned(), clip=encoder.tokenizer, other=Letters(), most=3)
    settings = {"preprocess": encoder.preprocess, "tokenizer": encoder.tokenizer, "batch_size": 6, "seed": 0}
    plain, loader = TrainLoader(Captioned(), **settings), TrainLoader(twice, **settings)
    drawn = set()
    for _, a, b in zip(range(60), plain.iterate(), loader.iterate(), strict=False):
        assert torch.equal(a.text, b.text)  # drawn as without the second reader
        told = read(other_ids(b))
        assert torch.equal(encoder.tokenizer(told), b.text)
        refuse_strangers(b)
        drawn |= set(zip(b.ids, told, strict=True))
    assert len(drawn) == 4 * (1 + 2 + 3)  # every caption of every image came once
    b.text[2] += 1
    with pytest.raises(ClipgraftError, match="none of its captions"):
        refuse_strangers(b)


def test_captions_beyond_the_first_so_many_are_left_out_with_their_weights():
    sample = TwiceRead(Captioned(), clip=tiny_clip().tokenizer, other=Letters(), most=2)[2]
    assert len(sample.captions) == len(sample.caption_weights) == 2
    assert sample.extra[KEY].shape == (2, 16 + 20)


def test_captions_states_are_computed_once():
    s, calls = stage(), []
    data, teacher = batch(s.encoder), s.critic.parts.teacher
    inner = teacher.tell
    object.__setattr__(teacher, "tell", lambda ids: calls.append(1) or inner(ids))
    first = s.critic.told(data)
    assert torch.equal(s.critic.told(data[slice(1, 3)]), first[1:3])
    assert torch.equal(first, inner(data.text))
    assert len(calls) == 1


def test_shuffled_tells_each_image_the_caption_of_another():
    s = stage()
    data = batch(s.encoder)
    own = s.critic.told(data)
    other = copy.copy(s.critic)
    other.parts = Distillation(s.mapper, s.critic.parts.loss, s.critic.parts.teacher, shuffled=True)
    assert torch.equal(other.told(data), own.roll(1, 0))


def test_warm_up_trains_the_map_alone_on_images_captions_or_both():
    encoder = tiny_clip().eval()
    data, seen = batch(encoder), {}
    for on in ("image", "text", "both"):
        torch.manual_seed(0)
        parts = Distillation(LatentMapper(16, latent=(2, 4)), sds_loss(), Linear())
        s = MapperStage("mapper", train=TRAIN, source=None, encoder=encoder, distillation=parts, on=on)
        assert {n for n, _ in s.named_parameters()} == {"mapper.linear.weight", "mapper.linear.bias"}
        s(data).loss.backward()
        assert all(p.grad is None for p in encoder.parameters())
        seen[on] = s._embedding(data)
    torch.testing.assert_close(seen["both"], torch.cat([seen["image"][:2], seen["text"][2:]]))
    torch.testing.assert_close(seen["text"], encoder.text(data.text).pooled)


def test_the_end_says_how_far_both_towers_moved_and_whether_captions_matter():
    s = stage()
    found = s.final_metrics()
    assert (found["weight_drift"], found["text_weight_drift"]) == (0, 0)
    assert found["cosine_to_base"] == pytest.approx(1)
    assert found["caption_gap"] == pytest.approx(found["sds_wrong"] / found["sds_right"] - 1)
    with torch.no_grad():
        for p in layer_norms(s.encoder.text):
            p.mul_(2)
    moved = s.final_metrics()
    assert moved["weight_drift"] == 0
    assert moved["text_weight_drift"] > 0
    assert s.components().keys() == {"mapper"}
    assert not hasattr(s.mapper, "registered")


class Fixed(nn.Module):
    """``SdsLoss`` whose steps and noise depend on the latent's row alone, so that splitting a batch changes nothing."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, denoiser, u, condition):
        t = condition.sum(1).long() % 1000
        noise = torch.stack([torch.linspace(-1, float(s) / 1000, 8, dtype=u.dtype).view(2, 4) for s in t])
        return self.inner.at(denoiser, u, condition, t, noise)


def whole_or_part():
    """Gradients of one step in float64; on W ranks each sees its part."""
    s = stage(dtype=torch.float64, weight=0.7)
    s.critic.parts = Distillation(s.mapper, Fixed(s.critic.parts.loss), s.critic.parts.teacher)
    module = Step(s)
    if world_size() > 1:
        module = nn.parallel.DistributedDataParallel(module)
    n = 4 // world_size()
    module(batch(s.encoder, dtype=torch.float64)[slice(rank() * n, (rank() + 1) * n)]).loss.backward()
    return {name: p.grad for name, p in s.named_parameters() if p.grad is not None}


def test_two_ranks_give_the_gradient_of_one():
    one = whole_or_part()
    for found in run_ranks(whole_or_part, 2):
        assert found.keys() == one.keys()
        for name, grad in one.items():
            assert (found[name] - grad).abs().max() < 1e-5 * grad.abs().max(), name  # losses are fp32


def test_accumulation_is_exact():
    from clipgraft.trainer import Trainer

    class Alone:
        def __init__(self):
            self.accelerator = self

        scaler, unwrap_model, autocast, layout = None, staticmethod(lambda m: m), staticmethod(torch.no_grad), Layout()

        def backward(self, loss):
            loss.backward()

        def no_sync(self, wrapped):
            return torch.enable_grad()

    found = []
    for chunks in (1, 2):
        s = stage(weight=0.7)
        s.critic.parts = Distillation(s.mapper, Fixed(s.critic.parts.loss), s.critic.parts.teacher)
        trainer = Trainer(TrainConfig(steps=1, batch_size=4, lr=1e-3, accumulate=chunks))
        output = trainer._forward_backward(Alone(), Step(s), s, batch(s.encoder))
        found.append(({n: p.grad for n, p in s.named_parameters() if p.grad is not None}, output))
    (whole, a), (parts, b) = found
    torch.testing.assert_close(a.loss, b.loss)
    assert whole.keys() == parts.keys()
    for name, grad in whole.items():
        torch.testing.assert_close(parts[name], grad, atol=1e-6, rtol=1e-4, msg=name)


def test_text_and_image_are_unit_vectors_in_the_contrastive_loss():
    s = stage(weight=0)
    data = batch(s.encoder)
    z, text = (F.normalize(f, dim=-1) for f in s.encode(data))
    logits = s.encoder.logit_scale.exp() * z @ text.T
    own = torch.arange(4)
    wanted = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    torch.testing.assert_close(s(data).loss, wanted)
