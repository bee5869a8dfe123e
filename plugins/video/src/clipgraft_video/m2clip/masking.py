"""Class texts with some words masked: which words, which tokens they are, and what stands in their place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from clipgraft.encoders.base import Encoder
from clipgraft.encoders.towers import ClipText
from clipgraft.errors import InputError

IGNORED = -100


class MaskedTexts(nn.Module):
    """``texts`` as tokens whose words can be masked; a masked word becomes one token, that of "mask".

    ``vocabulary``: all words, lower case. One draw masks max(1, round(share * words)) words of a text.
    """

    ids: Tensor
    word: Tensor
    label: Tensor
    words: Tensor
    wanted: Tensor

    def __init__(self, encoder: Encoder, texts: Sequence[str], *, share: float = 0.2) -> None:
        super().__init__()
        text = encoder.text
        if not isinstance(text, ClipText) or not text.trim_exact:
            raise InputError(
                f"masked words need open_clip's causal text tower, {encoder.data.origin.uri} has another; set "
                "weights.words=0"
            )
        self.rows = {one: k for k, one in enumerate(dict.fromkeys(texts))}
        split = [one.lower().split() for one in self.rows]
        self.vocabulary = {word: k for k, word in enumerate(sorted({word for words in split for word in words}))}
        spelt = {word: _pieces(encoder, text, word) for word in [*self.vocabulary, "mask"]}
        self.pad, self.mask = encoder.tokenizer.pad_id, spelt["mask"][0]
        (start, *_, end), width = _ends(encoder, text), 0
        rows = []
        for one, words in zip(self.rows, split, strict=True):
            while 2 + sum(len(spelt[word]) for word in words) > text.context_length:
                words = words[:-1]  # what doesn't fit is cut at a word
            pieces = [(piece, k) for k, word in enumerate(words) for piece in spelt[word]]
            ids = [start, *(piece for piece, _ in pieces), end]
            plain = encoder.tokenizer([" ".join(words)])[0, : len(ids)].tolist()
            if plain != ids:
                raise InputError(
                    f"the tokenizer of {encoder.data.origin.uri} reads {one!r} in another way than word by word, so "
                    "words can't be masked; set weights.words=0"
                )
            rows.append((ids, [-1, *(k for _, k in pieces), -1], [self.vocabulary[word] for word in words]))
            width = max(width, len(ids))
        most = max(len(words) for _, _, words in rows)
        self.register_buffer("ids", _filled([ids for ids, _, _ in rows], width, self.pad), persistent=False)
        self.register_buffer("word", _filled([places for _, places, _ in rows], width, -1), persistent=False)
        self.register_buffer("label", _filled([words for _, _, words in rows], most, IGNORED), persistent=False)
        counts = [len(words) for _, _, words in rows]
        self.register_buffer("words", torch.tensor(counts), persistent=False)
        wanted = [min(max(1, round(share * n)), n) if share else 0 for n in counts]
        self.register_buffer("wanted", torch.tensor(wanted), persistent=False)

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Rows (B,) of texts -> ids (B, L) with words masked, and labels (B, L): word numbers there, else IGNORED."""
        ids, word, label = self.ids[rows], self.word[rows], self.label[rows]
        places = torch.arange(label.shape[1], device=ids.device)
        chance = torch.rand(label.shape, device=ids.device).masked_fill(places >= self.words[rows, None], 2.0)
        drawn = chance.argsort(-1).argsort(-1) < self.wanted[rows, None]  # (B, words)
        hidden = drawn.gather(1, word.clamp(min=0)) & (word >= 0)  # (B, L)
        later = hidden & torch.cat([torch.zeros_like(word[:, :1]) > 0, word[:, 1:] == word[:, :-1]], 1)
        labels = label.gather(1, word.clamp(min=0)).masked_fill(~hidden | later, IGNORED)
        ids = ids.masked_fill(hidden, self.mask)
        order = later.int().argsort(dim=-1, stable=True)  # the other pieces of a masked word go, the rest moves up
        left = later.gather(1, order)
        return ids.gather(1, order).masked_fill(left, self.pad), labels.gather(1, order).masked_fill(left, IGNORED)


def _ends(encoder: Encoder, text: ClipText) -> list[int]:
    """Start and end of an empty text."""
    found: list[int] = text.trim(encoder.tokenizer([""]))[0].tolist()
    return found


def _pieces(encoder: Encoder, text: ClipText, word: str) -> list[int]:
    """Token ids of a word, without start and end."""
    found: list[int] = text.trim(encoder.tokenizer([word]))[0, 1:-1].tolist()
    return found


def _filled(rows: Sequence[Sequence[int]], width: int, value: int) -> Tensor:
    """Rows of different lengths -> (rows, width) int64."""
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows])
