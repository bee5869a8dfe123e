"""M2-CLIP's further tasks, as parts of the loss: all classes by their texts, the classifier, masked words."""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipgraft.encoders.base import Encoder
from clipgraft.encoders.towers import ClipText
from clipgraft.errors import InputError
from clipgraft_video.m2clip.graft import Place, TextTedBlock
from clipgraft_video.m2clip.head import M2Head
from clipgraft_video.m2clip.masking import IGNORED, MaskedTexts
from clipgraft_video.stage import Seen


class ByTexts(nn.Module):
    """Cross entropy over the texts of all K classes. ``twice``: over their softmax, as the official code does."""

    def __init__(self, encoder: Encoder, *, twice: bool = False) -> None:
        super().__init__()
        self._encoder, self.twice = (encoder,), twice

    def forward(self, seen: Seen) -> dict[str, Tensor]:
        """Scalar loss."""
        assert seen.texts is not None and seen.batch.labels is not None
        logits = self._encoder[0].logit_scale.exp() * seen.video.unit().float() @ seen.texts.float().T
        return {"loss": F.cross_entropy(logits.softmax(-1) if self.twice else logits, seen.batch.labels)}


class ByHead(nn.Module):
    """Cross entropy of the head's own classifier, and its accuracy."""

    def __init__(self, head: M2Head) -> None:
        super().__init__()
        self._head = (head,)

    def forward(self, seen: Seen) -> dict[str, Tensor]:
        """Scalar loss and accuracy."""
        assert seen.batch.labels is not None
        scores = self._head[0].classify(seen.video).float()
        right = (scores.argmax(-1) == seen.batch.labels).float().mean()
        return {"loss": F.cross_entropy(scores, seen.batch.labels), "accuracy": right}


def word_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """(B, L, V), (B, L) -> (): the mean over labels that are not IGNORED; zero, not NaN, when there are none."""
    total = F.cross_entropy(scores.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum")
    return total / (labels != IGNORED).sum().clamp(min=1)


class WordHead(nn.Module):
    """BERT's head for masked words: (..., W) -> (..., V)."""

    def __init__(self, width: int, words: int) -> None:
        super().__init__()
        self.dense, self.norm = nn.Linear(width, width), nn.LayerNorm(width, eps=1e-12)
        self.decoder = nn.Linear(width, words)
        for linear in (self.dense, self.decoder):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of words."""
        return self.decoder(self.norm(F.gelu(self.dense(x))))  # type: ignore[no-any-return]


class MaskedWords(nn.Module):
    """Words of a video's class text that are masked must be told from its frames.

    The text tower reads the masked text; one more block, a copy of the last one, looks from its tokens at the T frames;
    ``WordHead`` names the words. Training alone needs any of this.
    """

    def __init__(
        self, encoder: Encoder, texts: MaskedTexts, *, places: tuple[Place, ...] = ("mlp",), hidden: int = 384
    ) -> None:
        super().__init__()
        text: Any = encoder.text
        assert isinstance(text, ClipText)
        if text.width != text.embed_dim:
            raise InputError(
                f"masked words look from text tokens of width {text.width} at frames of width {text.embed_dim}; for "
                "such a model set weights.words=0"
            )
        self.texts, self._text = texts, (text,)
        self.block = TextTedBlock(copy.deepcopy(text.tower.transformer.resblocks[-1]), places=places, hidden=hidden)
        self.block.requires_grad_(False)
        self.block.adapters.requires_grad_(True)
        self.head = WordHead(text.width, len(texts.vocabulary))

    def forward(self, seen: Seen) -> dict[str, Tensor]:
        """Scalar loss."""
        assert seen.batch.labels is not None
        rows = torch.tensor([self.texts.rows[one] for one in seen.chosen], device=seen.batch.labels.device)
        ids, labels = self.texts(rows[seen.batch.labels])
        return {"loss": word_loss(self.scores(ids, seen.video.frames), labels)}

    def scores(self, ids: Tensor, frames: Tensor) -> Tensor:
        """Ids (B, L), embeddings of frames (B, T, W) -> (B, L, V)."""
        tower = self._text[0].tower
        length = ids.shape[1]
        x = tower.token_embedding(ids) + tower.positional_embedding[:length]
        x = tower.transformer(x, attn_mask=tower.attn_mask[:length, :length])
        return self.head(tower.ln_final(self.block(x, frames.to(x.dtype))))  # type: ignore[no-any-return]


Compat = Literal["paper", "official"]
