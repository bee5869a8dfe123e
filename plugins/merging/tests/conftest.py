import pytest
import torch

torch.set_num_threads(1)  # tensors this small are faster on one thread


@pytest.fixture(scope="session")
def sam_sizes():
    """A SAM of some 100,000 weights: 64 px, patch 8, windows of 3 that don't divide its grid of 8."""
    from clipgraft_merging.sam.settings import SamSettings

    return SamSettings.model_validate(
        {
            "vision": {
                "hidden_size": 32,
                "output_channels": 16,
                "num_hidden_layers": 3,
                "num_attention_heads": 2,
                "image_size": 64,
                "patch_size": 8,
                "window_size": 3,
                "global_attn_indexes": [2],
                "num_pos_feats": 8,
                "mlp_dim": 48,
            },
            "prompt": {"hidden_size": 16, "image_size": 64, "patch_size": 8, "mask_input_channels": 8},
            "decoder": {"hidden_size": 16, "mlp_dim": 32, "num_attention_heads": 2, "iou_head_hidden_dim": 16},
        }
    )


def lively(model, seed=0):
    """Random weights large enough for mistakes to show, also where transformers starts at zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "rel_pos" in name or "pos_embed" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
            elif parameter.ndim >= 2 and "positional_embedding" not in name:
                scale = max(1, parameter[0].numel()) ** -0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


@pytest.fixture
def sam_model(sam_sizes):
    """A fresh random SamModel."""
    torch.manual_seed(0)
    return lively(sam_sizes.model())


@pytest.fixture(scope="session")
def sam_folder(sam_sizes, tmp_path_factory):
    """The same as transformers writes it."""
    folder = tmp_path_factory.mktemp("sam") / "sam"
    torch.manual_seed(0)
    lively(sam_sizes.model()).save_pretrained(folder)
    return folder
