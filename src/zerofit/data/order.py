"""Sample order as a pure function of (seed, epoch, index): any position is reached without walking to it."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]
ROUNDS = 6


def permute(indices: Indices, n: int, seed: int, epoch: int) -> Indices:
    """Position in an epoch -> sample, a keyed pseudo-random bijection of ``range(n)``.

    A balanced Feistel network over the next power of four; values that fall outside walk along their cycle until
    they are inside (Black & Rogaway 2002, "Ciphers with arbitrary finite domains"). Costs O(1) per index and no
    memory, so that a resumed run, or another number of ranks, sees the same samples.

    Args:
        indices: positions, int64, each in ``range(n)``.
        n: samples of an epoch.
        seed, epoch: key of the permutation.
    """
    half_bits = max(((n - 1).bit_length() + 1) // 2, 1)
    keys = _round_keys(seed, epoch)
    out = np.asarray(indices, dtype=np.uint64)
    out = _feistel(out, half_bits, keys)
    outside = out >= n
    while outside.any():
        out[outside] = _feistel(out[outside], half_bits, keys)
        outside = out >= n
    return out.astype(np.int64)


def epoch_shift(seed: int, epoch: int, size: int) -> int:
    """A number in ``range(size)`` for an epoch: where its first block starts, so that boundaries move."""
    return int(_hash(seed, epoch, "shift") % size)


def sample_keys(numbers: Indices, seed: int) -> Indices:
    """A 64-bit key for every sample of the endless sequence of epochs: all that is random about it is made from this.

    Args:
        numbers: ``epoch * samples + position``, int64.
    """
    keys = _mix(numbers.astype(np.uint64) + np.uint64(_hash(seed, 0, "samples")))
    return keys.astype(np.int64)


def _feistel(values: NDArray[np.uint64], half_bits: int, keys: list[np.uint64]) -> NDArray[np.uint64]:
    mask, shift = np.uint64((1 << half_bits) - 1), np.uint64(half_bits)
    left, right = values >> shift, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right + key) & mask)
    return (left << shift) | right


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64 (Steele et al. 2014); wraps around modulo 2^64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _round_keys(seed: int, epoch: int) -> list[np.uint64]:
    return [np.uint64(_hash(seed, epoch, f"round {number}")) for number in range(ROUNDS)]


def _hash(seed: int, epoch: int, use: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{epoch}:{use}".encode()).digest()[:8], "little")
