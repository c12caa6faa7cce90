"""Prompts in, replies out: any modalities, interleaved, streamed, in batches of mixed tasks.

Prompts are read once, whatever n is; all replies then advance together (`engine.py`), each as it would alone. What comes out
can be decoded, because nothing outside the grammar can be drawn.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from weft.inference.engine import Job, result, run
from weft.inference.errors import PromptError, SamplingError
from weft.inference.feed import clone
from weft.inference.plans import plan_of, producible
from weft.inference.prompts import Prompt, bare, encode, prefill
from weft.inference.reply import Finish, Reply, Timings
from weft.inference.request import Produce, requested
from weft.inference.sampling import Sampling
from weft.inference.values import is_integer
from weft.inference.writer import Script, Writer, fork
from weft.tokenizers.bundle import StreamTokenizer
from weft.tokenizers.segment import Action, Segment, Sensor, Text, Video
from weft.tokenizers.stream import Stream

_SAMPLING = tuple(f.name for f in fields(Sampling))
_PRODUCE = tuple(f.name for f in fields(Produce) if f.name not in ("modality", "edit"))
OPTIONS = (*_SAMPLING, *_PRODUCE, "stop", "n")
"""Every option of `generate` beside prompt and produce."""


@dataclass(frozen=True)
class Request:
    """One prompt with its own task: a list of these is a batch of mixed tasks."""

    prompt: Any
    produce: Any = "text"
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of `generate`, by name."""


@dataclass(frozen=True)
class Task:
    """A checked request."""

    prompt: Prompt
    items: tuple[Produce, ...] | None
    sampling: Sampling
    stop: tuple[str, ...]
    n: int
    most: int
    """Body tokens of a whole `produce="any"` reply."""


def check(tokenizer: StreamTokenizer, request: Request) -> Task:
    """Everything that can be wrong with a request is found here, before the model runs."""
    options = {name: value for name, value in request.options.items() if value is not None}
    if unknown := sorted(options.keys() - set(OPTIONS)):
        raise SamplingError(f"generate has no option {unknown[0]!r}; it has {', '.join(sorted(OPTIONS))}")
    n = options.get("n", 1)
    if not is_integer(n) or not 1 <= n <= 4096:
        raise SamplingError(f"n={n!r} must be an integer from 1 to 4096")
    stop = stops(options.get("stop", ()))
    sampling = Sampling(**{name: options[name] for name in _SAMPLING if name in options})
    about = {name: options[name] for name in _PRODUCE if name in options}
    items = requested(request.produce, about)
    most = Produce("text", max_tokens=about.get("max_tokens")).most if items is None else 0
    prompt = encode(tokenizer, request.prompt)
    if items is not None:
        info = prompt.stream.info
        for item in items:
            plan_of(item, tokenizer, info)
    elif not producible(tokenizer, prompt.stream.info, most):
        raise PromptError("this model can produce nothing: none of its tokenizers has codes")
    return Task(prompt, items, sampling, stop, int(n), most)


def stops(stop: Any) -> tuple[str, ...]:
    """One string or several, each with at least one character."""
    found = (stop,) if isinstance(stop, str) else tuple(stop) if isinstance(stop, Iterable) else (stop,)
    if any(not isinstance(s, str) or not s for s in found):
        raise SamplingError(f"stop={stop!r} must be a non-empty string, or several of them")
    return found


def start(model: Any, tokenizer: StreamTokenizer, tasks: Sequence[Task]) -> list[list[Job]]:
    """n jobs for every task; a prompt is read once."""
    filled = prefill(model, [task.prompt for task in tasks])
    twin = bare(model, tokenizer) if any(task.sampling.guidance != 1.0 for task in tasks) else None
    groups = []
    for task, (cache, hidden) in zip(tasks, filled):
        jobs = []
        for sample in range(task.n):
            writer = Writer(tokenizer, fork(task.prompt.builder), task.stop)
            jobs.append(
                Job(
                    writer,
                    script(task, tokenizer, writer),
                    task.sampling,
                    cache if sample == task.n - 1 else clone(cache),
                    hidden,
                    sample,
                    free=clone(twin[0]) if twin and task.sampling.guidance != 1.0 else None,
                    free_hidden=twin[1] if twin else None,
                    seen=task.prompt.text_ids(tokenizer) if task.sampling.repetition_penalty != 1.0 else set(),
                )
            )
        groups.append(jobs)
    return groups


def script(task: Task, tokenizer: StreamTokenizer, writer: Writer) -> Script:
    """What one reply writes, in order; sizes that follow earlier segments are resolved when their turn comes."""
    if task.items is None:
        yield from writer.write_any(lambda: producible(tokenizer, writer.builder.info, task.most), task.most)
        return
    for item in task.items:
        yield from writer.write(plan_of(item, tokenizer, writer.builder.info))


def generate(model: Any, tokenizer: StreamTokenizer, requests: Sequence[Request]) -> list[list[Reply]]:
    """n replies for every request, in order."""
    began = time.perf_counter()
    tasks = [check(tokenizer, request) for request in requests]
    groups = start(model, tokenizer, tasks)
    for _ in run(model, [job for jobs in groups for job in jobs], began):
        pass
    return [[finish(job, tokenizer, task) for job in jobs] for task, jobs in zip(tasks, groups)]


def steps(model: Any, tokenizer: StreamTokenizer, task: Task) -> Iterator[Job]:
    """One reply, step by step, for streaming. Abandoning the iterator frees everything it holds."""
    began = time.perf_counter()
    ((job,),) = start(model, tokenizer, [task])
    for _ in run(model, [job], began):
        yield job


def finish(job: Job, tokenizer: StreamTokenizer, task: Task) -> Reply:
    """A finished job as a reply."""
    return reply_of(job, tokenizer, len(task.prompt.stream), task.stop)


def reply_of(job: Job, tokenizer: StreamTokenizer, prompt_tokens: int, stop: tuple[str, ...]) -> Reply:
    """What a finished job has written, decoded."""
    tokens, logprobs, drawn = result(job)
    parts = tuple(job.writer.written)
    segments = tuple(trim(s, stop) for s in decode(tokenizer, parts))
    timings = Timings(job.first_token_s or 0.0, job.total_s, prompt_tokens, len(tokens))
    why: Finish = "stop" if job.writer.stopped else "max_tokens" if job.writer.limited else "done"
    return Reply(segments, tokens, logprobs, drawn, why, timings, parts)


def decode(tokenizer: StreamTokenizer, parts: Sequence[Stream]) -> list[Segment]:
    """The segments of finished parts."""
    out = []
    for part in parts:
        for info, codes in tokenizer.segments(part):
            segment = tokenizer.decode_segment(codes, info)
            # One reading or action of a segment without a clock is no clock either.
            timed = info.start is None and isinstance(segment, Sensor | Action | Video) and segment.times is not None
            out.append(replace(segment, times=None) if timed else segment)  # type: ignore[call-arg]
    return out


def trim(segment: Segment, stop: tuple[str, ...]) -> Segment:
    """Text without the stop string that ended it."""
    return replace(segment, text=cut(segment.text, stop)) if isinstance(segment, Text) else segment


def cut(text: str, stop: tuple[str, ...]) -> str:
    """The text before the first of the stop strings."""
    return text[: min((at for s in stop if (at := text.find(s)) >= 0), default=len(text))]
