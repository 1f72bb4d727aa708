"""What `herd status` shows: the router's state as plain values. Reads, decides nothing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from .expert_load import ClusterLoad
from .expert_map import Expert, ExpertMap, pack_experts
from .leases import Lease
from .router_spec import RouterSpec

NUM_HOT = 5


def build_status(
    spec: RouterSpec,
    expert_map: ExpertMap,
    leases: Iterable[Lease],
    load: ClusterLoad,
    engines: Mapping[str, tuple[int, float]],
    now: float,
) -> dict[str, Any]:
    """`engines`: id -> (epoch it follows, when it was heard of)."""
    imbalance = load.imbalance(expert_map.shards.keys())
    worst = None
    if imbalance.worst_layer is not None:
        worst = {"layer": imbalance.worst_layer, "max_over_mean": imbalance.worst_max_over_mean}
    return {
        "model": spec.model,
        "epoch": expert_map.epoch,
        "experts": _experts(spec, expert_map),
        "shards": [_shard(lease, spec, load, now) for lease in sorted(leases, key=lambda s: (s.slot, s.shard_id))],
        "imbalance": {"max_over_mean": imbalance.max_over_mean, "worst_layer": worst},
        "engines": [
            {"engine_id": engine_id, "epoch": epoch, "seen_age_s": now - seen}
            for engine_id, (epoch, seen) in sorted(engines.items())
        ],
        "hot_experts": _hot_experts(load.expert_rates(), expert_map.replicas),
    }


def _experts(spec: RouterSpec, expert_map: ExpertMap) -> dict[str, int]:
    units = len(spec.layers) * spec.num_experts
    return {
        "layers": len(spec.layers),
        "per_layer": spec.num_experts,
        "units": units,
        "bytes_each": spec.expert_bytes,
        "copies": sum(len(hosted) for hosted in expert_map.hosted.values()),
        "missing": units - len(expert_map.replicas),
    }


def _shard(lease: Lease, spec: RouterSpec, load: ClusterLoad, now: float) -> dict[str, Any]:
    shard = load.of(lease.shard_id)
    return {
        "shard_id": lease.shard_id,
        "slot": lease.slot,
        "state": str(lease.state),
        "node_id": lease.node_id,
        "host": lease.endpoint.host if lease.endpoint else "",
        "experts": len(lease.experts),
        "hosted": pack_experts(lease.experts),
        "bytes": spec.num_bytes(lease.experts),
        "epoch": lease.entered,
        "beat_age_s": now - lease.heard_at,
        "pid": lease.pid,
        "device": lease.gpu or "cpu",
        "rows_per_s": shard.rows_per_s,
        "busy": shard.busy,
        "queued_rows": shard.queued_rows,
        "rows": shard.rows,
    }


def _hot_experts(rates: Mapping[Expert, float], replicas: Mapping[Expert, Collection[str]]) -> list[dict[str, Any]]:
    """Those that take the largest share of their layer's rows."""
    totals: dict[int, float] = defaultdict(float)
    for (layer, _), rate in rates.items():
        totals[layer] += rate
    shares = {expert: rate / totals[expert[0]] for expert, rate in rates.items() if rate > 0}
    hottest = sorted(shares, key=lambda expert: (-shares[expert], expert))[:NUM_HOT]
    return [
        {
            "layer": layer,
            "expert": expert,
            "share": shares[layer, expert],
            "copies": len(replicas.get((layer, expert), ())),
        }
        for layer, expert in hottest
    ]
