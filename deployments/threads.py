"""How many compute threads each process of a machine gets, so that together they use its cores once."""

from __future__ import annotations

import math

import psutil
import ray

from .config import HerdConfig


def engine_threads(config: HerdConfig, cores: int, nodes: int = 1) -> int:
    """Of one engine. One core is left for the gateway where there are several; half of the rest is the shards' where
    there are shards on CPUs, because both compute at once."""
    if config.engine.threads is not None:
        return config.engine.threads
    if not _has_cpu_shards(config):
        return max(1, (cores - 1) // config.engine.replicas)
    return max(1, (cores - 1) // 2 // math.ceil(config.engine.replicas / nodes))


def shard_threads(config: HerdConfig, cores: int, nodes: int = 1) -> int:
    """Of one expert shard; all of the cores but one where engines do not compute on CPUs."""
    if config.experts.threads is not None:
        return config.experts.threads
    share = (cores - 1) // 2 if config.engine.device == "cpu" else cores - 1
    return max(1, share // math.ceil((config.experts.shards or 1) / nodes))


def live_nodes() -> int:
    """Nodes of the cluster, over which Serve spreads engines and shards."""
    return sum(node["Alive"] for node in ray.nodes())


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(psutil.Process().cpu_affinity())


def _has_cpu_shards(config: HerdConfig) -> bool:
    return config.experts.mode == "shards" and config.experts.device == "cpu"
