"""Facts of the GenCLIP reconstruction on tiny random towers: two branches, vision prompts, and the filter of names."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
from torch.nn import functional as F

from clipgraft.config.schema import TrainConfig
from clipgraft.data.base import Sample
from clipgraft.distributed import rank, world_size
from clipgraft.errors import InputError
from clipgraft.log import RunLog
from clipgraft.testing.ranks import run_ranks
from clipgraft.testing.tiny import tiny_clip
from clipgraft.types import Batch
from clipgraft_anomaly.dense import DenseTower
from clipgraft_anomaly.detector import Fits
from clipgraft_anomaly.feature_store import FeatureStore
from clipgraft_anomaly.genclip.branches import GenClipDetector
from clipgraft_anomaly.genclip.config import LossConfig
from clipgraft_anomaly.genclip.name_filter import FilterConfig, NameFilter, Told
from clipgraft_anomaly.genclip.prompts import BlendConfig, GenClip, QueryConfig
from clipgraft_anomaly.genclip.stage import BranchesStage, produce
from clipgraft_anomaly.genclip.vision import LayeredReadConfig, LayeredReader
from clipgraft_anomaly.losses import map_loss
from clipgraft_anomaly.onnx_graph import InspectionGraph
from clipgraft_anomaly.reading import Reader, detection
from clipgraft_anomaly.scoring import gaussian, probabilities, upsampled
from clipgraft_anomaly.text_path import encode_embeddings

torch.set_num_threads(1)
PROMPT = QueryConfig(query=5, deep_tokens=2, deep_layers=3, scale=0.3)


def setting(prompt=PROMPT, *, layers=(3, 5), blend=None, names=None, **read):
    encoder = tiny_clip(depth=5, context=24).eval().requires_grad_(False)
    chosen = LayeredReadConfig(size=48, layers=layers, vv_start=2, **read).resolved(encoder)
    torch.manual_seed(0)
    head = GenClip(
        prompt=prompt.resolved(encoder),
        read=chosen,
        blend=blend or BlendConfig(),
        filter=names or FilterConfig(),
        fits=Fits.of(encoder),
    )
    head.settle(encoder)
    return encoder, head


def pictures(count=3):
    return torch.rand(count, 3, 48, 48, generator=torch.Generator().manual_seed(1))


def told(*names):
    return [Told(name) for name in names]


def look(encoder, head):
    return LayeredReader(Reader(encoder, head.read), pooling=head.prompt.pooling)


def by_hand(encoder, head, name, feature=None, layer=None):
    """Texts (2, D) of unit length, a prompt at a time, token by token."""
    found = []
    for state, words in enumerate((head.prompt.normal, head.prompt.anomalous)):
        ids = encoder.tokenizer([words.replace("{}", name)])[0]
        embedded = [encoder.text.embed(i[None, None])[0, 0] for i in ids[: int(ids.argmax()) + 1]]
        own = list(head.query[min(state, len(head.query) - 1)])
        if feature is not None:
            normed = (feature - feature.mean()) / (feature.var(unbiased=False) + 1e-5).sqrt()
            linear = head.vision[str(layer)]
            own.append(linear.weight @ normed + linear.bias)
        tokens = torch.stack([embedded[0], *own, *embedded[1:]])
        end = torch.tensor([len(tokens) - 1])
        found.append(encode_embeddings(encoder.text, tokens[None], end, deep=list(head.deep))[0])
    return F.normalize(torch.stack(found), dim=-1)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_one_pass_gives_the_readers_features_and_every_layers_pooled_one(pooling):
    encoder, head = setting(PROMPT.model_copy(update={"pooling": pooling}))
    found, want = look(encoder, head)(pictures()), Reader(encoder, head.read)(pictures())
    torch.testing.assert_close(found.seen.whole, want.whole, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.seen.local, dict(want.local), atol=1e-5, rtol=1e-5)
    h = DenseTower(encoder.image, size=48).embed(encoder.preprocess.normalize(pictures()))
    for layer, block in enumerate(encoder.image.tower.transformer.resblocks, start=1):
        h = block(h)
        if layer in (3, 5):
            by_block = h[:, 1:].mean(1) if pooling == "mean" else h[:, 0]
            torch.testing.assert_close(found.pooled[layer], by_block, atol=1e-5, rtol=1e-5)


def test_texts_are_those_of_single_prompts_written_token_by_token():
    encoder, head = setting(PROMPT.model_copy(update={"per_state": True}))
    pooled = look(encoder, head)(pictures()).pooled
    names = ("cat", "small red star", "dog")
    texts = head.vision_texts(encoder, told(*names), pooled)
    for layer in (3, 5):
        for i, name in enumerate(names):
            want = by_hand(encoder, head, name, pooled[layer][i], layer)
            torch.testing.assert_close(texts[layer][i], want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(head.texts, by_hand(encoder, head, "object"), atol=1e-5, rtol=1e-5)
    assert (texts[3] - texts[5]).abs().max() > 1e-3


def test_g01_the_query_only_branch_knows_no_picture_and_no_name_that_the_filter_replaces():
    encoder, head = setting(blend=BlendConfig(a=0, b=0))
    texts = head.query_texts(encoder)
    assert texts.shape == (1, 2, 16) and torch.equal(texts[0], head.texts)
    detector = head.detector(encoder)
    assert detector.image_only
    named, plain = detector(pictures(), ["cat"] * 3), detector(pictures())
    assert torch.equal(named.map, plain.map) and torch.equal(named.score, plain.score)
    encoder, head = setting(PROMPT.model_copy(update={"named": "both"}), blend=BlendConfig(a=0, b=0))
    detector = head.detector(encoder)
    assert not detector.image_only
    plain, odd, cat = (detector(pictures(), [name] * 3) for name in ("object", "pcb1", "cat"))
    assert torch.equal(odd.map, plain.map) and torch.equal(odd.score, plain.score)
    assert (cat.map - plain.map).abs().max() > 1e-4


def test_g02_one_branch_alone_is_what_the_blend_gives_at_its_ends():
    encoder, head = setting(score_weight=0.25)
    seen = Reader(encoder, head.read)(pictures())
    want = detection(seen, head.texts, head.read, size=48)
    query = GenClipDetector(encoder, head, blend=BlendConfig(a=0, b=0))
    again = GenClipDetector(encoder, head, blend=BlendConfig(a=0.5, b=0.5)).query_only()
    for found in (query(pictures()), again(pictures())):
        torch.testing.assert_close(found.map, want.map)
        torch.testing.assert_close(found.score, want.score)
    vision = GenClipDetector(encoder, head, blend=BlendConfig(a=1, b=1))
    found = vision(pictures(), ["cat"] * 3)
    pooled = look(encoder, head)(pictures()).pooled
    for i in range(3):
        texts = {layer: by_hand(encoder, head, "cat", pooled[layer][i], layer) for layer in (3, 5)}
        maps = [
            upsampled(probabilities(seen.local[layer][i : i + 1], texts[layer]), (6, 6), 48)[:, 1] for layer in (3, 5)
        ]
        smooth = gaussian(torch.stack(maps).mean(0), head.read.sigma)[0]
        whole = torch.stack([probabilities(seen.whole[i : i + 1], texts[layer])[0, 1] for layer in (3, 5)]).mean()
        torch.testing.assert_close(found.map[i], smooth, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(found.score[i], 0.75 * whole + 0.25 * smooth.max(), atol=1e-5, rtol=1e-4)


def test_g03_permuting_the_batch_permutes_what_is_found():
    encoder, head = setting(blend=BlendConfig(a=1, b=1))
    detector, order, names = head.detector(encoder), [2, 0, 1], ["cat", "dog", "small star"]
    found = detector(pictures(), names)
    moved = detector(pictures()[order], [names[i] for i in order])
    torch.testing.assert_close(moved.map, found.map[order], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(moved.score, found.score[order], atol=1e-5, rtol=1e-5)
    one = detector(pictures()[:1], names[:1])  # a batch of one, with prompts of another length
    torch.testing.assert_close(one.map[0], found.map[0], atol=1e-5, rtol=1e-5)


def test_g05_names_that_are_labels_become_object_always_the_same_and_once_and_for_all():
    said = []
    real = SimpleNamespace(tokenizer=open_clip.get_tokenizer("ViT-B-32"), text=None)
    check = NameFilter(real, FilterConfig(), log=said.append)
    names = ("bottle", "pcb1", "macaroni2", "capsules_v2", "metal nut", "object", "zxqvkjw")
    found = [check(name) for name in names]
    assert [t.name for t in found] == ["bottle", *["object"] * 3, "metal nut", "object", "object"]
    assert [check(name) for name in names] == found and len(said) == len(check.doubted) == 4
    assert "digits" in check.doubted["pcb1"] and "tokens" in check.doubted["zxqvkjw"] and "'pcb1'" in said[0]
    assert [check(t.name).name for t in found] == [t.name for t in found]
    other = NameFilter(real, FilterConfig())
    assert [other(name) for name in reversed(names)] == found[::-1]
    assert NameFilter(real, FilterConfig(mode="off"))("pcb1") == Told("pcb1")
    assert check("metal_nut").name == "object"
    assert NameFilter(real, FilterConfig(underscores="space"))("metal_nut").name == "metal nut"


def test_g05_a_name_is_doubted_when_its_cosine_is_below_the_quantile_of_the_nouns():
    encoder = tiny_clip(depth=2, context=24).eval()
    nouns = ("cat", "dog", "car", "star", "red", "one", "two", "black")
    settings = FilterConfig(mode="cosine", quantile=0.4, nouns=nouns, pieces=9)
    check = NameFilter(encoder, settings)
    names = ["cat", "dog", "green", "blue", "large", "white circle"]
    sentences = [f"a photo of a {n}." for n in ("object", *nouns, *names)]
    with torch.no_grad():
        unit = F.normalize(encoder.text(encoder.tokenizer(sentences)).pooled, dim=-1).numpy().astype(np.float64)
    cosines = unit[1:] @ unit[0]
    least = np.quantile(cosines[: len(nouns)], 0.4)
    want = [bool(c < least) for c in cosines[len(nouns) :]]
    assert [check(name).name == "object" for name in names] == want and 0 < sum(want) < len(names)
    assert check("object").name == "object" and check("cat2").name == "object"


def test_a_doubted_name_can_be_mixed_with_object_instead():
    encoder, head = setting(names=FilterConfig(weight=0.3))
    one = NameFilter(encoder, head.filter)("pcb1")
    assert (one.name, one.weight) == ("pcb1", 0.3)
    pooled = {layer: f[:1] for layer, f in look(encoder, head)(pictures()).pooled.items()}
    texts = head.vision_texts(encoder, [one], pooled)
    for layer in (3, 5):
        name, thing = (by_hand(encoder, head, n, pooled[layer][0], layer) for n in ("pcb1", "object"))
        want = F.normalize(0.3 * name + 0.7 * thing, dim=-1)
        torch.testing.assert_close(texts[layer][0], want, atol=1e-5, rtol=1e-5)


def test_g06_without_vision_tokens_texts_depend_on_no_picture():
    encoder, head = setting()
    with torch.no_grad():
        for linear in head.vision.values():
            linear.weight.zero_()
            linear.bias.zero_()
    texts = head.vision_texts(encoder, told(*["cat"] * 3), look(encoder, head)(pictures()).pooled)
    torch.testing.assert_close(texts[3], texts[3][:1].expand(3, -1, -1), atol=1e-6, rtol=0)
    torch.testing.assert_close(texts[3], texts[5], atol=1e-6, rtol=0)
    assert (texts[3][0] - head.query_texts(encoder, told("cat"))[0]).abs().max() > 1e-4  # a zero token is still one


def test_g07_the_order_of_layers_changes_nothing():
    found = []
    for layers in ((3, 5, 1), (5, 1, 3)):
        encoder, head = setting(layers=layers)
        found.append(head.detector(encoder)(pictures(), ["cat"] * 3))
    torch.testing.assert_close(found[0].map, found[1].map, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found[0].score, found[1].score, atol=1e-6, rtol=1e-5)


def test_g08_the_blend_lies_between_the_branches():
    encoder, head = setting()
    shares = [GenClipDetector(encoder, head, blend=BlendConfig(a=a, b=a))(pictures()) for a in (0.0, 0.3, 1.0)]
    for query, mixed, vision in (tuple(s.map for s in shares), tuple(s.score for s in shares)):
        low, high = torch.minimum(query, vision), torch.maximum(query, vision)
        assert (mixed >= low - 1e-6).all() and (mixed <= high + 1e-6).all() and (high - low).max() > 1e-3
        torch.testing.assert_close(mixed, 0.7 * query + 0.3 * vision, atol=1e-6, rtol=1e-5)


def test_small_chunks_of_prompts_give_the_same_texts_and_gradients():
    found = []
    for chunk in (256, 5):
        encoder, head = setting(PROMPT.model_copy(update={"chunk": chunk}))
        pooled = look(encoder, head)(pictures()).pooled
        texts = head.vision_texts(encoder, told("cat", "dog", "object"), pooled)
        sum((k * t[..., 0]).sum() for k, t in texts.items()).backward()
        found.append([texts[3], head.query.grad, head.deep.grad, head.vision["5"].weight.grad])
    for whole, split in zip(*found, strict=True):
        torch.testing.assert_close(split, whole, atol=1e-5, rtol=1e-4)
        assert whole.abs().max() > 1e-4


# -- training ------------------------------------------------------------------------------------------------------


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
        return Sample(f"p{index}", image, label=index % 2, extra={} if index == 3 else {"mask": mask.byte()})


def stage_over(tmp_path, *, keep="memory", loss=None):
    encoder, head = setting()
    reader = LayeredReader(Reader(encoder, head.read), pooling="mean")
    how = replace(encoder.preprocess, size=(48, 48), resize_mode="squash")
    store = FeatureStore(Parts(), produce(reader), how, tmp_path / keep, "k", keep=keep, batch_size=4)
    store.fill(RunLog())
    stage = BranchesStage(
        "branches",
        train=TrainConfig(steps=1, batch_size=2, lr=1e-3),
        store=store,
        encoder=encoder,
        head=head,
        grid=(6, 6),
        told=told("cat", "dog", "cat", "object", "dog", "dog"),
        loss=loss or LossConfig(),
    )
    return stage, encoder, head


def batch(*places):
    return Batch(torch.zeros(len(places), 3, 1, 1), [str(p) for p in places], extra={"place": torch.tensor(places)})


def test_g04_query_tokens_learn_from_both_branches_and_vision_tokens_from_theirs(tmp_path):
    for loss, vision_learns in ((LossConfig(query=0), True), (LossConfig(vision=0), False)):
        stage, _, head = stage_over(tmp_path, loss=loss)
        stage(batch(0, 1, 2)).loss.backward()
        assert head.query.grad.abs().max() > 0 and head.deep.grad.abs().max() > 0
        for linear in head.vision.values():
            assert (linear.weight.grad is not None and bool(linear.weight.grad.abs().max() > 0)) == vision_learns


def test_the_loss_is_both_branches_and_unmasked_pictures_count_for_the_whole_alone(tmp_path):
    stage, encoder, head = stage_over(tmp_path, loss=LossConfig(local=2, vision=0.5, query=3))
    rows, names, labels = stage.store([1, 2, 3]), ("dog", "cat", "object"), torch.tensor([1, 0, 1])
    want = torch.zeros(())
    for weight, named in ((0.5, True), (3, False)):
        texts = {
            layer: torch.stack(
                [by_hand(encoder, head, names[i], rows[f"pooled.{layer}"][i], layer) for i in range(3)]
                if named
                else [head.texts] * 3
            )
            for layer in (3, 5)
        }
        shares = torch.stack([probabilities(rows["whole"], t) for t in texts.values()]).mean(0)
        want = want + weight * F.nll_loss(shares.log(), labels)
        for layer in (3, 5):
            share = upsampled(probabilities(rows[f"local.{layer}"][:2], texts[layer][:2]), (6, 6), 48)
            want = want + weight * 2 * map_loss(share, rows["mask"][:2])
    torch.testing.assert_close(stage(batch(1, 2, 3)).loss, want, atol=1e-4, rtol=1e-4)
    assert torch.isfinite(stage(batch(3)).loss)  # damaged, without a mask, a batch of one


@pytest.mark.parametrize("keep", ["memory", "disk"])
def test_kept_features_give_the_same_loss_and_gradients(tmp_path, keep):
    found = {}
    for how in (keep, "none"):
        stage, _, head = stage_over(tmp_path, keep=how)
        output = stage(batch(1, 2, 3, 5))
        output.loss.backward()
        found[how] = [output.loss.detach(), head.query.grad, head.vision["3"].weight.grad]
    for kept, anew in zip(found[keep], found["none"], strict=True):
        torch.testing.assert_close(kept, anew, atol=1e-6 + 1e-4 * float(anew.abs().max()), rtol=0)


def test_a_step_moves_what_is_learnt_and_nothing_else(tmp_path):
    stage, encoder, head = stage_over(tmp_path)
    before = {name: p.clone() for name, p in encoder.state_dict().items()}
    start = {name: p.detach().clone() for name, p in head.named_parameters()}
    groups = stage.param_groups()
    assert {id(p) for g in groups for p in g["params"]} == {id(p) for p in head.parameters()}
    optimizer = torch.optim.Adam(groups, lr=1e-2)
    stage(batch(0, 1)).loss.backward()
    optimizer.step()
    assert all(p.grad is None for p in encoder.parameters())
    assert all(torch.equal(p, before[name]) for name, p in encoder.state_dict().items())
    assert all(not torch.equal(p, start[name]) for name, p in head.named_parameters())
    old = head.texts.clone()
    assert stage.components()["genclip"] is head and not torch.equal(head.texts, old)


# -- refusals ------------------------------------------------------------------------------------------------------


def test_the_layers_are_quarters_of_the_tower_unless_said():
    for depth, want in ((24, (6, 12, 18, 24)), (12, (3, 6, 9, 12)), (2, (1, 2))):
        assert LayeredReadConfig().resolved(tiny_clip(depth=depth, width=16)).layers == want


def test_what_does_not_fit_is_refused():
    encoder = tiny_clip(depth=2, context=16)
    with pytest.raises(InputError, match=r"set prompt\.query to"):
        QueryConfig(query=14).resolved(encoder)
    with pytest.raises(InputError, match="deep_layers 2 must be below"):
        QueryConfig(query=2, deep_tokens=1, deep_layers=2).resolved(encoder)
    with pytest.raises(InputError, match="deep_tokens 3 exceeds"):
        QueryConfig(query=2, deep_tokens=3, deep_layers=1).resolved(encoder)
    with pytest.raises(InputError, match="SigLIP"):
        QueryConfig().resolved(tiny_clip(kind="siglip-timm"))
    with pytest.raises(InputError, match="names a layer twice"):
        LayeredReadConfig(layers=(1, 1)).resolved(encoder)
    with pytest.raises(InputError, match="layer 3"):
        LayeredReadConfig(layers=(3,)).resolved(encoder)
    with pytest.raises(ValueError, match=r"must hold \{\} once"):
        QueryConfig(anomalous="damaged object.")
    with pytest.raises(InputError, match="run it, then give its run"):
        GenClip(prompt=QueryConfig(), read=LayeredReadConfig(), blend=BlendConfig(), filter=FilterConfig(), fits=Fits())


def test_a_name_that_is_too_long_and_pixels_of_another_size_are_refused():
    encoder, head = setting(names=FilterConfig(mode="off"))
    with pytest.raises(InputError, match="shorter name"):
        head.detector(encoder)(pictures(1), ["a very long name of some part"])
    with pytest.raises(InputError, match="this detector takes 48 x 48"):
        head.detector(encoder)(torch.rand(1, 3, 32, 32))


def test_without_a_text_tower_the_query_only_branch_still_works():
    encoder, head = setting()
    want = head.detector(encoder).query_only()(pictures())
    blind, _ = setting()
    blind.text = None
    with pytest.raises(InputError, match="this model has none"):
        head.detector(blind)
    found = GenClipDetector(blind, head, blend=BlendConfig(a=0, b=0))(pictures())
    assert torch.equal(found.map, want.map)


def test_the_query_only_branch_is_a_graph_of_pictures_with_two_constants():
    encoder, head = setting(score_weight=0.25)
    detector = head.detector(encoder).query_only()
    graph = InspectionGraph(
        detector.reader.dense, texts=detector.texts, read=detector.read, preprocess=encoder.preprocess
    )
    found, want = graph(pictures()), detector(pictures(), ["cat", "dog", "pcb1"])
    torch.testing.assert_close(found.map, want.map, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.score, want.score, atol=1e-5, rtol=1e-5)


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
