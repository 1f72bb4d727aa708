from __future__ import annotations

import pytest

from herd.deployments.config import load_config
from herd.deployments.threads import engine_threads, shard_threads


@pytest.mark.parametrize(
    ("sets", "cores", "nodes", "engine", "shard"),
    [
        ([], 2, 1, 1, None),
        ([], 16, 1, 15, None),
        (["engine.replicas=2"], 16, 1, 7, None),
        (["experts.mode=shards", "experts.shards=2"], 2, 1, 1, 1),
        (["experts.mode=shards", "experts.shards=3"], 16, 1, 7, 2),
        (["experts.mode=shards", "experts.shards=4", "engine.replicas=2"], 16, 2, 7, 3),
        (["experts.mode=shards", "experts.shards=3", "engine.device=cuda"], 16, 1, 7, 5),
        (["experts.mode=shards", "experts.shards=3", "experts.threads=4", "engine.threads=6"], 16, 1, 6, 4),
    ],
)
def test_engines_and_shards_share_the_cores(
    sets: list[str], cores: int, nodes: int, engine: int, shard: int | None
) -> None:
    config = load_config(sets=["engine.device=cpu", "experts.device=cpu", *sets], env={}).config
    assert engine_threads(config, cores, nodes) == engine
    if shard is not None:
        assert shard_threads(config, cores, nodes) == shard
