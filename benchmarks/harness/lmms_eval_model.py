"""weft as a model of lmms-eval (0.7.3): images, films and sound in the prompt, texts and likelihoods out.

In: requests of lmms-eval's simple interface, whose media come from the task's own function. Out: texts, and (loss, greedy).
Media stand at `<image>`, `<video>` and `<audio>` in the text, else before it, in their order. The adapter is found by the entry
point `lmms_eval.models`; lmms-eval and its pinned requirements live in an environment of their own (`make lmms-eval`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from weft.benchmarks.harness.lm_eval_model import in_batches, options
from weft.inference.generate import Request
from weft.inference.load import load
from weft.tokenizers.segment import Audio, Image, Segment, Text, Video

PLACEHOLDER = re.compile(r"(<image>|<video>|<audio>)")
SOUNDS = (".wav", ".flac", ".mp3", ".ogg")


def medium(thing: Any) -> Segment:
    """A picture, a film (a path), or a sound (a path, or a dict with samples)."""
    if isinstance(thing, str | Path):
        return Audio(Path(thing)) if Path(thing).suffix.lower() in SOUNDS else Video(Path(thing))
    if hasattr(thing, "convert"):
        return Image(thing)
    try:
        return Audio(np.asarray(thing["array"], np.float32), rate_hz=float(thing["sampling_rate"]))
    except (TypeError, KeyError):
        raise ValueError(f"lmms-eval handed a {type(thing).__name__}; weft reads PIL images, paths and sound dicts") from None


def prompt(context: str, things: Sequence[Any]) -> list[Segment]:
    """The segments of a context."""
    media = [medium(thing) for thing in things]
    pieces: list[Segment] = []
    for piece in PLACEHOLDER.split(context):
        match = next((m for m in media if f"<{m.modality}>" == piece), None)
        if match is not None:
            media = [m for m in media if m is not match]
            pieces.append(match)
        elif piece.strip():
            pieces.append(Text(piece.strip()))
    return [*media, *pieces]


@cache
def model_class() -> type[Any]:
    """The class that lmms-eval makes."""
    try:
        from lmms_eval.api.instance import GenerationResult
        from lmms_eval.api.model import lmms
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{error.name} is missing; build the environment of lmms-eval: make lmms-eval") from None

    class WeftLmms(lmms):  # type: ignore[misc, no-any-unimported]
        """`pretrained`: a checkpoint folder."""

        is_simple = True

        def __init__(self, pretrained: str, batch_size: int | str = 16, device: str | None = None, **other: Any) -> None:
            super().__init__()
            if unknown := sorted(set(other) - {"max_batch_size"}):
                raise ValueError(f"weft has no model argument {unknown[0]!r}; it has pretrained, batch_size and device")
            self.weft = load(pretrained, device=device or "auto")
            self.size = 64 if str(batch_size).startswith("auto") else int(batch_size)

        def _things(self, visual: Any, place: tuple[int, str, str]) -> list[Any]:
            doc_id, task, split = place
            return list(visual(self.task_dict[task][split][doc_id]) or []) if visual else []

        def generate_until(self, requests: list[Any]) -> list[str]:
            """Texts up to a stop string."""

            def work(args: Sequence[Any]) -> list[str]:
                asked = []
                for context, keywords, visual, *place in args:
                    found = {k: v for k, v in dict(keywords).items() if k not in ("max_new_tokens", "num_beams")}
                    found.setdefault("max_gen_toks", dict(keywords).get("max_new_tokens", 256))
                    asked.append(Request(prompt(context, self._things(visual, tuple(place))), "text", options(found)))
                return [reply.text for reply in self.weft.generate(asked)]

            return in_batches([r.args for r in requests], self.size, work)

        def loglikelihood(self, requests: list[Any]) -> list[Any]:
            """(loss, False): lmms-eval takes the choice with the least loss; no metric of its choices reads the second."""

            def work(args: Sequence[Any]) -> list[Any]:
                prompts = [prompt(a[0], self._things(a[2], tuple(a[3:6])) if len(a) > 2 else []) for a in args]
                said = [a[1](self.task_dict[a[4]][a[5]][a[3]]) if callable(a[1]) else a[1] for a in args]
                scores = self.weft.score(prompts, [[Text(str(words).lstrip())] for words in said])
                # 0.7.3 turns a bare pair into a string on its way to the metric; inside a GenerationResult it stays a pair.
                return [GenerationResult(text=(-s.total, False), token_counts=None) for s in scores]

            return in_batches([r.args for r in requests], self.size, work)

        def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
            """Refused: a dialogue needs state that lmms-eval keeps in the task."""
            raise ValueError("weft does not answer lmms-eval's multi-round tasks; choose single-round ones")

    return WeftLmms


def __getattr__(name: str) -> Any:
    if name == "WeftLmms":
        return model_class()
    if name == "MANIFEST":
        from lmms_eval.models.registry_v2 import ModelManifest

        return ModelManifest(model_id="weft", simple_class_path="weft.benchmarks.harness.lmms_eval_model.WeftLmms")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
