import json

import pytest
import torch

torch.set_num_threads(1)  # tensors this small are faster on one thread, and goldens don't depend on the machine


@pytest.fixture(scope="session")
def tiny_diffusion(tmp_path_factory):
    """A Stable Diffusion of a few thousand random weights as diffusers writes it: 64 px halve twice in its UNet."""
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    where = tmp_path_factory.mktemp("diffusion")
    torch.manual_seed(0)
    UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=16,
        attention_head_dim=4,
    ).save_pretrained(where / "unet")
    AutoencoderKL(
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
    ).save_pretrained(where / "vae")
    DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").save_pretrained(
        where / "scheduler"
    )
    words = [*"abcdefghijklmnopqrstuvwxyz.", *(f"{c}</w>" for c in "abcdefghijklmnopqrstuvwxyz.")]
    ids = {word: i for i, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    (where / "tokenizer").mkdir()
    (where / "tokenizer" / "vocab.json").write_text(json.dumps(ids))
    (where / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77}
    (where / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(settings))
    text = CLIPTextConfig(
        vocab_size=len(ids),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        eos_token_id=ids["<|endoftext|>"],
        bos_token_id=ids["<|startoftext|>"],
        pad_token_id=ids["<|endoftext|>"],
    )
    CLIPTextModel(text).save_pretrained(where / "text_encoder")
    return where
