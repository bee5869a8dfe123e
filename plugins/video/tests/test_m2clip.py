"""Facts of M2-CLIP."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from clipgraft.checkpoint import write_export
from clipgraft.data import open_source
from clipgraft.encoders.base import Encoder
from clipgraft.errors import InputError
from clipgraft.evaluation.features import EncoderFeatures
from clipgraft.execution import run_recipe
from clipgraft.registry import current
from clipgraft.testing.tiny import tiny_clip
from clipgraft.types import Batch
from clipgraft_video.heads import VideoFeatures
from clipgraft_video.m2clip.adapters import Bottleneck, Difference, TedAdapter, TemporalAdapter, TextAdapter
from clipgraft_video.m2clip.evaluator import TrainedClassifier
from clipgraft_video.m2clip.graft import M2ClipGraft
from clipgraft_video.m2clip.head import M2Head
from clipgraft_video.m2clip.masking import IGNORED, MaskedTexts
from clipgraft_video.m2clip.recipe import groups
from clipgraft_video.m2clip.tasks import ByHead, ByTexts, MaskedWords, word_loss
from clipgraft_video.model import HEAD, VideoModel, open_video_model
from clipgraft_video.stage import Seen

NAMES = ("moving left", "moving right", "a red dog")


def plain(**settings: Any) -> Encoder:
    return tiny_clip(width=32, embed=32, depth=3, **settings).eval()


def grafted(**settings: Any) -> Encoder:
    torch.manual_seed(0)
    return M2ClipGraft(**{"hidden": 8, "classes": NAMES, **settings}).apply(plain()).eval()


def awake(module: torch.nn.Module) -> None:
    """As after training: nothing is zero any more."""
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, Bottleneck):
                for p in part.parameters():
                    p.copy_(0.3 * torch.randn_like(p))


def clips(n: int = 2, frames: int = 4) -> Tensor:
    return torch.rand(n, frames, 3, 32, 32, generator=torch.Generator().manual_seed(5))


def seen(video: VideoFeatures, labels: list[int], texts: Tensor | None = None) -> Seen:
    batch = Batch(torch.zeros(len(labels), 3, 2, 2), [""] * len(labels), labels=torch.tensor(labels))
    return Seen(video, texts, NAMES, clips(), batch)


@pytest.mark.parametrize(
    ("settings", "visual", "text"),
    [
        ({}, 14_511_872, 788_224),
        (
            {"places": ["attention", "mlp"], "text_places": ["attention", "mlp"], "text_layers": 12},
            28_759_808,
            10_246_912,
        ),
    ],
)
def test_what_the_paper_trains_of_vit_b_16(vit_b_16: Encoder, settings: dict[str, Any], visual: int, text: int) -> None:
    classes = tuple(f"class {k}" for k in range(400))
    with torch.device("meta"):
        encoder = M2ClipGraft(classes=classes, **settings).apply(copy.deepcopy(vit_b_16))
        method = M2ClipGraft(**settings)
        texts: Any = torch.nn.Module()
        texts.vocabulary = range(520)
        words = MaskedWords(encoder, texts, places=method.text_places, hidden=method.hidden)
    encoder.requires_grad_(False)
    new, told = groups(encoder, {"words": (0.1, words)}, text_lr=0.5)
    fc, head = 768 * 400 + 400, sum(p.numel() for p in words.head.parameters())
    assert fc == 307_600
    assert sum(p.numel() for p in new["params"]) == visual + fc + head
    assert sum(p.numel() for p in told["params"]) == text  # the decoder's own block among them
    assert told["lr_scale"] == 0.5


def test_adapters_over_frames_are_the_identity_at_first_those_of_texts_are_not() -> None:
    encoder, bare = grafted(), plain()
    x = torch.randn(2, 3, 17, 32)
    adapter = TedAdapter(32, 8, grid=(4, 4))
    assert torch.equal(adapter(x), x) and torch.equal(TemporalAdapter(32)(x[:, :, 0]), x[:, :, 0])
    assert not torch.allclose(TextAdapter(32, 8)(x), x, atol=1e-3)
    model, flat = VideoModel(encoder), VideoModel(bare)
    ids = bare.tokenizer(["a cat", "a red dog"])
    with torch.no_grad():
        assert torch.allclose(model(clips()).pooled, flat(clips()).pooled, atol=1e-5)
        assert not torch.allclose(encoder.text(ids).pooled, bare.text(ids).pooled, atol=1e-3)  # type: ignore[misc]


def test_a_still_clip_has_no_difference_until_a_bias_moves() -> None:
    torch.manual_seed(0)
    branch = Difference(32, 8, (4, 4))
    torch.nn.init.normal_(branch.conv.weight)
    still = torch.randn(1, 1, 16, 32).expand(2, 3, 16, 32)
    assert float(branch(still).detach().abs().max()) == 0
    torch.nn.init.ones_(branch.fc1.bias)
    assert float(branch(still).detach().abs().max()) > 0


def test_the_first_frame_has_no_difference_and_a_class_token_never_has_one() -> None:
    torch.manual_seed(0)
    adapter, x = TedAdapter(32, 8, grid=(4, 4)), torch.randn(2, 3, 17, 32)
    assert adapter.difference is not None
    torch.nn.init.normal_(adapter.difference.conv.weight)
    before = x.clone()
    with torch.no_grad():
        change = adapter(x) - x  # the branch over frames is still zero
    assert float(change[:, 0].abs().max()) == 0 and float(change[:, :, 0].abs().max()) == 0
    assert float(change[:, 1:, 1:].abs().amax((2, 3)).min()) > 0
    assert torch.equal(x, before)  # an adapter changes nothing in place


def test_an_adapter_over_frames_is_three_shifted_sums() -> None:
    torch.manual_seed(0)
    adapter, x = TedAdapter(32, 8, grid=(4, 4), difference=False), torch.randn(2, 5, 17, 32)
    awake(adapter)
    part = adapter.over_frames
    inner = F.pad(part.fc1(x), (0, 0, 0, 0, 1, 1))  # zeros before and behind the clip
    taps = part.conv.weight[:, 0, :, 0]  # (C, 3)
    summed = sum(inner[:, k : k + 5] * taps[:, k] for k in range(3)) + part.conv.bias
    assert torch.allclose(adapter(x), x + part.fc2(summed), atol=1e-5)


def test_order_counts_for_three_frames_at_once_and_not_for_one() -> None:
    turned = clips()[:, [3, 2, 1, 0]]
    for settings, counts in (({}, True), ({"kernel": 1}, True), ({"kernel": 1, "difference": False}, False)):
        encoder = grafted(**settings)
        awake(encoder)
        model = VideoModel(encoder)
        with torch.no_grad():
            same = torch.allclose(model(clips()).pooled, model(turned).pooled, atol=1e-5)
        assert same != counts, settings


def test_a_frame_reaches_its_video_and_no_other_and_a_picture_passes_alone() -> None:
    encoder = grafted()
    awake(encoder)
    model, changed = VideoModel(encoder), clips()
    changed[0, 1] = 1 - changed[0, 1]
    with torch.no_grad():
        one, other = model(clips()).frames, model(changed).frames
        assert not torch.allclose(one[0, 0], other[0, 0], atol=1e-6) and torch.allclose(one[1], other[1], atol=1e-6)
        picture = encoder.image(torch.rand(3, 3, 32, 32)).pooled
    assert picture.shape == (3, 32) and not encoder.image.clock.left


def test_the_classifier_reads_the_norm_of_the_mean_class_token() -> None:
    encoder = grafted()
    model, head = VideoModel(encoder), getattr(encoder.image, HEAD)
    tokens = list[Tensor]()
    last = encoder.image.tower.transformer.resblocks[-1]
    last.register_forward_hook(lambda _, __, out: tokens.append(out[:, 0]))
    with torch.no_grad():
        video = model(clips())
        wanted = encoder.image.tower.ln_post(tokens[0].unflatten(0, (2, 4)).mean(1))
        assert torch.allclose(head.classify(video), head.fc(wanted), atol=1e-6)
    assert not encoder.image.clock.left  # forgotten when the call ends
    with pytest.raises(InputError, match="no classifier"):
        head.classify(VideoFeatures(video.pooled, video.frames))
    copied = copy.deepcopy(encoder)
    assert getattr(copied.image, HEAD)._norm[0] is copied.image.tower.ln_post


def test_only_what_is_new_learns() -> None:
    encoder = grafted().requires_grad_(False)
    words = MaskedWords(encoder, MaskedTexts(encoder, NAMES), hidden=8)
    terms: Any = {"words": (0.1, words)}
    found = groups(encoder, terms, text_lr=0.5)
    trained = {id(p) for group in found for p in group["params"]}
    assert trained == {id(p) for m in (encoder, words) for p in m.parameters() if p.requires_grad}
    names = {name for name, p in encoder.named_parameters() if p.requires_grad}
    assert names and all("adapter" in name or "video_head.fc" in name for name in names)
    assert not encoder.logit_scale.requires_grad
    model = VideoModel(encoder)
    video = model(clips())
    loss = ByHead(getattr(encoder.image, HEAD))(seen(video, [0, 2]))["loss"]
    loss = loss + ByTexts(encoder)(seen(video, [0, 2], model.texts(list(NAMES))))["loss"]
    (loss + words(seen(video, [0, 2]))["loss"]).backward()
    assert all(p.grad is not None for group in found for p in group["params"])


def test_cross_entropy_over_classes_once_and_as_the_official_code_twice() -> None:
    video = VideoFeatures(torch.tensor([[2.0, 0.0]]), torch.zeros(1, 1, 2))
    texts, scale = torch.eye(2), tiny_clip()
    scale.logit_scale.data.fill_(math.log(10))
    once = ByTexts(scale)(seen(video, [0], texts))["loss"]
    twice = ByTexts(scale, twice=True)(seen(video, [0], texts))["loss"]
    assert float(once.detach()) == pytest.approx(0, abs=1e-3)
    assert float(twice.detach()) == pytest.approx(0.3133, abs=1e-3)  # log(1 + e^-1): it can't come closer to zero


def test_words_that_are_all_ignored_cost_nothing() -> None:
    scores = torch.randn(2, 3, 5, requires_grad=True)
    labels = torch.full((2, 3), IGNORED)
    assert float(word_loss(scores, labels).detach()) == 0  # cross_entropy's mean is NaN here
    labels[0, 1] = 4
    loss = word_loss(scores, labels)
    assert torch.allclose(loss, F.cross_entropy(scores[0, 1:2], labels[0, 1:2]))
    loss.backward()
    assert scores.grad is not None and bool(torch.isfinite(scores.grad).all())


def test_masked_words_are_one_token_and_the_rest_moves_up() -> None:
    encoder = plain()
    texts = MaskedTexts(encoder, NAMES, share=0.5)
    vocabulary = texts.vocabulary
    assert list(vocabulary) == ["a", "dog", "left", "moving", "red", "right"]
    torch.manual_seed(0)
    for _ in range(20):
        ids, labels = texts(torch.tensor([0, 2]))
        assert ids.shape == labels.shape
        for row, (told, wanted) in enumerate(zip(ids.tolist(), labels.tolist(), strict=True)):
            words = NAMES[(0, 2)[row]].split()
            hidden = [k for k, label in enumerate(wanted) if label != IGNORED]
            assert len(hidden) == (1, 2)[row] and all(told[k] == texts.mask for k in hidden)
            gone = {wanted[k] for k in hidden}
            shown = " ".join("mask" if vocabulary[word] in gone else word for word in words)
            spelt = [encoder.tokenizer([word])[0].tolist() for word in shown.split()]
            end = int(texts.ids.max())
            pieces = [
                [texts.mask] if w == "mask" else s[1 : s.index(end)] for w, s in zip(shown.split(), spelt, strict=True)
            ]
            flat = [told[0], *(piece for word in pieces for piece in word), end]
            assert told[: len(flat)] == flat and set(told[len(flat) :]) <= {texts.pad}


def test_masked_words_see_the_frames_and_texts_in_the_way_of_the_tower() -> None:
    encoder = grafted(text_layers=0)
    words = MaskedWords(encoder, MaskedTexts(encoder, NAMES), hidden=8).eval()
    ids, _ = words.texts(torch.tensor([0, 1]))
    frames = torch.randn(2, 4, 32)
    with torch.no_grad():
        one, other = words.scores(ids, frames), words.scores(ids, -frames)
        assert one.shape == (*ids.shape, 6) and not torch.allclose(one, other, atol=1e-4)
        assert torch.allclose(one, words.scores(ids, frames[:, [2, 0, 3, 1]]), atol=1e-5)  # no positions of frames
    last = encoder.text.tower.transformer.resblocks[-1]  # type: ignore[union-attr]
    assert torch.equal(words.block.attn.in_proj_weight, last.attn.in_proj_weight)
    assert not any(p.requires_grad for name, p in words.block.named_parameters() if "adapters" not in name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: M2ClipGraft(text_layers=4).apply(plain()), "set text_layers to 3 or less"),
        (lambda: M2ClipGraft().apply(tiny_clip(kind="siglip-timm")), "open_clip ViT"),
        (lambda: MaskedTexts(tiny_clip(kind="siglip-timm"), NAMES), "set weights.words=0"),
        (lambda: MaskedWords(tiny_clip(), MaskedTexts(tiny_clip(), NAMES)), "set weights.words=0"),
        (lambda: TedAdapter(32, 8, grid=(4, 4))(torch.zeros(1, 2, 9, 32)), "patch dropout"),
        (lambda: M2ClipGraft(text_layers=0).apply(grafted()), "mixes frames already"),
    ],
)
def test_what_does_not_fit_is_said(change: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        change()


def test_a_kernel_of_two_frames_is_refused() -> None:
    with pytest.raises(ValueError, match="odd"):
        M2ClipGraft(kernel=2)
    assert isinstance(getattr(grafted().image, HEAD), M2Head)


def test_a_run_from_files_to_an_export_whose_classifier_is_measured(
    tmp_path: Path, write_video: Callable[..., Path]
) -> None:
    write_export(plain(), tmp_path / "clip")
    for word in ("cat", "dog"):
        (tmp_path / "videos" / word).mkdir(parents=True)
        for k in range(2):
            write_video(tmp_path / "videos" / word / f"{k}.mp4", 8)
    data = f"video:{tmp_path}/videos?frames=4&size=32"
    given: dict[str, object] = {
        "model.from": str(tmp_path / "clip"),
        "data.from": data,
        "method.hidden": 8,
        "train": {"steps": 2, "batch_size": 2, "lr": 1e-3, "warmup": 0},
        "evaluate.retention": "none",
    }
    run_recipe("video/m2-clip", overrides=given, out=tmp_path / "run")
    model = open_video_model(str(tmp_path / "run"), registry=current())
    head = model.pooling
    assert isinstance(head, M2Head) and head.classes == ("cat", "dog")
    source = open_source(data, registry=current())
    features = EncoderFeatures(model.encoder, batch_size=2, workers=0)
    assert 0 <= TrainedClassifier()(features, source).metrics["top1"] <= 1
    turned = copy.copy(source)
    turned.classes, turned.files = ["dog", "cat"], [replace(f, label=1 - f.label) for f in source.files]
    assert TrainedClassifier()(features, turned).metrics == TrainedClassifier()(features, source).metrics
    turned.classes = ["dog", "bird"]
    with pytest.raises(InputError, match=r"'bird' of .* is none of them"):
        TrainedClassifier()(features, turned)
    with pytest.raises(InputError, match="no classifier of its own"):
        TrainedClassifier()(EncoderFeatures(plain(), batch_size=2, workers=0), source)
    again = given | {"model.from": str(tmp_path / "run/export"), "train.steps": 1}
    assert run_recipe("video/m2-clip", overrides=again, out=tmp_path / "again").status == "done"
    for change, message in (
        ({"objective": "classes"}, "set objective to labels"),
        ({"method.text_layers": 9}, "set text_layers to 3 or less"),
        ({"model.from": str(tmp_path / "run/export"), "data.from": f"{data}&classes={tmp_path}/names.txt"}, "other"),
    ):
        (tmp_path / "names.txt").write_text("dog\ncat\n")
        with pytest.raises(InputError, match=message):
            run_recipe("video/m2-clip", overrides=given | change, out=tmp_path / "no", dry_run=True)
