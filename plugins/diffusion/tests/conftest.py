import json
import shutil

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


@pytest.fixture(scope="session")
def tiny_unclip(tiny_diffusion, tmp_path_factory):
    """A Stable unCLIP for embeddings of width 16, with the files and settings of the released ones."""
    from diffusers import DDPMScheduler, UNet2DConditionModel
    from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer

    where = tmp_path_factory.mktemp("unclip") / "model"
    shutil.copytree(tiny_diffusion, where, ignore=shutil.ignore_patterns("unet", "scheduler"))
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
        class_embed_type="projection",
        projection_class_embeddings_input_dim=32,
    ).save_pretrained(where / "unet")
    normalizer = StableUnCLIPImageNormalizer(embedding_dim=16)
    with torch.no_grad():
        normalizer.mean.copy_(torch.randn(1, 16) / 4)
        normalizer.std.copy_(0.5 + torch.rand(1, 16))
    normalizer.save_pretrained(where / "image_normalizer")
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    DDPMScheduler(prediction_type="v_prediction", **betas).save_pretrained(where / "scheduler")
    DDPMScheduler(beta_schedule="squaredcos_cap_v2").save_pretrained(where / "image_noising_scheduler")
    return where
