"""Metrics against scikit-learn, against a loop over thresholds and regions, and on maps whose values are known."""

from itertools import pairwise

import numpy as np
import pytest
from scipy import ndimage

from clipgraft_anomaly.metrics import aupro, auroc, average_precision, best_f1, curve, rank, thinned
from clipgraft_anomaly.pixels import Pixels


def scene(kind, seed=0, count=4, side=24):
    """Maps and masks (n, S, S): two squares that touch at a corner, one alone, some pictures without damage."""
    rng = np.random.default_rng(seed)
    masks = np.zeros((count, side, side), np.uint8)
    masks[0, 4:10, 4:10] = masks[0, 10:14, 10:14] = 1
    masks[0, 18:21, 5:9] = 1
    masks[1, 8:22, 2:6] = 1
    masks[2, 0:3, 0:3] = 1
    noise = rng.normal(size=masks.shape)
    if kind == "random":
        maps = rng.uniform(size=masks.shape)
    elif kind == "smooth":
        maps = ndimage.gaussian_filter(noise + 1.5 * masks, (0, 1.5, 1.5))
    elif kind == "saturated":
        maps = np.clip(np.round(noise + masks, 1), -0.4, 0.8)
    elif kind == "constant":
        maps = np.full(masks.shape, 0.25)
    elif kind == "perfect":
        maps = masks.astype(float)
    else:
        maps = masks + 0.1 * rng.uniform(size=masks.shape)  # all damage above everything else
    return maps.astype(np.float32), masks


def measured(maps, masks, **more):
    pixels = Pixels(**more)
    for one, mask in zip(maps, masks, strict=True):
        pixels.add(one, mask)
    return pixels.measure()


def regions_of(masks):
    for number, mask in enumerate(masks):
        labels, count = ndimage.label(mask, structure=np.ones((3, 3)))
        for k in range(1, count + 1):
            yield number, labels == k


def brute_aupro(maps, masks, limit=0.3):
    """All thresholds, all regions; the area by tiny steps of the false positive rate."""
    points = [(0.0, 0.0)]
    for threshold in np.unique(maps)[::-1]:
        found = maps >= threshold
        pro = np.mean([found[n][region].mean() for n, region in regions_of(masks)])
        points.append((found[masks == 0].mean(), pro))
    area = 0.0
    for (x0, y0), (x1, y1) in pairwise(points):
        if x0 < limit and x1 > x0:
            cut = min(x1, limit)
            area += (cut - x0) * (y0 + (y0 + (y1 - y0) * (cut - x0) / (x1 - x0))) / 2
    return area / limit


def brute_legacy(maps, masks, limit=0.3):
    """The official code's recipe, in loops."""
    low, high = float(maps.min()), float(maps.max())
    rates, pros = [], []
    for k in range(200):
        found = maps > low + k * (high - low) / 200
        pros.append(np.mean([found[n][region].mean() for n, region in regions_of(masks)]))
        rates.append(found[masks == 0].mean())
    rates, pros = np.array(rates), np.array(pros)
    x, y = rates[rates < limit][::-1], pros[rates < limit][::-1]
    with np.errstate(invalid="ignore"):
        return np.trapezoid(y, (x - x.min()) / (x.max() - x.min()))


@pytest.mark.parametrize("kind", ["random", "smooth", "saturated", "above"])
def test_both_pros_equal_a_loop_over_thresholds_and_regions(kind):
    maps, masks = scene(kind)
    found, _ = measured(maps, masks)
    assert found.aupro == pytest.approx(brute_aupro(maps, masks), abs=1e-9)
    assert found.aupro_legacy == pytest.approx(brute_legacy(maps, masks), abs=1e-9)


def test_toys_whose_values_are_known():
    constant, _ = measured(*scene("constant"))
    assert constant.aupro == pytest.approx(0.15) and constant.auroc == pytest.approx(0.5)
    assert constant.aupro_legacy is None  # the official code stops with an error
    perfect, _ = measured(*scene("perfect"))
    assert perfect.aupro == perfect.auroc == perfect.ap == perfect.f1_max == 1.0
    assert np.isnan(brute_legacy(*scene("perfect"))) and perfect.aupro_legacy is None
    random = [measured(*scene("random", seed))[0].aupro for seed in range(5)]
    assert np.mean(random) == pytest.approx(0.15, abs=0.02)
    above, _ = measured(*scene("above"))
    assert above.aupro == pytest.approx(1.0)


def test_the_two_pros_agree_on_smooth_maps_and_not_on_saturated_ones():
    smooth, _ = measured(*scene("smooth"))
    assert abs(smooth.aupro - smooth.aupro_legacy) < 0.02
    saturated, _ = measured(*scene("saturated"))
    assert abs(saturated.aupro - saturated.aupro_legacy) > 0.05


def test_squares_that_touch_at_a_corner_are_one_region():
    maps, masks = scene("smooth")
    pixels = Pixels()
    pixels.add(maps[0], masks[0])
    assert pixels.regions == 2
    assert [int(region.sum()) for _, region in regions_of(masks[:1])] == [52, 12]


@pytest.mark.parametrize("kind", ["random", "smooth", "saturated"])
def test_areas_equal_scikit_learns(kind):
    sklearn = pytest.importorskip("sklearn.metrics")
    maps, masks = scene(kind)
    found, counts = measured(maps, masks)
    y, s = masks.ravel(), maps.ravel()
    assert found.auroc == pytest.approx(sklearn.roc_auc_score(y, s), abs=1e-10)
    assert found.ap == pytest.approx(sklearn.average_precision_score(y, s), abs=1e-10)
    precision, recall, thresholds = sklearn.precision_recall_curve(y, s)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    assert found.f1_max == pytest.approx(f1.max(), abs=1e-10)
    assert best_f1(counts)[1] == pytest.approx(thresholds[f1[:-1].argmax()])
    x, y_curve = curve(counts)
    assert np.trapezoid(y_curve, x) == pytest.approx(found.auroc, abs=1e-10)
    rates, hits, _ = sklearn.roc_curve(y, s, drop_intermediate=False)
    np.testing.assert_allclose(np.interp(rates, x, y_curve), np.interp(rates, rates, hits), atol=1e-9)


def test_normal_scores_in_a_file_give_the_very_same():
    maps, masks = scene("saturated", count=9)
    assert measured(maps, masks, in_memory=900)[0] == measured(maps, masks)[0]


def test_one_side_alone_is_undefined():
    maps, masks = scene("smooth")
    found, counts = measured(maps, np.zeros_like(masks))
    assert not counts.defined and set(vars_of(found)) == {None}
    found, counts = measured(maps, np.ones_like(masks))
    assert not counts.defined and set(vars_of(found)) == {None}
    assert set(vars_of(Pixels().measure()[0])) == {None}
    one = rank(np.array([0.3]), np.array([]))
    assert auroc(one) is average_precision(one) is aupro(one) is None and best_f1(one) == (None, None)


def vars_of(found):
    return [getattr(found, name) for name in found.__dataclass_fields__]


def test_a_thinned_curve_keeps_its_ends_and_its_area():
    rng = np.random.default_rng(1)
    r = rank(rng.normal(1, 1, 4000), rng.normal(0, 1, 9000))
    x, y = curve(r)
    tx, ty = thinned(x, y)
    assert len(tx) <= 402 and (tx[0], ty[0], tx[-1], ty[-1]) == (0, 0, 1, 1)
    assert np.trapezoid(ty, tx) == pytest.approx(auroc(r), abs=2e-3)
    assert len(thinned(*curve(rank(np.array([1.0]), np.array([0.0]))))[0]) == 4
