"""One pass over the data and one over the texts, shared by all evaluators of a call."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from clipgraft.data.base import Pair, PairSource, Sample, Source
from clipgraft.data.loader import BadSamples, class_prompts, evaluation_batches, stack_images
from clipgraft.encoders.base import Encoder
from clipgraft.errors import InputError
from clipgraft.log import RunLog
from clipgraft.types import FeatureRequest

GONE = torch.empty(0)
"""Stands for an image that was encoded."""


@dataclass(frozen=True, slots=True)
class Pass:
    """What a pass over a source left: unit embeddings (m, D), maybe tokens (m, N, W), items without their images."""

    pooled: Tensor
    tokens: Tensor | None
    items: list[Sample | Pair]
    bad: BadSamples


class EncoderFeatures:
    """Embeddings of one encoder whose weights stay as they are meanwhile: fp32, on the CPU, computed when asked for.

    Rows are the readable items in source order. ``tokens`` are fingerprints of sources whose tokens will be asked for,
    so that one pass brings both. ``classifiers`` may outlive this object: a key covers all that its value depends on.
    """

    def __init__(
        self,
        encoder: Encoder,
        *,
        batch_size: int = 256,
        tokens: frozenset[str] = frozenset(),
        classifiers: MutableMapping[str, Tensor] | None = None,
        log: RunLog | None = None,
    ) -> None:
        self.encoder, self.batch_size, self._tokens, self.log = encoder, batch_size, tokens, log
        self._classifiers: MutableMapping[str, Tensor] = {} if classifiers is None else classifiers
        self._passes: dict[str, Pass] = {}
        self._text_digest = ""

    def samples(self, source: Source) -> list[Sample]:
        """What is known about each row of ``images(source)``; its image and ``extra`` are gone."""
        return [item for item in self._read(source).items if isinstance(item, Sample)]

    def pairs(self, source: PairSource) -> list[Pair]:
        """What is known about each row of ``pair_images(source)``."""
        return [item for item in self._read(source, paired=True).items if isinstance(item, Pair)]

    def skipped(self, source: Source | PairSource) -> int:
        """How many could not be read, if ``source`` was read."""
        done = self._passes.get(source.fingerprint)
        return done.bad.count if done else 0

    def images(self, source: Source) -> Tensor:
        """(n, D) of length one."""
        return self._read(source).pooled

    def tokens(self, source: Source) -> Tensor:
        """(n, N, W) patch tokens."""
        tokens = self._read(source, tokens=True).tokens
        if tokens is None:
            raise InputError(f"{self.encoder.data.origin.uri} has no patch tokens; measure its pooled embedding")
        return tokens

    def pair_images(self, source: PairSource) -> tuple[Tensor, Tensor]:
        """Two (n, D) of length one: first and second image of every pair."""
        rows = self._read(source, paired=True).pooled
        return rows[0::2], rows[1::2]

    def labels(self, source: Source) -> Tensor:
        """(n,) class indices; ``InputError`` unless every row has one of the source's two classes or more."""
        if len(source.classes) < 2:
            raise InputError(
                f"{source.name} has {len(source.classes)} classes where two or more are needed; use class folders or a "
                "label column"
            )
        for sample in self.samples(source):
            if sample.label is None or not 0 <= sample.label < len(source.classes):
                had = f"label {sample.label}, outside its {len(source.classes)} classes" if sample.label else "no label"
                raise InputError(f"{source.name}: {sample.id} has {had}; correct the labels of the data")
        return torch.tensor([sample.label for sample in self.samples(source)])

    def texts(self, texts: Sequence[str]) -> Tensor:
        """(n, D) of length one; equal texts are encoded once and have equal rows."""
        unique = list(dict.fromkeys(texts))
        row, ids = {text: k for k, text in enumerate(unique)}, self.encoder.tokenizer(unique)
        return self._encode(ids)[[row[text] for text in texts]]

    def classifier(self, classes: Sequence[str], templates: Sequence[str]) -> Tensor:
        """(K, D) of length one: the mean over templates of unit text embeddings, normalised again."""
        prompts = [prompt for name in classes for prompt in class_prompts(name, templates)]
        ids = self.encoder.tokenizer(prompts)
        digest = hashlib.sha256(f"{self._weights()}/{len(classes)}/{tuple(ids.shape)}".encode())
        digest.update(ids.contiguous().numpy().tobytes())
        key = digest.hexdigest()
        if key not in self._classifiers:
            mean = self._encode(ids).view(len(classes), len(ids) // len(classes), -1).mean(1)
            self._classifiers[key] = F.normalize(mean, dim=-1)
        return self._classifiers[key]

    def _read(self, source: Source | PairSource, *, paired: bool = False, tokens: bool = False) -> Pass:
        if hasattr(source, "patterns") != paired:
            kinds = ("single images", "minimal pairs (such as toyworld/pairs)")
            raise InputError(f"{source.name} holds {kinds[not paired]}; this needs {kinds[paired]}")
        done = self._passes.get(source.fingerprint)
        if done is not None and (done.tokens is not None or not tokens):
            return done
        tokens = tokens or source.fingerprint in self._tokens
        want, preprocess, parameter = FeatureRequest(tokens=tokens), self.encoder.preprocess, self._parameter()
        pooled, patches, items, bad = list[Tensor](), list[Tensor](), list[Sample | Pair](), BadSamples(len(source))
        with self.log.progress(f"encoding {source.name}", len(source)) if self.log else nullcontext() as bar:
            for batch in evaluation_batches(source, preprocess=preprocess, batch_size=self.batch_size, bad=bad):
                with self._frozen():
                    found = self.encoder.image(preprocess.normalize(stack_images(batch).to(parameter)), want)
                pooled.append(F.normalize(found.pooled.float(), dim=-1).cpu())
                patches += [found.tokens.float().cpu()] if tokens and found.tokens is not None else []
                items += [
                    replace(i, images=(GONE, GONE)) if isinstance(i, Pair) else replace(i, image=GONE, extra={})
                    for i in batch
                ]
                if bar is not None:
                    bar.advance(len(batch))
        if not items:
            raise InputError(f"{source.name} has nothing that can be read: {bad}")
        if bad.count:
            say = self.log.info if self.log else logging.getLogger("clipgraft").warning
            say(f"{source.name}: {bad}; skipped")
        done = Pass(torch.cat(pooled), torch.cat(patches) if patches else None, items, bad)
        self._passes[source.fingerprint] = done
        return done

    def _encode(self, ids: Tensor) -> Tensor:
        """(n, L) ids -> (n, D) of length one, in chunks of which each is trimmed to its longest text."""
        text = self.encoder.text
        assert text is not None  # the tokenizer has refused otherwise
        with self._frozen():
            chunks = [
                text(text.trim(chunk).to(self._parameter().device)) for chunk in torch.split(ids, self.batch_size)
            ]
        return torch.cat([F.normalize(found.pooled.float(), dim=-1).cpu() for found in chunks])

    def _weights(self) -> str:
        """Digest of the text tower's tensors and grafts."""
        if not self._text_digest and self.encoder.text is not None:
            digest = hashlib.sha256(repr([(g.name, g.config) for g in self.encoder.data.grafts]).encode())
            for name, tensor in self.encoder.text.state_dict().items():
                digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
                digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
            self._text_digest = digest.hexdigest()
        return self._text_digest

    def _parameter(self) -> Tensor:
        """Has the device and dtype of the image tower."""
        return next(self.encoder.image.parameters())

    @contextmanager
    def _frozen(self) -> Iterator[None]:
        """No gradient (not inference_mode, under which autocast copies weights on every call) and eval mode."""
        modes = {module: module.training for module in self.encoder.modules()}
        self.encoder.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            for module, mode in modes.items():
                module.training = mode
