"""FLUX blocks that stage 1 starts from, in place of random ones: diffusers' ``FluxTransformer2DModel``.

Deviation: the paper starts at random on purpose; a generator that restores images from little is a weak teacher.
"""

from __future__ import annotations

from typing import Any

from clipgraft.errors import InputError
from clipgraft.runner import Run
from clipgraft_diffusion.denoiser import FluxDenoiser, rope_axes
from clipgraft_diffusion.genhancer.config import GenHancerConfig
from clipgraft_diffusion.pretrained import Pretrained
from clipgraft_diffusion.weights import Weights

FLUX = Pretrained("FluxTransformer2DModel", "denoiser.from", "transformer", "set denoiser.from to null")


def begin_problems(run: Run, config: GenHancerConfig) -> list[str]:
    """Why these blocks can't be had, and sizes of theirs that the settings don't have."""
    d = config.denoiser
    if d.from_ is None:
        return []
    if problem := FLUX.problem(d.from_, d.subfolder, **_files(config), log=run.log):
        return [problem]
    if d.positions:
        return [f"denoiser.positions {d.positions} has no place in the blocks of denoiser.from; set it to 0"]
    found = FLUX.settings(d.from_, d.subfolder, revision=d.revision) or {}
    return [
        f"denoiser.from: {d.from_} has {key} {found[key]}, {setting} makes it {value}; make them equal"
        for key, (value, setting) in _sizes(config).items()
        if found.get(key, value) != value
    ]


def begin(run: Run, config: GenHancerConfig, denoiser: FluxDenoiser) -> None:
    """Put the weights of ``denoiser.from`` into a denoiser of the same sizes, if it is set."""
    d = config.denoiser
    if d.from_ is None:
        return
    blocks: Any = FLUX.open(d.from_, d.subfolder, **_files(config), log=run.log)
    try:
        denoiser.flux.load_state_dict(blocks.state_dict())
    except RuntimeError:
        raise InputError(
            f"denoiser.from: {d.from_} takes latents of {blocks.config.in_channels} channels, here they have "
            f"{denoiser.channels}; choose the autoencoder it was trained on, or set denoiser.from to null"
        ) from None


def _files(config: GenHancerConfig) -> dict[str, Any]:
    d = config.denoiser
    return {"revision": d.revision, "weights": Weights(sha256=d.sha256)}


def _sizes(config: GenHancerConfig) -> dict[str, tuple[Any, str]]:
    """What config.json must say, and the setting that decides it."""
    d, c = config.denoiser, config.condition
    return {
        "num_layers": (d.depth, "denoiser.depth"),
        "num_single_layers": (d.single_depth, "denoiser.single_depth"),
        "num_attention_heads": (d.heads, "denoiser.heads"),
        "attention_head_dim": (d.width // d.heads, "denoiser.width"),
        "axes_dims_rope": (list(rope_axes(d.width // d.heads)), "denoiser.width"),
        "joint_attention_dim": (c.txt_dim, "condition.txt_dim"),
        "pooled_projection_dim": (c.vec_dim, "condition.vec_dim"),
        "guidance_embeds": (d.guidance is not None, "denoiser.guidance"),
    }
