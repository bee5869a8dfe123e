"""The light denoiser: a few FLUX blocks with random weights (diffusers' ``FluxTransformer2DModel``)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipgraft_diffusion.condition import Condition
from clipgraft_diffusion.flow import Compat, Prediction, network_time, velocity_of_sample


class Fp32Linear(nn.Linear):
    """A linear layer that leaves autocast.

    diffusers casts the timestep to the dtype of the embedded latent before it multiplies it by 1000; embedding the
    latent in fp32 keeps the timestep and the residual stream exact.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out) in fp32."""
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.weight.float(), None if self.bias is None else self.bias.float())


def rope_axes(head_dim: int) -> tuple[int, int, int]:
    """Rotary dimensions of (constant, row, column): FLUX's (16, 56, 56) for 128, the nearest even split otherwise."""
    if head_dim % 2 or head_dim < 6:
        raise ValueError(f"a head of width {head_dim} can't hold three even rotary axes; use an even width above 5")
    first = next(k for k in range(2, head_dim, 2) if 8 * k >= head_dim and (head_dim - k) % 4 == 0)
    return first, (head_dim - first) // 2, (head_dim - first) // 2


def grid_ids(grid: tuple[int, int], *, compat: Compat) -> Tensor:
    """(h*w, 3) position ids (0, row, column); ``official`` rounds them to bf16, exact up to 256."""
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    ids = torch.stack([torch.zeros_like(rows), rows, columns], -1).flatten(0, 1).float()
    return ids.bfloat16().float() if compat == "official" else ids


class FluxDenoiser(nn.Module):
    """(x_t, t, condition) -> velocity, for latents of ``channels`` C on ``grid`` (h, w).

    ``width`` is the hidden size over ``heads`` heads, ``depth`` MM-DiT and ``single_depth`` single-stream blocks.
    ``guidance`` is the constant that the official code feeds to the guidance embedder, in effect one learnt vector;
    None leaves the embedder out. All layers keep ``nn.Linear``'s default initialisation, as in the official code.
    Deviation: ``prediction="sample"`` lets the network predict the clean latent and forms the velocity from it; at
    t near 1, where a miniature must train, predicting the velocity means copying the noise through a narrow network.
    Deviation: ``positions`` > 0 appends that many learnt channels per latent position to x_t; with the official's
    rotary embedding alone, almost pure noise tells a small network too little about where it is.
    Deviation: weights stay fp32 under autocast; the official code casts the denoiser to bf16 before the optimizer.
    """

    def __init__(
        self,
        channels: int,
        grid: tuple[int, int],
        *,
        width: int = 3072,
        heads: int = 24,
        depth: int = 2,
        single_depth: int = 4,
        vec_dim: int = 768,
        txt_dim: int = 4096,
        guidance: float | None = 4.0,
        prediction: Prediction = "velocity",
        positions: int = 0,
        compat: Compat = "fixed",
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel

        self.channels, self.grid, self.guidance = channels, grid, guidance
        self.prediction, self.compat = prediction, compat
        self.flux = FluxTransformer2DModel(
            in_channels=channels + positions,
            out_channels=channels,
            num_layers=depth,
            num_single_layers=single_depth,
            attention_head_dim=width // heads,
            num_attention_heads=heads,
            joint_attention_dim=txt_dim,
            pooled_projection_dim=vec_dim,
            guidance_embeds=guidance is not None,
            axes_dims_rope=rope_axes(width // heads),
        )
        self.flux.x_embedder = Fp32Linear(channels + positions, width)
        if checkpointing:
            self.flux.enable_gradient_checkpointing()
        self.positions = nn.Parameter(torch.randn(grid[0] * grid[1], positions)) if positions else None
        self.register_buffer("image_ids", grid_ids(grid, compat=compat), persistent=False)
        self.register_buffer("text_ids", torch.zeros(1, 3), persistent=False)

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """x_t (B, N, C), t (B,), condition -> velocity (B, N, C) in fp32."""
        size = len(x_t)
        tokens = x_t if self.positions is None else torch.cat([x_t, self.positions.expand(size, -1, -1)], -1)
        (out,) = self.flux(
            hidden_states=tokens,
            encoder_hidden_states=condition.txt,
            pooled_projections=condition.vec,
            timestep=network_time(t, compat=self.compat),
            img_ids=self.image_ids,
            txt_ids=self.text_ids,
            guidance=None if self.guidance is None else torch.full_like(t, self.guidance),
            return_dict=False,
        )
        return velocity_of_sample(x_t, out.float(), t) if self.prediction == "sample" else out.float()
