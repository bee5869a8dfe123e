"""Texts to ids with the prompt around them: left padding for decoders, words lost at the end are counted.

B texts, L longest text in tokens.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from clipgraft.errors import InputError
from clipgraft_llm.tower.model_folder import ARCHITECTURE, OWN, ModelFolder
from clipgraft_llm.tower.settings import TextSettings


class CaptionTokenizer:
    """What ``Encoder.tokenizer`` is for a text model.

    A row is special tokens and the template's beginning (``lead`` ids, the same for every text), then the text with the
    template's end. Both parts are tokenised on their own, so that the text's ids don't depend on what stands before it.
    A text that doesn't fit loses words at its end, never a part of one, and is counted in ``cut``.
    ``architecture``: configuration of a model whose weights travel with the tokenizer.
    """

    def __init__(self, inner: Any, *, settings: TextSettings) -> None:
        self.inner, self.settings, self.context_length = inner, settings, settings.max_length
        self.architecture: Mapping[str, Any] | None = None
        bare, full = inner("a", add_special_tokens=False)["input_ids"], inner("a")["input_ids"]
        starts = [k for k in range(len(full)) if full[k : k + len(bare)] == bare]
        at = starts[0] if bare and starts else len(full)
        before, self._after = settings.template.split("{}")
        self.head = full[:at] + (inner(before, add_special_tokens=False)["input_ids"] if before else [])
        self.tail = full[at + len(bare) :]
        if len(self.head) + len(self.tail) + 1 >= self.context_length:
            raise InputError(
                f"text.template takes {len(self.head) + len(self.tail)} of {self.context_length} tokens; shorten it or "
                "raise text.max_length"
            )
        edge = self.head[:1] if settings.decoder else self.tail[-1:]
        known = [inner.pad_token_id, inner.eos_token_id, inner.unk_token_id, 0, 1]
        self.pad_id = int(next(k for k in known if k is not None and [k] != edge))
        self._cut = torch.zeros(2, dtype=torch.int64).share_memory_()  # seen by worker processes too

    @classmethod
    def of(cls, folder: ModelFolder, settings: TextSettings) -> Self:
        """The tokenizer in ``folder``."""
        return cls(read_tokenizer(folder.path, where=folder.reference), settings=settings)

    @property
    def lead(self) -> int:
        """Ids before the text."""
        return len(self.head)

    @property
    def cut(self) -> int:
        """Texts so far that lost words."""
        return int(self._cut[0])

    @property
    def seen(self) -> int:
        """Texts so far."""
        return int(self._cut[1])

    def ids(self, text: str) -> tuple[list[int], bool]:
        """Ids of one text without padding, and whether words were lost."""
        room = self.context_length - len(self.head) - len(self.tail)
        words = text.strip()
        own = self._own(words)
        whole = len(own) <= room
        if not whole:
            own = self._fitting(words.split(), room)
        return [*self.head, *own, *self.tail], not whole

    def _own(self, text: str) -> list[int]:
        found: list[int] = self.inner(text + self._after, add_special_tokens=False)["input_ids"]
        return found

    def _fitting(self, words: list[str], room: int) -> list[int]:
        """As many words from the front as fit; of a single word that doesn't, its first ids and the template's end."""
        few, many = 0, len(words)  # few fit, many don't
        while many - few > 1:
            middle = (few + many) // 2
            few, many = (middle, many) if len(self._own(" ".join(words[:middle]))) <= room else (few, middle)
        if few:
            return self._own(" ".join(words[:few]))
        end = self.inner(self._after, add_special_tokens=False)["input_ids"] if self._after else []
        whole: list[int] = self.inner(words[0], add_special_tokens=False)["input_ids"]
        return [*whole[: room - len(end)], *end]

    def rows(self, texts: Sequence[str]) -> tuple[Tensor, list[bool]]:
        """(B, L) int64, and which texts lost words."""
        rows = torch.full((len(texts), self.context_length), self.pad_id, dtype=torch.int64)
        lost = []
        for row, text in zip(rows, texts, strict=True):
            ids, cut = self.ids(text)
            lost.append(cut)
            part = slice(-len(ids), None) if self.settings.decoder else slice(len(ids))
            row[part] = torch.tensor(ids)
        return rows, lost

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """(B, L) int64; texts that lost words are counted, and told of once."""
        rows, lost = self.rows(texts)
        if any(lost) and not self.cut:
            warnings.warn(
                f"a text is longer than {self.context_length} tokens and loses words at its end; raise text.max_length "
                "(they are counted)",
                stacklevel=2,
            )
        self._cut += torch.tensor([sum(lost), len(texts)])
        return rows

    def real(self, ids: Tensor) -> Tensor:
        """(B, L) ids -> (B, L) of what is no padding: everything but the run of padding at one side."""
        other = ids != self.pad_id
        if self.settings.decoder:
            found = other.long().cumsum(1) > 0
            found[:, -1] = True
        else:
            found = other.flip(1).long().cumsum(1).flip(1) > 0
            found[:, 0] = True
        return found

    def trim(self, ids: Tensor) -> Tensor:
        """(B, L) -> (B, L') without columns that are padding in every row."""
        longest = int(self.real(ids).sum(1).max())
        return ids[:, -longest:] if self.settings.decoder else ids[:, :longest]

    def save(self, folder: str) -> None:
        """transformers' tokenizer files, and how the model wants to be asked."""
        self.inner.save_pretrained(folder)
        Path(folder, OWN).write_text(json.dumps(self.settings.as_dict(), indent=2) + "\n", encoding="utf-8")
        if self.architecture is not None:
            Path(folder, ARCHITECTURE).write_text(json.dumps(self.architecture, default=str), encoding="utf-8")


def read_tokenizer(folder: Path, *, where: str) -> Any:
    """transformers' tokenizer in ``folder``; never code of the model's."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # OSError, ValueError, ImportError and what the tokenizers library raises
        reason = " ".join(str(error).split())[:120]
        raise InputError(f"text model {where}: no tokenizer could be read from {folder} ({reason})") from None
