"""Tiles of large pictures: where they lie, one tile against none, seams."""

from itertools import pairwise

import pytest
import torch
from PIL import Image

from clipgraft.data.base import Sample
from clipgraft.errors import InputError
from clipgraft.testing.tiny import tiny_clip
from clipgraft_anomaly.detector import Detection, Detector
from clipgraft_anomaly.handwritten import Prompts, PromptsConfig
from clipgraft_anomaly.predict_stream import Inspected, Unreadable, inspect
from clipgraft_anomaly.tiling import Box, Mosaic, Tiling, resized

torch.set_num_threads(1)


class Listed:
    """Pictures in memory."""

    name, fingerprint, classes, templates, attributes = "listed", "listed", ("normal", "anomalous"), (), {}

    def __init__(self, *pictures):
        self.pictures = pictures

    def __len__(self):
        return len(self.pictures)

    def __getitem__(self, index):
        return Sample(str(index), self.pictures[index], label=0)


class Red(Detector):
    """The map is the red channel, the score its largest value; remembers how many came at once."""

    method = "red"

    def __init__(self, size=16, constant=None):
        super().__init__()
        self.encoder, self.size, self.constant, self.batches = tiny_clip(), size, constant, []

    def forward(self, pixels, names=None):
        self.batches.append(len(pixels))
        maps = pixels[:, 0] if self.constant is None else torch.full_like(pixels[:, 0], self.constant)
        return Detection(maps.amax((1, 2)), maps)


def noise(height, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)


def found(detector, *pictures, **how):
    source = Listed(*pictures)
    return list(inspect(detector, source, range(len(source)), **how))


@pytest.mark.parametrize(
    ("length", "tile", "overlap"), [(100, 40, 10), (101, 40, 0), (41, 40, 39), (40, 40, 5), (7, 9, 0)]
)
def test_tiles_reach_from_edge_to_edge_and_share_at_least_the_overlap(length, tile, overlap):
    spans = Tiling(tile, overlap).spans(length)
    assert spans[0][0] == 0 and spans[-1][1] == length
    assert all(end - start == min(tile, length) for start, end in spans)
    shared = [a[1] - b[0] for a, b in pairwise(spans)]
    assert all(s >= overlap for s in shared)
    least = 1 if length <= tile else 1 + -(-(length - tile) // (tile - overlap))
    assert len(spans) == least


@pytest.mark.parametrize(("tile", "overlap"), [(0, 0), (10, 10), (10, -1)])
def test_tiles_that_cannot_be_are_refused(tile, overlap):
    with pytest.raises(InputError, match="--overlap"):
        Tiling(tile, overlap)


def test_one_tile_is_no_tiling_for_files_and_tensors_alike():
    encoder = tiny_clip(depth=2, context=48).eval()
    config = PromptsConfig()
    detector = Prompts(words=config.words, read=config.read).detector(encoder).eval()
    pictures = noise(40, 56), Image.fromarray(noise(33, 20, seed=1).permute(1, 2, 0).numpy())
    for plain, tiled in zip(found(detector, *pictures), found(detector, *pictures, tiling=Tiling(56, 8)), strict=True):
        assert plain.score == tiled.score and torch.equal(plain.map, tiled.map) and tiled.parts == 1


def test_pixels_of_a_mosaic_are_the_weighted_mean_of_the_tiles_that_cover_them():
    tiling, size = Tiling(12, 5), (20, 31)
    boxes, mosaic = tiling.boxes(size), Mosaic(size, tiling)
    maps = [torch.rand(12, 12, generator=torch.Generator().manual_seed(k)) for k in range(len(boxes))]
    for box, scores in zip(boxes, maps, strict=True):
        mosaic.add(box, scores)
    weighted, total = torch.zeros(size), torch.zeros(size)
    for box, scores in zip(boxes, maps, strict=True):
        for y in range(12):
            for x in range(12):
                near = [min(p + 0.5, 11.5 - p, 5) for p in (y, x)]
                weighted[box.top + y, box.left + x] += near[0] * near[1] * scores[y, x]
                total[box.top + y, box.left + x] += near[0] * near[1]
    torch.testing.assert_close(mosaic.map(), weighted / total)
    one = Mosaic((12, 9), Tiling(12, 3))
    one.add(Box(0, 12, 0, 9), maps[0])
    torch.testing.assert_close(one.map(), resized(maps[0], (12, 9)))


def test_seams_of_a_constant_detector_and_of_tiles_that_disagree():
    (flat,) = found(Red(constant=0.3), noise(50, 70), tiling=Tiling(24, 8))
    assert flat.map.shape == (50, 70) and flat.parts == 1 + 3 * 4
    torch.testing.assert_close(flat.map, torch.full((50, 70), 0.3))
    tiling = Tiling(32, 16)
    mosaic = Mosaic((32, 48), tiling)
    for box, value in zip(tiling.boxes((32, 48)), (0.0, 1.0), strict=True):
        mosaic.add(box, torch.full((32, 32), value))
    across = mosaic.map()[5]
    steps = across.diff()
    assert across[:16].eq(0).all() and across[32:].eq(1).all() and steps.min() >= 0 and steps.max() < 1.2 / 16


def test_scores_are_the_highest_of_tiles_and_whole_and_maps_lie_where_the_damage_is():
    picture = torch.zeros(3, 64, 64, dtype=torch.uint8)
    picture[0, 50:54, 8:12] = 255
    detector = Red()
    (whole,), (tiled,) = found(detector, picture), found(detector, picture, tiling=Tiling(16, 4), batch_size=4)
    assert tiled.score > whole.score and tiled.score == pytest.approx(1, abs=0.05)
    assert tiled.map[51, 9] > 0.9 and tiled.map[:40].max() < 0.05 and max(detector.batches) == 4
    assert detector.batches[1] == 1 and sum(detector.batches[1:]) == tiled.parts
    faint = torch.full((3, 64, 64), 100, dtype=torch.uint8)

    class OnlyWhole(Red):
        def forward(self, pixels, names=None):
            result = super().forward(pixels, names)
            first = len(self.batches) == 1
            return Detection(torch.full((len(pixels),), 0.9 if first else 0.1), result.map)

    (seen,) = found(OnlyWhole(), faint, tiling=Tiling(16, 4))
    assert seen.score == pytest.approx(0.9)


def test_order_batches_and_what_cannot_be_read():
    from clipgraft.data.base import BadSample

    class Gaps(Listed):
        def __getitem__(self, index):
            if index in (0, 3):
                raise BadSample(f"p{index}", "broken")
            return super().__getitem__(index)

    pictures = [noise(20, 20, seed=k) for k in range(5)] + [noise(60, 20, seed=9), noise(20, 20, seed=10)]
    source, detector = Gaps(*pictures), Red()
    results = list(inspect(detector, source, range(7), batch_size=2, tiling=Tiling(32, 4)))
    assert [r.place for r in results] == list(range(7))
    assert [isinstance(r, Unreadable) for r in results] == [True, False, False, True, False, False, False]
    assert results[3] == Unreadable(3, "p3", "broken")
    kept = [r for r in results if isinstance(r, Inspected)]
    assert [r.parts for r in kept] == [1, 1, 1, 3, 1] and [r.size for r in kept][3] == (60, 20)
    alone = [next(inspect(Red(), source, [r.place], tiling=Tiling(32, 4))) for r in kept]
    for one, other in zip(kept, alone, strict=True):
        assert one.score == other.score and torch.equal(one.map, other.map)
    assert detector.batches == [2, 1, 1, 2, 1]
