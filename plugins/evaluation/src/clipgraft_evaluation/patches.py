"""What the patch tokens see, as colours: one PCA over the tokens of both encoders, its first three components."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from clipgraft.data.base import BadSample, Pair
from clipgraft.errors import ClipgraftError
from clipgraft.rundir import RunRecord
from clipgraft_evaluation.pictures import as_image, as_uri, tiles_as_uri

if TYPE_CHECKING:
    from clipgraft.data.base import Picture
    from clipgraft.encoders.base import Encoder


@dataclass(frozen=True, slots=True)
class PatchRow:
    """One image and its patch colours before and after, as data URIs; ``similarity`` of corresponding tokens."""

    picture: str
    before: str
    after: str
    similarity: float


@dataclass(frozen=True, slots=True)
class PatchPictures:
    """``explained``: share of the tokens' variance in the three components."""

    rows: tuple[PatchRow, ...]
    grid: tuple[int, int]
    explained: float


def pca_colours(before: np.ndarray, after: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Tokens (n, N, W) of two encoders -> colours (n, N, 3) each in [0, 1], and the share of variance explained.

    One mean, one basis and one scale for both, so that equal tokens have equal colours.
    """
    tokens = np.concatenate([before, after]).reshape(-1, before.shape[-1]).astype(np.float64)
    centred = tokens - tokens.mean(0)
    values, vectors = np.linalg.eigh(centred.T @ centred)
    basis = vectors[:, ::-1][:, :3]
    basis = basis * np.sign(basis[np.abs(basis).argmax(0), range(basis.shape[1])])  # a sign that never flips by chance
    projected = centred @ basis
    low, high = np.percentile(projected, [2, 98], axis=0)
    colours = ((projected - low) / np.maximum(high - low, 1e-12)).clip(0, 1)
    colours = np.pad(colours, ((0, 0), (0, 3 - colours.shape[1])))
    first, second = np.split(colours.reshape(2 * len(before), -1, 3), 2)
    return first, second, float(values[::-1][:3].sum() / max(values.sum(), 1e-12))


@torch.no_grad()
def patch_tokens(encoder: Encoder, pixels: Tensor) -> tuple[np.ndarray, tuple[int, int]]:
    """Patch tokens (n, N, W) of ``pixels`` (n, 3, H, W') in [0, 1], and the grid (h, w)."""
    from clipgraft.types import FeatureRequest

    features = encoder.eval().image(encoder.preprocess.normalize(pixels), FeatureRequest(tokens=True))
    if features.tokens is None or features.grid is None:
        raise ClipgraftError("this image tower has no patch tokens")
    return features.tokens.float().numpy(), features.grid


def patch_pictures(run: RunRecord, *, number: int) -> PatchPictures:
    """The base and the run's export on ``number`` images of the run's data, each as the encoder sees it."""
    from clipgraft.data.transforms import evaluation_transform
    from clipgraft.encoders import load

    base, result = load(run.base), load(str(run.path / "export"))
    if base.preprocess != result.preprocess:
        raise ClipgraftError("the run changed the image size or its preprocessing, so patches do not correspond")
    transform = evaluation_transform(base.preprocess)
    pixels = torch.stack([transform(picture) for picture in _some_pictures(run, number)])
    (before, grid), (after, _) = patch_tokens(base, pixels), patch_tokens(result, pixels)
    first, second, explained = pca_colours(before, after)
    products = (before * after).sum(-1) / (np.linalg.norm(before, axis=-1) * np.linalg.norm(after, axis=-1) + 1e-12)
    rows = [
        PatchRow(
            as_uri(as_image((image * 255).round().to(torch.uint8))),
            tiles_as_uri(one.reshape(*grid, 3)),
            tiles_as_uri(two.reshape(*grid, 3)),
            float(product.mean()),
        )
        for image, one, two, product in zip(pixels, first, second, products, strict=True)
    ]
    return PatchPictures(tuple(rows), grid, explained)


def _some_pictures(run: RunRecord, number: int) -> list[Picture]:
    """Images spread over the evaluation data, or over the training data when nothing was evaluated."""
    from clipgraft.data import open_source

    evaluated = [run.data_of(name) for name in run.after]
    reference = next((r for r in evaluated if r), None) or run.data
    source = open_source(reference)
    count, pictures = len(source), []
    for k in range(min(number, count)):
        with contextlib.suppress(BadSample):
            found = source[k * count // min(number, count)]
            pictures.append(found.images[0] if isinstance(found, Pair) else found.image)
    return pictures
