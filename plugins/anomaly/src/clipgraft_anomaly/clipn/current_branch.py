"""Which "no" branch belongs to a model: that of the run at work, or of the export that it came from."""

from __future__ import annotations

from pathlib import Path

from clipgraft.encoders.base import Encoder
from clipgraft.errors import InputError
from clipgraft.registry import Registry
from clipgraft_anomaly.clipn.branch import NoBranch
from clipgraft_anomaly.current_head import current_part, part_in


def branch_in(folder: Path, *, registry: Registry) -> NoBranch | None:
    """The branch in a run or export; None when there is none."""
    branch = part_in(folder, NoBranch, registry=registry)
    return None if branch is None else branch.requires_grad_(False).eval()


def branch_for(encoder: Encoder, *, registry: Registry, given: str | None = None) -> NoBranch | None:
    """The branch in ``given``, else of the run at work, else of the export that ``encoder`` came from; maybe none.

    It is on the encoder's device and fits it.
    """
    if given is not None:
        branch = branch_in(Path(given), registry=registry)
        if branch is None:
            raise InputError(f"{given} holds no branch that says no; give a run or export of clipgraft run clipn")
    else:
        branch = current_part(NoBranch) or branch_in(Path(encoder.data.origin.uri), registry=registry)
    if branch is None:
        return None
    mine, text = branch.fits, encoder.text
    for what, has, needs in (
        ("text width", 0 if text is None else text.width, mine.text_width),
        ("joint embedding", encoder.image.embed_dim, mine.embed_dim),
    ):
        if has != needs:
            raise InputError(
                f"this no branch was trained for {mine.architecture or 'another model'} ({what} {needs}), the model "
                f"has {what} {has}; give the model it was trained for"
            )
    return branch.to(next(encoder.parameters()).device)
