"""Which layers, channels, heads and hidden units a smaller tower takes over, as explicit lists of indices.

W tower width, n_t and n_s layers of teacher and student.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pydantic import Field
from torch import Tensor

from clipgraft.config.schema import Config
from clipgraft.errors import InputError

Depth = Literal["spaced", "even", "first"]
Choice = Literal["leading", "strongest"]


class TowerSize(Config):
    """The wanted size of a tower; what is left out stays as it is."""

    layers: int | None = Field(None, gt=0, description="transformer blocks")
    width: int | None = Field(None, gt=0, description="channels of the residual stream")
    heads: int | None = Field(None, gt=0, description="attention heads; by default as wide as the teacher's heads")
    hidden: int | None = Field(None, gt=0, description="units of the feed-forward blocks; by default in proportion")


@dataclass(frozen=True, slots=True)
class TowerPlan:
    """``layers`` of the teacher in order; ``channels`` of the residual stream; per kept layer ``heads`` and ``hidden``;

    ``head_channels`` inside every head. len(heads[k]) * len(head_channels) equals len(channels).
    """

    layers: tuple[int, ...]
    channels: tuple[int, ...]
    heads: tuple[tuple[int, ...], ...]
    head_channels: tuple[int, ...]
    hidden: tuple[tuple[int, ...], ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class TowerShape:
    """What a tower has now."""

    layers: int
    width: int
    heads: int
    hidden: int


def depth_map(teacher: int, student: int, *, depth: Depth = "spaced") -> list[int]:
    """Layers that ``student`` takes from ``teacher``.

    ``spaced`` is the official rule, a step of n_t // n_s: 12 -> 9 takes the first nine, 12 -> 6 every second.
    ``even`` spreads them over the whole depth, first and last included; ``first`` takes the lowest.
    """
    if student > teacher:
        raise InputError(f"a tower of {teacher} layers can't give {student}; ask for {teacher} or fewer")
    if depth == "even" and student > 1:
        return [round(k * (teacher - 1) / (student - 1)) for k in range(student)]
    step = teacher // student if depth == "spaced" else 1
    return list(range(0, student * step, step))


def plan_tower(
    state: Mapping[str, Tensor],
    shape: TowerShape,
    size: TowerSize,
    *,
    depth: Depth = "spaced",
    choice: Choice = "leading",
    what: str = "tower",
) -> TowerPlan:
    """A plan from sizes. ``state`` are the tower's tensors by open_clip's names, read only for ``strongest``."""
    width, layers = size.width or shape.width, size.layers or shape.layers
    head_width = shape.width // shape.heads
    heads = size.heads or max(1, width // head_width)
    hidden = size.hidden or round(shape.hidden * width / shape.width)
    for name, wanted, had in (
        ("layers", layers, shape.layers),
        ("width", width, shape.width),
        ("heads", heads, shape.heads),
        ("hidden", hidden, shape.hidden),
    ):
        if wanted > had:
            raise InputError(f"{what}: {name} {wanted} is more than the teacher's {had}; inheritance only takes away")
    if width % heads or width // heads > head_width:
        fit = [h for h in range(1, shape.heads + 1) if width % h == 0 and width // h <= head_width]
        say = f"heads {' or '.join(map(str, fit))} fit" if fit else f"a width that is a multiple of {head_width} fits"
        raise InputError(
            f"{what}: width {width} with {heads} heads needs heads of {width / heads:g} channels, the teacher's have "
            f"{head_width}; {say}"
        )
    kept = depth_map(shape.layers, layers, depth=depth)
    if choice == "leading":
        every = (tuple(range(heads)),) * layers, (tuple(range(hidden)),) * layers
        return TowerPlan(tuple(kept), tuple(range(width)), every[0], tuple(range(width // heads)), every[1])
    blocks = [{k.split(f"resblocks.{n}.", 1)[1]: v for k, v in state.items() if f"resblocks.{n}." in k} for n in kept]
    return TowerPlan(
        layers=tuple(kept),
        channels=_strongest(_channel_strength(blocks), width),
        heads=tuple(_strongest(_head_strength(block, shape.heads), heads) for block in blocks),
        head_channels=tuple(range(width // heads)),
        hidden=tuple(_strongest(_hidden_strength(block), hidden) for block in blocks),
    )


def _strongest(strength: Tensor, count: int) -> tuple[int, ...]:
    """The ``count`` largest of (n,), in their order."""
    found: list[int] = strength.topk(count).indices.sort().values.tolist()
    return tuple(found)


def _channel_strength(blocks: Sequence[Mapping[str, Tensor]]) -> Tensor:
    """(W,): squared weights that write a channel of the residual stream times those that read it, over the blocks."""
    written = sum(b["attn.out_proj.weight"].square().sum(1) + b["mlp.c_proj.weight"].square().sum(1) for b in blocks)
    read = sum(
        (b["attn.in_proj_weight"] * b["ln_1.weight"]).square().sum(0)
        + (b["mlp.c_fc.weight"] * b["ln_2.weight"]).square().sum(0)
        for b in blocks
    )
    return written * read  # type: ignore[return-value, operator]


def _head_strength(block: Mapping[str, Tensor], heads: int) -> Tensor:
    """(H,): squared norm of each head's value times output weights."""
    width = block["attn.out_proj.weight"].shape[0]
    value = block["attn.in_proj_weight"][2 * width :].view(heads, -1, width)  # (H, D_h, W)
    out = block["attn.out_proj.weight"].view(width, heads, -1).transpose(0, 1)  # (H, W, D_h)
    return (out @ value).square().sum((1, 2))


def _hidden_strength(block: Mapping[str, Tensor]) -> Tensor:
    """(hidden,): squared weights into a unit times those out of it."""
    return block["mlp.c_fc.weight"].square().sum(1) * block["mlp.c_proj.weight"].square().sum(0)
