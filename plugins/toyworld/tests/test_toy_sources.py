"""Data sources: the contract, determinism, and settings that reach the samples."""

from __future__ import annotations

import pytest
import torch

from clipgraft.data.base import PairSource, Source
from clipgraft.errors import InputError
from clipgraft_toyworld.sources import Images, MinimalPairs
from clipgraft_toyworld.task_sources import Crowds, Defects, Videos
from clipgraft_toyworld.world import BLOCK, COLORS, DETAILS, SHAPES, SPLITS


def build(split="train", n=12, seed=0):
    return [
        Images(split=split, n=n, seed=seed, masks=True),
        Defects(split=split, n=n, seed=seed),
        Videos(split=split, n=n, seed=seed, frames=3),
        Crowds(split=split, n=n, seed=seed),
    ]


def test_sources_keep_the_contract() -> None:
    for source in build():
        assert isinstance(source, Source) and len(source) == 12 and source.name.startswith("toyworld/")
        ids = set()
        for index in range(len(source)):
            sample = source[index]
            ids.add(sample.id)
            assert sample.image.dtype == torch.uint8 and sample.image.shape == (3, 32, 32)
            assert sample.label is not None and 0 <= sample.label < len(source.classes)
            assert sample.captions and all(caption for caption in sample.captions)
            for name, value in sample.attributes.items():
                assert 0 <= value < len(source.attributes[name])
        assert len(ids) == 12
        with pytest.raises(IndexError):
            source[12]


def test_equal_settings_give_equal_samples_and_fingerprints_others_do_not() -> None:
    for one, same, other, seeded in zip(build(), build(), build("tune"), build(seed=1), strict=True):
        assert one.fingerprint == same.fingerprint
        assert len({one.fingerprint, other.fingerprint, seeded.fingerprint}) == 3
        assert torch.equal(one[3].image, same[3].image) and one[3].captions == same[3].captions
        assert not torch.equal(one[3].image, other[3].image) and not torch.equal(one[3].image, seeded[3].image)


def test_no_picture_is_in_two_splits() -> None:
    seen: dict[bytes, str] = {}
    for split in SPLITS:
        source = Images(split=split, n=200)
        for index in range(len(source)):
            assert seen.setdefault(source[index].image.numpy().tobytes(), split) == split
    assert len(seen) == 600


def test_a_larger_source_extends_a_smaller_one() -> None:
    few, many = Images(n=5), Images(n=BLOCK + 5)
    assert all(torch.equal(few[i].image, many[i].image) and few[i].captions == many[i].captions for i in range(5))
    assert len(many) == BLOCK + 5 and many[BLOCK + 4].id != few[4].id


def test_captions_and_masks_follow_the_settings() -> None:
    short, long = Images(n=40), Images(n=40, captions="long", per_image=2)
    assert len(long[0].captions) == 2 and long[0].captions[0] != long[0].captions[1]
    assert sum(len(short[i].captions[0]) for i in range(40)) < sum(len(long[i].captions[0]) for i in range(40)) / 2
    assert Images(n=4, size=64, masks=True).segments == SHAPES and not Images(n=4).segments
    masked = Images(n=4, size=64, masks=True)[1]
    assert masked.extra["semantics"].shape == (64, 64) and masked.extra["instances"].shape == (3, 64, 64)
    covered = masked.extra["instances"].any(0)
    assert torch.equal(covered, masked.extra["semantics"] > 0)
    assert not short[0].extra


def test_pairs_keep_the_contract() -> None:
    pairs = MinimalPairs(per_pattern=2)
    assert isinstance(pairs, PairSource) and len(pairs) == 2 * len(DETAILS)
    assert [pairs[i].pattern for i in range(0, len(pairs), 2)] == list(pairs.patterns)
    assert len({pairs[i].id for i in range(len(pairs))}) == len(pairs)
    pair = pairs[0]
    assert pair.texts[0] != pair.texts[1] and not torch.equal(*pair.images)


def test_damage_is_labelled_masked_and_told() -> None:
    source = Defects(n=60, shapes=("moon",))
    for index in range(len(source)):
        sample = source[index]
        assert sample.label == int(sample.attributes["kind"] > 0) == int(sample.extra["mask"].any())
        assert ("flawless" in sample.captions[0]) == (sample.label == 0) and "moon" in sample.captions[0]
    assert 10 < sum(source[i].label or 0 for i in range(60)) < 50


def test_an_unknown_shape_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InputError, match="moon"):
        Defects(n=4, shapes=("mooon",))


def test_a_video_carries_its_frames() -> None:
    sample = Videos(n=2, frames=5)[1]
    assert sample.extra["frames"].shape == (5, 3, 32, 32)
    assert torch.equal(sample.extra["frames"][0], sample.image)
    assert sample.captions[0].startswith("a video of a ")


def test_real_digits_split_without_overlap() -> None:
    pytest.importorskip("sklearn")
    from clipgraft_toyworld.digits import Digits

    sources = [Digits(split=split) for split in SPLITS]
    ids = [source[i].id for source in sources for i in range(len(source))]
    assert len(ids) == len(set(ids)) == 1797
    sample = sources[1][0]
    assert sample.image.shape == (3, 32, 32) and sources[1].classes[sample.label or 0] in sample.captions[0]
    assert {sources[2][i].label for i in range(len(sources[2]))} == set(range(10))


def test_real_photographs_open() -> None:
    pytest.importorskip("skimage")
    pytest.importorskip("sklearn")
    from clipgraft_toyworld.photos import Photos

    photos = Photos()
    assert len(photos) >= 15
    modes = {photos[index].image.mode for index in range(len(photos))}
    assert {"RGB", "L"} <= modes
    assert photos[2].captions[0] and photos.classes[photos[2].label or 0]


def test_only_keeps_pictures_as_they_are() -> None:
    whole, part = Images(n=2 * BLOCK), Images(n=40, only=("white background", "close up", "black background"))
    assert len(part) == 40 and part.fingerprint != Images(n=40).fingerprint
    known = {whole[i].id: whole[i] for i in range(len(whole))}
    kept = [i for i in known if known[i].attributes["background"] in (0, 2) and known[i].attributes["perspective"] == 1]
    assert [part[i].id for i in range(40)] == kept[:40]
    for index in range(40):
        sample, twin = part[index], known[part[index].id]
        assert torch.equal(sample.image, twin.image) and sample.captions == twin.captions
    with pytest.raises(InputError, match="did you mean white background"):
        Images(n=5, only=("white backgrund",))


def test_a_label_is_any_attribute_and_value_names_are_unique() -> None:
    classes, glyphs = Images(n=30), Images(n=30, label="glyph")
    assert list(glyphs.classes) == ["saying x", "saying o", "saying t", "saying l"]
    assert all(glyphs[i].label == classes[i].attributes["glyph"] and glyphs[i].id == classes[i].id for i in range(30))
    assert glyphs.fingerprint != classes.fingerprint and len(Images(n=5, label="shape").classes) == 8
    names = [value for values in classes.attributes.values() for value in values]
    assert len(set(names)) == len(names)
    with pytest.raises(InputError, match="unknown label"):
        Images(n=5, label="glyf")


def test_the_wrong_caption_of_a_crowd_is_the_right_one_of_another_crowd() -> None:
    """Swapping colours maps captions onto captions one to one, so that no score of words alone beats guessing."""
    source = Crowds(n=200)
    for index in range(200):
        sample = source[index]
        (right,), (wrong,) = sample.captions, sample.negatives
        words, swapped = right.split(), wrong.split()
        words[1], words[5] = words[5], words[1]
        assert words == swapped and right != wrong
    pairs = [
        ((c, s), (d, t)) for c in range(4) for s in range(4) for d in range(4) for t in range(4) if c != d and s != t
    ]
    wrongs = {((d, s), (c, t)) for (c, s), (d, t) in pairs}
    assert wrongs == set(pairs)


def test_crowds_by_colour_label_every_object_with_its_colour():
    plain, coloured = Crowds(n=64, size=32), Crowds(n=64, size=32, segments="color")
    assert coloured.segments == COLORS and coloured.fingerprint != plain.fingerprint
    for shaped, sample in zip(plain, coloured, strict=True):
        for shape, color in (("shape", "color"), ("other_shape", "other_color")):
            region = shaped.extra["semantics"] == 1 + sample.attributes[shape]
            assert bool((sample.extra["semantics"][region] == 1 + sample.attributes[color]).all())
        assert torch.equal(sample.extra["semantics"] == 0, shaped.extra["semantics"] == 0)
