"""Hand-written prompts: which sentences, what their mean is, names, and plain patches by default."""

import pytest
import torch
from torch.nn import functional as F

from clipgraft.errors import InputError
from clipgraft.registry import Registry
from clipgraft.testing.tiny import tiny_clip
from clipgraft.types import FeatureRequest
from clipgraft_anomaly.detector import detect, open_detector
from clipgraft_anomaly.handwritten import Texts, WordsConfig
from clipgraft_anomaly.scoring import upsampled

torch.set_num_threads(1)
CPU = torch.device("cpu")
SHORT = {"words": {"normal": ["{}"], "anomalous": ["red {}", "{} left"], "templates": ["a {}", "the {} photo"]}}


def detector(**settings):
    encoder = tiny_clip(depth=4, context=32).eval()
    head = Registry.discover().build("head", "anomaly/prompts", settings)
    return encoder, head.detector(encoder).eval()


def text_of(encoder, sentence):
    return encoder.text(encoder.tokenizer([sentence])).pooled[0].detach()


def test_w06_the_public_lists_give_147_and_84_prompts_and_140_and_80_without_the_double():
    for legacy, counts in ((True, (147, 84)), (False, (140, 80))):
        normal, anomalous = WordsConfig(legacy_templates=legacy).sentences("bottle")
        assert (len(normal), len(anomalous)) == counts
        assert (len(set(normal)), len(set(anomalous))) == (140, 80)
    assert "a close-up photo of the bottle without defect." in normal
    assert "a photo of a damaged metal nut." in WordsConfig().sentences("metal_nut")[1]


def test_w06_what_counts_twice_moves_the_mean():
    encoder = tiny_clip(context=32).eval()
    found = {legacy: Texts(encoder, WordsConfig(legacy_templates=legacy))(["cat"], device=CPU) for legacy in (0, 1)}
    distance = (found[0] - found[1]).abs().max()
    assert 1e-6 < distance < 0.5 * found[0].abs().max()


@pytest.mark.parametrize("unit", [False, True])
def test_prototypes_are_the_mean_of_the_texts_or_of_unit_texts(unit):
    words = WordsConfig(**SHORT["words"], unit=unit)
    encoder = tiny_clip(context=32).eval()
    told = Texts(encoder, words)(["cat", "small dog", "cat"], device=CPU)
    assert told.shape == (3, 2, 16) and torch.equal(told[0], told[2])
    rows = [text_of(encoder, s) for s in ("a red cat", "the red cat photo", "a cat left", "the cat left photo")]
    rows = [F.normalize(row, dim=0) for row in rows] if unit else rows
    torch.testing.assert_close(told[0, 1], torch.stack(rows).mean(0))
    assert not torch.equal(told[0], told[1])


def test_a_name_is_encoded_once(monkeypatch):
    encoder = tiny_clip(context=32).eval()
    texts, calls = Texts(encoder, WordsConfig(**SHORT["words"])), []
    forward = encoder.text.forward
    monkeypatch.setattr(encoder.text, "forward", lambda ids, *a, **k: calls.append(len(ids)) or forward(ids, *a, **k))
    texts(["cat", "dog", "cat"], device=CPU)
    texts(["dog"], device=CPU)
    assert calls == [2, 4, 2, 4]


def test_scores_are_clips_own_zero_shot_and_maps_those_of_plain_patches():
    encoder, found = detector(**SHORT, read={"sigma": 0.0})
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    seen = detect(found, pixels, ["cat", "dog"])
    features = encoder.image(encoder.preprocess.normalize(pixels), FeatureRequest(tokens=True))
    texts = F.normalize(Texts(encoder, WordsConfig(**SHORT["words"]))(["cat", "dog"], device=CPU), dim=-1)
    for i in range(2):
        whole = (F.normalize(features.pooled[i], dim=0) @ texts[i].T / 0.07).softmax(0)[1]
        torch.testing.assert_close(seen.score[i], whole)
        patches = F.normalize(features.tokens[i] @ encoder.image.tower.proj, dim=-1) @ texts[i].T / 0.07
        share = upsampled(patches.softmax(-1)[None], (4, 4), 32)[0, 1]
        torch.testing.assert_close(seen.map[i], share)
    one = detect(found, pixels[1:], ["dog"])
    torch.testing.assert_close(one.map[0], seen.map[1])
    torch.testing.assert_close(one.score[0], seen.score[1])


def test_an_object_that_nobody_names_is_called_object():
    _, found = detector(**SHORT)
    pixels = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(detect(found, pixels).score, detect(found, pixels, ["object"] * 2).score)
    assert found.named and (detect(found, pixels).score - detect(found, pixels, ["cat"] * 2).score).abs().max() > 1e-6


def test_settings_go_through_the_reading_and_keep_plain_patches():
    _, found = detector(**SHORT, read={"size": 48, "sigma": 1.0})
    assert (found.size, found.read.first, found.read.ln_post_global, found.read.needed) == (48, None, True, (4,))
    assert detect(found, torch.rand(1, 3, 48, 48)).map.shape == (1, 48, 48)
    assert found.header()["words"]["anomalous"] == ("red {}", "{} left")
    _, value = detector(**SHORT, read={"vv_start": 2})
    assert value.read.first == 2


def test_any_model_is_opened_by_the_methods_name():
    pytest.importorskip("clipgraft_toyworld")
    found = open_detector("toyworld/clip", registry=Registry.discover(), method="prompts", settings=SHORT)
    assert found.method == "prompts" and found.size == 32
    with pytest.raises(InputError, match=r"hold \{\} once"):
        open_detector(
            "toyworld/clip", registry=Registry.discover(), method="prompts", settings={"words": {"normal": ["fine"]}}
        )


def test_towers_that_can_not_do_it_are_refused():
    head = Registry.discover().build("head", "anomaly/prompts", {})
    with pytest.raises(InputError, match="SigLIP"):
        head.detector(tiny_clip(kind="siglip-timm"))
    encoder = tiny_clip()
    encoder.text = None
    with pytest.raises(InputError, match="no text tower"):
        head.detector(encoder)
