"""What a dispatcher counts. Values only."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(slots=True)
class DispatchCounters:
    """Totals since the start."""

    layers: int = 0
    """Layers dispatched."""
    calls: int = 0
    rows: int = 0
    """Rows sent, those sent again included."""
    retries: int = 0
    """Parts sent to another shard, or to the same one again."""
    late: int = 0
    """Shards found late with a call."""
    hedges: int = 0
    hedge_wins: int = 0
    lost_shards: int = 0
    """Connections that broke."""
    stale: int = 0
    busy: int = 0
    errors: int = 0
    failed_layers: int = 0
    """Layers given up because an expert was missing for too long, or kept failing."""
    wait_s: float = 0.0
    """Time spent waiting for results."""

    def figures(self) -> dict[str, float]:
        """By name."""
        return asdict(self)
