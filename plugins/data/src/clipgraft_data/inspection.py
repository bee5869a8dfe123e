"""One sample looked at closely: what is wrong with its file, and the marks that tell it from others."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from clipgraft.data.base import BadSample, Listed, Source, entry_of
from clipgraft.data.images import FORMATS, MAX_PIXELS, as_rgb, decode_image

if TYPE_CHECKING:
    from PIL.Image import Image

Full = Callable[[Sequence[str]], list[bool]]
"""Which of some captions are longer than a model reads."""
MISSING = ("missing file", "missing image", "a caption without an image")
WORDS = 77
"""A caption of more words than this is longer than any 77 tokens."""
ORIENTATION = 0x0112
"""EXIF tag."""


@dataclass(frozen=True, slots=True)
class Facts:
    """``problems`` are (kind, reason). ``digest`` of the file, a perceptual hash (64 bits) and a thumbnail, 4 x 4 RGB.

    An unreadable image has no hash.
    """

    id: str
    problems: tuple[tuple[str, str], ...]
    captions: tuple[str, ...] = ()
    label: int | None = None
    digest: bytes = b""
    hash: int | None = None
    thumbnail: bytes = b""


def inspect(
    source: Source, index: int, *, min_side: int, max_pixels: int = MAX_PIXELS, full: Full | None = None
) -> Facts:
    """Everything that can be said of sample ``index`` alone."""
    problems, captions, label, file, name = list[tuple[str, str]](), tuple[str, ...](), None, "", str(index)
    try:
        entry = entry_of(source, index)
        name, captions, label, file = entry.id, entry.captions, entry.label, entry.file
    except BadSample as error:
        if not isinstance(source, Listed):
            return Facts(error.sample_id, ((_kind(error.reason), error.reason),))
        name = error.sample_id
        problems.append(("bad-caption", error.reason))
    problems += _of_captions(captions, full)
    digest, image = b"", None
    try:
        content = _content(source, index)
        if content is None:
            image = _picture(source, index)
            digest = hashlib.blake2b(image.tobytes() + repr(image.size).encode(), digest_size=16).digest()
        else:
            digest = hashlib.blake2b(content, digest_size=16).digest()
            image = decode_image(io.BytesIO(content), sample_id=name, max_pixels=max_pixels)
            problems += _of_file(content, file)
    except BadSample as error:
        problems.append((_kind(error.reason), error.reason))
    if image is None:
        return Facts(name, tuple(problems), captions, label, digest)
    if min(image.size) < min_side:
        problems.append(("tiny", f"{image.width} x {image.height} pixels"))
    return Facts(name, tuple(problems), captions, label, digest, perceptual_hash(image), thumbnail(image))


def perceptual_hash(image: Image) -> int:
    """ImageHash's DCT hash as one number of 64 bits."""
    import imagehash
    import numpy as np

    return int.from_bytes(np.packbits(imagehash.phash(image).hash.flatten()).tobytes(), "big")


def thumbnail(image: Image) -> bytes:
    """48 bytes: the mean colours of a 4 x 4 grid, because the hash sees no colour and nothing in a flat image."""
    from PIL import Image as pillow

    return image.convert("RGB").resize((4, 4), pillow.Resampling.BOX).tobytes()


def longer_than_context(tokenizer: Callable[[Sequence[str]], object], pad_id: int) -> Full:
    """Whether a caption is cut: its ids fill the context and stay the same without its last character."""

    def full(captions: Sequence[str]) -> list[bool]:
        ids, shorter = tokenizer(captions), tokenizer([caption[:-1] for caption in captions])
        filled = (ids[:, -1] != pad_id).tolist()  # type: ignore[index]
        return [is_full and bool((a == b).all()) for is_full, a, b in zip(filled, ids, shorter, strict=True)]  # type: ignore[call-overload]

    return full


def _of_captions(captions: tuple[str, ...], full: Full | None) -> list[tuple[str, str]]:
    found = []
    if any(not caption.strip() for caption in captions):
        found.append(("empty-caption", "empty caption"))
    spoken = [caption for caption in captions if caption.strip()]
    long = full(spoken) if full and spoken else [len(caption.split()) > WORDS for caption in spoken]
    if any(long):
        caption = spoken[long.index(True)]
        what = "longer than the model's context" if full else f"more than {WORDS} words"
        found.append(("long-caption", f"{what}: {caption[:40]}..."))
    return found


def _of_file(content: bytes, file: str) -> list[tuple[str, str]]:
    """Of a file that can be read: a name that says another format, an orientation that only EXIF knows."""
    from pathlib import PurePosixPath

    from PIL import Image as pillow

    found = []
    with pillow.open(io.BytesIO(content), formats=FORMATS) as image:
        is_format = "JPEG" if image.format == "MPO" else image.format
        suffix = PurePosixPath(file).suffix.lower()
        named = pillow.registered_extensions().get(suffix)
        if file and named != is_format:
            found.append(("wrong-extension", f"{is_format} in a file called {suffix or 'nothing'}"))
        if (turn := image.getexif().get(ORIENTATION, 1)) not in (0, 1):
            found.append(("exif-rotated", f"orientation {turn}; readers that ignore EXIF see it turned"))
    return found


def _content(source: Source, index: int) -> bytes | None:
    """The image file; None for a source that makes pictures."""
    if not isinstance(source, Listed):
        return None
    try:
        return source.content(index)
    except LookupError:
        return None


def _picture(source: Source, index: int) -> Image:
    from torch import Tensor
    from torchvision.transforms.functional import to_pil_image

    picture = source[index].image
    image: Image = as_rgb(to_pil_image(picture) if isinstance(picture, Tensor) else picture)
    return image


def _kind(reason: str) -> str:
    if reason in MISSING:
        return "missing-image"
    if "decompression bomb" in reason or (reason.startswith("refused") and "pixels" in reason):
        return "bomb"
    return "unreadable"
