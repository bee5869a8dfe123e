"""Pictures and prompts in, masks out: for a plain SAM and for an encoder whose image tower is one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field
from torch import Tensor, nn

from clipgraft.config.schema import Config
from clipgraft.encoders.base import Encoder, Preprocess
from clipgraft.errors import InputError
from clipgraft_merging.sam.promptable import Masks, Promptable
from clipgraft_merging.sam.tower import SamTower

if TYPE_CHECKING:
    from clipgraft.registry import Registry


class Segmenter(nn.Module):
    """A tower, a prompt encoder and a mask decoder that belong together, and how pixels reach them.

    ``preprocess.size`` is the native size; pictures of any multiple of the patch are taken.
    """

    def __init__(self, tower: SamTower, promptable: Promptable, *, preprocess: Preprocess) -> None:
        super().__init__()
        self.tower, self.promptable = tower, promptable
        self.preprocess = replace(preprocess, size=(tower.native, tower.native))

    def embed(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W') in [0, 1] -> (B, C, h, w); once per picture, whatever is asked of it."""
        return self.tower(self.preprocess.normalize(pixels))  # type: ignore[no-any-return]

    def masks(
        self,
        features: Tensor,
        points: Tensor | None = None,
        labels: Tensor | None = None,
        boxes: Tensor | None = None,
        mask_prompts: Tensor | None = None,
        *,
        multimask: bool = True,
    ) -> Masks:
        """As ``Promptable.masks``, on what ``embed`` returned."""
        return self.promptable.masks(features, points, labels, boxes, mask_prompts, multimask=multimask)


def segmenter_of(encoder: Encoder) -> Segmenter | None:
    """The promptable half of an encoder made by ``merging/sam-image``; None for any other. Weights are shared."""
    image: Any = encoder.image
    tower, promptable = getattr(image, "sam", None), getattr(image, "promptable", None)
    if not isinstance(tower, SamTower) or not isinstance(promptable, Promptable):
        return None
    return Segmenter(tower, promptable, preprocess=encoder.preprocess)


def open_segmenter(reference: str, *, registry: Registry | None = None, setting: str = "sam") -> Segmenter:
    """A SAM (directory, hub id, registered head), or the promptable half of an export or run of ``sam-clip``."""
    from clipgraft_merging.sam.opening import open_sam

    folder = Path(reference).expanduser()
    folder = folder / "export" if (folder / "export" / "clipgraft.json").is_file() else folder
    if (folder / "clipgraft.json").is_file():
        from clipgraft.encoders import load

        if (found := segmenter_of(load(str(folder), registry=registry))) is None:
            raise InputError(f"{setting}: {reference} is a CLIP without SAM's decoder; give a SAM or a run of sam-clip")
        return found.eval()
    parts = open_sam(reference, setting=setting, registry=registry)
    return Segmenter(parts.tower, parts.promptable, preprocess=parts.preprocess).eval()


class SamMasksConfig(Config):
    """``merging/sam-masks``."""

    model: str = Field(description="a SAM (directory, hub id or registered head), or a run or export of sam-clip")


def sam_masks(*, model: str) -> Segmenter:
    """The head ``merging/sam-masks``: pictures and prompts in, masks out."""
    return open_segmenter(model, setting="model")
