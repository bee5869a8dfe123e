from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from clipgraft.data.transforms import evaluation_transform
from clipgraft.encoders.base import AppliedGraft, Encoder
from clipgraft.errors import ClipgraftError
from clipgraft.testing.tiny import tiny_clip
from clipgraft_embedding import tower as towers
from clipgraft_embedding.precision import choose
from clipgraft_embedding.stream import pixels_of
from clipgraft_embedding.tower import Tower, tower_sha256


def pixels(count: int = 6) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def reference(encoder: Encoder, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        pooled = encoder.image(encoder.preprocess.normalize(images.float() / 255)).pooled
    return F.normalize(pooled, dim=-1)


@pytest.mark.parametrize("kind", ["vit", "custom-text", "siglip-timm"])
def test_images_are_what_the_encoder_says(kind: str) -> None:
    encoder = tiny_clip(kind=kind).eval()  # type: ignore[arg-type]
    assert towers._pools_class_token(encoder.image) == (kind != "siglip-timm"), "timm towers run as they are"
    torch.testing.assert_close(Tower(encoder)(pixels()), reference(encoder, pixels()), rtol=0, atol=1e-6)


def test_the_last_block_is_not_shortened_where_something_was_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = tiny_clip().eval()
    encoder.image.tower.transformer.resblocks[-1].mlp.register_forward_hook(lambda m, i, o: o * 2)
    assert not towers._pools_class_token(encoder.image)
    torch.testing.assert_close(Tower(encoder)(pixels()), reference(encoder, pixels()), rtol=0, atol=1e-6)
    patched = tiny_clip().eval()
    patched.image.tower.transformer.resblocks[-1].attention = lambda q_x, **_: q_x
    assert not towers._pools_class_token(patched.image)
    torch.testing.assert_close(Tower(patched)(pixels()), reference(patched, pixels()), rtol=0, atol=1e-6)
    grafted = tiny_clip().eval()
    grafted.data.grafts.append(AppliedGraft("plugin/graft", {}, None))  # type: ignore[arg-type]
    monkeypatch.setattr(towers, "_class_token_only", lambda *_: pytest.fail("a graft may have changed the tower"))
    Tower(grafted)(pixels())


def test_texts_are_what_the_encoder_says(encoder: Encoder) -> None:
    assert encoder.text is not None
    texts = ["a cat", "a photo of a large red square", "dog"]
    with torch.no_grad():
        expected = encoder.text(encoder.tokenizer(texts)).unit()
    torch.testing.assert_close(Tower(encoder, "texts")(texts), expected, rtol=0, atol=1e-6)


def test_the_encoder_keeps_its_mode_and_its_weights() -> None:
    encoder = tiny_clip().train()
    before = tower_sha256(encoder, "images")
    Tower(encoder)(pixels())
    Tower(encoder, precision="bf16")(pixels())
    assert encoder.image.training and tower_sha256(encoder, "images") == before
    assert next(encoder.image.parameters()).dtype == torch.float32


def test_uint8_pixels_are_the_evaluation_transform_bit_for_bit(encoder: Encoder) -> None:
    noise = torch.randint(0, 256, (70, 51, 3), dtype=torch.uint8).numpy()
    for picture in (
        Image.fromarray(noise),
        Image.fromarray(noise).convert("L"),
        torch.from_numpy(noise).permute(2, 0, 1),
    ):
        found = pixels_of(encoder.preprocess)(picture)
        assert found.dtype == torch.uint8
        torch.testing.assert_close(
            found.float().div(255), evaluation_transform(encoder.preprocess)(picture), rtol=0, atol=0
        )


@pytest.mark.parametrize("resize_mode", ["longest", "squash"])
def test_every_resize_mode_is_followed(encoder: Encoder, resize_mode: str) -> None:
    from dataclasses import replace

    preprocess = replace(encoder.preprocess, resize_mode=resize_mode, fill_color=7)
    picture = Image.fromarray(torch.randint(0, 256, (70, 51, 3), dtype=torch.uint8).numpy())
    found = pixels_of(preprocess)(picture).float().div(255)
    torch.testing.assert_close(found, evaluation_transform(preprocess)(picture), rtol=0, atol=0)


def test_parity_is_measured_and_auto_needs_speed_and_closeness(
    encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = choose(encoder, "images", "bf16", pixels())
    full, rounded = Tower(encoder)(pixels()).double(), Tower(encoder, precision="bf16")(pixels()).double()
    assert half.error == pytest.approx(float((1 - (full * rounded).sum(1)).max())) and 0 < half.error < 1e-3
    monkeypatch.setattr("clipgraft_embedding.precision.FASTER", 0.0)
    assert choose(encoder, "images", "auto", pixels()).precision == "bf16"
    monkeypatch.setattr("clipgraft_embedding.precision.CLOSE", 0.0)
    assert choose(encoder, "images", "auto", pixels()).precision == "fp32"
    monkeypatch.undo()
    monkeypatch.setattr("clipgraft_embedding.precision.FASTER", float("inf"))
    slow = choose(encoder, "images", "auto", pixels())
    assert slow.precision == "fp32" and slow.error == 0 and "x as fast" in slow.text


def test_bf16_that_is_not_finite_is_an_error() -> None:
    encoder = tiny_clip().eval()
    with torch.no_grad():
        encoder.image.tower.class_embedding.fill_(3.4e38)  # rounds to infinity in bf16
    with pytest.raises(ClipgraftError, match="no usable embeddings in bf16"):
        choose(encoder, "images", "bf16", pixels())


def test_the_hash_follows_the_tower_alone(model: str, encoder: Encoder) -> None:
    from clipgraft.encoders import load

    again = load(model)
    assert tower_sha256(again, "images") == tower_sha256(encoder, "images"), "a saved model is the same model"
    with torch.no_grad():
        again.text.tower.token_embedding.weight[0, 0] += 1  # type: ignore[union-attr]
    assert tower_sha256(again, "images") == tower_sha256(encoder, "images")
    assert tower_sha256(again, "texts") != tower_sha256(encoder, "texts")
    assert Path(model).is_dir()
