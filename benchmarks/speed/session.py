"""A session of 100,000 tokens: step time, memory and answer, which must not depend on how long it has run.

In: the `tiny` preset with random weights, one sensor reading pushed and one action asked for per step (11 tokens). Out: (1) the
median step of the last tenth against that of the first tenth after memory is full, with the step at every tenth beside it;
(2) bytes of the cache and of the process, last against first tenth; (3) a control step of 16 sessions in one call against 16
calls; (4) for a one-layer model, whose tokens know nothing but the keys they see, the hidden state after the whole session
against a fresh model that reads only what can still be seen: the error must be rounding.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import torch

from weft.benchmarks.speed.inference import tiny
from weft.benchmarks.speed.report import Row, compare, finish, measure, speed_parser, start
from weft.inference import feed
from weft.inference.generalist import Generalist
from weft.inference.session import Session, Sessions
from weft.tokenizers.segment import Action, ActionSpace, Sensor

STEP_NS = 20_000_000
STEP_TOKENS = 11
FULL_TOKENS, LANDMARKS = 512, 128
SPEC: dict[str, Any] = {"space": 4, "rate_hz": 50.0, "full_tokens": FULL_TOKENS, "landmarks": LANDMARKS}


def reading(step: int) -> Sensor:
    """What happens at a step: four random channels, the same in every run."""
    return Sensor(np.random.default_rng(step).normal(size=(1, 4)), rate_hz=50.0, kind="plant")


def resident_bytes() -> int:
    """Bytes of this process in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def long_session(model: Generalist, tokens: int) -> list[Row]:
    """One session of `tokens` tokens, timed step by step."""
    session = model.session(**SPEC)
    steps = tokens // STEP_TOKENS
    took, held, resident = np.zeros(steps), np.zeros(steps, np.int64), np.zeros(steps, np.int64)
    for k in range(steps):
        begin = time.perf_counter()
        session.push(reading(k), k * STEP_NS)
        session.act()
        took[k] = time.perf_counter() - begin
        held[k] = session.nbytes()
        resident[k] = resident_bytes() if k % 64 == 0 else resident[k - 1]
    full = min(2 * FULL_TOKENS // STEP_TOKENS, steps // 4)  # memory is full from here on
    tenths = np.array_split(np.arange(full, steps), 10)
    by_tenth = {f"step_ms_{i}": 1e3 * statistics.median(took[part].tolist()) for i, part in enumerate(tenths)}
    early, late = (statistics.median(took[tenths[i]].tolist()) for i in (0, -1))
    name = f"step at {len(session):,} tokens against {full * STEP_TOKENS:,}"
    growth = f"{1e3 * np.quantile(took[full:], 0.99):.2f} ms at the 99th percentile"
    first, last = (resident[tenths[i]].max() / 2**20 for i in (0, -1))
    cache = [float(held[tenths[i]].max()) / 2**20 for i in (0, -1)]
    return [
        compare(name, late, early, must=0.8, aim=1.0, note=growth, extra=by_tenth),
        compare("bytes of the cache, last tenth against first", cache[1], cache[0], unit="MiB", must=1.0),
        compare("bytes of the process, last tenth against first", last, first, unit="MiB", must=0.95),
    ]


def together(model: Generalist, count: int, rounds: int) -> Row:
    """A step of `count` sessions in one call against one call each."""
    group = Sessions([model.session(**SPEC) for _ in range(count)])
    alone = [model.session(**SPEC) for _ in range(count)]
    clock = {"ours": 0, "rival": 0}

    def step(who: str) -> None:
        k = clock[who] = clock[who] + 1
        if who == "ours":
            group.push([reading(k)] * count, k * STEP_NS)
            group.act()
            return
        for session in alone:
            session.push(reading(k), k * STEP_NS)
            session.act()

    took = measure({who: partial(step, who) for who in clock}, rounds=rounds, warmup=20)
    return compare(f"a step of {count} sessions: one call against {count}", took["ours"], took["rival"], must=2.0)


def still_seen(parts: Sequence[feed.Part], window: int, landmarks: int) -> feed.Part:
    """Of a document's tokens, those whose keys its next token can see: the newest `window` and the newest `landmarks`."""
    whole = feed.joined(parts)
    count = len(whole)
    seen = np.union1d(np.flatnonzero(whole.landmark)[-landmarks:], np.arange(max(count - window, 0), count))
    rows = {name: getattr(whole, name)[seen] for name in feed.ROW}
    features, places = {}, {}
    for name, at in whole.feature_at.items():
        kept = np.flatnonzero(np.isin(at, seen))
        features[name], places[name] = whole.features[name][kept], np.searchsorted(seen, at[kept])
    return feed.Part(**rows, features=features, feature_at=places)


def written(session: Session, steps: int) -> list[feed.Part]:
    """Push `steps` readings and own actions, read every one, and return all that was written."""
    parts: list[feed.Part] = []
    space = ActionSpace(n=4)
    for k in range(steps):
        session.push(reading(k), k * STEP_NS)
        session.push(Action(np.array([k % 4]), space, rate_hz=50.0), k * STEP_NS, own=True)
        parts += session.writer.pending
        session.read()
    return parts


def same_answer(tokens: int) -> Row:
    """One layer: the state after `tokens` tokens against a fresh model over what is still seen."""
    model = tiny(layers=1, full_every=0, window=256, max_landmarks=64)
    session = Session(model.model, model.tokenizer)
    begin = time.perf_counter()
    parts = written(session, tokens // STEP_TOKENS)
    took = time.perf_counter() - begin
    state = session.state()
    with torch.inference_mode():
        (hidden,) = feed.extend(model.model, [model.model.new_cache()], [still_seen(parts, 256, 64)])
    error = float((hidden[-1] - state).abs().max() / state.abs().max())
    note = f"{len(session):,} tokens in {took:.0f} s"
    return Row("state of a long session against a fresh model", None, None, "", None, error=error, note=note)


def main() -> None:
    """Run the table."""
    parser = speed_parser("session", __doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=None, help="length of the session (default 100,000; 6,000 with --quick)")
    args = parser.parse_args()
    start(args)
    tokens = args.tokens or (6_000 if args.quick else 100_000)
    model = tiny(max_landmarks=LANDMARKS)
    rows = [*long_session(model, tokens), together(model, 16, 20 if args.quick else 100), same_answer(tokens)]
    finish(rows, args)
    for name, value in asdict(rows[0])["extra"].items():
        print(f"{name:>12}  {value:.3f}")


if __name__ == "__main__":
    main()
