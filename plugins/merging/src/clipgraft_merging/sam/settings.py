"""What decides the shape of a SAM, so that a config rebuilds it without the directory that it came from."""

from __future__ import annotations

from typing import Any, Self

from pydantic import Field

from clipgraft.config.schema import Config
from clipgraft.errors import InputError

PARTS = {"vision": "vision_config", "prompt": "prompt_encoder_config", "decoder": "mask_decoder_config"}


class Vision(Config):
    """The image tower; names and defaults are transformers' (SAM ViT-B)."""

    hidden_size: int = Field(768, gt=0, description="width of the tokens")
    output_channels: int = Field(256, gt=0, description="channels after the neck")
    num_hidden_layers: int = Field(12, gt=0, description="blocks")
    num_attention_heads: int = Field(12, gt=0, description="heads per block")
    num_channels: int = Field(3, gt=0, description="colours")
    image_size: int = Field(1024, gt=0, description="native image side [pixels]")
    patch_size: int = Field(16, gt=0, description="patch side [pixels]")
    hidden_act: str = Field("gelu", description="activation of the blocks")
    layer_norm_eps: float = Field(1e-6, gt=0, description="added to variances")
    initializer_range: float = Field(
        0.02, gt=0, description="standard deviation of random weights, never read from a SAM"
    )
    attention_dropout: float = Field(0.0, ge=0, lt=1, description="in training")
    qkv_bias: bool = Field(True, description="biases of queries, keys and values")
    mlp_ratio: float = Field(4.0, gt=0, description="hidden width of a block, per width")
    use_abs_pos: bool = Field(True, description="absolute positions")
    use_rel_pos: bool = Field(True, description="decomposed relative positions in every block")
    window_size: int = Field(14, ge=0, description="side of a window of attention [patches]")
    global_attn_indexes: tuple[int, ...] = Field((2, 5, 8, 11), description="blocks without windows")
    num_pos_feats: int = Field(128, gt=0, description="half the width of coordinate embeddings")
    mlp_dim: int | None = Field(None, description="hidden width of a block; null: mlp_ratio times the width")


class Prompt(Config):
    """The prompt encoder."""

    hidden_size: int = Field(256, gt=0, description="width")
    image_size: int = Field(1024, gt=0, description="native image side [pixels]")
    patch_size: int = Field(16, gt=0, description="patch side [pixels]")
    mask_input_channels: int = Field(16, gt=0, description="width of the mask prompt's convolutions")
    num_point_embeddings: int = Field(4, gt=0, description="background, foreground, two corners")
    hidden_act: str = Field("gelu", description="activation")
    layer_norm_eps: float = Field(1e-6, gt=0, description="added to variances")


class Decoder(Config):
    """The mask decoder."""

    hidden_size: int = Field(256, gt=0, description="width")
    hidden_act: str = Field("relu", description="activation")
    mlp_dim: int = Field(2048, gt=0, description="hidden width")
    num_hidden_layers: int = Field(2, gt=0, description="two-way blocks")
    num_attention_heads: int = Field(8, gt=0, description="heads")
    attention_downsample_rate: int = Field(2, gt=0, description="width over the inner width of cross-attention")
    num_multimask_outputs: int = Field(3, gt=0, description="masks for a prompt that may mean several objects")
    iou_head_depth: int = Field(3, gt=0, description="layers that guess the IoU")
    iou_head_hidden_dim: int = Field(256, gt=0, description="their width")
    layer_norm_eps: float = Field(1e-6, gt=0, description="added to variances")


class SamSettings(Config):
    """A SAM's three parts."""

    vision: Vision = Vision()
    prompt: Prompt = Prompt()
    decoder: Decoder = Decoder()

    @classmethod
    def of(cls, config: dict[str, Any]) -> Self:
        """From transformers' ``SamConfig`` as a dict."""
        values: dict[str, Any] = {}
        for name, theirs in PARTS.items():
            fields, given = cls.model_fields[name].annotation, dict(config.get(theirs, {}))
            values[name] = {k: given[k] for k in fields.model_fields if k in given}  # type: ignore[union-attr]
            values[name].pop("initializer_range", None)  # transformers' 1e-10 would be a dead tower
            for side in ("image_size", "patch_size"):
                if isinstance(values[name].get(side), list | tuple):
                    if len(set(values[name][side])) > 1:
                        raise InputError(f"SAM's {side} is {values[name][side]}; only square ones are supported")
                    values[name][side] = values[name][side][0]
        return cls.model_validate(values)

    def model(self) -> Any:
        """A transformers ``SamModel`` of these sizes with random weights, in eval mode."""
        from transformers import SamConfig, SamModel

        given = {theirs: getattr(self, name).model_dump(mode="json") for name, theirs in PARTS.items()}
        return SamModel(SamConfig(**given)).eval()
