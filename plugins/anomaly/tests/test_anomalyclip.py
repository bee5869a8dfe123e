"""AnomalyCLIP's facts on tiny random towers, and its prompts from training to inspection."""

import copy
from dataclasses import replace

import numpy as np
import open_clip
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch.nn import functional as F

from clipgraft.config.schema import TrainConfig
from clipgraft.data.base import Sample
from clipgraft.distributed import rank, world_size
from clipgraft.errors import InputError
from clipgraft.log import RunLog
from clipgraft.testing.ranks import run_ranks
from clipgraft.testing.tiny import tiny_clip
from clipgraft.types import Batch
from clipgraft_anomaly.anomalyclip.prompts import AnomalyClip, PromptConfig
from clipgraft_anomaly.anomalyclip.stage import PromptStage, produce
from clipgraft_anomaly.detector import Fits
from clipgraft_anomaly.feature_store import FeatureStore
from clipgraft_anomaly.losses import dice, focal, map_loss
from clipgraft_anomaly.reading import ReadConfig, Reader, Seen, detection
from clipgraft_anomaly.scoring import gaussian, probabilities, upsampled

torch.set_num_threads(1)
PROMPT = PromptConfig(context=6, deep_tokens=2, deep_layers=3)


def setting(prompt=PROMPT, **read):
    encoder = tiny_clip(depth=5, context=24).eval().requires_grad_(False)
    read = ReadConfig(size=48, layers=(3, 5), vv_start=2, **read).resolved(encoder)
    torch.manual_seed(0)
    head = AnomalyClip(prompt=prompt.resolved(encoder), read=read, fits=Fits.of(encoder))
    return encoder, head


class Parts:
    """Noise with a bright square on every other picture; picture 3 is damaged and nobody says where."""

    name, fingerprint, classes, templates, attributes = "parts", "parts", ("normal", "anomalous"), (), {}

    def __len__(self):
        return 6

    def __getitem__(self, index):
        g = torch.Generator().manual_seed(index)
        image, mask = torch.randint(0, 200, (3, 60, 50), generator=g, dtype=torch.uint8), torch.zeros(60, 50)
        if index % 2:
            image[:, 10:30, 10:30], mask[10:30, 10:30] = 255, 1
        extra = {} if index == 3 else {"mask": mask.byte()}
        return Sample(f"p{index}", image, label=index % 2, extra=extra)


def stage_over(tmp_path, *, keep="memory", dtype=torch.float32):
    encoder, head = setting()
    reader = Reader(encoder, head.read)
    how = replace(encoder.preprocess, size=(48, 48), resize_mode="squash")
    store = FeatureStore(Parts(), produce(reader), how, tmp_path / keep, "k", keep=keep, dtype=dtype, batch_size=4)
    store.fill(RunLog())
    train = TrainConfig(steps=1, batch_size=2, lr=1e-3)
    stage = PromptStage("prompts", train=train, store=store, encoder=encoder, head=head, grid=reader.grid)
    return stage, encoder, head


def batch(*places):
    return Batch(torch.zeros(len(places), 3, 1, 1), [str(p) for p in places], extra={"place": torch.tensor(places)})


def test_a02_nineteen_of_24_layers_are_read_by_value_attention_at_the_official_setting():
    encoder = tiny_clip(depth=24).eval()
    read = ReadConfig().resolved(encoder)
    assert (read.first, read.needed, len(range(read.first, 25))) == (6, (24,), 19)


def test_a08_ids_and_end_positions_are_those_of_clips_tokenizer():
    ids = open_clip.get_tokenizer("ViT-B-32")(["X " * 12 + "object.", "X " * 12 + "damaged object."])
    assert ids[0, :17].tolist() == [49406, *[343] * 12, 14115, 269, 49407, 0]
    assert ids[1, 13:17].tolist() == [13568, 14115, 269, 49407]
    assert ids.argmax(-1).tolist() == [15, 16]


def test_a10_what_belongs_to_one_prompt_never_changes_the_other():
    encoder, head = setting()
    before = head.embed(encoder)
    with torch.no_grad():
        head.context[0] += torch.randn(6, 32)
    after = head.embed(encoder)
    torch.testing.assert_close(after[1], before[1], atol=1e-6, rtol=0)
    assert (after[0] - before[0]).abs().max() > 1e-4


def test_context_behind_deep_tokens_matters_and_the_overwritten_part_only_through_the_first_layer():
    encoder, head = setting()
    before = head.embed(encoder).detach()
    moved = []
    for part in (slice(0, 2), slice(2, 6)):
        other = copy.deepcopy(head)
        with torch.no_grad():
            other.context[:, part] += torch.randn(other.context[:, part].shape)
        moved.append((other.embed(encoder) - before).norm())
    assert 0 < moved[0] < moved[1]


def test_a11_shares_sum_to_one_and_the_official_sum_over_layers_is_the_anomalous_share():
    encoder, head = setting()
    head.settle(encoder)
    seen = Reader(encoder, head.read)(torch.rand(2, 3, 48, 48))
    total = torch.zeros(2, 48, 48)
    for x in seen.local.values():
        share = upsampled(probabilities(x, head.texts), seen.grid, 48)
        torch.testing.assert_close(share.sum(1), torch.ones(2, 48, 48))
        total += (share[:, 1] + 1 - share[:, 0]) / 2
    found = detection(seen, head.texts, head.read.model_copy(update={"sigma": 0.0}), size=48)
    torch.testing.assert_close(found.map, total)
    assert float(found.map.min()) >= 0 and float(found.map.max()) <= 2


def test_a12_softmax_comes_before_upsampling():
    features, texts = torch.randn(1, 9, 4, generator=torch.Generator().manual_seed(0)), torch.randn(2, 4)
    early = upsampled(probabilities(features, texts), (3, 3), 12)
    logits = F.normalize(features, dim=-1) @ F.normalize(texts, dim=-1).T / 0.07
    late = upsampled(logits, (3, 3), 12).softmax(1)
    assert (early - late).abs().max() > 0.05


def test_a13_focal_and_dice_at_known_points():
    half = torch.full((1, 2, 4, 4), 0.5)
    mask = (torch.arange(16).view(1, 4, 4) % 2).float()
    assert float(focal(half, mask)) == pytest.approx(0.17327, abs=2e-5)
    perfect = torch.stack([1 - mask, mask], 1)
    assert float(focal(perfect, mask)) == pytest.approx(0, abs=1e-4)
    assert float(dice(perfect[:, 1], mask)) == 0
    assert float(dice(torch.zeros(1, 4, 4), torch.zeros(1, 4, 4))) == 0
    p = torch.rand(3, 4, 4)
    y = (torch.rand(3, 4, 4) > 0.5).float()
    by_hand = [1 - (2 * (p[i] * y[i]).sum() + 1) / (p[i].sum() + y[i].sum() + 1) for i in range(3)]
    torch.testing.assert_close(dice(p, y), torch.stack(by_hand).mean())
    torch.testing.assert_close(dice(p[:1], y[:1]), by_hand[0])  # a last batch of one is a picture, not rows


def test_a14_smoothing_is_scipys_and_leaves_constants_alone():
    maps = torch.rand(2, 40, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    want = np.stack([gaussian_filter(m.numpy(), sigma=4) for m in maps])
    torch.testing.assert_close(gaussian(maps, 4.0), torch.from_numpy(want), atol=1e-9, rtol=1e-9)
    small = torch.rand(1, 9, 9, dtype=torch.float64)  # the kernel is wider than the picture
    torch.testing.assert_close(gaussian(small, 2.0)[0], torch.from_numpy(gaussian_filter(small[0].numpy(), sigma=2)))
    torch.testing.assert_close(gaussian(torch.full((1, 30, 30), 0.3), 4.0), torch.full((1, 30, 30), 0.3))


def test_a15_the_official_setting_trains_43_008_numbers():
    fits = Fits(text_width=768, embed_dim=768)
    head = AnomalyClip(
        prompt=PromptConfig(deep_layers=8), read=ReadConfig(size=518, layers=(24,), vv_start=6), fits=fits
    )
    assert sum(p.numel() for p in head.parameters() if p.requires_grad) == 43_008


def test_a17_a_batch_is_three_single_pictures():
    encoder, head = setting()
    head.settle(encoder)
    detector = head.detector(encoder)
    pixels = torch.rand(3, 3, 48, 48)
    whole = detector(pixels)
    for i in range(3):
        one = detector(pixels[i : i + 1])
        torch.testing.assert_close(one.score[0], whole.score[i], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(one.map[0], whole.map[i], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("keep", ["memory", "disk"])
def test_a18_kept_features_give_the_same_loss_and_gradients(tmp_path, keep):
    found = {}
    for how in (keep, "none"):
        stage, _, head = stage_over(tmp_path, keep=how)
        output = stage(batch(1, 2, 3, 5))
        output.loss.backward()
        found[how] = [output.loss.detach(), head.context.grad, head.deep.grad]
    for kept, anew in zip(found[keep], found["none"], strict=True):
        torch.testing.assert_close(kept, anew, atol=1e-6 + 1e-4 * float(anew.abs().max()), rtol=0)  # other batches


def test_features_on_disk_are_taken_over_by_a_second_process_and_not_for_other_settings(tmp_path, monkeypatch):
    stage, _, _ = stage_over(tmp_path, keep="disk")
    store = stage.store
    again = FeatureStore(Parts(), None, store.preprocess, store.folder, "k", keep="disk")  # nothing may be computed
    again.fill(RunLog())
    torch.testing.assert_close(again([2, 4]), store([2, 4]))
    other = FeatureStore(Parts(), store.produce, store.preprocess, store.folder, "another", keep="disk")
    calls = []
    monkeypatch.setattr(other, "produce", lambda pixels: calls.append(len(pixels)) or store.produce(pixels))
    other.fill(RunLog())
    assert sum(calls) == 6


def test_a19_one_step_moves_the_prompts_and_nothing_else(tmp_path):
    stage, encoder, head = stage_over(tmp_path)
    before = {name: p.clone() for name, p in encoder.state_dict().items()}
    groups = stage.param_groups()
    assert {id(p) for g in groups for p in g["params"]} == {id(head.context), id(head.deep)}
    optimizer = torch.optim.Adam(groups, lr=1e-2)
    start = head.context.detach().clone(), head.deep.detach().clone()
    stage(batch(0, 1)).loss.backward()
    optimizer.step()
    assert all(p.grad is None for p in encoder.parameters())
    assert all(torch.equal(p, before[name]) for name, p in encoder.state_dict().items())
    assert not torch.equal(head.context, start[0]) and not torch.equal(head.deep, start[1])


def test_the_loss_is_that_of_the_paper_and_unmasked_pictures_count_for_the_whole_alone(tmp_path):
    stage, encoder, head = stage_over(tmp_path)
    loss = stage(batch(1, 2, 3)).loss
    rows, texts = stage.store([1, 2, 3]), head.embed(encoder)
    whole = F.cross_entropy(
        F.normalize(rows["whole"], dim=-1) @ F.normalize(texts, dim=-1).T / 0.07, torch.tensor([1, 0, 1])
    )
    local = torch.zeros(())
    for layer in (3, 5):
        share = probabilities(rows[f"local.{layer}"][:2], texts)
        local = local + map_loss(upsampled(share, (6, 6), 48), rows["mask"][:2])
    torch.testing.assert_close(loss, whole + 4 * local, atol=1e-5, rtol=1e-5)
    only = stage(batch(3))  # damaged, without a mask, a batch of one
    assert float(only.terms["local"]) == 0 and torch.isfinite(only.loss)


def test_prompts_that_do_not_fit_are_refused():
    encoder = tiny_clip(depth=2, context=16)
    with pytest.raises(InputError, match=r"set prompt\.context to"):
        PromptConfig(context=14).resolved(encoder)
    with pytest.raises(InputError, match="deep_layers 2 must be below"):
        PromptConfig(context=4, deep_layers=2).resolved(encoder)
    with pytest.raises(InputError, match="SigLIP"):
        PromptConfig().resolved(tiny_clip(kind="siglip-timm"))
    assert "depth 5" in Fits.of(tiny_clip(depth=5)).problem(encoder)
    with pytest.raises(InputError, match="layer 3"):
        ReadConfig(layers=(3,)).resolved(encoder)


def test_global_score_takes_its_share_of_the_map_when_asked():
    encoder, head = setting(score_weight=0.25)
    head.settle(encoder)
    pixels = torch.rand(2, 3, 48, 48)
    mixed = head.detector(encoder)(pixels)
    read = head.read.model_copy(update={"score_weight": 0.0})
    seen: Seen = Reader(encoder, head.read)(pixels)
    plain = detection(seen, head.texts, read, size=48)
    torch.testing.assert_close(mixed.score, 0.75 * plain.score + 0.25 * plain.map.flatten(1).amax(1) / 2)


def _gradients(folder, places):
    """What a rank's ``places`` leave behind; all of them in one process."""
    stage, *_ = stage_over(folder / str(rank()))
    share = len(places) // world_size()
    stage(batch(*places[rank() * share : (rank() + 1) * share])).loss.backward()
    return {name: p.grad for name, p in stage.named_parameters() if p.grad is not None}


def test_pictures_without_masks_count_alike_however_processes_share_them(tmp_path):
    """The local losses are means over the pictures with masks, of which two processes have another number."""
    places, torch_threads = (0, 1, 2, 3), torch.get_num_threads()
    torch.set_num_threads(1)
    whole = _gradients(tmp_path, places)
    torch.set_num_threads(torch_threads)
    first, second = run_ranks(_gradients, 2, tmp_path / "two", places)
    assert whole.keys() == first.keys() == second.keys() != set()
    for name, grad in whole.items():
        torch.testing.assert_close((first[name] + second[name]) / 2, grad, rtol=1e-4, atol=1e-6)
