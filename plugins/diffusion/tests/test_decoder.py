import torch
from torch.nn import functional as F

from clipgraft.config.schema import TrainConfig
from clipgraft.testing.tiny import tiny_clip
from clipgraft.types import Batch
from clipgraft_diffusion.decoder import Decoder, DecoderConfig, DecoderStage, decoder_grid
from clipgraft_diffusion.eps import EpsObjective, NoiseSchedule
from clipgraft_diffusion.generator import FlowGenerator
from clipgraft_diffusion.pretraining import CaptionTeller

SMALL = DecoderConfig(width=24, heads=2, pool=2, positions=4, train=TrainConfig(steps=2, batch_size=4, lr=1e-2))


def setting():
    base = tiny_clip().eval()
    torch.manual_seed(0)
    decoder = Decoder(SMALL, base.image, told=base.image.embed_dim)
    text = base.tokenizer([f"a {word}" for word in ("cat", "dog", "hat", "pig")])
    batch = Batch(torch.rand(4, 3, *base.preprocess.size), [*"abcd"], text=text)
    stage = DecoderStage(
        "decoder",
        config=SMALL,
        source=[],
        held_out=[batch],
        base=base,
        decoder=decoder,
        teller=CaptionTeller(base),
        captions=True,
    )
    return base, decoder, stage, batch


def test_neighbouring_tokens_are_averaged_in_the_raster():
    base, decoder, _, _ = setting()
    rows, columns = base.image.grid
    tokens = torch.randn(2, rows * columns, base.image.width)
    square = tokens.reshape(2, rows, columns, -1)
    want = square.reshape(2, rows // 2, 2, columns // 2, 2, -1).mean((2, 4)).flatten(1, 2)
    torch.testing.assert_close(decoder.raw(tokens), want)
    assert decoder_grid(base.image, pool=2) == (rows // 2, columns // 2)


def test_training_lowers_the_error_and_changes_the_decoder_alone():
    base, _, stage, batch = setting()
    before = {name: weight.clone() for name, weight in base.state_dict().items()}
    assert {name.split(".")[0] for name, p in stage.named_parameters() if p.requires_grad} == {"decoder"}
    optimizer = torch.optim.AdamW([p for p in stage.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(40):
        torch.manual_seed(0)
        output = stage(batch)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        losses.append(output.loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(torch.equal(weight, before[name]) for name, weight in base.state_dict().items())
    found = stage.final_metrics()
    assert found["condition_gap"] == found["decoder_wrong"] / found["decoder_right"] - 1
    assert found["condition_gap"] > 0  # four images learnt by heart: the wrong caption must hurt


def test_behind_the_eps_objective_noise_and_v_tell_the_same_clean_tokens():
    base, decoder, _, batch = setting()
    schedule = NoiseSchedule()
    told = F.normalize(torch.randn(4, 1, base.image.embed_dim), dim=-1)
    noisy = FlowGenerator(decoder, base, schedule=schedule)
    x0, t = noisy.latents(batch.pixels), torch.tensor([300, 700, 900, 999])
    assert x0.shape == (4, 4, base.image.width)
    noise = torch.randn_like(x0)
    eps = EpsObjective(schedule, noisy)(x0, told, t, noise)
    v = EpsObjective(schedule, FlowGenerator(decoder, base, schedule=schedule, target="velocity"), target="velocity")
    torch.testing.assert_close(v(x0, told, t, noise) * schedule.alphas[t], eps, rtol=1e-3, atol=1e-5)


def test_without_unit_the_length_of_what_is_told_matters():
    base, *_ = setting()
    torch.manual_seed(0)
    decoder = Decoder(SMALL, base.image, told=6, unit=False)
    generator = FlowGenerator(decoder, base, schedule=NoiseSchedule(), unit=False)
    x_t, t, told = torch.randn(4, 4, base.image.width), torch.tensor([999] * 4), torch.randn(4, 6)
    assert (generator(x_t, t, told) - generator(x_t, t, 3 * told)).abs().max() > 1e-4
