"""SAM's image tower: transformers' numbers at the native size, and every other size."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from clipgraft.errors import InputError
from clipgraft_merging.sam.attention import block, lean_attention, relative_table, unwindowed, windowed
from clipgraft_merging.sam.settings import SamSettings
from clipgraft_merging.sam.tower import SamTower


@torch.no_grad()
def test_fact_9_the_tower_at_its_native_size_is_transformers_bit_for_bit(sam_model):
    pixels = torch.randn(2, 3, 64, 64)
    theirs = sam_model.vision_encoder(pixels).last_hidden_state
    assert torch.equal(SamTower(sam_model.vision_encoder, attention="reference")(pixels), theirs)
    torch.testing.assert_close(SamTower(sam_model.vision_encoder)(pixels), theirs, atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("size", [(64, 64), (32, 32), (40, 72), (96, 24)])
def test_attention_without_a_bias_is_transformers_at_every_size(sam_model, size):
    pixels = torch.randn(1, 3, *size)
    lean, reference = SamTower(sam_model.vision_encoder), SamTower(sam_model.vision_encoder, attention="reference")
    torch.testing.assert_close(lean(pixels), reference(pixels), atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("side", [32, 48, 96])
def test_another_size_is_a_transformers_sam_of_that_size_with_resized_positions(sam_model, sam_sizes, side):
    """The whole forward, windows and their zero padding too, against transformers' own at the other size."""
    other = sam_sizes.model_copy(update={"vision": sam_sizes.vision.model_copy(update={"image_size": side})}).model()
    state, grid = sam_model.vision_encoder.state_dict(), side // 8
    positions = F.interpolate(
        state["pos_embed"].permute(0, 3, 1, 2), (grid, grid), mode="bicubic", antialias=True, align_corners=False
    )
    state["pos_embed"] = positions.permute(0, 2, 3, 1)
    for axis in "hw":
        name = f"layers.2.attn.rel_pos_{axis}"
        state[name] = F.interpolate(state[name].t()[None], 2 * grid - 1, mode="linear")[0].t()
    other.vision_encoder.load_state_dict(state)
    pixels = torch.randn(2, 3, side, side)
    theirs = other.vision_encoder(pixels).last_hidden_state
    torch.testing.assert_close(SamTower(sam_model.vision_encoder)(pixels), theirs, atol=1e-5, rtol=1e-4)


def test_positions_are_the_stored_ones_at_the_native_grid(sam_model):
    tower = SamTower(sam_model.vision_encoder)
    assert tower.positions((8, 8)) is tower.encoder.pos_embed
    assert tower.positions((5, 9)).shape == (1, 5, 9, 32)


def test_the_attention_runs_in_a_fused_kernel(sam_model):
    """No kernel of that kind takes a bias, so the matrix of relative positions can't exist."""
    attn = sam_model.vision_encoder.layers[2].attn
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        out = lean_attention(attn, torch.randn(1, 5, 7, 32))
    out.sum().backward()
    assert attn.rel_pos_h.grad.abs().sum() > 0 and attn.rel_pos_w.grad.abs().sum() > 0


def test_gradients_are_those_of_transformers_attention(sam_model):
    attn, x = sam_model.vision_encoder.layers[2].attn, torch.randn(2, 4, 6, 32)
    weight = torch.randn(2, 4, 6, 32)
    parameters = list(attn.parameters())
    lean = torch.autograd.grad((lean_attention(attn, x) * weight).sum(), parameters)
    theirs = torch.autograd.grad((attn(x)[0] * weight).sum(), parameters)
    for a, b in zip(lean, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


def test_without_relative_positions_too(sam_sizes):
    plain = sam_sizes.model_copy(update={"vision": sam_sizes.vision.model_copy(update={"use_rel_pos": False})}).model()
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        theirs = plain.vision_encoder(pixels).last_hidden_state
        torch.testing.assert_close(SamTower(plain.vision_encoder)(pixels), theirs, atol=1e-5, rtol=1e-4)


def test_relative_positions_count_from_the_key_to_the_query():
    table = torch.arange(5.0)[:, None]
    assert relative_table(table, 3)[..., 0].tolist() == [[2, 1, 0], [3, 2, 1], [4, 3, 2]]
    assert relative_table(table, 2).shape == (2, 2, 1)


def test_windows_put_together_are_what_they_were_and_padding_is_zero():
    x = torch.randn(2, 5, 7, 4)
    windows, padded = windowed(x, 3)
    assert windows.shape == (2 * 2 * 3, 3, 3, 4) and padded == (6, 9)
    assert torch.equal(unwindowed(windows, padded, (5, 7)), x)
    assert windows[5, 2].abs().sum() == 0 and windows[2, :, 1:].abs().sum() == 0


@torch.no_grad()
def test_trap_d_padding_is_not_masked_so_that_it_shifts_outputs_as_in_sam(sam_model):
    """A grid of 8 in windows of 3: the tokens of the last windows see zeros beside them, in transformers too."""
    layer, x = sam_model.vision_encoder.layers[0], torch.randn(1, 8, 8, 32)
    torch.testing.assert_close(block(layer, x), layer(x), atol=1e-5, rtol=1e-4)
    whole = block(layer, x[:, 6:, 6:])  # one window, padded: these four tokens alone, and the zeros
    torch.testing.assert_close(block(layer, x)[:, 6:, 6:], whole, atol=1e-5, rtol=1e-4)
    unpadded = x[:, 6:, 6:] + lean_attention(layer.attn, layer.layer_norm1(x[:, 6:, 6:]))
    assert not torch.allclose(unpadded + layer.mlp(layer.layer_norm2(unpadded)), whole, atol=1e-3)


@pytest.mark.parametrize("size", [224, 336, 448, 1024])
def test_fact_10_the_grid_is_the_size_over_16(size):
    class Encoder(torch.nn.Module):
        config = type("C", (), dict(hidden_size=4, output_channels=4, patch_size=16, image_size=1024, window_size=14))
        layers = ()

    tower = SamTower(Encoder())
    assert tower.grid_of(torch.empty(1, 3, size, size, device="meta")) == (size // 16, size // 16)
    assert tower.grid_of(torch.empty(1, 3, size, 32, device="meta")) == (size // 16, 2)


def test_facts_1_and_2_sizes_of_sam_vit_b():
    with torch.device("meta"):
        model = SamSettings().model()

    def count(module):
        return sum(p.numel() for p in module.parameters())

    assert count(model.vision_encoder) == 89_670_912
    assert count(model.mask_decoder) == 4_058_340
    assert (
        count(model.prompt_encoder) == 6_476 and count(model) == 93_735_728 + count(model.shared_image_embedding) - 256
    )
    layers = model.vision_encoder.layers
    assert (count(layers[11]), count(layers[10])) == (7_104_128, 7_091_328)
    assert 3 * count(layers[11]) == 21_312_384


def test_a_size_that_the_patch_does_not_divide_is_one_line(sam_model):
    with pytest.raises(InputError, match="multiples of its patch of 8 pixels, got 64 x 60; resize to, say, 64"):
        SamTower(sam_model.vision_encoder)(torch.zeros(1, 3, 64, 60))
    with pytest.raises(InputError, match="layer 3 was asked of a tower of 3 blocks"):
        SamTower(sam_model.vision_encoder).tokens(torch.zeros(1, 3, 64, 64), (3,))


@torch.no_grad()
def test_layers_are_what_the_blocks_left(sam_model):
    found = SamTower(sam_model.vision_encoder).tokens(torch.randn(1, 3, 64, 64), (0, -1))
    assert found.grid == (8, 8) and torch.equal(found.layers[-1], found.tokens)
    assert not torch.equal(found.layers[0], found.tokens)


def test_recomputing_blocks_leaves_gradients_as_they_are(sam_model):
    pixels, grads = torch.randn(2, 3, 64, 64), []
    for recompute in (False, True):
        tower = SamTower(copy.deepcopy(sam_model.vision_encoder), recompute=recompute)
        tower(pixels).square().sum().backward()
        grads.append([p.grad for p in tower.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
