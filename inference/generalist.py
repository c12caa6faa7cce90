"""One model with its tokenizers: everything a user calls.

    import weft
    model = weft.load("runs/quickstart")
    model.generate(["What is this?", weft.Image("photo.png")]).text
    model.generate("draw a seven", produce="image").image
    model.predict([weft.Audio("word.wav")], choices=["yes", "no"]).best

A prompt is a string, a segment, a document, or a list that mixes them. A list of lists (or of documents) is a batch of prompts.
A result never depends on what else is in the batch, and the methods may be called from any number of threads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from weft.inference import embed as embedding
from weft.inference import predict as predicting
from weft.inference.errors import IndexFileError, ProduceError, PromptError, SessionError
from weft.inference.explain import Explanation, explain
from weft.inference.generate import Request, check, generate
from weft.inference.index import Hit, Index
from weft.inference.index_server import ServerIndex
from weft.inference.prompts import as_segments, encode, is_batch
from weft.inference.reply import Reply
from weft.inference.rollout import EpisodeSpec, Rollout, rollout
from weft.inference.score import Score, continuation, log_likelihoods
from weft.inference.session import Session, SessionSpec
from weft.inference.spaces import as_space
from weft.inference.streaming import pieces
from weft.inference.values import is_number
from weft.tokenizers.bundle import StreamTokenizer
from weft.tokenizers.segment import Segment


@dataclass(frozen=True)
class Found:
    """What `search_or_create` gives: a hit, or a reply where nothing was near enough."""

    hits: tuple[Hit, ...]
    reply: Reply | None

    @property
    def created(self) -> bool:
        return self.reply is not None


class Generalist:
    """A loaded model. Made by `weft.load`."""

    def __init__(self, model: Any, tokenizer: StreamTokenizer, digest: str = "") -> None:
        """`model` is a `Transformer` in evaluation mode whose sizes fit `tokenizer`; `digest` names its weights."""
        self.model, self.tokenizer, self.digest = model.eval(), tokenizer, digest

    def __repr__(self) -> str:
        config = self.model.config
        names = ", ".join(self.modalities)
        return f"Generalist({names}; width {config.width}, {config.layers} layers, {self.model.device})"

    @property
    def modalities(self) -> tuple[str, ...]:
        """What it reads."""
        return tuple(self.tokenizer.tokenizers)

    @property
    def produces(self) -> tuple[str, ...]:
        """What it can produce."""
        return tuple(name for name, tokenizer in self.tokenizer.tokenizers.items() if tokenizer.size)

    # -- generate

    def generate(self, prompt: Any, produce: Any = "text", *, stream: bool = False, **options: Any) -> Any:
        """Continue a prompt.

        `produce`: "text", "image", "video", "audio", "sensor", "action", a `Produce` with sizes, an `Image` or `Audio` to edit
        (with `keep=`), a list of these in order, or "any".
        Options: `max_tokens min_tokens grid seconds readings channels kind rate_hz start space keep` say what is produced (see
        `Produce`); `temperature top_k top_p min_p repetition_penalty guidance seed` how it is drawn (see `Sampling`); `stop`
        ends a text at a string; `n` replies per prompt.
        Returns a `Reply`, a list of n where n > 1, one of these per prompt for a batch of prompts or of `Request`s; with
        `stream=True` an iterator of `Piece`s (one prompt, n = 1).
        """
        if stream:
            if is_batch(prompt) or options.get("n", 1) != 1:
                raise PromptError(
                    "stream=True takes one prompt and n=1; call generate once per prompt, from threads if you like"
                )
            task = check(self.tokenizer, Request(prompt, produce, options))
            return pieces(self.model, self.tokenizer, task)
        if isinstance(prompt, Request):
            prompt = [prompt]
            return self._replies(self._requests(prompt, produce, options))[0]
        if isinstance(prompt, list | tuple) and any(isinstance(p, Request) for p in prompt):
            return self._replies(self._requests(prompt, produce, options))
        if is_batch(prompt):
            return self._replies([Request(p, produce, options) for p in prompt])
        return self._replies([Request(prompt, produce, options)])[0]

    def _requests(self, prompts: Sequence[Any], produce: Any, options: Mapping[str, Any]) -> list[Request]:
        """Requests with the call's options as defaults."""
        if any(not isinstance(p, Request) for p in prompts):
            raise PromptError("a batch of requests holds something else; make every member a Request")
        return [Request(r.prompt, r.produce, {**options, **r.options}) for r in prompts]

    def _replies(self, requests: Sequence[Request]) -> list[Any]:
        groups = generate(self.model, self.tokenizer, requests)
        return [replies if len(replies) > 1 else replies[0] for replies in groups]

    # -- predict and score

    def predict(
        self,
        prompt: Any,
        *,
        choices: Sequence[Any] | None = None,
        horizon: int | float | None = None,
        action: Any = None,
        samples: int = 16,
        **options: Any,
    ) -> Any:
        """Exactly one of three questions about a prompt (or about each prompt of a batch).

        `choices` (strings, segments or lists of these; one list for all prompts): a `Choice` with probabilities.
        `horizon` (readings as int, seconds as float), with `kind`, `rate_hz`, `samples`, `quantiles`: a `Forecast` in units.
        `action` (an ActionSpace, n, Discrete or Box): one legal action, or an error.
        """
        asked = [name for name, value in (("choices", choices), ("horizon", horizon), ("action", action)) if value is not None]
        if len(asked) != 1:
            raise ProduceError(f"predict needs exactly one of choices=, horizon= and action=, got {asked or 'none'}")
        batch = is_batch(prompt)
        prompts = list(prompt) if batch else [prompt]
        if choices is not None:
            if options:
                raise ProduceError(f"predict(choices=) has no option {sorted(options)[0]!r}")
            if isinstance(choices, str | Segment):
                raise ProduceError("choices must be a list; one choice alone has probability one")
            choices = list(choices)
            found: list[Any] = list(predicting.choose(self.model, self.tokenizer, prompts, [choices] * len(prompts)))
        elif horizon is not None:
            found = list(predicting.forecast(self.model, self.tokenizer, prompts, horizon, samples, dict(options)))
        else:
            space = as_space(action)
            found = list(predicting.act(self.model, self.tokenizer, prompts, [space] * len(prompts), dict(options)))
        return found if batch else found[0]

    def score(self, prompt: Any, continuation_: Any) -> Any:
        """Log-probabilities of a continuation (string, segments or a `Reply`); a batch of prompts takes one each.

        An empty prompt scores the continuation alone.
        """
        batch = is_batch(prompt)
        prompts, whats = (list(prompt), list(continuation_)) if batch else ([prompt], [continuation_])
        if len(prompts) != len(whats):
            raise PromptError(f"{len(prompts)} prompts need as many continuations, got {len(whats)}")
        encoded = [encode(self.tokenizer, p, may_be_empty=True) for p in prompts]
        streams = [[continuation(self.tokenizer, p, what)] for p, what in zip(encoded, whats)]
        scores: list[Score] = [one[0] for one in log_likelihoods(self.model, self.tokenizer, encoded, streams)]
        return scores if batch else scores[0]

    # -- search

    def embed(self, items: Any) -> np.ndarray:
        """float32 [n E], rows of length one: a single item, or a list of items. A list inside the list is one document."""
        many = list(items) if isinstance(items, list | tuple) else [items]
        if not many:
            raise PromptError("there is nothing to embed; give at least one item")
        return embedding.embed(self.model, self.tokenizer, many)

    def index(self, items: Mapping[str, Any] | None = None, kind: str = "flat") -> Index:
        """A search index of this model's vectors, filled with `items` (key -> anything that can be embedded)."""
        return self._filled(Index(self.model.config.embed_width, kind, self.digest), items)

    def _filled(self, index: Any, items: Mapping[str, Any] | None) -> Any:
        if items is not None and not isinstance(items, Mapping):
            raise PromptError(f"items is a {type(items).__name__}; give a mapping from keys to what shall be found")
        if items:
            index.add(list(items), self.embed(list(items.values())))
        return index

    def load_index(self, path: str | Path) -> Index:
        """An index from a file, if this model made it."""
        index = Index.load(path)
        self._mine(index, str(path))
        return index

    def _mine(self, index: Index | ServerIndex, what: str) -> None:
        """Vectors of two models cannot be compared. An index that does not say its model is taken as it is."""
        if index.model and index.model != self.digest:
            raise IndexFileError(f"{what} was made by another model ({index.model[:16]}); embed the items again with this one")

    def server_index(
        self, url: str, name: str, items: Mapping[str, Any] | None = None, kind: str = "flat", make: bool = True
    ) -> ServerIndex:
        """The same on a PostgreSQL server with pgvector (extra `server`): opened if it exists, else made; `items` are added."""
        return self._filled(ServerIndex(url, name, self.model.config.embed_width, kind, self.digest, make), items)

    def search(self, index: Index | ServerIndex, query: Any, k: int = 10) -> list[Hit]:
        """The k items of `index` nearest to one query of any modality. An index of another model is refused."""
        self._mine(index, "this index")
        return index.search(self.embed([query]), k)[0]

    def search_or_create(
        self, index: Index | ServerIndex, query: Any, produce: Any = "text", *, threshold: float, k: int = 1, **options: Any
    ) -> Found:
        """Hits at least `threshold` near (inner product, -1 to 1); if there are none, a new reply to the query."""
        if not (is_number(threshold) and -1.0 <= threshold <= 1.0):
            raise ProduceError(f"threshold={threshold!r} must lie between -1 and 1")
        near = tuple(hit for hit in self.search(index, query, k) if hit.score >= threshold)
        return Found(near, None if near else self.generate(query, produce, **options))

    def explain(self, prompt: Any, reply: Any) -> Explanation:
        """Which segments mattered for a reply, who looked at whom, which experts worked; `.save(path)` writes a page."""
        return explain(self.model, self.tokenizer, prompt, reply)

    # -- streams without an end

    def session(self, spec: SessionSpec | None = None, **options: Any) -> Session:
        """An endless stream: push, act, say, forecast. `options` are the fields of `SessionSpec`."""
        names = [field.name for field in fields(SessionSpec)]
        if unknown := sorted(options.keys() - set(names)):
            raise SessionError(f"a session has no option {unknown[0]!r}; it has {', '.join(names)}")
        return Session(self.model, self.tokenizer, replace(spec, **options) if spec else SessionSpec(**options), self.digest)

    def load_session(self, path: str | Path) -> Session:
        """A session that `session.save(path)` wrote with this model; it goes on bit for bit."""
        return Session.load(self.model, self.tokenizer, path, self.digest)

    def rollout(
        self,
        env: Any,
        spec: EpisodeSpec,
        episodes: int,
        *,
        demonstrations: Sequence[Any] = (),
        max_steps: int = 1000,
        seed: int = 0,
        batch: int = 64,
    ) -> Rollout:
        """Act in `episodes` episodes of a gymnasium environment (an id, or a function that makes one), side by side."""
        return rollout(self.model, self.tokenizer, env, spec, episodes, demonstrations, max_steps, seed, batch)

    def segments(self, prompt: Any) -> tuple[Segment, ...]:
        """What a prompt is read as."""
        return as_segments(prompt)
