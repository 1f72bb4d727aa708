"""Counter-based noise: Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC11).

A draw is a pure function of (seed, position), so it needs no state and does not depend on batch mates, retries or the
process that computes it. Knows nothing of logits.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

_MULTIPLIERS = np.array([[0xD2511F53], [0xCD9E8D57]], dtype=np.uint64)
_WEYL = np.array([[0x9E3779B9], [0xBB67AE85]], dtype=np.uint64)
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_ROUNDS = 10
_SPARE_BITS = np.uint64(11)
"""64 random bits less the 53 that a double holds."""


def philox4x32(counter_4N: npt.NDArray[np.uint64], key_2N: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Ten rounds of Philox4x32 on N independent columns.

    `counter_4N` and `key_2N` hold 32-bit words in uint64 (word 0 first); so does the result, shape [4, N].
    """
    even, odd, key = counter_4N[0::2], counter_4N[1::2], key_2N
    for _ in range(_ROUNDS):
        product = even * _MULTIPLIERS
        high, low = (product >> _HALF)[::-1], (product & _LOW)[::-1]
        even, odd = high ^ odd ^ key, low
        key = (key + _WEYL) & _LOW
    return np.stack((even[0], odd[0], even[1], odd[1]))


def uniforms(seeds: Sequence[int], positions: Sequence[int]) -> npt.NDArray[np.float64]:
    """One number in [0, 1) per (seed, position) pair, a multiple of 2**-53. Both are taken modulo 2**64."""
    mask = 0xFFFFFFFFFFFFFFFF
    key_N = np.array([seed & mask for seed in seeds], dtype=np.uint64)
    at_N = np.array([position & mask for position in positions], dtype=np.uint64)
    zeros_N = np.zeros_like(at_N)
    words_4N = philox4x32(
        np.stack((at_N & _LOW, at_N >> _HALF, zeros_N, zeros_N)),
        np.stack((key_N & _LOW, key_N >> _HALF)),
    )
    return ((words_4N[0] << _HALF | words_4N[1]) >> _SPARE_BITS).astype(np.float64) * 2.0**-53
