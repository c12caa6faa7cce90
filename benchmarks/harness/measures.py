"""Which metric fits which kind of answer, which way is up, what a failed sample scores, and how samples become one figure.

`worst` is what a sample scores that crashed or could not be decoded. Where a metric has no worst value (an error without a
bound) the failed samples cannot enter the figure; they are counted beside it and the table marks the row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Pool = Literal["mean", "ratio", "perplexity", "corpus"]
"""mean of samples; ratio of two sums; exp of such a ratio; computed from all samples at once."""


@dataclass(frozen=True)
class Measure:
    """One metric."""

    answers: tuple[str, ...]
    higher: bool = True
    target: float | None = None
    """The right figure where neither way is up: an interval of 90 % should hold 90 % of the truth, not all of it."""
    worst: float | None = 0.0
    pool: Pool = "mean"
    text: bool = False
    """Computed from the written answer and the reference, after all samples are in."""

    def goodness(self, value: float) -> float:
        """The figure turned so that more is better."""
        if self.target is not None:
            return -abs(value - self.target)
        return value if self.higher else -value


_WORDS = ("text", "choices")
MEASURES: dict[str, Measure] = {
    "accuracy": Measure(_WORDS, text=True),
    "exact_match": Measure(_WORDS, text=True),
    "macro_f1": Measure(_WORDS, pool="corpus", text=True),
    "calibration_error": Measure(("choices",), higher=False, worst=1.0, pool="corpus", text=True),
    "accuracy_normalized": Measure(("choices",)),
    "f1": Measure(("text",), text=True),
    "vqa_accuracy": Measure(_WORDS, text=True),
    "wer": Measure(("text",), higher=False, worst=1.0, pool="ratio", text=True),
    "cer": Measure(("text",), higher=False, worst=1.0, pool="ratio", text=True),
    "bleu": Measure(("text",), text=True),
    "corpus_bleu": Measure(("text",), pool="corpus", text=True),
    "chrf": Measure(("text",), text=True),
    "rouge_1": Measure(("text",), text=True),
    "rouge_2": Measure(("text",), text=True),
    "rouge_l": Measure(("text",), text=True),
    "consensus": Measure(("text",), text=True),
    "temporal": Measure(("text",), text=True),
    "psnr": Measure(("image",)),
    "ssim": Measure(("image",)),
    "frechet": Measure(("image", "audio"), higher=False, worst=None, pool="corpus"),
    "mel_error": Measure(("audio",), higher=False, worst=None),
    "judged": Measure(("image", "audio")),
    "consistency": Measure(("image", "audio")),
    "mase": Measure(("forecast",), higher=False, worst=None),
    "crps": Measure(("forecast",), higher=False, worst=None),
    "over_persistence": Measure(("forecast",), higher=False, worst=None, pool="ratio"),
    "coverage_90": Measure(("forecast",), target=0.9),
    "recall@1": Measure(("retrieval",)),
    "recall@5": Measure(("retrieval",)),
    "recall@10": Measure(("retrieval",)),
    "rank": Measure(("retrieval",), higher=False, worst=None),
    "return": Measure(("control",), worst=None),
    "normalised_return": Measure(("control",)),
    "length": Measure(("control",), worst=0.0),
    "bits_per_byte": Measure(("bits",), higher=False, worst=None, pool="ratio"),
    "perplexity": Measure(("bits",), higher=False, worst=None, pool="perplexity"),
}
"""`perplexity:MODALITY` counts the tokens of one modality, `perplexity` those of all."""


def measure(metric: str) -> Measure:
    """The entry of a metric's name, `perplexity:image` included."""
    return MEASURES[metric.split(":")[0]]
