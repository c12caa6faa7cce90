"""Any transformers causal or vision-language model with the methods of `Generalist` that a task in words calls.

In: prompts of text segments, and of images where the model sees. Out: texts, ranked choices, likelihoods. Prompts go through
the model's own tokenizer or processor one by one and through the model in batches: likelihoods filled up on the right, texts
on the left, so that what stands in a batch changes a score by rounding alone. Remote code is never run and nothing is
unpickled (safetensors only). transformers is imported inside.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from weft.benchmarks.harness.specialist import Written
from weft.benchmarks.harness.task import Task
from weft.tokenizers.media.image import load_image
from weft.tokenizers.segment import Image, Segment, Text

ROWS = 32
"""Sequences that go through the model together at most."""
Inputs = dict[str, Any]
"""What a processor gives for one prompt: `input_ids` [1 L], others of that shape, pixels and their sizes."""


@dataclass(frozen=True)
class Ranked:
    """A choice, as `Generalist.predict` gives it."""

    choices: tuple[str, ...]
    logprobs: np.ndarray
    lengths: np.ndarray

    @property
    def probabilities(self) -> np.ndarray:
        """float64 [choices]."""
        weight = np.exp(self.logprobs - self.logprobs.max())
        return np.asarray(weight / weight.sum())

    @property
    def best(self) -> str:
        """The most likely one."""
        return self.choices[int(np.argmax(self.logprobs))]

    @property
    def best_normalized(self) -> str:
        """The most likely one per token."""
        return self.choices[int(np.argmax(self.logprobs / self.lengths))]


@dataclass(frozen=True)
class TextScore:
    """A score, as `Generalist.score` gives it, of text alone."""

    logprobs: np.ndarray
    text_bytes: int

    @property
    def counted(self) -> np.ndarray:
        """All tokens count."""
        return np.ones(len(self.logprobs), bool)

    @property
    def modality(self) -> tuple[str, ...]:
        """Text."""
        return ("text",) * len(self.logprobs)

    @property
    def total(self) -> float:
        """Nats."""
        return float(self.logprobs.astype(np.float64).sum())

    @property
    def by_modality(self) -> dict[str, float]:
        """Nats, all of them text."""
        return {"text": self.total}


class TransformersModel:
    """A model from a folder on disk (or a hub name, if the hub can be reached).

    A prompt is its text segments joined by `joint`; images go to the processor in the order in which they stand, each marked
    by the processor's own image token. Its tokens are its own: compare bits per byte, never bits per token.
    """

    def __init__(self, name: str, device: str = "auto", joint: str = "\n", rows: int = ROWS) -> None:
        try:
            import transformers
        except ModuleNotFoundError:
            raise ModuleNotFoundError("rivals named hf:... need transformers; pip install 'weft[bench]'") from None
        import torch

        self.joint, self.rows = joint, rows
        self.device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        config = transformers.AutoConfig.from_pretrained(name)
        self.sees = hasattr(config, "vision_config")
        kind: Any = transformers.AutoModelForImageTextToText if self.sees else transformers.AutoModelForCausalLM
        model: Any = kind.from_pretrained(name, use_safetensors=True)
        self.model = model.to(self.device).eval()
        self.keeps = "logits_to_keep" in inspect.signature(self.model.forward).parameters
        processor: Any = transformers.AutoProcessor
        self.processor: Any = processor.from_pretrained(name) if self.sees else processor
        tokenizer: Any = transformers.AutoTokenizer
        self.tokenizer: Any = self.processor.tokenizer if self.sees else tokenizer.from_pretrained(name)
        self.digest = _digest(Path(name)) if Path(name).is_dir() else name

    def unable(self, task: Task) -> str | None:
        """It answers in words, and scores words."""
        if task.answer not in ("text", "choices", "bits"):
            return f"a transformers model answers in words, task {task.name!r} asks for {task.answer}"
        return None

    def _inputs(self, prompt: Sequence[Segment]) -> Inputs:
        """Token ids of a prompt, and pixels where there are images."""
        strange = [s.modality for s in prompt if not isinstance(s, Text | (Image if self.sees else Text))]
        if strange:
            raise ValueError(
                f"this transformers model reads {'text and images' if self.sees else 'text'}, the prompt holds {strange[0]}"
            )
        import torch

        if not self.sees:
            text = self.joint.join(s.text for s in prompt if isinstance(s, Text))
            ids = self.tokenizer(text)["input_ids"] or [self._start()]
            return {"input_ids": torch.tensor([ids])}
        mark = getattr(self.processor, "image_token", "<image>")
        text = self.joint.join(mark if isinstance(s, Image) else s.text for s in prompt if isinstance(s, Text | Image))
        pictures = [np.rint(load_image(s.pixels, 3) * 255).astype(np.uint8) for s in prompt if isinstance(s, Image)]
        if not text:
            return {"input_ids": torch.tensor([[self._start()]])}
        found = dict(self.processor(text=[text], images=[pictures] if pictures else None, return_tensors="pt"))
        if not found["input_ids"].shape[1]:
            return {"input_ids": torch.tensor([[self._start()]])}
        return {key: value for key, value in found.items() if key != "attention_mask"}

    def _start(self) -> int:
        for name in ("bos_token_id", "eos_token_id"):
            if (token := getattr(self.tokenizer, name, None)) is not None:
                return int(token)
        return 0

    def _pad(self) -> int:
        return int(self.tokenizer.pad_token_id) if self.tokenizer.pad_token_id is not None else self._start()

    def _likelihoods(self, prompts: Sequence[Sequence[Segment]], words: Sequence[str]) -> list[TextScore]:
        """Each text behind its prompt."""
        rows, tails = [], []
        for prompt, said in zip(prompts, words, strict=True):
            inputs = self._inputs(prompt)
            lead = self.joint if any(isinstance(s, Text) for s in prompt) else ""
            tail = self.tokenizer(lead + said, add_special_tokens=False)["input_ids"] if said else []
            rows.append(_longer(inputs, tail))
            tails.append(tail)
        out: dict[int, TextScore] = {}
        for part in _alike(rows, self.rows):
            for i, logprobs in zip(part, self._logprobs([rows[i] for i in part], [tails[i] for i in part])):
                out[i] = TextScore(logprobs, len(words[i].encode()))
        return [out[i] for i in range(len(rows))]

    def _logprobs(self, rows: Sequence[Inputs], tails: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """float32 [n] of the last n tokens of each row. Logits are computed where a row needs them, not over whole prompts."""
        import torch

        inputs = self._batched(rows, left=False)
        ends = [row["input_ids"].shape[1] for row in rows]
        first = min(end - len(tail) - 1 for end, tail in zip(ends, tails))
        kept = torch.arange(first, max(ends), device=self.device)
        more = {"logits_to_keep": kept} if self.keeps else {}
        with torch.inference_mode():
            logits = self.model(**inputs, **more).logits
            logits = logits if logits.shape[1] == len(kept) else logits[:, kept]
            out = []
            for i, (end, tail) in enumerate(zip(ends, tails)):
                begin = end - len(tail) - 1 - first
                table = torch.log_softmax(logits[i, begin : begin + len(tail)].float(), dim=-1)
                picked = torch.tensor(list(tail), dtype=torch.long, device=self.device)
                out.append(table.gather(1, picked[:, None])[:, 0].cpu().numpy())
        return out

    def _batched(self, rows: Sequence[Inputs], left: bool) -> Inputs:
        """Rows of one batch: tokens filled up on one side, everything else one after another."""
        import torch

        width = max(row["input_ids"].shape[1] for row in rows)
        out: Inputs = {}
        for key in rows[0]:
            values = [row[key] for row in rows]
            if _per_token(rows[0], key):
                fill = self._pad() if key == "input_ids" else 0
                values = [_filled(value, width, fill, left) for value in values]
            out[key] = torch.cat(values).to(self.device)
        ones = [torch.ones_like(row["input_ids"]) for row in rows]
        out["attention_mask"] = torch.cat([_filled(mask, width, 0, left) for mask in ones]).to(self.device)
        return out

    def predict(self, prompts: Sequence[Sequence[Segment]], *, choices: Sequence[str]) -> list[Ranked]:
        """Choices ranked by likelihood."""
        every = [(prompt, words) for prompt in prompts for words in choices]
        scores = self._likelihoods([prompt for prompt, _ in every], [words for _, words in every])
        out = []
        for i in range(len(prompts)):
            mine = scores[i * len(choices) : (i + 1) * len(choices)]
            lengths = np.array([max(len(s.logprobs), 1) for s in mine])
            out.append(Ranked(tuple(choices), np.array([s.total for s in mine]), lengths))
        return out

    def score(self, prompts: Sequence[Sequence[Segment]], whats: Sequence[Sequence[Segment]]) -> list[TextScore]:
        """Likelihood of text behind prompts."""
        if any(not isinstance(s, Text) for what in whats for s in what):
            raise ValueError("a transformers model scores text alone")
        return self._likelihoods(prompts, [self.joint.join(s.text for s in what if isinstance(s, Text)) for what in whats])

    def generate(self, prompts: Sequence[Sequence[Segment]], produce: str = "text", **options: Any) -> list[Written]:
        """Greedy text, up to `max_tokens` and a stop string."""
        import torch

        if float(options.get("temperature") or 0) > 0:
            raise ValueError("rivals decode greedily; set temperature: 0")
        stop = options.get("stop") or ()
        rows = [self._inputs(prompt) for prompt in prompts]
        said: dict[int, str] = {}
        for part in _alike(rows, self.rows):
            inputs = self._batched([rows[i] for i in part], left=True)
            with torch.inference_mode():
                ids = self.model.generate(
                    **inputs, do_sample=False, max_new_tokens=int(options.get("max_tokens", 64)), pad_token_id=self._pad()
                )
            for i, row in zip(part, ids[:, inputs["input_ids"].shape[1] :]):
                text = self.tokenizer.decode(row, skip_special_tokens=True)
                for mark in [stop] if isinstance(stop, str) else stop:
                    text = text.split(mark)[0]
                said[i] = text.strip()
        return [Written(said[i]) for i in range(len(rows))]


def _per_token(row: Inputs, key: str) -> bool:
    """Whether a tensor has one entry per token, as `token_type_ids` has."""
    return bool(key == "input_ids" or (key.endswith("_ids") and row[key].shape == row["input_ids"].shape))


def _filled(value: Any, width: int, fill: int, left: bool) -> Any:
    import torch

    short = width - value.shape[1]
    return torch.nn.functional.pad(value, (short, 0) if left else (0, short), value=fill)


def _longer(row: Inputs, tail: Sequence[int]) -> Inputs:
    """A prompt with a text behind it."""
    import torch

    out = dict(row)
    for key in row:
        if _per_token(row, key):
            more = torch.tensor([list(tail)], dtype=row[key].dtype)
            out[key] = torch.cat([row[key], more if key == "input_ids" else torch.zeros_like(more)], dim=1)
    return out


def _alike(rows: Sequence[Inputs], most: int) -> list[list[int]]:
    """Numbers of rows that may stand in one batch: with as many pictures of the same sizes, the shortest first."""
    groups: dict[Any, list[int]] = {}
    for i, row in enumerate(rows):
        kind = tuple((key, tuple(row[key].shape[1:])) for key in sorted(row) if not _per_token(row, key))
        groups.setdefault(kind, []).append(i)
    out = []
    for numbers in groups.values():
        numbers.sort(key=lambda i: rows[i]["input_ids"].shape[1])
        out += [numbers[i : i + most] for i in range(0, len(numbers), most)]
    return out


def _digest(folder: Path) -> str:
    """SHA-256 over the weights of a folder."""
    sha = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as opened:
            sha.update(hashlib.file_digest(opened, "sha256").digest())
    return sha.hexdigest()
