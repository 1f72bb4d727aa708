"""Decides which steps run as two halves, so that one half computes its attention while the other's experts are under
way. Whether that is faster depends on the step's size, the machine and the network, so it is measured. Pure Python with
the clock passed in; knows neither tensors nor where the experts are."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from statistics import median
from typing import Literal

_SAMPLES = 5
"""Latest times of each way that count."""
_PROBE_PERIOD = 64
"""One step in so many goes the way that seems slower, in case it no longer is."""
_LARGEST_SHARE = 2 / 3
"""A step of which the larger half would hold more than this is not split: little would overlap."""


class _Bucket:
    """What is known about steps of one size, by whether they were split."""

    def __init__(self) -> None:
        self._seconds_per_token = {way: deque[float](maxlen=_SAMPLES) for way in (False, True)}
        self._since_probe = 0

    def choose(self) -> bool:
        """Whether to split the next step."""
        whole, halves = self._seconds_per_token[False], self._seconds_per_token[True]
        if len(halves) < _SAMPLES:
            return len(halves) < len(whole)
        faster = median(halves) < median(whole)
        self._since_probe += 1
        if self._since_probe < _PROBE_PERIOD:
            return faster
        self._since_probe = 0
        return not faster

    def note(self, split: bool, seconds_per_token: float) -> None:
        self._seconds_per_token[split].append(seconds_per_token)


class OverlapTuner:
    """Splits no step ("off"), every step that can be split ("on"), or those of sizes at which that proves faster
    ("auto"). Each power of two of tokens is measured by itself: first both ways in turns, then the slower one once in a
    while."""

    def __init__(self, mode: Literal["auto", "on", "off"], clock: Callable[[], float] = time.perf_counter) -> None:
        self._mode = mode
        self._clock = clock
        self._buckets: defaultdict[int, _Bucket] = defaultdict(_Bucket)

    @contextmanager
    def step(self, tokens: Sequence[int]) -> Iterator[int]:
        """Around the computation of a step whose sequences have so many tokens each. Gives how many sequences make the
        first half; 0: do not split. A step that raises is not measured."""
        cut = 0 if self._mode == "off" else even_cut(tokens)
        if not cut or self._mode == "on":
            yield cut
            return
        total = sum(tokens)
        bucket = self._buckets[total.bit_length()]
        split = bucket.choose()
        began = self._clock()
        yield cut if split else 0
        bucket.note(split, (self._clock() - began) / total)


def even_cut(tokens: Sequence[int]) -> int:
    """After how many sequences to cut for the most even halves; 0 if none of the cuts is even enough."""
    ends = list(accumulate(tokens))
    total = sum(tokens)
    if len(ends) < 2:
        return 0
    cut = min(range(1, len(ends)), key=lambda n: abs(2 * ends[n - 1] - total))
    larger = max(ends[cut - 1], total - ends[cut - 1])
    return cut if larger <= _LARGEST_SHARE * total else 0
