"""Answers with numbers: which choice, how the signal goes on, which action.

Choices are ranked by their likelihood after the prompt; a forecast is the quantiles of sampled continuations, in the sensor's
own units; an action is legal in its space, or there is an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from weft.inference.errors import ProduceError, PromptError
from weft.inference.generate import Request, generate
from weft.inference.prompts import encode
from weft.inference.request import Produce
from weft.inference.score import Score, continuation, log_likelihoods
from weft.inference.spaces import check_action
from weft.tokenizers.bundle import StreamTokenizer
from weft.tokenizers.segment import ActionSpace

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class Choice:
    """Probabilities over the choices of one prompt."""

    choices: tuple[Any, ...]
    logprobs: np.ndarray
    """float64 [choices]: log-likelihood of each."""
    lengths: np.ndarray
    """int64 [choices]: counted tokens of each."""
    scores: tuple[Score, ...]

    @property
    def probabilities(self) -> np.ndarray:
        """float64 [choices]: by likelihood, summing to one."""
        return _softmax(self.logprobs)

    @property
    def normalized(self) -> np.ndarray:
        """float64 [choices]: by likelihood per token, summing to one; use it where the choices differ in length."""
        return _softmax(self.logprobs / self.lengths)

    @property
    def best(self) -> Any:
        """The most likely choice."""
        return self.choices[int(np.argmax(self.logprobs))]

    @property
    def best_normalized(self) -> Any:
        """The most likely choice per token."""
        return self.choices[int(np.argmax(self.logprobs / self.lengths))]


@dataclass(frozen=True)
class Forecast:
    """How a sensor may go on."""

    values: np.ndarray
    """float64 [samples horizon channels], in the sensor's units."""
    quantiles: dict[float, np.ndarray]
    """level -> float64 [horizon channels]."""
    channels: tuple[str, ...] | None
    units: tuple[str, ...] | None
    rate_hz: float | None

    @property
    def median(self) -> np.ndarray:
        """float64 [horizon channels]."""
        return np.median(self.values, axis=0)

    @property
    def mean(self) -> np.ndarray:
        """float64 [horizon channels]."""
        return self.values.mean(axis=0)


def choose(model: Any, tokenizer: StreamTokenizer, prompts: Sequence[Any], choices: Sequence[Sequence[Any]]) -> list[Choice]:
    """Rank each prompt's choices (strings, segments or lists of these)."""
    for some in choices:
        if len(some) < 1:
            raise PromptError("choices is empty; give at least one string or segment")
    encoded = [encode(tokenizer, prompt) for prompt in prompts]
    streams = [[continuation(tokenizer, prompt, c) for c in some] for prompt, some in zip(encoded, choices)]
    scores = log_likelihoods(model, tokenizer, encoded, streams)
    return [
        Choice(
            tuple(some),
            np.array([s.total for s in mine]),
            np.array([max(int(s.counted.sum()), 1) for s in mine], np.int64),
            tuple(mine),
        )
        for some, mine in zip(choices, scores)
    ]


def forecast(
    model: Any, tokenizer: StreamTokenizer, prompts: Sequence[Any], horizon: int | float, samples: int, options: dict[str, Any]
) -> list[Forecast]:
    """`horizon` readings (int) or seconds (float) of the sensor that each prompt ends with, `samples` times."""
    kind, rate = options.pop("sensor", None), options.pop("rate_hz", None)
    quantiles = tuple(options.pop("quantiles", QUANTILES))
    if any(not 0 <= q <= 1 for q in quantiles):
        raise ProduceError(f"quantiles={quantiles!r} must lie in [0, 1]")
    if isinstance(horizon, bool) or not isinstance(horizon, int | float) or not 0 < horizon < float("inf"):
        raise ProduceError(f"horizon={horizon!r} must be a number of readings (int) or of seconds (float)")
    requests = []
    for prompt in prompts:
        readings = horizon
        if isinstance(horizon, float):
            readings = max(round(horizon * (rate or _rate(tokenizer, prompt, kind))), 1)
        item = Produce("sensor", readings=int(readings), kind=kind, rate_hz=rate)
        requests.append(Request(prompt, item, {"n": samples, "temperature": 1.0, **options}))
    return [forecast_of([reply.sensor for reply in replies], quantiles) for replies in generate(model, tokenizer, requests)]


def _rate(tokenizer: StreamTokenizer, prompt: Any, kind: str | None) -> float:
    info = encode(tokenizer, prompt).stream.info
    rates = [i.fields.get("rate_hz") for i in info if i.modality == "sensor" and kind in (None, i.fields.get("kind"))]
    if not rates or rates[-1] is None:
        raise ProduceError("a horizon in seconds needs rate_hz=, as no such sensor in the prompt says it; or give readings")
    return float(rates[-1])


def forecast_of(sensors: Sequence[Any], quantiles: tuple[float, ...]) -> Forecast:
    """Quantiles over sampled continuations (`Sensor` segments of equal length)."""
    values = np.stack([np.asarray(s.values, np.float64) for s in sensors])
    levels = {q: np.quantile(values, q, axis=0) for q in quantiles}
    return Forecast(values, levels, sensors[0].channels, sensors[0].units, sensors[0].rate_hz)


def act(
    model: Any, tokenizer: StreamTokenizer, prompts: Sequence[Any], spaces: Sequence[ActionSpace], options: dict[str, Any]
) -> list[np.ndarray]:
    """One legal action after each prompt: an int64 scalar, or float64 [dims] inside the bounds."""
    requests = [Request(p, Produce("action", space=space), dict(options)) for p, space in zip(prompts, spaces)]
    replies = [n[0] for n in generate(model, tokenizer, requests)]
    return [legal(reply.action, space) for reply, space in zip(replies, spaces)]


def legal(action: Any, space: ActionSpace) -> np.ndarray:
    """The first action of a produced segment, checked against its space."""
    return check_action(np.asarray(action.values)[0], space)


def _softmax(x: np.ndarray) -> np.ndarray:
    weight = np.exp(x - x.max())
    return weight / weight.sum()
