"""Times on a GPU, and what the card reaches: the yardsticks of its benchmarks."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch


def seconds_per_call(calls: Sequence[Callable[[], object]], repeats: int = 5) -> float:
    """Of one of `calls`, recorded one after the other as one CUDA graph, so that no launch is timed. Median."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    took = []
    for _ in range(repeats):
        began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        began.record()
        graph.replay()
        ended.record()
        ended.synchronize()
        took.append(began.elapsed_time(ended) / 1000)
    return statistics.median(took) / len(calls)


def limits() -> dict[str, float]:
    """What this card does now: bytes per second of a copy, read and written, and operations per second of a bfloat16
    product of 8,192^3 on random numbers."""
    source = torch.randint(0, 255, (1 << 30,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    return {
        "copied_bytes_per_s": 2 * source.nbytes / seconds_per_call([lambda: target.copy_(source)] * 3),
        "product_flop_per_s": 2 * 8192**3 / seconds_per_call([lambda: torch.mm(a, b)] * 3),
    }
