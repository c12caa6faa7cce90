"""A stream without an end: push what happens with its time, act, speak or forecast at any moment, in bounded memory.

A session is one document that is being written. What is pushed is read lazily, together with the next question, so that a step
of a control loop costs one pass of the model per number of the action. Memory is bounded by the model's window and, for full
layers and landmarks, by the spec: older tokens are forgotten, which training never did if its documents were shorter.

`Sessions` advances many at once, each exactly as it would advance alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from weft.inference.engine import Job, feed_pending, run
from weft.inference.errors import ProduceError, SessionError
from weft.inference.feed import Part, clone, part_of
from weft.inference.generate import decode, reply_of, stops
from weft.inference.plans import latest, plan_of
from weft.inference.predict import QUANTILES, Forecast, ahead, check_forecast, forecast_of, legal
from weft.inference.prompts import as_segments
from weft.inference.reply import Reply
from weft.inference.request import Produce
from weft.inference.sampling import Sampling
from weft.inference.session_file import fill_session, read_session, save_session
from weft.inference.spaces import as_space
from weft.inference.writer import Script, Writer, fork
from weft.model.cache import StreamCache
from weft.tokenizers.build import StreamBuilder
from weft.tokenizers.bundle import StreamTokenizer
from weft.tokenizers.clock import segment_start, to_ns
from weft.tokenizers.plan import PRESETS
from weft.tokenizers.segment import Segment
from weft.tokenizers.stream import SegmentInfo

MOST_PENDING = 1024
"""Pushed tokens that may wait for a question before they are read anyway."""


@dataclass(frozen=True)
class SessionSpec:
    """What a session is about, and what it may remember."""

    prompt: Any = None
    """Said at the beginning: an instruction, or a demonstration."""
    space: Any = None
    """Default space of `act`: ActionSpace, n, Discrete or Box."""
    rate_hz: float | None = None
    """Default rate of pushed readings and of actions, where they do not say."""
    full_tokens: int | None = 16_384
    """Newest tokens that full layers keep (local layers keep the model's window). None: all, so memory grows."""
    landmarks: int | None = 1_024
    """Newest closing tokens kept beyond that. None: the model's `max_landmarks`."""
    sampling: Sampling = field(default_factory=Sampling)

    def __post_init__(self) -> None:
        for name in ("full_tokens", "landmarks"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise SessionError(f"{name}={value!r} must be a positive integer or None")
        if self.rate_hz is not None and not 0 < self.rate_hz < float("inf"):
            raise SessionError(f"rate_hz={self.rate_hz!r} must be a positive number")
        if self.sampling.guidance != 1.0:
            raise SessionError("guidance needs a second stream without the prompt, which a session has not; leave it out")
        if self.space is not None:
            object.__setattr__(self, "space", as_space(self.space))


@dataclass(frozen=True)
class Snapshot:
    """A moment of a session; `Session.restore` goes back to it, any number of times."""

    cache: StreamCache
    builder: StreamBuilder
    pending: tuple[Part, ...]
    hidden: Tensor | None
    questions: int
    now: int | None


class Session:
    """One endless document."""

    def __init__(self, model: Any, tokenizer: StreamTokenizer, spec: SessionSpec | None = None, digest: str = "") -> None:
        """`digest` names the model's weights, for files."""
        self.model, self.tokenizer, self.spec, self.digest = model, tokenizer, spec or SessionSpec(), digest
        self.cache = model.new_cache()
        config, store = model.config, self.cache.full
        if self.spec.full_tokens is not None:
            # Never less than the local layers see.
            store.window = max(self.spec.full_tokens, config.window or 0)
        marks = [n for n in (self.spec.landmarks, config.max_landmarks) if n is not None]
        self.cache.local.max_landmarks = store.max_landmarks = min(marks, default=None)
        self.writer = Writer(tokenizer, tokenizer.builder())
        self.writer.pending.append(part_of(self.writer.builder.open()))
        self.hidden: Tensor | None = None
        self.questions = 0
        """How often something was drawn: the sample number of the next draw."""
        self.now: int | None = None
        """ns of the latest clocked segment."""
        if self.spec.prompt is not None:
            self.push(self.spec.prompt)

    def __len__(self) -> int:
        """Tokens so far, read or waiting."""
        return self.cache.length + sum(len(part) for part in self.writer.pending)

    def nbytes(self) -> int:
        """Bytes of the cache: flat once the window and the landmark store are full."""
        return int(self.cache.nbytes())

    def push(self, what: Any, time: Any = None, own: bool = False) -> None:
        """Something happened: a string, a segment or a list of these; `time` is when (ns as int, seconds as float, datetime).

        Times may not go backwards. What has no time stands where it is pushed. `own` writes it as if the model had produced it
        (codes without features): an action that it took in an earlier session, for example.
        """
        segments = as_segments(what, "pushed segment")
        if time is not None and len(segments) != 1:
            raise SessionError(f"time= says when one segment happened, got {len(segments)}; give each its own start")
        for segment in segments:
            start = segment.start if time is None else time
            self._push(replace(segment, role="target" if own else "observed", start=start))
        if sum(len(part) for part in self.writer.pending) > MOST_PENDING:
            self.read()

    def _push(self, segment: Segment) -> None:
        if segment.modality not in self.tokenizer.tokenizers:
            raise SessionError(f"this model does not read {segment.modality}; it reads {', '.join(self.tokenizer.tokenizers)}")
        start = segment_start(segment)
        if start is not None and self.now is not None and start < self.now:
            raise SessionError(
                f"a {segment.modality} segment starts {(self.now - start) / 1e9:.3f} s before the latest one; "
                "push in order of time"
            )
        (item,) = self.tokenizer.prepare([segment])
        stream = self.writer.builder.add([item], PRESETS["instruct"] if segment.role == "target" else None)
        if stream is not None:
            self.writer.pending.append(part_of(stream))
        self.now = start if start is not None else self.now
        self._forget()

    def read(self) -> None:
        """Read what is waiting now, not with the next question."""
        job = self._job(None, 0)
        feed_pending(self.model, [job])
        self.hidden = job.hidden

    def state(self) -> Tensor:
        """[D]: the hidden state after everything so far."""
        self.read()
        assert self.hidden is not None
        return self.hidden

    # -- questions

    def act(self, space: Any = None, time: Any = None) -> np.ndarray:
        """One legal action, which becomes part of the stream: int64 scalar, or float64 [dims].

        `time` is when it is taken; None = at the latest reading, frame or sound of the stream.
        """
        return Sessions([self]).act(space, time)[0]

    def say(self, max_tokens: int = 256, **options: Any) -> Reply:
        """Speak now: the text becomes part of the stream. `options` as in `produce`."""
        return self.produce(Produce("text", max_tokens=max_tokens), **options)

    def produce(self, item: Produce | str, **options: Any) -> Reply:
        """Write any segment into the stream. `options` are those of `Sampling` but guidance, and `stop`."""
        return Sessions([self]).produce([item], **options)[0]

    def forecast(
        self, horizon: int | float, samples: int = 16, kind: str | None = None, quantiles: Sequence[float] = QUANTILES
    ) -> Forecast:
        """How a sensor goes on for `horizon` readings (int) or seconds (float). The stream stays as it is."""
        check_forecast(horizon, samples, quantiles)
        item = ahead(horizon, (), kind, self._rate(kind))
        plan_of(item, self.tokenizer, self.writer.builder.info)
        self.read()
        twins = [self.fork() for _ in range(samples)]
        sampling = replace(self.spec.sampling, temperature=self.spec.sampling.temperature or 1.0)
        jobs = [twin._job(item, i, sampling) for i, twin in enumerate(twins)]
        for _ in run(self.model, jobs):
            pass
        self.questions += 1
        sensors = [decode(self.tokenizer, job.writer.written)[0] for job in jobs]
        return forecast_of(sensors, quantiles)

    def _rate(self, kind: str | None) -> float | None:
        mine = [i for i in self.writer.builder.info if i.modality == "sensor" and kind in (None, i.fields.get("kind"))]
        return (mine[-1].fields.get("rate_hz") if mine else None) or self.spec.rate_hz

    # -- moments

    def snapshot(self) -> Snapshot:
        """This moment."""
        pending = tuple(self.writer.pending)
        return Snapshot(clone(self.cache), fork(self.writer.builder), pending, self.hidden, self.questions, self.now)

    def restore(self, moment: Snapshot) -> None:
        """Go back to a moment of this session or of one with the same spec and model."""
        if not isinstance(moment, Snapshot):
            raise SessionError(f"restore takes what snapshot() gave, got {type(moment).__name__}; load_session reads a file")
        self._begin_at(replace(moment, cache=clone(moment.cache), builder=fork(moment.builder)))

    def _begin_at(self, moment: Snapshot) -> None:
        """Go on from a moment that is nobody else's."""
        self.cache, self.hidden = moment.cache, moment.hidden
        self.writer = Writer(self.tokenizer, moment.builder)
        self.writer.pending = list(moment.pending)
        self.questions, self.now = moment.questions, moment.now

    def fork(self) -> Session:
        """An independent session that begins at this moment."""
        twin = object.__new__(Session)
        twin.model, twin.tokenizer, twin.spec, twin.digest = self.model, self.tokenizer, self.spec, self.digest
        twin._begin_at(self.snapshot())
        return twin

    def save(self, path: str | Path) -> None:
        """Write this moment into one file (safetensors and JSON), published by one rename; `load` goes on from it."""
        save_session(self, path)

    @classmethod
    def load(cls, model: Any, tokenizer: StreamTokenizer, path: str | Path, digest: str = "") -> Session:
        """The session that `save` wrote, bit for bit. Raises `SessionFileError` for another model's, or a torn file."""
        saved = read_session(path)
        session = cls(model, tokenizer, SessionSpec(**saved.spec), digest)
        fill_session(session, saved)
        return session

    # -- inside

    def _job(self, item: Produce | None, sample: int, sampling: Sampling | None = None) -> Job:
        script = self._script(item)
        return Job(self.writer, script, sampling or self.spec.sampling, self.cache, self.hidden, sample)

    def _script(self, item: Produce | None) -> Script:
        if item is not None:
            yield from self.writer.write(plan_of(item, self.tokenizer, self.writer.builder.info))

    def _asked(self, job: Job) -> None:
        """Take over what a job has read and written."""
        self.hidden, self.questions = job.hidden, self.questions + 1
        for info in job.writer.written[-1].info[-1:]:
            self.now = max((t for t in (self.now, info.start) if t is not None), default=None)
        self.writer.written, self.writer.limited, self.writer.stopped, self.writer.stop = [], False, False, ()
        self._forget()

    def _forget(self) -> None:
        """Keep the last segment of each kind: what plans look at. A session of days holds a handful of infos."""
        last: dict[tuple[str, Any], SegmentInfo] = {}
        for info in self.writer.builder.info:
            key = (info.modality, info.fields.get("kind"))
            last.pop(key, None)
            last[key] = info
        self.writer.builder.info = tuple(last.values())


class Sessions:
    """Many sessions of one model, advanced together."""

    def __init__(self, sessions: Sequence[Session]) -> None:
        self.sessions = list(sessions)
        if not self.sessions:
            raise SessionError("Sessions needs at least one session")
        if len({id(s) for s in self.sessions}) != len(self.sessions):
            raise SessionError("one session appears twice; fork() it first")
        if len({id(s.model) for s in self.sessions}) != 1:
            raise SessionError("sessions of different models cannot advance together")

    def __len__(self) -> int:
        return len(self.sessions)

    def push(self, whats: Sequence[Any], time: Any = None) -> None:
        """One thing for each session."""
        if len(whats) != len(self.sessions):
            raise SessionError(f"{len(self.sessions)} sessions need as many things to push, got {len(whats)}")
        for session, what in zip(self.sessions, whats):
            session.push(what, time)

    def act(self, space: Any = None, time: Any = None) -> list[np.ndarray]:
        """One legal action of every session."""
        items, spaces = [], []
        for session in self.sessions:
            wanted = as_space(space) if space is not None else session.spec.space
            if wanted is None:
                raise ProduceError("act() needs a space: give act(space) or SessionSpec(space=...)")
            now = latest(session.writer.builder.info) if time is None else to_ns(time, "time of the action")
            if now is not None and session.now is not None and now < session.now:
                raise SessionError(
                    f"an action {(session.now - now) / 1e9:.3f} s before the latest segment; act in order of time"
                )
            items.append(Produce("action", space=wanted, start=now, rate_hz=session.spec.rate_hz))
            spaces.append(wanted)
        replies = self.produce(items)
        return [legal(reply.action, wanted) for reply, wanted in zip(replies, spaces)]

    def produce(self, items: Sequence[Produce | str], stop: Any = (), **options: Any) -> list[Reply]:
        """One segment of every session, written into its stream. `stop` ends a text, as in `generate`."""
        if len(items) != len(self.sessions):
            raise SessionError(f"{len(self.sessions)} sessions need as many things to produce, got {len(items)}")
        ends = stops(stop)
        drawn = [_sampling(session.spec.sampling, options) for session in self.sessions]
        wanted = [item if isinstance(item, Produce) else Produce(item) for item in items]
        for session, item in zip(self.sessions, wanted):
            plan_of(item, session.tokenizer, session.writer.builder.info)
        jobs = []
        for session, item, sampling in zip(self.sessions, wanted, drawn):
            session.writer.stop = ends
            jobs.append(session._job(item, session.questions, sampling))
        lengths = [len(session) for session in self.sessions]
        for _ in run(self.sessions[0].model, jobs):
            pass
        replies = []
        for session, job, length in zip(self.sessions, jobs, lengths):
            replies.append(reply_of(job, session.tokenizer, length, ends))
            session._asked(job)
        return replies


def _sampling(base: Sampling, options: dict[str, Any]) -> Sampling:
    """The session's sampling with what this call says."""
    if not options:
        return base
    names = tuple(f.name for f in fields(Sampling) if f.name != "guidance")
    if unknown := sorted(options.keys() - set(names)):
        raise SessionError(f"a session draws without {unknown[0]!r}; it takes stop, {', '.join(names)}")
    return replace(base, **options)
