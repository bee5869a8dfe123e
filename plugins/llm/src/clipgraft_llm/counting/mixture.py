"""How much of an epoch counts: an exact share of captions with a number, the numbers equally often.

Numbers in captions are distributed like Zipf's law: without balance "two" would drown the others.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Sequence

from torch import Tensor

from clipgraft.data.base import BadSample, Drawn, Sample, Source, entry_of
from clipgraft.errors import InputError
from clipgraft.log import RunLog
from clipgraft_llm.counting.numbers import drawn_counts, number_in, value_of
from clipgraft_llm.negatives.source import WithNegatives


class Counting(WithNegatives):
    """The samples of ``source``; an epoch draws ``share`` of itself from counting ones, balanced over their numbers.

    A sample counts when all of its captions name the same one number, and, with ``verified``, when its id is listed
    there (a detector found exactly that many). Others have no changed caption: ``present`` is false.
    """

    def __init__(
        self,
        source: Source,
        *,
        tokenizer: Callable[[Sequence[str]], Tensor],
        share: float,
        verified: frozenset[str] | None = None,
        count: int = 1,
        log: RunLog | None = None,
    ) -> None:
        super().__init__(
            source,
            tokenizer=tokenizer,
            wrong=self._wrong,
            count=count,
            told=f"counting {share} {sorted(verified or ())}",
        )
        if isinstance(source, Drawn):
            raise InputError(
                f"{self.name}: a mix and counting.share each decide what an epoch shows; use a plain source"
            )
        self.share, self.by_number, self.others = share, defaultdict[int, list[int]](list), list[int]()
        counting = set[str]()
        with (log or RunLog()).progress("captions that count", len(source)) as bar:
            for index in range(len(source)):
                bar.advance()
                try:
                    entry = entry_of(source, index)
                except BadSample:
                    self.others.append(index)
                    continue
                found = {value_of(m) if (m := number_in(c)) else 0 for c in entry.captions}
                if len(found) == 1 and 0 not in found and (verified is None or entry.id in verified):
                    self.by_number[found.pop()].append(index)
                    counting.add(entry.id)
                else:
                    self.others.append(index)
        self._counting = frozenset(counting)
        if not counting:
            raise InputError(f"{self.name}: no caption has exactly one number from two to ten; count-to-ten needs some")
        if not self.others and share < 1:
            raise InputError(f"{self.name}: every caption counts; set counting.share to 1")
        told = ", ".join(f"{number}: {len(self.by_number[number])}" for number in sorted(self.by_number))
        (log or RunLog()).info(f"{self.name}: {len(counting)} of {len(source)} samples count ({told})")

    def _wrong(self, sample: Sample, caption: str, rng: random.Random) -> Sequence[str]:
        return drawn_counts(caption, self.count, rng=rng) if sample.id in self._counting else ()

    @property
    def quotas(self) -> Sequence[tuple[Sequence[int], int]]:
        """Equal amounts of every number, together ``share`` of an epoch as long as the source."""
        size = len(self.source)
        counting = max(len(self.by_number), round(self.share * size))
        each, more = divmod(counting, len(self.by_number))
        parts = [(self.by_number[k], each + (place < more)) for place, k in enumerate(sorted(self.by_number))]
        return [*parts, (self.others, size - counting)] if size > counting and self.others else parts
