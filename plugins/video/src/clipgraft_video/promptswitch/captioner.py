"""Prompt Switch's second objective: frames must say enough to write the caption. Used in training alone.

B videos, T frames, L text length, W the text tower's width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipgraft.encoders.base import Encoder
from clipgraft.encoders.towers import ClipText
from clipgraft.errors import InputError
from clipgraft_video.stage import Seen

FREQUENT = tuple(
    ["in", "on", "of", "to", "about", "this", "that", "a", "an", "the", "and", "there", "here", "is", "are", ".", ","]
)
"""Words that say little; with the start and the end they count less."""


class Captioner(nn.Module):
    """A transformer decoder over words that looks at the raw embeddings of frames (B, T, D).

    Words enter as the text tower's own embeddings with positions, through which no gradient flows; the output head
    starts as the embedding table. Post-norm layers with ReLU, as torch's. Deviation: where the joint space is not as
    wide as the text tower, frames pass a linear layer first.
    """

    def __init__(
        self,
        encoder: Encoder,
        *,
        layers: int = 2,
        frequent_weight: float = 0.25,
        frequent: tuple[str, ...] = FREQUENT,
    ) -> None:
        super().__init__()
        text = encoder.text
        if not isinstance(text, ClipText) or not text.trim_exact:
            raise InputError(
                f"captions are written with open_clip's causal text tower, {encoder.data.origin.uri} has another; "
                "set caption=0"
            )
        self._text = (text,)  # the encoder's own, named here without a second registration
        table, width = text.tower.token_embedding.weight, text.width
        self.prenorm = nn.LayerNorm(width)
        self.bridge = nn.Identity() if encoder.image.embed_dim == width else nn.Linear(encoder.image.embed_dim, width)
        heads = text.tower.transformer.resblocks[0].attn.num_heads
        layer = nn.TransformerDecoderLayer(width, heads, 4 * width, dropout=0.0, batch_first=True)
        self.decoder = nn.TransformerDecoder(layer, layers, norm=nn.LayerNorm(width))
        self.head = nn.Linear(width, len(table))
        with torch.no_grad():
            self.head.weight.copy_(table)
            self.head.bias.zero_()
        rows = [text.trim(encoder.tokenizer([word]))[0].tolist() for word in frequent or ("a",)]
        self.start, self.end = rows[0][0], rows[0][-1]
        few = [row[1] for row in rows if len(row) == 3 and frequent]  # words of one token
        weights = torch.ones(len(table))
        weights[[*few, self.start, self.end]] = frequent_weight
        self.register_buffer("weights", weights, persistent=False)

    def logits(self, frames: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Raw frames (B, T, D), token ids (B, L) -> scores (n, V) of the next token, and the tokens (n,) that follow.

        n counts every token but the last, of every row up to its end.
        """
        (text,) = self._text
        given, following = ids[:, :-1], ids[:, 1:]
        with torch.no_grad():
            words = text.embed(given) + text.tower.positional_embedding[: given.shape[1]]
        mask = nn.Transformer.generate_square_subsequent_mask(given.shape[1], device=ids.device, dtype=frames.dtype)
        hidden = self.decoder(self.prenorm(words.to(frames.dtype)), self.bridge(frames), tgt_mask=mask)
        before_end = (given == self.end).cumsum(1) == 0
        return self.head(hidden[before_end]), following[before_end]

    def forward(self, seen: Seen) -> dict[str, Tensor]:
        """Weighted cross entropy of the captions of a step, as "loss"."""
        assert seen.batch.text is not None
        (text,) = self._text
        scores, following = self.logits(seen.video.frames, text.trim(seen.batch.text))
        return {"loss": F.cross_entropy(scores.float(), following, weight=self.weights)}
