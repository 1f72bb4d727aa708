"""An expert backend for tests: computes in a thread of its own, notes what is asked of it, and fails where it is told
to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from herd.model.decoder import Decoder
from herd.model.experts import ExpertsUnavailable, LocalExperts

Fails = Callable[[int, int, Sequence[int]], Sequence[int]]
"""(number of the call, layer, counts_E) -> the rows that nobody hosts"""


def nothing_fails(call: int, layer: int, counts_E: Sequence[int]) -> Sequence[int]:
    return ()


@dataclass(eq=False)
class Pending:
    call: int
    layer: int
    counts_E: Sequence[int]
    rows_ND: Future[Tensor]


class FarExperts:
    """Experts elsewhere, played by `LocalExperts` in another thread. A dispatch takes a copy of its rows; results may
    be collected in any order, each once."""

    def __init__(self, local: LocalExperts, fails: Fails = nothing_fails) -> None:
        self.fails = fails
        self.calls = 0
        self.events: list[tuple[str, int]] = []
        """("dispatch" or "collect", number of the call), in order."""
        self.most_under_way = 0
        self.abandoned = 0
        self._local = local
        self._under_way: set[Pending] = set()
        self._thread = ThreadPoolExecutor(1)

    def dispatch(self, layer: int, rows_ND: Tensor, counts_E: Sequence[int]) -> Pending:
        assert sum(counts_E) == len(rows_ND)
        result = self._thread.submit(self._compute, layer, rows_ND.clone(), counts_E)
        pending = Pending(self.calls, layer, counts_E, result)
        self.calls += 1
        self.events.append(("dispatch", pending.call))
        self._under_way.add(pending)
        self.most_under_way = max(self.most_under_way, len(self._under_way))
        return pending

    def collect(self, pending: Pending) -> Tensor:
        assert pending in self._under_way, "collected twice, or after it was abandoned"
        self.events.append(("collect", pending.call))
        self._under_way.remove(pending)
        rows = self.fails(pending.call, pending.layer, pending.counts_E)
        if rows:
            raise ExpertsUnavailable("nobody hosts an expert", rows)
        return pending.rows_ND.result()

    def refresh(self) -> None:
        pass

    def abandon(self) -> None:
        self.abandoned += len(self._under_way)
        self._under_way.clear()

    @property
    def is_idle(self) -> bool:
        """Whether no dispatch was left behind."""
        return not self._under_way

    def _compute(self, layer: int, rows_ND: Tensor, counts_E: Sequence[int]) -> Tensor:
        with torch.inference_mode():
            return self._local.collect(self._local.dispatch(layer, rows_ND, counts_E))


def send_experts_away(decoder: Decoder, fails: Fails = nothing_fails) -> FarExperts:
    """Let a decoder's own experts be far ones from now on."""
    decoder.experts = experts = FarExperts(cast(LocalExperts, decoder.experts), fails)
    return experts
