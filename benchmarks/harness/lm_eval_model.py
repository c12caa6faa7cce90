"""weft as a model of lm-eval (EleutherAI's harness, 0.4.13): likelihoods and texts, with images and sound in the prompt.

In: lm-eval's requests. Out: what its tasks expect, computed by the public interface. A context is one text segment (media stand
where `<image>` and `<audio>` do, else before it) and a continuation the next segment, so the space between them, which lm-eval
writes into the continuation, is the border itself and is dropped. Chat templates are off: a segment is its own template.
lm-eval is imported when `WeftLM` is first asked for.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np

from weft.inference.generate import Request
from weft.inference.load import load
from weft.tokenizers.segment import Audio, Image, Segment, Text

log = logging.getLogger(__name__)
PLACEHOLDER = re.compile(r"(<image>|<audio>)")
AUTO_BATCH = 64
IGNORED = ("do_sample", "until", "max_gen_toks", "temperature", "top_p", "top_k")


def prompt(context: str, media: dict[str, Any]) -> list[Segment]:
    """The segments of a context: text around images and sounds, in the order of their placeholders."""
    images = [Image(picture) for picture in media.get("visual") or ()]
    sounds = [_sound(sound) for sound in media.get("audio") or ()]
    pieces: list[Segment] = []
    for piece in PLACEHOLDER.split(context):
        if piece == "<image>" and images:
            pieces.append(images.pop(0))
        elif piece == "<audio>" and sounds:
            pieces.append(sounds.pop(0))
        elif piece.strip():
            pieces.append(Text(piece.strip()))
    return [*images, *sounds, *pieces]


def _sound(sound: Any) -> Audio:
    """lm-eval hands a dict, or datasets' decoder that answers the same keys."""
    return Audio(np.asarray(sound["array"], np.float32), rate_hz=float(sound["sampling_rate"]))


def in_batches(items: Sequence[Any], size: int, work: Callable[[Sequence[Any]], list[Any]]) -> list[Any]:
    """Work through items; a batch for which memory does not suffice is halved, and so are those after it."""
    out: list[Any] = []
    while len(out) < len(items):
        try:
            out += work(items[len(out) : len(out) + size])
        except (RuntimeError, MemoryError) as error:
            if size == 1 or not (isinstance(error, MemoryError) or "memory" in str(error).lower()):
                raise
            size //= 2
            log.warning("memory does not suffice, going on with batches of %d", size)
    return out


def options(gen: dict[str, Any]) -> dict[str, Any]:
    """lm-eval's generation keywords as ours."""
    until = gen.get("until") or []
    stop = [s for s in ([until] if isinstance(until, str) else until) if s]
    sampled = gen.get("do_sample", float(gen.get("temperature") or 0) > 0)
    unknown = sorted(set(gen) - set(IGNORED))
    if unknown:
        log.warning("generation keyword %s is not known to weft and is ignored", unknown[0])
    found: dict[str, Any] = {"max_tokens": int(gen.get("max_gen_toks", 256)), "stop": tuple(stop)}
    found["temperature"] = float(gen.get("temperature") or 1.0) if sampled else 0.0
    return {**found, **{key: gen[key] for key in ("top_p", "top_k") if gen.get(key) is not None and sampled}}


@cache
def model_class() -> type[Any]:
    """The class, registered with lm-eval as `weft`."""
    try:
        from lm_eval.api.model import LM
        from lm_eval.api.registry import register_model
    except ModuleNotFoundError:
        raise ModuleNotFoundError("weft lm-eval needs lm-eval; pip install 'weft[eval]'") from None

    class WeftLM(LM):  # type: ignore[misc, no-any-unimported]
        """`pretrained`: a checkpoint folder. `batch_size`: a number or "auto"."""

        MULTIMODAL = True

        def __init__(
            self,
            pretrained: str,
            batch_size: int | str = 16,
            max_batch_size: int | None = None,
            device: str | None = None,
            dtype: str = "auto",
            quantize: str | None = None,
        ) -> None:
            super().__init__()
            self.weft = load(pretrained, device=device or "auto", dtype=dtype, quantize=quantize)
            auto = str(batch_size).startswith("auto")
            self.size = (max_batch_size or AUTO_BATCH) if auto else int(batch_size)

        @property
        def tokenizer_name(self) -> str:
            """Names caches: the tokenizer's digest."""
            return str(self.weft.tokenizer.digest())

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            """(log-likelihood of the continuation, closing token included; whether greedy decoding writes it)."""
            found = in_batches([r.args for r in requests], self.size, self._likelihoods)
            return self._kept("loglikelihood", requests, found)

        def _likelihoods(self, args: Sequence[Any]) -> list[tuple[float, bool]]:
            prompts = [prompt(a[0], a[2] if len(a) > 2 else {}) for a in args]
            whats = [[Text(a[1].lstrip())] for a in args]
            scores = self.weft.score(prompts, whats)
            return [(s.total, g) for s, g in zip(scores, self._greedy(prompts, whats, scores), strict=True)]

        def _greedy(self, prompts: Sequence[Any], whats: Sequence[Any], scores: Sequence[Any]) -> list[bool]:
            """Certain where every token has more than half of the probability; else greedy decoding is asked."""
            sure = [bool((s.logprobs[s.counted] > np.log(0.5)).all()) for s in scores]
            # A token rarer than one in the whole vocabulary cannot be the most likely one.
            least = -np.log(self.weft.model.config.vocab_size)
            out = [bool((s.logprobs[s.counted] < least).any()) for s in scores]
            ask = [i for i in range(len(scores)) if not sure[i] and not out[i] and prompts[i]]
            for i in ask:
                most = max(int(scores[i].counted.sum()), 1)
                reply = self.weft.generate(list(prompts[i]), "text", temperature=0.0, max_tokens=most)
                sure[i] = reply.text == whats[i][0].text and reply.finish == "done"
            return sure

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
            """Log-likelihood of whole texts behind nothing but the opening of a document."""

            def work(args: Sequence[Any]) -> list[float]:
                return [s.total for s in self.weft.score([[] for _ in args], [[Text(a[0])] for a in args])]

            return self._kept("loglikelihood_rolling", requests, in_batches([r.args for r in requests], self.size, work))

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            """Texts up to a stop string."""

            def work(args: Sequence[Any]) -> list[str]:
                asked = [Request(prompt(a[0], a[2] if len(a) > 2 else {}), "text", options(dict(a[1]))) for a in args]
                return [reply.text for reply in self.weft.generate(asked)]

            return self._kept("generate_until", requests, in_batches([r.args for r in requests], self.size, work))

        def _kept(self, method: str, requests: list[Any], found: list[Any]) -> list[Any]:
            for request, one in zip(requests, found, strict=True):
                self.cache_hook.add_partial(method, request.args, one)
            return found

    register_model("weft")(WeftLM)
    return WeftLM


def __getattr__(name: str) -> Any:
    if name == "WeftLM":
        return model_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def command_line(argv: Sequence[str]) -> None:
    """lm-eval's own command line with `weft` registered, and as the model unless another one is named."""
    import sys

    model_class()
    from lm_eval.__main__ import cli_evaluate

    argv = list(argv)
    verb = [argv.pop(0)] if argv and argv[0] in ("run", "ls", "validate") else ["run"] if argv else []
    named = any(a in ("--model", "-m", "--config", "-C") or a.startswith(("--model=", "--config=")) for a in argv)
    if verb == ["run"] and argv and not named:
        argv = ["--model", "weft", *argv]
    before, sys.argv = sys.argv, ["lm-eval", *verb, *argv]
    try:
        cli_evaluate()
    finally:
        sys.argv = before
