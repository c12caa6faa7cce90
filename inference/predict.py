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
from weft.inference.values import is_integer, is_number
from weft.tokenizers.bundle import StreamTokenizer
from weft.tokenizers.segment import ActionSpace
from weft.tokenizers.stream import SegmentInfo

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

    def __repr__(self) -> str:
        return f"Choice({', '.join(f'{c!r}: {p:.3f}' for c, p in zip(self.choices, self.probabilities))})"

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

    def __repr__(self) -> str:
        samples, horizon, channels = self.values.shape
        return f"Forecast({horizon} readings of {channels} channels, {samples} samples)"

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
    kind, rate = options.pop("sensor", options.pop("kind", None)), options.pop("rate_hz", None)
    quantiles = options.pop("quantiles", QUANTILES)
    if "n" in options:
        raise ProduceError("predict(horizon=) has no option 'n'; samples= says how many continuations are drawn")
    check_forecast(horizon, samples, quantiles)
    requests = []
    for prompt in prompts:
        info = encode(tokenizer, prompt).stream.info if isinstance(horizon, float) else ()
        item = ahead(horizon, info, kind, rate)
        requests.append(Request(prompt, item, {"n": samples, "temperature": 1.0, **options}))
    return [forecast_of([reply.sensor for reply in replies], quantiles) for replies in generate(model, tokenizer, requests)]


def check_forecast(horizon: Any, samples: Any, quantiles: Any) -> None:
    """Refuse a horizon, a number of samples or levels that mean nothing."""
    if not (is_number(horizon) and 0 < horizon < float("inf")):
        raise ProduceError(f"horizon={horizon!r} must be a number of readings (int) or of seconds (float)")
    if not (is_integer(samples) and 1 <= samples <= 4096):
        raise ProduceError(f"samples={samples!r} must be an integer from 1 to 4096")
    if not isinstance(quantiles, list | tuple | np.ndarray) or not all(is_number(q) and 0 <= q <= 1 for q in quantiles):
        raise ProduceError(f"quantiles={quantiles!r} must be a list of levels in [0, 1]")


def ahead(horizon: int | float, info: Sequence[SegmentInfo], kind: str | None, rate_hz: float | None) -> Produce:
    """The readings of a horizon, in readings or in seconds of the last such sensor's rate."""
    if isinstance(horizon, float):
        rates = [i.fields.get("rate_hz") for i in info if i.modality == "sensor" and kind in (None, i.fields.get("kind"))]
        rate = rate_hz or (rates[-1] if rates else None)
        if rate is None:
            raise ProduceError("a horizon in seconds needs rate_hz=, as no such sensor in the prompt says it; or give readings")
        horizon = max(round(horizon * rate), 1)
    return Produce("sensor", readings=int(horizon), kind=kind, rate_hz=rate_hz)


def forecast_of(sensors: Sequence[Any], quantiles: Sequence[float]) -> Forecast:
    """Quantiles over sampled continuations (`Sensor` segments of equal length)."""
    values = np.stack([np.asarray(s.values, np.float64) for s in sensors])
    levels = {float(q): np.quantile(values, q, axis=0) for q in quantiles}
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
