"""Specialist of prose: an n-gram over bytes with Witten-Bell interpolation down to the uniform distribution.

In: texts. Out: bits per byte. Bell, Cleary and Witten, "Text compression" (1990): a context that was followed by d different
bytes in c occurrences trusts itself with c / (c + d) and its shorter context with the rest.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from math import log2

BYTES = 256


class NgramText:
    """`order` bytes at once: 1 is the unigram."""

    def __init__(self, order: int) -> None:
        if order < 1:
            raise ValueError(f"an n-gram needs an order of at least 1, got {order}")
        self.order = order
        self._follow: defaultdict[bytes, Counter[int]] = defaultdict(Counter)
        self._total: dict[bytes, int] = {}

    def fit(self, texts: Sequence[str]) -> NgramText:
        """Count every text on its own: no n-gram crosses from one to the next."""
        for text in texts:
            data = text.encode()
            for i, byte in enumerate(data):
                for size in range(min(self.order - 1, i) + 1):
                    self._follow[data[i - size : i]][byte] += 1
        self._total = {context: sum(after.values()) for context, after in self._follow.items()}
        return self

    def probability(self, context: bytes, byte: int) -> float:
        """Of `byte` after the last order - 1 bytes of `context`."""
        found = 1.0 / BYTES
        for size in range(min(self.order - 1, len(context)) + 1):
            tail = context[len(context) - size :]
            after = self._follow.get(tail)
            if after is None:
                break
            found = (after[byte] + len(after) * found) / (self._total[tail] + len(after))
        return found

    def bits_per_byte(self, texts: Sequence[str]) -> float:
        """Mean code length, each text on its own."""
        bits, count = 0.0, 0
        for text in texts:
            data = text.encode()
            bits -= sum(log2(self.probability(data[max(0, i - self.order + 1) : i], byte)) for i, byte in enumerate(data))
            count += len(data)
        return bits / count
