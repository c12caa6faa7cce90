"""What is measured, one number per sample wherever a metric allows it, by well-kept libraries where they exist.

A metric is a function (predictions, references) -> per-sample scores [n]; it never sees the reference of another sample, except
corpus metrics, which say so. Names are the field's own; what a task file may name stands in `measures.py`.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

Scores = np.ndarray


def _need(module: str, extra: str) -> Any:
    """Import an optional library or say how to get it."""
    from importlib import import_module

    try:
        return import_module(module)
    except ModuleNotFoundError:
        raise ModuleNotFoundError(f"{module} is not installed; pip install 'weft[{extra}]'") from None


def normalise(text: str) -> str:
    """Lower case, no punctuation, no articles, single spaces: SQuAD's normalisation (Rajpurkar et al. 2016)."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def accuracy(predictions: Sequence[Any], references: Sequence[Any]) -> Scores:
    """1 where equal."""
    return np.array([float(p == r) for p, r in zip(predictions, references, strict=True)])


def exact_match(predictions: Sequence[str], references: Sequence[str]) -> Scores:
    """1 where equal after normalisation."""
    return np.array([float(normalise(p) == normalise(r)) for p, r in zip(predictions, references, strict=True)])


def token_f1(predictions: Sequence[str], references: Sequence[str]) -> Scores:
    """Harmonic mean of word precision and recall (SQuAD)."""

    def one(prediction: str, reference: str) -> float:
        p, r = normalise(prediction).split(), normalise(reference).split()
        shared = sum((Counter(p) & Counter(r)).values())
        return 2 * shared / (len(p) + len(r)) if shared else float(p == r)

    return np.array([one(p, r) for p, r in zip(predictions, references, strict=True)])


def vqa_accuracy(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Scores:
    """min(1, annotators who agree / 3), averaged over leaving one annotator out (VQA, Antol et al. 2015)."""

    def one(prediction: str, answers: Sequence[str]) -> float:
        answer, human = normalise(prediction), [normalise(a) for a in answers]
        if len(human) == 1:
            return float(answer == human[0])
        return float(
            np.mean([min(1.0, sum(h == answer for j, h in enumerate(human) if j != i) / 3) for i in range(len(human))])
        )

    return np.array([one(p, r) for p, r in zip(predictions, references, strict=True)])


def _error_counts(predictions: Sequence[str], references: Sequence[str], unit: str) -> Scores:
    """[n 2]: edits and reference units per sample, so that a corpus rate can be resampled."""
    jiwer = _need("jiwer", "eval")
    measure = jiwer.process_words if unit == "word" else jiwer.process_characters
    rows = []
    for prediction, reference in zip(predictions, references, strict=True):
        out = measure(reference, prediction)
        edits = out.substitutions + out.deletions + out.insertions
        rows.append((edits, out.hits + out.substitutions + out.deletions))
    return np.array(rows, dtype=np.float64)


def word_errors(predictions: Sequence[str], references: Sequence[str]) -> Scores:
    """[n 2] word edits and words; the word error rate is the ratio of their sums (`ratio`)."""
    return _error_counts(predictions, references, "word")


def character_errors(predictions: Sequence[str], references: Sequence[str]) -> Scores:
    """[n 2] character edits and characters."""
    return _error_counts(predictions, references, "character")


def ratio(counts: np.ndarray) -> float:
    """Sum of the first column over the sum of the second: the corpus rate behind [n 2] counts."""
    return float(counts[:, 0].sum() / max(counts[:, 1].sum(), 1e-12))


def chrf(predictions: Sequence[str], references: Sequence[str]) -> Scores:
    """Sentence chrF in [0, 100] (Popovic 2015, sacrebleu)."""
    metric = _need("sacrebleu.metrics", "eval").CHRF()
    return np.array([metric.sentence_score(p, [r]).score for p, r in zip(predictions, references, strict=True)])


def bleu(predictions: Sequence[str], references: Sequence[str]) -> Scores:
    """Sentence BLEU in [0, 100] with sacrebleu's effective order; corpus BLEU is `corpus_bleu`."""
    metric = _need("sacrebleu.metrics", "eval").BLEU(effective_order=True)
    return np.array([metric.sentence_score(p, [r]).score for p, r in zip(predictions, references, strict=True)])


def corpus_bleu(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Corpus BLEU (Papineni et al. 2002, sacrebleu)."""
    return float(_need("sacrebleu", "eval").corpus_bleu(list(predictions), [list(references)]).score)


def _rouge(kind: str, predictions: Sequence[str], references: Sequence[str]) -> Scores:
    scorer = _need("rouge_score.rouge_scorer", "eval").RougeScorer([kind])
    return np.array([scorer.score(r, p)[kind].fmeasure for p, r in zip(predictions, references, strict=True)])


def rouge_1(predictions: Sequence[str], references: Sequence[str]) -> Scores:
    """ROUGE-1 F-measure in [0, 1]: shared words (Lin 2004, rouge_score)."""
    return _rouge("rouge1", predictions, references)


def rouge_2(predictions: Sequence[str], references: Sequence[str]) -> Scores:
    """ROUGE-2 F-measure in [0, 1]: shared pairs of words (Lin 2004, rouge_score)."""
    return _rouge("rouge2", predictions, references)


def rouge_l(predictions: Sequence[str], references: Sequence[str]) -> Scores:
    """ROUGE-L F-measure in [0, 1]: longest common subsequence (Lin 2004, rouge_score)."""
    return _rouge("rougeL", predictions, references)


def caption_consensus(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Scores:
    """CIDEr-D's idea (Vedantam et al. 2015): tf-idf cosine of 1- to 4-grams against each reference, x10.

    Document frequencies come from the references of the whole set, as the metric defines; weights never come from predictions.
    """
    grams = [[_ngrams(normalise(r)) for r in refs] for refs in references]
    frequency = Counter(g for refs in grams for g in set().union(*refs))
    count = np.log(max(len(references), 2))

    def vector(counts: Counter, n: int) -> dict[tuple[str, ...], float]:
        return {g: c * (count - np.log(max(1, frequency[g]))) for g, c in counts.items() if len(g) == n}

    def cosine(a: dict, b: dict) -> float:
        size = np.sqrt(sum(x * x for x in a.values()) * sum(x * x for x in b.values()))
        return sum(min(x, b[g]) * b[g] for g, x in a.items() if g in b) / size if size else 0.0

    def one(prediction: str, refs: list[Counter]) -> float:
        mine = _ngrams(normalise(prediction))
        length = sum(c for g, c in mine.items() if len(g) == 1)
        total = 0.0
        for ref in refs:
            penalty = np.exp(-((length - sum(c for g, c in ref.items() if len(g) == 1)) ** 2) / (2 * 6.0**2))
            total += penalty * float(np.mean([cosine(vector(mine, n), vector(ref, n)) for n in range(1, 5)]))
        return 10 * total / len(refs)

    return np.array([one(p, refs) for p, refs in zip(predictions, grams, strict=True)])


def _ngrams(text: str) -> Counter:
    words = text.split()
    return Counter(tuple(words[i : i + n]) for n in range(1, 5) for i in range(len(words) - n + 1))


def calibration_error(confidence: Sequence[float], correct: Sequence[float], bins: int = 10) -> float:
    """Expected calibration error with equal-width bins (Guo et al. 2017). A corpus metric."""
    p, hit = np.asarray(confidence, float), np.asarray(correct, float)
    which = np.minimum((p * bins).astype(int), bins - 1)
    return float(
        sum(abs(p[which == b].mean() - hit[which == b].mean()) * (which == b).mean() for b in range(bins) if (which == b).any())
    )


def macro_f1(predictions: Sequence[Any], references: Sequence[Any]) -> float:
    """Mean of F1 over the classes that are right somewhere: an answer that is no class is a miss. A corpus metric."""
    labels = sorted(set(references), key=str)
    scores = []
    for label in labels:
        hit = sum(p == label and r == label for p, r in zip(predictions, references, strict=True))
        said = sum(p == label for p in predictions)
        true = sum(r == label for r in references)
        scores.append(2 * hit / (said + true) if said + true else 0.0)
    return float(np.mean(scores))


def psnr(predictions: Sequence[np.ndarray], references: Sequence[np.ndarray]) -> Scores:
    """Peak signal-to-noise ratio in dB of images in [0, 1]; equal images give 100."""
    errors = [
        float(((np.asarray(p, float) - np.asarray(r, float)) ** 2).mean()) for p, r in zip(predictions, references, strict=True)
    ]
    return np.array([100.0 if e < 1e-10 else -10 * np.log10(e) for e in errors])


def ssim(predictions: Sequence[np.ndarray], references: Sequence[np.ndarray]) -> Scores:
    """Structural similarity (Wang et al. 2004, scikit-image) of images [H W] or [H W C] in [0, 1], at least 3 x 3 pixels."""
    measure = _need("skimage.metrics", "eval").structural_similarity

    def one(p: np.ndarray, r: np.ndarray) -> float:
        side = min(7, *np.shape(r)[:2])
        channel = 2 if np.ndim(r) == 3 else None
        return float(
            measure(
                np.asarray(p, float), np.asarray(r, float), data_range=1.0, win_size=side - 1 + side % 2, channel_axis=channel
            )
        )

    return np.array([one(p, r) for p, r in zip(predictions, references, strict=True)])


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Frechet distance between Gaussians fitted to features [n F] (Heusel et al. 2017). State the extractor beside it.

    The trace of the root of a product of covariances is read from the symmetric product, which has a root even where there are
    fewer samples than features.
    """
    shift = a.mean(0) - b.mean(0)
    left, right = (np.atleast_2d(np.cov(x, rowvar=False)) for x in (a, b))
    sizes, axes = np.linalg.eigh(left)
    root = (axes * np.sqrt(np.clip(sizes, 0, None))) @ axes.T
    both = np.sqrt(np.clip(np.linalg.eigvalsh(root @ right @ root), 0, None)).sum()
    return float(max(shift @ shift + np.trace(left) + np.trace(right) - 2 * both, 0.0))


def mase(forecast: np.ndarray, truth: np.ndarray, history: np.ndarray) -> float:
    """Mean absolute scaled error (Hyndman and Koehler 2006): error over the in-sample error of "same as before"."""
    scale = np.abs(np.diff(history, axis=0)).mean()
    return float(np.abs(forecast - truth).mean() / max(scale, 1e-12))


def crps(samples: np.ndarray, truth: np.ndarray) -> float:
    """Continuous ranked probability score from samples [s ...] (Gneiting and Raftery 2007): E|X-y| - E|X-X'|/2."""
    spread = np.abs(samples[:, None] - samples[None]).mean() / 2
    return float(np.abs(samples - truth[None]).mean() - spread)


def coverage(low: np.ndarray, high: np.ndarray, truth: np.ndarray) -> float:
    """Share of true values inside [low, high]."""
    return float(((truth >= low) & (truth <= high)).mean())


def retrieval(similarity: np.ndarray, relevant: np.ndarray, k: Sequence[int] = (1, 5, 10)) -> dict[str, np.ndarray]:
    """Recall@k and rank of the first relevant item per query; `similarity` and bool `relevant` are [queries items]."""
    order = np.argsort(-similarity, axis=1, kind="stable")
    hits = np.take_along_axis(relevant, order, axis=1)
    rank = np.where(hits.any(1), hits.argmax(1) + 1, hits.shape[1] + 1)
    return {**{f"recall@{i}": (rank <= i).astype(float) for i in k}, "rank": rank.astype(float)}


def normalised_return(returns: Sequence[float], random: float, expert: float) -> Scores:
    """100 * (return - random) / (expert - random), Gato's normalisation (arXiv 2205.06175; JAT uses the same)."""
    if expert == random:
        raise ValueError(f"expert and random return are both {expert}; normalisation needs them to differ")
    return 100 * (np.asarray(returns, float) - random) / (expert - random)


def temporal_hits(predicted_s: Sequence[float], true_s: Sequence[float], within_s: float = 0.1) -> Scores:
    """1 where an event was placed within `within_s` seconds of the truth."""
    return (np.abs(np.asarray(predicted_s, float) - np.asarray(true_s, float)) <= within_s).astype(float)


def first_number(text: str) -> float:
    """The first number in a text, NaN (which hits nothing) where there is none."""
    found = re.search(r"-?\d+(\.\d+)?", text)
    return float(found[0]) if found else float("nan")
