"""What a shard does with the rows it receives: runs its experts over everything that waits for one layer, together, and
counts what it did. Handler of a `TransportServer`; knows nothing of sockets, maps or who asks.

Shapes: N rows sorted by expert, D hidden."""

from __future__ import annotations

import logging
import time
from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..kernels.grouped_mlp import ExpertWeights
from .expert_frames import Kind
from .expert_map import Expert, pack_experts
from .transport import Request

logger = logging.getLogger(__name__)


class ExpertCompute:
    """The experts of one shard. Called by one thread; `load` may be asked for by any."""

    def __init__(self, experts: Mapping[Expert, ExpertWeights], clock: Callable[[], float] = time.monotonic) -> None:
        self._experts = dict(experts)
        self._clock = clock
        self._rows: dict[Expert, int] = dict.fromkeys(sorted(experts), 0)
        self._calls = self._merged = self._stale = self._expired = self._faults = 0
        self._busy_s = 0.0
        self._waiting_rows = 0
        self.entered_epoch = 0
        """The map version in which this shard first appeared: whoever calls on an older one cannot mean it."""
        self.faults_in_a_row = 0
        """Computations that failed since the last one that did not. For health checks, any thread."""

    def __call__(self, waiting: deque[Request]) -> None:
        """Answer the oldest request, and with it every other that waits for the same layer."""
        layer = waiting[0].layer
        chosen = [request for request in waiting if request.layer == layer]
        if len(chosen) == len(waiting):
            waiting.clear()
        else:
            others = [request for request in waiting if request.layer != layer]
            waiting.clear()
            waiting.extend(others)
        started = self._clock()
        accepted = [request for request in chosen if self._accepts(request, started)]
        if accepted:
            self._waiting_rows = sum(request.rows_ND.shape[0] for request in accepted)
            self._answer(layer, accepted)
            self._waiting_rows = 0
        self._busy_s += self._clock() - started

    def load(self) -> dict[str, Any]:
        """Totals since the start, for the router; rows per expert in the order of `pack_experts`."""
        packed = pack_experts(list(self._rows))
        experts = [[layer, [self._rows[layer, e] for e in ids]] for layer, ids in packed]
        return {
            "rows": sum(self._rows.values()),
            "calls": self._calls,
            "merged_calls": self._merged,
            "stale_calls": self._stale,
            "expired_calls": self._expired,
            "faults": self._faults,
            "busy_s": self._busy_s,
            "queued_rows": self._waiting_rows,
            "experts": experts,
        }

    def _accepts(self, request: Request, now: float) -> bool:
        if now > request.deadline_s:
            self._expired += 1
            request.reply(Kind.BUSY)
            return False
        if request.epoch < self.entered_epoch or any((request.layer, e) not in self._rows for e, _ in request.groups):
            self._stale += 1
            request.reply(Kind.STALE_MAP)
            return False
        return True

    @torch.inference_mode()
    def _answer(self, layer: int, requests: list[Request]) -> None:
        self._calls += len(requests)
        self._merged += len(requests) - 1
        try:
            if len(requests) == 1:
                self._run_alone(layer, requests[0])
            else:
                self._run_together(layer, requests)
        except Exception as error:  # the edge of the compute loop: a defect must not end the shard
            self._faults += 1
            self.faults_in_a_row += 1
            logger.exception("experts of layer %d failed", layer)
            for request in requests:
                request.reply(Kind.ERROR, f"the experts of layer {layer} failed: {error}")
            return
        for request in requests:
            request.reply(Kind.RESULT)
        self.faults_in_a_row = 0  # now: on a GPU, a fault may show itself only when the result is sent

    def _run_alone(self, layer: int, request: Request) -> None:
        start = 0
        for expert, count in request.groups:
            rows_ND = request.rows_ND[start : start + count]
            rows_ND.copy_(self._experts[layer, expert](rows_ND))
            self._rows[layer, expert] += count
            start += count

    def _run_together(self, layer: int, requests: list[Request]) -> None:
        """Each expert reads its weights once for all requests; a row's bits do not depend on its company."""
        pieces: dict[int, list[Tensor]] = defaultdict(list)
        for request in requests:
            start = 0
            for expert, count in request.groups:
                pieces[expert].append(request.rows_ND[start : start + count])
                start += count
        for expert, parts in pieces.items():
            rows_ND = parts[0] if len(parts) == 1 else torch.cat(parts)
            results = self._experts[layer, expert](rows_ND).split([part.shape[0] for part in parts])
            for part, result in zip(parts, results, strict=True):
                part.copy_(result)
            self._rows[layer, expert] += rows_ND.shape[0]
