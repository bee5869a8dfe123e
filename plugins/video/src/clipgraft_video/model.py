"""A CLIP that takes videos: an encoder, whose tower may mix frames, and a head over its frames."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from clipgraft.encoders.base import Encoder
from clipgraft.errors import InputError
from clipgraft.types import ImageFeatures
from clipgraft_video.clock import Clock
from clipgraft_video.heads import Mean, VideoFeatures, VideoHead

if TYPE_CHECKING:
    from clipgraft.registry import Registry

CLOCK, HEAD = "clock", "video_head"
"""Attributes that grafts leave on an encoder's image tower: the clock they share, a head with tensors of its own."""


class VideoModel(nn.Module):
    """``encoder`` with ``head``; by default the head that a graft put on the tower, else the mean over frames."""

    def __init__(self, encoder: Encoder, head: VideoHead | None = None) -> None:
        super().__init__()
        own = getattr(encoder.image, HEAD, None)
        self.encoder = encoder
        # a head on the tower is registered there, and named here without a second registration
        self._own: tuple[VideoHead, ...] = (own,) if head is None and own is not None else ()
        if not self._own:
            self.head = head or Mean()
        self.clock: Clock = getattr(encoder.image, CLOCK, None) or Clock()

    @property
    def pooling(self) -> VideoHead:
        """The head in use."""
        return self._own[0] if self._own else self.head

    def forward(self, clips: Tensor) -> VideoFeatures:
        """Clips (B, T, 3, S, S) in [0, 1] or uint8, not standardised -> features. Frames pass the tower as a batch."""
        if clips.ndim != 5 or clips.shape[2] != 3:
            raise InputError(f"expected clips (B, T, 3, S, S), got {tuple(clips.shape)}")
        size = self.encoder.preprocess.size
        if tuple(clips.shape[-2:]) != size:
            raise InputError(
                f"frames have {clips.shape[-2]} x {clips.shape[-1]} pixels, the model takes {size[0]} x {size[1]}; "
                f"write size={size[0]} into the data reference"
            )
        parameter = next(self.encoder.image.parameters())
        pixels = clips.flatten(0, 1)
        pixels = pixels.to(parameter.dtype) / 255 if pixels.dtype == torch.uint8 else pixels.to(parameter.dtype)
        with self.clock.showing(clips.shape[1]):
            image, _ = self.encoder(self.encoder.preprocess.normalize(pixels), want=self.pooling.want)
            assert isinstance(image, ImageFeatures)
            found: VideoFeatures = self.pooling(image, clips.shape[1])
        return found

    def logits(self, video: VideoFeatures, texts: Tensor) -> Tensor:
        """Texts (K, D) as the head wants them -> (B, K)."""
        return self.pooling.logits(video, texts, self.encoder.logit_scale.exp())

    def texts(self, texts: list[str], *, raw: bool = False, batch_size: int = 256) -> Tensor:
        """(K, D) of length one, or ``raw`` as the tower gives them; with a graph when the text tower is trained."""
        encoder, text = self.encoder, self.encoder.text
        if text is None:
            raise InputError(f"{encoder.data.origin.uri} has no text tower; classes and queries need one")
        ids, found = encoder.tokenizer(texts).to(next(text.parameters()).device), []
        for part in torch.split(ids, batch_size):
            _, features = encoder(text=text.trim(part))
            assert features is not None
            pooled = features.pooled.float()
            found.append(pooled if raw else F.normalize(pooled, dim=-1))
        return torch.cat(found)


def open_video_model(reference: str, *, registry: Registry, head: VideoHead | None = None) -> VideoModel:
    """Any CLIP, or a run or export of this plugin with the head that it was trained with; frozen, in eval mode."""
    from clipgraft.checkpoint import MANIFEST
    from clipgraft.encoders import load

    folder = Path(reference)
    folder = folder / "export" if (folder / "export" / MANIFEST).is_file() else folder
    encoder = load(str(folder) if (folder / MANIFEST).is_file() else reference, registry=registry)
    model = VideoModel(encoder, head or stored_head(folder, registry=registry))
    return model.requires_grad_(False).eval()


def stored_head(folder: Path, *, registry: Registry) -> VideoHead | None:
    """The head among an export's components, or beside the encoder that a stage of a run left; None without one."""
    from clipgraft.checkpoint import MANIFEST, read_component, read_manifest

    if not (folder / MANIFEST).is_file():
        return None
    beside = folder.parent / "components.json"
    left = json.loads(beside.read_text("utf-8")) if beside.is_file() else {}
    records = [(use, c, partial(load_file, folder.parent / f"{name}.safetensors")) for name, (use, c) in left.items()]
    own = read_manifest(folder)["components"]
    records += [(c["use"], c["config"], partial(read_component, folder, c["name"])) for c in own]
    for use, settings, tensors in reversed(records):
        head: Any = registry.build("head", use, settings) if use.startswith("video/") else None
        if isinstance(head, VideoHead):
            head.load_state_dict(tensors())
            return head
    return None
