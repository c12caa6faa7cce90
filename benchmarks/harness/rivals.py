"""Other models through the same tasks: any transformers causal or vision-language model, and scikit-learn specialists.

In: `hf:FOLDER`, `sklearn:svm`, or a weft checkpoint. Out: an object with the methods of `Generalist` that a task calls
(`generate` for text, `predict` for choices, `score`), and `unable(task)`, which says why a task is not for it.
transformers is imported inside; remote code is never run and nothing is unpickled (safetensors only).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from weft.benchmarks.harness.specialist import Specialist, Written
from weft.benchmarks.harness.task import Task, TaskError
from weft.tokenizers.media.image import load_image
from weft.tokenizers.segment import Image, Segment, Text


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
    """A causal or vision-language model of transformers, from a folder on disk (or a hub name, if the hub can be reached).

    A prompt is its text segments joined by `joint`; images go to the processor in the order in which they stand, each marked
    by the processor's own image token. Its tokens are its own: compare bits per byte, never bits per token.
    """

    def __init__(self, name: str, device: str = "auto", joint: str = "\n") -> None:
        try:
            import transformers
        except ModuleNotFoundError:
            raise ModuleNotFoundError("rivals named hf:... need transformers; pip install 'weft[bench]'") from None
        import torch

        self.joint = joint
        self.device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        config = transformers.AutoConfig.from_pretrained(name)
        self.sees = hasattr(config, "vision_config")
        kind: Any = transformers.AutoModelForImageTextToText if self.sees else transformers.AutoModelForCausalLM
        model: Any = kind.from_pretrained(name, use_safetensors=True)
        self.model = model.to(self.device).eval()
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

    def _inputs(self, prompt: Sequence[Segment]) -> dict[str, Any]:
        """Token ids [1 L] of a prompt, and pixels where there are images."""
        strange = [s.modality for s in prompt if not isinstance(s, Text | (Image if self.sees else Text))]
        if strange:
            raise ValueError(
                f"this transformers model reads {'text and images' if self.sees else 'text'}, the prompt holds {strange[0]}"
            )
        import torch

        if not self.sees:
            text = self.joint.join(s.text for s in prompt if isinstance(s, Text))
            ids = self.tokenizer(text)["input_ids"] or [self._start()]
            return {"input_ids": torch.tensor([ids], device=self.device)}
        mark = getattr(self.processor, "image_token", "<image>")
        text = self.joint.join(mark if isinstance(s, Image) else s.text for s in prompt if isinstance(s, Text | Image))
        pictures = [np.rint(load_image(s.pixels, 3) * 255).astype(np.uint8) for s in prompt if isinstance(s, Image)]
        found = self.processor(text=text, images=pictures or None, return_tensors="pt")
        return {key: value.to(self.device) for key, value in found.items()}

    def _start(self) -> int:
        for name in ("bos_token_id", "eos_token_id"):
            if (token := getattr(self.tokenizer, name, None)) is not None:
                return int(token)
        return 0

    def _likelihood(self, prompt: Sequence[Segment], words: str) -> TextScore:
        import torch

        inputs = self._inputs(prompt)
        ids = inputs["input_ids"]
        lead = self.joint if any(isinstance(s, Text) for s in prompt) else ""
        more = self.tokenizer(lead + words, add_special_tokens=False)["input_ids"] if words else []
        extra = torch.tensor([more], device=self.device, dtype=ids.dtype)
        inputs = {**inputs, "input_ids": torch.cat([ids, extra], dim=1)}
        if "attention_mask" in inputs:
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        with torch.inference_mode():
            logits = self.model(**inputs).logits[0, -len(more) - 1 : -1].float()
        rows = torch.log_softmax(logits, dim=-1)[torch.arange(len(more)), extra[0]]
        return TextScore(rows.cpu().numpy(), len(words.encode()))

    def predict(self, prompts: Sequence[Sequence[Segment]], *, choices: Sequence[str]) -> list[Ranked]:
        """Choices ranked by likelihood, one sequence at a time: no padding, so no other prompt can matter."""
        out = []
        for prompt in prompts:
            scores = [self._likelihood(prompt, words) for words in choices]
            lengths = np.array([max(len(s.logprobs), 1) for s in scores])
            out.append(Ranked(tuple(choices), np.array([s.total for s in scores]), lengths))
        return out

    def score(self, prompts: Sequence[Sequence[Segment]], whats: Sequence[Sequence[Segment]]) -> list[TextScore]:
        """Likelihood of text behind prompts."""
        out = []
        for prompt, what in zip(prompts, whats, strict=True):
            if any(not isinstance(s, Text) for s in what):
                raise ValueError("a transformers model scores text alone")
            out.append(self._likelihood(prompt, self.joint.join(s.text for s in what if isinstance(s, Text))))
        return out

    def generate(self, prompts: Sequence[Sequence[Segment]], produce: str = "text", **options: Any) -> list[Written]:
        """Greedy text, up to `max_tokens` and a stop string."""
        import torch

        if float(options.get("temperature") or 0) > 0:
            raise ValueError("rivals decode greedily; set temperature: 0")
        stop = options.get("stop") or ()
        out = []
        for prompt in prompts:
            inputs = self._inputs(prompt)
            if "attention_mask" not in inputs:
                inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
            pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self._start()
            with torch.inference_mode():
                ids = self.model.generate(
                    **inputs, do_sample=False, max_new_tokens=int(options.get("max_tokens", 64)), pad_token_id=pad
                )
            text = self.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            for mark in [stop] if isinstance(stop, str) else stop:
                text = text.split(mark)[0]
            out.append(Written(text.strip()))
        return out


def _digest(folder: Path) -> str:
    """SHA-256 over the weights of a folder."""
    sha = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as opened:
            sha.update(hashlib.file_digest(opened, "sha256").digest())
    return sha.hexdigest()


def open_model(name: str, device: str = "auto", taken: Container[str] = ()) -> tuple[str, Any]:
    """A label that is not `taken`, and the model or rival behind a name of `weft eval`."""
    kind, _, rest = name.partition(":")
    if kind == "hf" and rest:
        model: Any = TransformersModel(rest, device)
    elif kind == "sklearn":
        model = Specialist(rest or "svm")
    elif rest and not Path(name).exists():
        raise TaskError(
            f"{name!r} is no folder and {kind!r} is no kind of rival; use hf:FOLDER, sklearn:svm, or a checkpoint folder"
        )
    else:
        from weft.inference.load import load

        model = load(name, device=device)
    label = base = re.sub(
        r"[^A-Za-z0-9._-]+", "-", "-".join(Path(rest or name).parts[-2:]) if not rest else f"{kind}-{Path(rest).name}"
    ).strip("-.")
    count = 1
    while label in taken:
        count += 1
        label = f"{base}-{count}"
    return label, model
