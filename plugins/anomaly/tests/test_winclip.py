"""WinCLIP's facts on tiny random towers: windows, harmonic means, the three maps, the memory."""

import itertools

import pytest
import torch
from torch.nn import functional as F

from clipgraft.errors import InputError
from clipgraft.registry import Registry
from clipgraft.testing.tiny import tiny_clip
from clipgraft.types import FeatureRequest
from clipgraft_anomaly.dense import DenseTower
from clipgraft_anomaly.detector import Fits, detect
from clipgraft_anomaly.handwritten import WordsConfig
from clipgraft_anomaly.winclip import MemoryConfig, WinClip, WindowsConfig
from clipgraft_anomaly.windows import WindowTower, harmonic, spread, window_patches

torch.set_num_threads(1)
WORDS = WordsConfig(normal=("{}",), anomalous=("red {}", "{} left"), templates=("a {}",))


def pictures(count=3, size=48, seed=0):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def winclip(objects=(), shots=0, encoder=None, **windows):
    """A detector over a 6 x 6 grid; ``objects`` remember pictures drawn with their place as the seed."""
    encoder = (encoder or tiny_clip(depth=3, context=32)).eval().requires_grad_(False)
    windows = WindowsConfig(size=48, **windows)
    objects = objects if shots else ()
    memory = MemoryConfig(objects=objects, shots=shots, grid=windows.dense(encoder).grid)
    head = WinClip(words=WORDS, windows=windows, memory=memory, fits=Fits.of(encoder))
    detector = head.detector(encoder).eval()
    with torch.inference_mode():
        for number, name in enumerate(objects):
            head.remember(name, detector.views(pictures(shots, seed=10 + number)))
    return encoder, head, detector


def covered_by_hand(scores, grid, k):
    """Harmonic means by looping over every patch and every window."""
    rows, columns = grid[0] - k + 1, grid[1] - k + 1
    found = torch.zeros(len(scores), *grid, dtype=scores.dtype)
    for b, y, x in itertools.product(range(len(scores)), range(grid[0]), range(grid[1])):
        mine = [
            scores[b, top * columns + left]
            for top, left in itertools.product(range(rows), range(columns))
            if top <= y < top + k and left <= x < left + k
        ]
        found[b, y, x] = len(mine) / sum(1 / s for s in mine)
    return found


def test_w01_windows_of_the_papers_grid():
    two, three = window_patches((15, 15), 2), window_patches((15, 15), 3)
    assert two.shape == (196, 4) and three.shape == (169, 9)
    assert window_patches((3, 3), 2).tolist() == [[0, 1, 3, 4], [1, 2, 4, 5], [3, 4, 6, 7], [4, 5, 7, 8]]
    assert two[14].tolist() == [15, 16, 30, 31] and three[-1].tolist()[-1] == 224
    assert window_patches((2, 4), 2).tolist() == [[0, 1, 4, 5], [1, 2, 5, 6], [2, 3, 6, 7]]
    with pytest.raises(InputError, match="1 to 3"):
        window_patches((3, 4), 4)


def test_w02_a_window_over_the_whole_grid_is_the_image_embedding():
    encoder = tiny_clip(depth=3).eval()
    pixels = pictures(size=32)
    views = WindowTower(DenseTower(encoder.image), scales=(4,))(pixels)
    want = encoder.image(pixels, FeatureRequest(tokens=True))
    torch.testing.assert_close(views.windows[4][:, 0], want.pooled, atol=1e-6, rtol=0)
    torch.testing.assert_close(views.whole, want.pooled, atol=1e-6, rtol=0)
    torch.testing.assert_close(views.patches, want.tokens, atol=1e-6, rtol=0)


def test_a_window_is_the_tower_run_over_its_own_tokens_alone():
    encoder = tiny_clip(depth=3).eval()
    pixels, tower = pictures(2, size=32), encoder.image.tower
    found = WindowTower(DenseTower(encoder.image), scales=(2,))(pixels).windows[2]
    tokens = tower.conv1(pixels).flatten(2).transpose(1, 2) + tower.positional_embedding[1:]
    first = tower.class_embedding + tower.positional_embedding[0]
    for b, (m, patches) in itertools.product(range(2), enumerate(window_patches((4, 4), 2))):
        alone = tower.transformer(tower.ln_pre(torch.cat([first[None], tokens[b, patches]])[None]))
        torch.testing.assert_close(found[b, m], tower.ln_post(alone[0, 0]) @ tower.proj, atol=1e-5, rtol=1e-5)


def test_w03_the_toy_of_a_grid_of_three_and_any_other_grid_by_hand():
    found = spread(torch.tensor([[1, 0.75, 0.5, 0.25]]), (3, 3), 2)
    want = torch.tensor([[1, 0.8571, 0.75], [0.6667, 0.48, 0.375], [0.5, 0.3333, 0.25]])
    torch.testing.assert_close(found[0], want, atol=5e-5, rtol=0)
    for grid, k in (((5, 4), 3), ((4, 6), 2), ((3, 3), 1), ((3, 3), 3)):
        scores = torch.rand(2, (grid[0] - k + 1) * (grid[1] - k + 1), dtype=torch.float64) + 0.01
        torch.testing.assert_close(spread(scores, grid, k), covered_by_hand(scores, grid, k))


def test_a_score_of_zero_makes_its_patches_zero_and_nothing_is_no_number():
    scores = torch.full((1, 4), 0.5)
    scores[0, 0] = 0
    found = spread(scores, (3, 3), 2)[0]
    assert found[:2, :2].abs().max() == 0 and torch.isfinite(found).all()
    torch.testing.assert_close(found[2], torch.full((3,), 0.5))


def test_w04_remembered_pictures_are_normal_themselves():
    _, _, detector = winclip(("cat", "dog"), shots=2)
    with torch.inference_mode():
        views = detector.views(pictures(2, seed=10))
        near = detector.few_shot(views, ["cat", "cat"])
        far = detector.few_shot(views, ["dog", "dog"])
    assert near.max() < 1e-6 and near.min() >= 0
    assert far.min() > 1e-4


def test_w05_no_hooks_are_left_behind():
    encoder, _, detector = winclip(("cat",), shots=1)
    hooks = []
    for _ in range(3):
        detect(detector, pictures())
        hooks.append(sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in encoder.modules()))
    assert hooks == [0, 0, 0]


def test_w07_harmonic_means_are_below_arithmetic_ones_and_maps_are_shares():
    maps = [torch.rand(2, 4, 4) + 0.01 for _ in range(3)]
    assert (harmonic(maps) <= torch.stack(maps).mean(0) + 1e-6).all()
    for objects, shots in (((), 0), (("cat",), 2)):
        found = detect(winclip(objects, shots)[2], pictures())
        for values in (found.map, found.score):
            assert values.min() > 0 and values.max() < 1


@pytest.mark.parametrize("chunk", [2048, 7])
@pytest.mark.parametrize("shots", [0, 2])
def test_w08_a_batch_is_its_single_pictures(shots, chunk):
    detector = winclip(("cat", "dog"), shots, chunk=chunk)[2]
    pixels, names = pictures(4), ["dog", "cat", "cat", "dog"]
    whole = detect(detector, pixels, names)
    for i, name in enumerate(names):
        one = detect(detector, pixels[i : i + 1], [name])
        torch.testing.assert_close(one.score[0], whole.score[i], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(one.map[0], whole.map[i], atol=1e-5, rtol=1e-5)


def test_few_windows_at_a_time_are_all_windows():
    encoder = tiny_clip(depth=2).eval()
    want = WindowTower(DenseTower(encoder.image), scales=(2, 3))(pictures(5, size=32))
    for chunk in (1, 4, 5, 20, 45):
        found = WindowTower(DenseTower(encoder.image), scales=(2, 3), chunk=chunk)(pictures(5, size=32))
        for k in (2, 3):
            torch.testing.assert_close(found.windows[k], want.windows[k], atol=1e-6, rtol=1e-5)


def shares(detector, x, name):
    texts = F.normalize(detector.texts([name], device=x.device)[0], dim=-1)
    return (F.normalize(x, dim=-1) @ texts.T / 0.07).softmax(-1)[..., 1]


def test_the_zero_shot_map_is_the_harmonic_mean_of_three_and_the_score_is_clips():
    encoder, _, detector = winclip()
    pixels = pictures()
    found = detect(detector, pixels, ["cat"] * 3)
    views = detector.views(pixels)
    whole = shares(detector, views.whole, "cat")
    maps = [whole[:, None, None].expand(-1, 6, 6)]
    maps += [covered_by_hand(shares(detector, views.windows[k], "cat"), (6, 6), k) for k in (2, 3)]
    local = 3 / sum(1 / m for m in maps)
    torch.testing.assert_close(found.score, whole)
    torch.testing.assert_close(
        found.map, F.interpolate(local[:, None], 48, mode="bilinear")[:, 0], atol=1e-6, rtol=1e-5
    )
    dense = DenseTower(encoder.image, size=48)
    cls = dense(encoder.preprocess.normalize(pixels), layers=[]).cls
    torch.testing.assert_close(whole, shares(detector, dense.project(cls), "cat"))


def test_the_few_shot_map_is_the_distance_to_the_nearest_at_three_scales():
    encoder, _, detector = winclip(("cat", "dog"), shots=3)
    pixels, before = pictures(2), detect(winclip(encoder=encoder)[2], pictures(2), ["dog"] * 2)
    found = detect(detector, pixels, ["dog"] * 2)
    views, kept = detector.views(pixels), detector.views(pictures(3, seed=11))
    maps = []
    for k, mine, theirs in (
        (1, views.patches, kept.patches),
        *((k, views.windows[k], kept.windows[k]) for k in (2, 3)),
    ):
        theirs = theirs.flatten(0, 1)
        cosine = F.cosine_similarity(mine[:, :, None], theirs[None, None], dim=-1)
        maps.append(covered_by_hand(((1 - cosine) / 2).amin(-1), (6, 6), k))
    near = sum(maps) / 3
    large = F.interpolate(near[:, None], 48, mode="bilinear")[:, 0]
    torch.testing.assert_close(found.score, (before.score + near.amax((1, 2))) / 2, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found.map, (before.map + large) / 2, atol=1e-6, rtol=1e-5)


def test_public_codes_sum_has_the_papers_ranks():
    encoder, _, mean = winclip(("cat",), 2)
    total = winclip(("cat",), 2, encoder=encoder, combine="sum")[2]
    a, b = detect(mean, pictures()), detect(total, pictures())
    torch.testing.assert_close(b.map, 2 * a.map)
    assert torch.equal(a.score, b.score)


def test_smoothing_is_off_unless_asked_for():
    encoder, _, plain = winclip()
    smooth = winclip(encoder=encoder, sigma=2.0)[2]
    a, b = detect(plain, pictures()), detect(smooth, pictures())
    assert b.map.flatten(1).std(1).max() < a.map.flatten(1).std(1).max() and torch.equal(a.score, b.score)


def test_half_precision_of_the_tower_stays_near():
    encoder, _, full = winclip(("cat",), 2)
    half = winclip(("cat",), 2, encoder=encoder, precision="bf16")[2]
    a, b = detect(full, pictures()), detect(half, pictures())
    assert b.map.dtype == torch.float32 and not torch.equal(a.map, b.map)
    torch.testing.assert_close(a.map, b.map, atol=0.03, rtol=0)


def test_names_of_the_memory():
    detector = winclip(("cat", "dog"), 1)[2]
    with pytest.raises(InputError, match="no normal pictures of 'moon' were gathered, the detector knows cat, dog"):
        detect(detector, pictures(1), ["moon"])
    with pytest.raises(InputError, match="'object'"):
        detect(detector, pictures(1))
    alone = winclip(("cat",), 1)[2]
    assert torch.equal(detect(alone, pictures(1)).map, detect(alone, pictures(1), ["cat"]).map)
    zero = winclip()[2]
    assert torch.equal(detect(zero, pictures(1)).map, detect(zero, pictures(1), ["object"]).map)


def test_what_does_not_fit_is_refused():
    build = Registry.discover().build
    with pytest.raises(InputError, match="1 to 4"):
        build("head", "anomaly/winclip", {"windows": {"scales": [2, 5]}}).detector(tiny_clip())
    with pytest.raises(InputError, match="SigLIP"):
        build("head", "anomaly/winclip", {}).detector(tiny_clip(kind="siglip-timm"))
    with pytest.raises(InputError, match="different"):
        build("head", "anomaly/winclip", {"windows": {"scales": [2, 2]}})
    with pytest.raises(InputError, match="recipe winclip"):
        build("head", "anomaly/winclip", {"memory": {"shots": 2}})
    with pytest.raises(InputError, match="takes 48 x 48"):
        detect(winclip()[2], pictures(1, size=32))
