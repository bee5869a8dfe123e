"""The photographs inside scikit-image's and scikit-learn's wheels, with captions written for them here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from clipgraft.config.schema import Config
from clipgraft.data.base import Sample
from clipgraft.errors import InputError

PHOTOS: dict[str, tuple[str, str]] = {
    "skimage/data/astronaut.png": ("an astronaut", "a smiling woman in an orange space suit before a flag"),
    "skimage/data/coffee.png": ("a cup of coffee", "a cup of coffee with a spoon on a wooden table"),
    "skimage/data/chelsea.png": ("a cat", "the face of a ginger cat looking at the camera"),
    "skimage/data/rocket.jpg": ("a rocket", "a white rocket on its launch pad at night"),
    "skimage/data/retina.jpg": ("a retina", "the inside of an eye with branching blood vessels"),
    "skimage/data/hubble_deep_field.jpg": ("galaxies", "hundreds of distant galaxies on a black sky"),
    "skimage/data/ihc.png": ("stained tissue", "a microscope picture of tissue stained brown and blue"),
    "skimage/data/motorcycle_left.png": ("a motorcycle", "a motorcycle parked inside a garage"),
    "skimage/data/brick.png": ("a brick wall", "a wall of regular bricks in black and white"),
    "skimage/data/grass.png": ("grass", "a lawn seen from above in black and white"),
    "skimage/data/gravel.png": ("gravel", "small stones covering the ground in black and white"),
    "skimage/data/camera.png": ("a photographer", "a man in a coat looking through a camera on a tripod"),
    "skimage/data/coins.png": ("coins", "rows of old coins on a dark background"),
    "skimage/data/moon.png": ("the surface of the moon", "craters on the surface of the moon"),
    "skimage/data/page.png": ("a printed page", "a page of printed text with uneven light"),
    "skimage/data/clock_motion.png": ("a clock", "a blurred clock in motion"),
    "skimage/data/cell.png": ("a cell", "a single cell under a microscope"),
    "skimage/data/horse.png": ("a horse", "the black silhouette of a horse"),
    "sklearn/datasets/images/china.jpg": ("a temple", "a Chinese temple with curved roofs among trees"),
    "sklearn/datasets/images/flower.jpg": ("a flower", "a pink and yellow dahlia against dark leaves"),
}
"""File inside an installed package: (class name, caption)."""


class PhotosConfig(Config):
    """Photographs; nothing to set."""


class Photos:
    """`toyworld/photos`: about twenty real pictures of nameable things, one per class, in their own modes and sizes."""

    def __init__(self) -> None:
        roots = {package: _root(package) for package in ("skimage", "sklearn")}
        self._files: list[Path] = []
        self._told: list[tuple[str, str]] = []
        for name, told in PHOTOS.items():
            package, _, inside = name.partition("/")
            path = roots[package] / inside
            if path.is_file():  # a later release may drop one
                self._files.append(path)
                self._told.append(told)
        self.name = "toyworld/photos"
        self.fingerprint = "photos-" + "-".join(str(path.stat().st_size) for path in self._files)
        self.classes: Sequence[str] = tuple(told[0] for told in self._told)
        self.templates: Sequence[str] = ("a photo of {}", "a picture of {}")
        self.attributes: Mapping[str, Sequence[str]] = {}

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Sample:
        from PIL import Image

        with Image.open(self._files[index]) as image:
            image.load()
        name, caption = self._told[index]
        return Sample(
            id=self._files[index].name,
            image=image,
            captions=(caption, f"a photo of {name}"),
            label=range(len(self))[index],
        )


def _root(package: str) -> Path:
    from importlib.util import find_spec

    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise InputError(f'photos need {package}; type: pip install "clipgraft-toyworld[real]"')
    return Path(spec.origin).parent
