"""Shards that reserve GPUs, which are only numbers here: a cluster that claims to have three, in a process of its own,
because a process has one Ray."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from .live_app import write_tiny

PROGRAM = """
import json, logging, os, sys, time
import ray
from ray import serve
from herd.deployments.app import build, cluster_resources
from herd.deployments.config import parse_tree
from herd.deployments.expert_plan import plan_experts, router_spec
from herd.deployments.router_client import RouterClient
from herd.model.config import parse_config
from herd.model.source import resolve_model

folder, temp, result = sys.argv[1:]
ray.init(address="local", num_cpus=8, num_gpus=3, include_dashboard=False, log_to_driver=False,
         logging_level=logging.ERROR, object_store_memory=100 << 20, _temp_dir=temp)
tree = {
    "model": {"path": folder, "load_format": "dummy"},
    "engine": {"device": "cpu", "kv_memory": "16MiB", "threads": 1},
    "experts": {"mode": "shards", "device": "cpu", "gpus_per_shard": 1, "threads": 1},
    "http": {"drain_timeout_s": 0},
}
serve.start(proxy_location="Disabled")
serve.run(build(tree), name="gpus", route_prefix=None)
source = resolve_model(folder, load_format="dummy", cache_dir=None)
shape = parse_config(source.config_json)
spec = router_spec(plan_experts(parse_tree(tree), shape, cluster_resources()), source, shape)
router = RouterClient("gpus", spec)

def wait_ready(without=None):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        shards = router.call("status")["shards"]
        ids = [shard["shard_id"] for shard in shards if shard["state"] == "ready"]
        if len(ids) == 3 and without not in ids:
            return shards
        time.sleep(0.1)
    raise SystemExit("the shards did not get ready")

first = wait_ready()
free = ray.available_resources().get("GPU", 0)
os.kill(first[0]["pid"], 9)
second = wait_ready(without=first[0]["shard_id"])
devices = [sorted(shard["device"] for shard in shards) for shards in (first, second)]
with open(result, "w") as file:
    json.dump([free, *devices], file)
serve.delete("gpus")
serve.shutdown()
"""


@pytest.mark.slow
def test_each_shard_has_a_gpu_and_so_has_its_replacement(tmp_path: Path) -> None:
    write_tiny(tmp_path / "tiny")
    result = tmp_path / "result.json"
    # A short path: Ray puts Unix sockets deep inside, and their paths end at 107 bytes.
    with tempfile.TemporaryDirectory(prefix="herd-test-", dir="/tmp", ignore_cleanup_errors=True) as temp:
        command = [sys.executable, "-c", PROGRAM, str(tmp_path / "tiny"), temp, str(result)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    free, first, second = json.loads(result.read_text())
    assert free == 0
    assert first == second == ["0", "1", "2"]
