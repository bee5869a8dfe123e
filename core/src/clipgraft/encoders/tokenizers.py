"""Text to ids: CLIP's byte-pair encoding that ships inside open_clip, and any Hugging Face tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from clipgraft.encoders.base import Tokenizer
from clipgraft.errors import InputError
from clipgraft.manifests import one_line

OPTIONS = frozenset(("clean", "strip_sep_token", "language"))
"""What a model's configuration may say of its tokenizer: open_clip hands anything else on to transformers, among it
``trust_remote_code``, with which a model folder would run its own code."""


@cache
def _simple(clean: str) -> Any:
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer(clean=clean)


@dataclass
class BpeTokenizer:
    """open_clip's ``SimpleTokenizer``; its merges are part of open_clip, nothing is downloaded or saved."""

    context_length: int = 77
    clean: str = "lower"
    pad_id: int = 0

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """(B, context_length) int64, padded with 0; the end token is the highest id."""
        ids: Tensor = _simple(self.clean)(list(texts), context_length=self.context_length)
        return ids

    def save(self, folder: str) -> None:
        """Nothing to write."""


@dataclass
class HuggingFaceTokenizer:
    """open_clip's ``HFTokenizer`` over a folder or hub name, read on first use and saved into exports.

    ``options`` are open_clip's ``tokenizer_kwargs``: SigLIP's is ``{"clean": "canonicalize"}``.
    """

    source: str
    context_length: int
    options: Mapping[str, Any] = field(default_factory=dict)
    mode: str | None = None

    @cached_property
    def inner(self) -> Any:
        """The open_clip object."""
        from open_clip.tokenizer import HFTokenizer

        try:
            return HFTokenizer(
                self.source,
                context_length=self.context_length,
                tokenizer_mode=self.mode,
                trust_remote_code=False,  # None asks on the terminal
                **dict(self.options),
            )
        except BaseException as error:  # damaged files raise anything
            if not _of_the_library(error):
                raise
            reason = one_line(error)[:200]
            raise InputError(f"no tokenizer could be read from {self.source} ({reason}); put its files there") from None

    @property
    def pad_id(self) -> int:
        """The id of padding."""
        return int(self.inner.tokenizer.pad_token_id or 0)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """(B, context_length) int64."""
        try:
            ids: Tensor = self.inner(list(texts))
        except BaseException as error:  # of odd settings in its files
            if not _of_the_library(error):
                raise
            raise InputError(
                f"the tokenizer of {self.source} fails: {one_line(error)[:200]}; fetch it again"
            ) from error
        return ids

    def save(self, folder: str) -> None:
        """The tokenizer's files, as transformers writes them."""
        self.inner.save_pretrained(folder)


def _of_the_library(error: BaseException) -> bool:
    """Whether an error says that the tokenizers library failed; a panic of its Rust code is no ``Exception``."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def tokenizer_for(text_config: Mapping[str, Any], *, folder: Path | None = None) -> Tokenizer:
    """The tokenizer that open_clip takes for this ``text_cfg``; a named one is read from ``folder`` when given."""
    length, options = text_config.get("context_length", 77), dict(text_config.get("tokenizer_kwargs") or {})
    if refused := sorted(set(options) - OPTIONS) if text_config.get("hf_tokenizer_name") else []:
        raise InputError(f"tokenizer_kwargs {refused} are not supported; leave them out of text_cfg")
    if name := text_config.get("hf_tokenizer_name"):
        return HuggingFaceTokenizer(
            str(folder or name), length, options=options, mode=text_config.get("tokenizer_mode")
        )
    if unknown := set(options) - {"clean"}:
        raise InputError(f"tokenizer_kwargs {sorted(unknown)} draw random text and are not supported; remove them")
    return BpeTokenizer(length, **options)
