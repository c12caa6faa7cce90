"""Random draws without state: every draw is a pure function of (seed, purpose...).

In: an integer seed and words or integers that say what the draw is for, for example `generator(7, "dropout", step, rank)`.
Out: a numpy `Generator`, a uniform number, a permutation, or a seed for torch. Nothing is remembered between calls, so
nothing has to be saved and nothing can drift at a resume.

The words are hashed (BLAKE2b) into the 128-bit key of Philox, a counter-based generator (Salmon et al., 2011). `uniforms`,
`permutation` and `torch_seed` read only Philox's raw output, which numpy promises never to change; the distributions of
`Generator` may change with the numpy version, so the order of the data does not use them.
"""

from __future__ import annotations

import hashlib

import numpy as np


def key(seed: int, *purpose: int | str) -> int:
    """The 128-bit key of a draw. Words and integers never collide: `key(0, "1") != key(0, 1)`."""
    parts = [f"i{seed:d}"]
    parts += [f"s{len(part)}:{part}" if isinstance(part, str) else f"i{part:d}" for part in purpose]
    return int.from_bytes(hashlib.blake2b("|".join(parts).encode(), digest_size=16).digest(), "little")


def generator(seed: int, *purpose: int | str) -> np.random.Generator:
    """A fresh generator for one purpose; the same arguments give the same draws on every machine."""
    return np.random.Generator(np.random.Philox(key=key(seed, *purpose)))


def raw(count: int, seed: int, *purpose: int | str) -> np.ndarray:
    """uint64 [count]: the raw stream of the draw."""
    return np.random.Philox(key=key(seed, *purpose)).random_raw(count)


def uniforms(count: int, seed: int, *purpose: int | str) -> np.ndarray:
    """float64 [count] in [0, 1), 53 bits each."""
    return (raw(count, seed, *purpose) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def uniform(seed: int, *purpose: int | str) -> float:
    """One float in [0, 1); cheaper than a generator (two microseconds)."""
    return (key(seed, *purpose) & (2**53 - 1)) * 2.0**-53


def integer(end: int, seed: int, *purpose: int | str) -> int:
    """One integer in [0, end); the bias is below end / 2^128."""
    if end < 1:
        raise ValueError(f"a draw needs at least one choice, got {end}")
    return key(seed, *purpose) * end >> 128


def permutation(count: int, seed: int, *purpose: int | str) -> np.ndarray:
    """int64 [count]: every number below `count` once, in an order fixed by the purpose."""
    return np.argsort(raw(count, seed, *purpose), kind="stable")


def torch_seed(seed: int, *purpose: int | str) -> int:
    """A seed in [0, 2^63) for `torch.Generator.manual_seed` or `torch.manual_seed`."""
    return key(seed, *purpose) >> 65
