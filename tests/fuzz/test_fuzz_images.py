"""Picture files of any kind: an RGB image that every transform takes, or one bad sample with one short reason."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from clipgraft.data.base import BadSample
from clipgraft.data.images import decode_image
from clipgraft.data.transforms import evaluation_transform, training_transform
from clipgraft.encoders.base import Preprocess

pytestmark = [pytest.mark.fuzz, pytest.mark.timeout(3600)]
many, some, few = (settings.get_profile(f"fuzz-{name}") for name in ("many", "some", "few"))

MODES = {
    "PNG": ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"],
    "JPEG": ["L", "RGB", "CMYK", "YCbCr"],
    "GIF": ["L", "P", "RGB"],
    "BMP": ["1", "L", "P", "RGB", "RGBA"],
    "TIFF": ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F", "LAB"],
    "WEBP": ["RGB", "RGBA"],
    "PPM": ["1", "L", "RGB"],
    "JPEG2000": ["L", "RGB", "RGBA"],
}
SIZES = st.sampled_from(
    [(1, 1), (1, 2), (3, 1), (7, 5), (32, 32), (40, 31), (1, 3000), (2500, 2), (30_000, 1), (60, 1500)]
)
KINDS = [(form, mode) for form, modes in MODES.items() for mode in modes]


def encoded(form: str, mode: str, size: tuple[int, int], *, frames: int = 1, turn: int = 1, junk: bytes = b"") -> bytes:
    """A file of one kind; the modes that a format can't hold become those that it can."""
    usual = Image.linear_gradient("L").resize(size)
    image = usual.convert("F") if mode == "F" else usual.convert("I") if mode in ("I", "I;16") else usual
    image = image.convert("RGB") if mode == "LAB" else image
    image = (
        Image.new("I;16", size, 40_000) if mode == "I;16" else image.convert(mode) if mode not in ("I", "F") else image
    )
    more: dict[str, Any] = {}
    if frames > 1 and form in ("GIF", "PNG", "WEBP", "TIFF"):
        more |= {"save_all": True, "append_images": [image.copy() for _ in range(frames - 1)]}
    exif = Image.Exif()
    exif[0x0112] = turn
    if form in ("JPEG", "PNG", "WEBP", "TIFF"):
        more |= {"exif": exif.tobytes() + junk if form != "TIFF" else exif}
    buffer = io.BytesIO()
    image.save(buffer, form, **more)
    return buffer.getvalue()


def png(width: int, height: int, *, body: bytes = b"", chunks: tuple[tuple[bytes, bytes], ...] = ()) -> bytes:
    """A PNG by hand: any size in its header, any compressed body."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [chunk(b"IHDR", header), *(chunk(*c) for c in chunks), chunk(b"IDAT", body or zlib.compress(b"\0" * 4))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + chunk(b"IEND", b"")


PREPROCESS = [
    Preprocess(size=size, mean=(0.5,) * 3, std=(0.5,) * 3, resize_mode=mode)
    for size in ((32, 32), (24, 40))
    for mode in ("shortest", "longest", "squash")
]


def check(arena: Any, content: bytes, *, transforms: bool = True) -> str:
    """The reason, or "" after the picture went through every transform."""

    def attempt() -> None:
        image = decode_image(io.BytesIO(content), sample_id="x")
        assert image.mode == "RGB" and min(image.size) >= 1
        for preprocess in PREPROCESS if transforms else PREPROCESS[:1]:
            for pixels in (
                evaluation_transform(preprocess)(image),
                training_transform(preprocess, (0.5, 1.0))(image, torch.Generator().manual_seed(0)),
            ):
                assert tuple(pixels.shape) == (3, *preprocess.size) and torch.isfinite(pixels).all()

    _, said = arena.call(attempt, refusals=(BadSample,))
    assert len(said.splitlines()) <= 1 and len(said) < 200
    return said


@many
@given(
    kind=st.sampled_from(KINDS),
    size=SIZES,
    frames=st.integers(1, 3),
    turn=st.integers(0, 9),
    junk=st.binary(max_size=4),
)
def test_every_kind_of_picture_is_decoded(arena, kind, size, frames, turn, junk):
    form, mode = kind
    assume(form != "WEBP" or max(size) <= 16_383)  # which the format can't hold
    content = encoded(form, mode, size, frames=frames, turn=turn, junk=junk)
    said = check(arena, content)
    if mode not in ("I", "F", "LAB") and max(size) < 500 * min(size) and not junk:
        assert not said, said


@many
@given(
    kind=st.sampled_from(KINDS),
    size=st.sampled_from([(1, 1), (7, 5), (40, 31)]),
    cut=st.floats(0, 1),
    edits=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=6),
)
def test_damaged_pictures_are_bad_samples(arena, kind, size, cut, edits):
    content = bytearray(encoded(*kind, size))
    for place, value in edits:
        content[min(int(place * len(content)), len(content) - 1)] = value
    check(arena, bytes(content[: max(1, int(cut * len(content)))] if cut > 0.2 else content), transforms=False)


@some
@given(
    content=st.binary(max_size=300),
    start=st.sampled_from(
        [
            b"",
            b"GIF89a",
            b"\xff\xd8\xff",
            b"II*\0",
            b"BM",
            b"P6 ",
            b"RIFF....WEBP",
            b"%!PS-Adobe",
            b"<svg",
            b"\x00\x00\x00\x0cjP  ",
        ]
    ),
)
def test_any_bytes_are_a_picture_or_a_bad_sample(arena, content, start):
    check(arena, start + content, transforms=False)


BOMBS = {
    "a header of 30,000 x 30,000": png(30_000, 30_000),
    "a header of 2^31": png(2**31 - 1, 2**31 - 1),
    "a body that swells": png(1000, 1000, body=zlib.compress(b"\0" * 200_000_000)),
    "a text chunk that swells": png(4, 4, chunks=((b"zTXt", b"a\0\0" + zlib.compress(b"\0" * 200_000_000)),)),
    "a profile that swells": png(4, 4, chunks=((b"iCCP", b"a\0\0" + zlib.compress(b"\0" * 200_000_000)),)),
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/tmp/x) (w) file\n",
    "1 x 30,000": encoded("PNG", "RGB", (1, 30_000)),
    "30,000 x 1": encoded("JPEG", "RGB", (30_000, 1)),
    "30,000 x 600": encoded("PNG", "L", (30_000, 600)),
    "a thousand frames": encoded("GIF", "L", (20, 20), frames=300),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_of_a_picture_costs_neither_time_nor_memory(arena, name):
    check(arena, BOMBS[name])


@pytest.mark.parametrize("turn", range(1, 9))
def test_pictures_come_upright_by_their_exif_tag(turn):
    image = Image.new("RGB", (40, 20), "black")
    image.paste("white", (0, 0, 20, 10))
    upright = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[turn]  # what undoes each tag
    exif = Image.Exif()
    exif[0x0112] = turn
    buffer = io.BytesIO()
    stored = image if upright is None else image.transpose({0: 0, 3: 3, 1: 1, 5: 5, 2: 2, 6: 6, 4: 4}[upright])
    stored.save(buffer, "PNG", exif=exif)
    shown = decode_image(io.BytesIO(buffer.getvalue()), sample_id="x")
    assert shown.size == (40, 20) and shown.getpixel((2, 2)) == (255, 255, 255)
    assert shown.getpixel((38, 18)) == (0, 0, 0) == shown.getpixel((38, 2))
