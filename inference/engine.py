"""Advances any number of replies together, each exactly as it would advance alone.

In: `Job`s (a writer, a script, sampling options and one or two caches). Out: their tokens with log-probabilities, step by step.
A step reads what every unfinished job has pending in one `extend`, then computes logits only for the output slices that are
asked for. Finished jobs leave. Every number of a job is a function of its own prompt, options and sample number.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from weft.inference.feed import extend, joined, log_probabilities
from weft.inference.sampling import Sampling, draw, uniform
from weft.inference.writer import Ask, Script, Writer
from weft.model.cache import StreamCache

GUIDED = ("image", "video", "audio", "sensor")
"""Modalities that classifier-free guidance acts on."""


@dataclass(eq=False)
class Job:
    """One reply in the making."""

    writer: Writer
    script: Script
    sampling: Sampling
    cache: StreamCache
    hidden: Tensor | None
    """[D]: the hidden state of the last token that the cache holds; None if the first tokens are still pending."""
    sample: int = 0
    """Number of this reply among the n of its prompt."""
    free: StreamCache | None = None
    """The same document without its prompt, for classifier-free guidance."""
    free_hidden: Tensor | None = None
    seen: set[int] = field(default_factory=set)
    """Text ids of prompt and reply, for the repetition penalty."""
    stop: tuple[str, ...] = ()
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    drawn: list[bool] = field(default_factory=list)
    first_token_s: float | None = None
    total_s: float = 0.0
    stopped: bool = False
    ask: Ask | None = None

    def start(self) -> None:
        """Run the script to its first question that has a choice."""
        self._answer(next(self.script, None))

    def tell(self, token: int, logprob: float) -> None:
        """Take a drawn token and run on to the next question."""
        self._record(token, logprob, True)
        self._send(token)

    def _send(self, token: int) -> None:
        try:
            ask: Ask | None = self.script.send(token)
        except StopIteration:
            ask = None
        self._answer(ask)

    def _answer(self, ask: Ask | None) -> None:
        """Forced tokens need no model: they are told at once, and read later together with what follows."""
        while ask is not None and ask.forced:
            token = int(ask.legal[0])
            self._record(token, 0.0, False)
            try:
                ask = self.script.send(token)
            except StopIteration:
                ask = None
        self.ask = ask

    def _record(self, token: int, logprob: float, drawn: bool) -> None:
        self.tokens.append(token)
        self.logprobs.append(logprob)
        self.drawn.append(drawn)

    @property
    def done(self) -> bool:
        return self.ask is None


def run(model: Any, jobs: Sequence[Job], began: float | None = None) -> Iterator[list[Job]]:
    """Advance all jobs to their ends; yields, step by step, those that have new tokens.

    `began`: when the call came (`time.perf_counter`), None = now. What a job writes last stays pending in its writer: only a
    session has a use for it.
    """
    began = time.perf_counter() if began is None else began
    for job in jobs:
        job.start()
    active = [job for job in jobs if not job.done]
    yield list(jobs)
    while active:
        feed_pending(model, active)
        _draw(model, active)
        now = time.perf_counter() - began
        for job in active:
            job.first_token_s = now if job.first_token_s is None else job.first_token_s
            job.total_s = now
        yield active
        active = [job for job in active if not job.done]


@torch.inference_mode()
def feed_pending(model: Any, jobs: Sequence[Job]) -> None:
    """Read what is pending, in the guided twin as well."""
    caches, parts, after = [], [], []
    for job in jobs:
        if not job.writer.pending:
            continue
        part = joined(job.writer.pending)
        job.writer.pending = []
        caches.append(job.cache)
        parts.append(part)
        after.append((job, "hidden"))
        if job.free is not None:
            caches.append(job.free)
            parts.append(part)
            after.append((job, "free_hidden"))
    for (job, name), hidden in zip(after, extend(model, caches, parts)):
        setattr(job, name, hidden[-1])


@torch.inference_mode()
def _draw(model: Any, jobs: Sequence[Job]) -> None:
    """One token for every job, slice by slice."""
    asks = {id(job): job.ask for job in jobs}
    for where in sorted({ask.slice for ask in asks.values() if ask is not None}):
        mine = [job for job in jobs if (ask := asks[id(job)]) is not None and ask.slice == where]
        guided = [job for job in mine if _is_guided(job)]
        hidden = [job.hidden for job in mine] + [job.free_hidden for job in guided]
        rows = log_probabilities(model, torch.stack([state for state in hidden if state is not None]), where)
        free = dict(zip(map(id, guided), rows[len(mine) :]))
        first = model.config.slices[where][0]
        for job, row in zip(mine, rows):
            ask = asks[id(job)]
            assert ask is not None
            score = row
            if id(job) in free:
                score = free[id(job)] + job.sampling.guidance * (row - free[id(job)])
            is_drawn = job.sampling.temperature_of(ask.modality) > 0
            noise = uniform(job.sampling.seed, job.sample, len(job.tokens)) if is_drawn else 0.0
            seen = [token - first for token in job.seen] if ask.modality == "text" else ()
            at = draw(score, ask.legal - first, job.sampling, ask.modality, noise, seen)
            if ask.modality == "text" and job.sampling.repetition_penalty != 1.0:
                job.seen.add(at + first)
            job.tell(at + first, float(row[at]))


def _is_guided(job: Job) -> bool:
    return job.free is not None and job.ask is not None and job.ask.modality in GUIDED


def result(job: Job) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens int64, log-probabilities float32 and the drawn flags of a job."""
    return np.array(job.tokens, np.int64), np.array(job.logprobs, np.float32), np.array(job.drawn, bool)
