"""Specialist of digit strings: left-to-right whole-word hidden Markov models with Gaussian mixtures.

In: log-mel frames [N MELS] and the digits that are spoken. Out: digits. Every word has STATES states that only stay or go
on; training alternates between aligning each utterance to its words (Viterbi) and refitting each state's mixture on the
frames it got (L. Rabiner, "A tutorial on hidden Markov models", 1989, section IV; segmental k-means).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

WORDS, STATES, MIXTURES, CEPSTRA, ROUNDS = 10, 8, 8, 13, 3
EXIT = -30.0
"""Log cost of beginning another word: keeps the decoder from inserting short words."""


def cepstra(mel: np.ndarray) -> np.ndarray:
    """Mel cepstra and their slopes over five frames: [N MELS] -> [N 2 * CEPSTRA]."""
    from scipy.fft import dct

    still = dct(mel, type=2, norm="ortho", axis=1)[:, :CEPSTRA]
    padded = np.pad(still, ((2, 2), (0, 0)), mode="edge")
    slope = (2 * (padded[4:] - padded[:-4]) + padded[3:-1] - padded[1:-3]) / 10
    return np.concatenate([still, 2 * slope], axis=1)


def mixture_of(rows: np.ndarray, kinds: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Means and variances [kinds F] and log weights [kinds] of `kinds` clusters of the rows [N F]."""
    from sklearn.cluster import KMeans

    owner = KMeans(kinds, n_init=1, max_iter=10, random_state=0).fit_predict(rows) if kinds > 1 else np.zeros(len(rows), int)
    groups = [rows[owner == k] for k in range(kinds) if (owner == k).any()]
    means, scales = (np.stack([getattr(g, name)(axis=0) for g in groups]) for name in ("mean", "var"))
    return means, scales, np.log([len(g) / len(rows) for g in groups])


class WordHMM:
    """`fit`, then `transcribe`."""

    means: np.ndarray  # [WORDS * STATES, M, F]
    scales: np.ndarray  # variances, same shape
    weights: np.ndarray  # log weights [WORDS * STATES, M]

    def fit(self, mels: Sequence[np.ndarray], spoken: Sequence[tuple[int, ...]]) -> WordHMM:
        """Align evenly at first, then by the model itself. Strings take part from the second round."""
        frames = [cepstra(mel) for mel in mels]
        paths = [np.concatenate([np.arange(STATES) + d * STATES for d in digits]) for digits in spoken]
        usable = [len(f) >= len(p) for f, p in zip(frames, paths)]
        single = [i for i in range(len(frames)) if usable[i] and len(spoken[i]) == 1]
        every = [i for i in range(len(frames)) if usable[i]]
        even = [paths[i][np.arange(len(frames[i])) * STATES // len(frames[i])] for i in single]
        self._refit([frames[i] for i in single], even)
        for turn in range(ROUNDS):
            chosen = single if turn == 0 else every
            self._refit([frames[i] for i in chosen], [self._align(frames[i], paths[i]) for i in chosen])
        return self

    def _refit(self, frames: Sequence[np.ndarray], states: Sequence[np.ndarray]) -> None:
        rows, owner = np.concatenate(frames), np.concatenate(states)
        spread = 0.05 * rows.var(axis=0) + 1e-3
        means, scales, weights = [], [], []
        for state in range(WORDS * STATES):
            own = rows[owner == state] if (owner == state).sum() >= 2 else rows
            kinds = max(1, min(MIXTURES, len(own) // 20))
            mean, scale, weight = mixture_of(own, kinds)
            fill = MIXTURES - len(mean)
            means.append(np.concatenate([mean, np.repeat(mean[:1], fill, axis=0)]))
            scales.append(np.concatenate([scale, np.repeat(scale[:1], fill, axis=0)]) + spread)
            weights.append(np.concatenate([weight, np.full(fill, -1e9)]))
        self.means, self.scales, self.weights = np.stack(means), np.stack(scales), np.stack(weights)

    def emissions(self, frames: np.ndarray, states: np.ndarray | None = None) -> np.ndarray:
        """Log likelihood of every frame in every state, or in the `states` asked for: [N F] -> [N states]."""
        chosen = slice(None) if states is None else states
        means, scales, weights = self.means[chosen], self.scales[chosen], self.weights[chosen]
        precision = 1 / scales
        constant = weights - 0.5 * (np.log(scales).sum(-1) + (means**2 * precision).sum(-1))
        flat = (-1, frames.shape[1])
        square = -0.5 * frames**2 @ precision.reshape(flat).T + frames @ (means * precision).reshape(flat).T
        each = square.reshape(len(frames), *weights.shape) + constant
        top = each.max(axis=2)
        return top + np.log(np.exp(each - top[..., None]).sum(axis=2))

    def _align(self, frames: np.ndarray, path: np.ndarray) -> np.ndarray:
        """The state of every frame on the best walk along `path`."""
        cost = self.emissions(frames, path)
        best = np.full(len(path), -np.inf)
        best[0] = cost[0, 0]
        moved = np.zeros(cost.shape, bool)
        for t in range(1, len(frames)):
            before = np.concatenate([[-np.inf], best[:-1]])
            moved[t] = before > best
            best = np.where(moved[t], before, best) + cost[t]
        at, found = len(path) - 1, np.zeros(len(frames), np.int64)
        for t in range(len(frames) - 1, -1, -1):
            found[t] = path[at]
            at -= int(moved[t, at])
        return found

    def transcribe(self, mel: np.ndarray, exit_cost: float = EXIT) -> tuple[int, ...]:
        """The best sequence of whole words: token passing, each state remembers the words before it."""
        cost = self.emissions(cepstra(mel)).reshape(-1, WORDS, STATES)
        best = np.full((WORDS, STATES), -np.inf)
        best[:, 0] = cost[0, :, 0]
        history: list[list[tuple[int, ...]]] = [[()] * STATES for _ in range(WORDS)]
        for t in range(1, len(cost)):
            ended = int(best[:, -1].argmax())
            over, words = best[ended, -1] + exit_cost, (*history[ended][-1], ended)
            before = np.concatenate([np.full((WORDS, 1), over), best[:, :-1]], axis=1)
            moved = before > best
            for word, state in zip(*np.nonzero(moved[:, ::-1])):  # later states first, so that histories move one step only
                last = STATES - 1 - state
                history[word][last] = words if last == 0 else history[word][last - 1]
            best = np.where(moved, before, best) + cost[t]
        ended = int(best[:, -1].argmax())
        return (*history[ended][-1], ended)


def word_error_rate(heard: Sequence[Sequence[int]], said: Sequence[Sequence[int]]) -> float:
    """Insertions, deletions and substitutions over the words that were said."""
    return sum(edits(h, s) for h, s in zip(heard, said)) / sum(len(s) for s in said)


def edits(a: Sequence[int], b: Sequence[int]) -> int:
    """Levenshtein distance of two sequences."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        last, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (x != y))
    return row[-1]
