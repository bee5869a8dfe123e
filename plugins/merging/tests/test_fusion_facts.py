"""Facts of MoF and COMM, and two towers from a graft to an export."""

import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from clipgraft.checkpoint import open_export, read_manifest, write_export
from clipgraft.config.schema import GraftNode
from clipgraft.encoders import apply_grafts
from clipgraft.errors import InputError
from clipgraft.registry import current
from clipgraft.testing.tiny import tiny_clip
from clipgraft.types import FeatureRequest, ImageFeatures
from clipgraft_merging.fusion.head import Fusion
from clipgraft_merging.fusion.mixture_of_features import FeatureFusion, MultiLevelMerge, resized, separate
from clipgraft_merging.fusion.second_tower import Dinov2Image, open_second
from clipgraft_merging.fusion.two_towers import TwoTowers

torch.set_num_threads(1)


def pair(n=6, a=8, b=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(2, n, a, generator=g).double(), torch.randn(2, n, b, generator=g).double()


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_mof01_mof02_interleaving_is_the_strided_assignment_in_raster_order():
    a, b = pair()
    out = FeatureFusion((8, 8), mode="interleave")(a, b)
    expected = torch.empty(2, 12, 8).double()
    expected[:, 0::2], expected[:, 1::2] = a, b
    assert out.equal(expected) and FeatureFusion((8, 8)).grid((2, 3)) == (2, 6)


def test_mof03_a_share_of_one_or_zero_is_one_tower_exactly():
    a, b = pair()
    assert FeatureFusion((8, 8), mode="add", share=1.0)(a, b).equal(a)
    assert FeatureFusion((8, 8), mode="add", share=0.0)(a, b).equal(b)


def test_mof04_separating_inverts_interleaving():
    a, b = pair()
    back = separate(FeatureFusion((8, 8), mode="interleave")(a, b))
    assert back[0].equal(a) and back[1].equal(b)


def test_mof05_grids_must_agree_and_can_be_resized():
    a, b = pair(n=6)[0], pair(n=24)[1]
    with pytest.raises(InputError, match="resize to one grid"):
        FeatureFusion((8, 8))(a, b)
    assert FeatureFusion((8, 8))(a, resized(b, (4, 6), (2, 3))).shape == (2, 12, 8)
    rows = torch.arange(4.0).repeat_interleave(6)[None, :, None]
    assert resized(rows, (4, 6), (2, 3)).flatten().tolist() == [0.5] * 3 + [2.5] * 3
    assert resized(a, (2, 3), (2, 3)) is a


def test_mof09_swapping_towers_swaps_even_and_odd():
    a, b = pair()
    fusion = FeatureFusion((8, 8), mode="interleave")
    even, odd = separate(fusion(a, b))
    assert separate(fusion(b, a))[0].equal(odd) and separate(fusion(b, a))[1].equal(even)


def test_mof11_addition_commutes_with_a_joint_rotation():
    a, b = pair()
    rotation = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(1)).double()).Q
    fusion = FeatureFusion((8, 8), mode="add", share=0.3)
    torch.testing.assert_close(fusion(a @ rotation, b @ rotation), fusion(a, b) @ rotation)


def test_comm01_comm02_parameter_counts_of_the_paper():
    with torch.device("meta"):
        assert count(MultiLevelMerge(range(24), 1024)) - 24 == 24 * 1_051_648
        both = count(MultiLevelMerge(range(24), 1024)) + count(MultiLevelMerge(range(18, 24), 1024)) - 30
        assert both == 31_549_440
        head = Fusion(widths=(1024, 1024), out=4096)
        assert head.fusion.width == 2048 and count(head.last) == 8_392_704


def features(layers=3, n=4, width=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {i: torch.randn(2, n, width, generator=g) for i in range(layers)}


def test_comm03_comm05_a_one_hot_weight_selects_a_layer_and_folding_is_stacking():
    x, merge = features(), MultiLevelMerge(range(3), 6, normalise="none")
    parts = torch.stack(
        [linear(norm(x[i])) for i, (norm, linear) in enumerate(zip(merge.norms, merge.maps, strict=True))]
    )
    torch.testing.assert_close(merge(x), (merge.weights[:, None, None, None] * parts).sum(0))
    merge.scale.data = torch.tensor([0.0, 1.0, 0.0])
    assert merge(x).equal(parts[1])


def test_comm04_softmax_weights_sum_to_one_and_free_ones_begin_equal():
    merge = MultiLevelMerge(range(5), 6)
    merge.scale.data.normal_()
    assert float(merge.weights.sum().detach()) == pytest.approx(1)
    assert MultiLevelMerge(range(4), 6, normalise="none").weights.tolist() == [0.25] * 4


def test_comm07_a_weight_of_zero_makes_the_output_independent_of_that_tower():
    head = Fusion(widths=(6, 6), second_layers=(0, 1), normalise="none", mode="concat", mlp_ratio=4)
    head.second_levels.scale.data.zero_()
    first = ImageFeatures(torch.zeros(2, 3), tokens=torch.randn(2, 4, 6), grid=(2, 2))
    one, two = (ImageFeatures(torch.zeros(2, 3), grid=(2, 2), layers=features(2, seed=s)) for s in (1, 2))
    assert head(first, one).equal(head(first, two)) and head(first, one).shape == (2, 4, 12)


def test_comm09_comm10_layers_enter_up_to_scale_and_shift_and_in_any_order():
    x, merge = features(), MultiLevelMerge(range(3), 6, linear=False)
    merge.scale.data.normal_()
    moved = {i: 3 * t + 5 for i, t in x.items()}
    torch.testing.assert_close(merge(moved), merge(x), atol=1e-4, rtol=1e-4)
    other = MultiLevelMerge((2, 0, 1), 6, linear=False)
    other.scale.data = merge.scale.data[[2, 0, 1]]
    torch.testing.assert_close(other(x), merge(x))


@pytest.fixture(scope="module", params=["dinov2", "dinov2_with_registers"])
def dino(request, tmp_path_factory):
    """A DINOv2 of a few thousand random weights as transformers writes it."""
    import transformers as t

    folder = tmp_path_factory.mktemp(request.param)
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    torch.manual_seed(0)
    if request.param == "dinov2":
        t.Dinov2Model(t.Dinov2Config(**sizes)).save_pretrained(folder)
    else:
        t.Dinov2WithRegistersModel(t.Dinov2WithRegistersConfig(**sizes)).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.4] * 3, "image_std": [0.2] * 3}))
    return folder


def fused(folder, **settings):
    nodes = [GraftNode(use="merging/two-towers", second=str(folder), **settings)]
    return apply_grafts(tiny_clip(), nodes, current()).eval()


def test_comm08_a_dinov2_gets_a_size_that_gives_it_the_grid_of_clip(dino):
    assert open_second(str(dino), grid=(24, 24)).preprocess.size == (336, 336)  # 576 tokens at 336
    second = open_second(str(dino), grid=(4, 5))
    found = second(torch.rand(2, 3, 33, 31), FeatureRequest(tokens=True, layers=(-1, 0)))
    assert second.preprocess.size == (56, 70) and second.preprocess.mean == (0.4, 0.4, 0.4)
    assert isinstance(second.image, Dinov2Image) and found.tokens.shape == (2, 20, 32) and found.grid == (4, 5)
    torch.testing.assert_close(second.image.model.layernorm(found.layers[-1]), found.tokens)


def test_two_towers_give_clips_embedding_and_fused_tokens(dino):
    plain, encoder = tiny_clip().eval(), fused(dino, mode="add", share=0.25)
    pixels, want = torch.rand(2, 3, 32, 32), FeatureRequest(tokens=True, layers=(0,))
    one, two = plain.image(pixels, want), encoder.image(pixels, want)
    assert one.pooled.equal(two.pooled) and one.layers[0].equal(two.layers[0]) and two.grid == (4, 4)
    # the same picture in DINOv2's size and normalisation
    seen = F.interpolate(pixels * 0.5 + 0.5, (56, 56), mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    theirs = encoder.image.second.image((seen - 0.4) / 0.2, want).tokens
    torch.testing.assert_close(two.tokens, 0.25 * one.tokens + 0.75 * theirs, atol=1e-5, rtol=1e-5)
    assert encoder.image(pixels).tokens is None


def test_mof08_comm06_no_gradient_reaches_the_second_tower_and_it_stays_in_eval_mode(dino):
    encoder = fused(dino, mode="concat", norm=True, second_layers=(1, 2)).train()
    found = encoder.image(torch.rand(2, 3, 32, 32), FeatureRequest(tokens=True))
    found.tokens.square().sum().backward()
    assert found.tokens.shape == (2, 16, 64) and not any(m.training for m in encoder.image.second.modules())
    assert all(p.grad is None for p in encoder.image.second.parameters())
    assert any(p.grad is not None for p in encoder.image.image.parameters()), "CLIP's own tower may learn"


def test_an_export_with_two_towers_is_l2_and_opens_with_equal_tokens(dino, tmp_path):
    encoder = fused(dino, mode="interleave", layers=(0, 1))
    write_export(encoder, tmp_path / "two")
    manifest = read_manifest(tmp_path / "two")
    assert manifest["level"] == "L2" and "merging/two-towers" in manifest["reason"]
    again = open_export(tmp_path / "two").eval()
    pixels, want = torch.rand(2, 3, 32, 32), FeatureRequest(tokens=True)
    assert again.image(pixels, want).tokens.equal(encoder.image(pixels, want).tokens)
    assert again.image.grid == (4, 8) and again.image.width == 32


def test_a_clip_is_a_second_tower_too(tmp_path):
    write_export(tiny_clip(seed=1, patch=16, width=48), tmp_path / "other")
    encoder = fused(tmp_path / "other", mode="interleave", width=24, seed=3)
    found = encoder.image(torch.rand(2, 3, 32, 32), FeatureRequest(tokens=True))
    assert found.tokens.shape == (2, 32, 24) and encoder.image.second.image.grid == (2, 2)
    again = fused(tmp_path / "other", mode="interleave", width=24, seed=3)
    assert again.image.fusion.projections[0].weight.equal(encoder.image.fusion.projections[0].weight)
    with pytest.raises(InputError, match="set mode to concat, or width"):
        fused(tmp_path / "other", mode="add")


def test_what_does_not_fit_is_refused_with_the_fix(dino):
    with pytest.raises(InputError, match="has a second tower already"):
        TwoTowers(second=str(dino)).apply(fused(dino))
    with pytest.raises(InputError, match="layers: block 7 of a tower of 2"):
        fused(dino, layers=(7,))
    with pytest.raises(InputError, match="nowhere"):
        fused("./nowhere")
    with pytest.raises(InputError, match="each once"):
        MultiLevelMerge((1, 1), 4)
    with pytest.raises(InputError, match="block 2 was not given"):
        MultiLevelMerge((2,), 6)(features(2))
    assert isinstance(Fusion(widths=(4, 4)).mlp, nn.Identity)
