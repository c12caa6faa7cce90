"""From the logits of one output slice to one token id, reproducibly.

In: log-probabilities [V] of the slice (already under the model's own softmax), which of them are legal, and `Sampling`.
Out: the index of the drawn token. The noise is a pure function of (seed, which of the n samples, how many tokens came
before), never of the place in a batch, so that a request draws the same tokens alone and in company.

The log-probability that a reply reports is the model's over the whole slice: the grammar and the options below
renormalise only for the draw. So scoring a reply afterwards gives the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import numpy as np

from weft.inference.errors import SamplingError
from weft.inference.values import is_integer, is_number

GREEDY_BY_DEFAULT = ("text", "action")
"""Modalities with one right answer more often than not: `temperature=None` means 0 for them and 1 for media."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn."""

    temperature: float | None = None
    """0 = the most likely token. None = 0 for text and actions, 1 for image, video, audio and sensor."""
    top_k: int | None = None
    """Keep the k most likely tokens."""
    top_p: float | None = None
    """Keep the smallest set of tokens that holds this probability (arXiv 1904.09751)."""
    min_p: float | None = None
    """Keep tokens at least this fraction as likely as the most likely one (arXiv 2407.01082)."""
    repetition_penalty: float = 1.0
    """Scale the scores of text pieces that prompt or reply already hold (arXiv 1909.05858); 1 = off."""
    guidance: float = 1.0
    """Classifier-free guidance for media (arXiv 2207.12598): 1 = off, more = closer to the prompt, at twice the work."""
    seed: int = 0

    def __post_init__(self) -> None:
        def check(name: str, kind: Callable[[Any], bool], fits: Callable[[Any], bool], need: str) -> None:
            value = getattr(self, name)
            if value is None and need.startswith("None"):
                return
            if not (kind(value) and fits(value)):
                raise SamplingError(f"{name}={value!r} is out of range; it must be {need}")
            object.__setattr__(self, name, int(value) if kind is is_integer else float(value))

        check("temperature", is_number, lambda x: 0 <= x < np.inf, "None or a number >= 0")
        check("top_k", is_integer, lambda x: x >= 1, "None or an integer >= 1")
        check("top_p", is_number, lambda x: 0 < x <= 1, "None or a number in (0, 1]")
        check("min_p", is_number, lambda x: 0 <= x <= 1, "None or a number in [0, 1]")
        check("repetition_penalty", is_number, lambda x: 0 < x < np.inf, "a number > 0")
        check("guidance", is_number, lambda x: 0 <= x < np.inf, "a number >= 0")
        check("seed", is_integer, lambda x: 0 <= x < 2**63, "an integer from 0 to 2^63 - 1")

    def temperature_of(self, modality: str) -> float:
        """The temperature for one modality, with the default resolved."""
        if self.temperature is not None:
            return float(self.temperature)
        return 0.0 if modality in GREEDY_BY_DEFAULT else 1.0


def uniform(seed: int, sample: int, step: int) -> float:
    """One number in [0, 1) that depends on nothing but its arguments (Philox, a counter-based generator)."""
    bits = np.random.Philox(key=[seed, sample], counter=[step, 0, 0, 0])
    return float(np.random.Generator(bits).random())


def draw(
    logprob: np.ndarray,
    legal: np.ndarray,
    sampling: Sampling,
    modality: str,
    noise: float,
    seen: Collection[int] = (),
) -> int:
    """The index in the slice of the next token.

    `logprob` float [V]; `legal` int [n] indices that the grammar allows (n >= 1, ascending); `noise` in [0, 1);
    `seen` indices that the repetition penalty weakens. Ties go to the lowest index.
    """
    if len(legal) == 1:
        return int(legal[0])
    score = logprob[legal].astype(np.float64)
    if sampling.repetition_penalty != 1.0 and len(seen) > 0:
        # Log-probabilities are never positive, so the CTRL rule "divide positive, multiply negative" is a product.
        score[np.isin(legal, list(seen))] *= sampling.repetition_penalty
    temperature = sampling.temperature_of(modality)
    if temperature == 0.0:
        return int(legal[int(np.argmax(score))])
    order = np.argsort(-score, kind="stable")
    with np.errstate(over="ignore"):  # the smallest temperatures: -inf, so a weight of 0
        weight = np.exp((score[order] - score[order[0]]) / temperature)
    keep = _kept(weight, sampling)
    ends = np.cumsum(weight[:keep])
    at = int(np.searchsorted(ends, noise * ends[-1], side="right"))
    return int(legal[order[min(at, keep - 1)]])


def _kept(weight: np.ndarray, sampling: Sampling) -> int:
    """How many of the weights (descending, the first is 1) remain after top-k, top-p and min-p."""
    keep = len(weight) if sampling.top_k is None else min(sampling.top_k, len(weight))
    if sampling.top_p is not None:
        share = np.cumsum(weight) / weight.sum()
        keep = min(keep, int(np.searchsorted(share, sampling.top_p, side="left")) + 1)
    if sampling.min_p is not None:
        keep = min(keep, int(np.count_nonzero(weight >= sampling.min_p)))
    return max(keep, 1)
