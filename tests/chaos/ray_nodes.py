"""A Ray cluster of several nodes on this machine, as a program that obeys lines on its standard input:

    add CPUS      start a node; answers "added"
    remove        kill the node added first, without warning; answers "removed"
    (end of input)  take everything down

Its first line says where the head is. A program of its own because a test's process has a Ray session already."""

from __future__ import annotations

import sys

from ray.cluster_utils import Cluster

HEAD_CPUS = 2
"""For the gateway and the engine: shards need other nodes."""
SOON_DEAD = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 1000,
    "health_check_failure_threshold": 3,
}


def main() -> None:
    small = {"object_store_memory": 100 << 20, "include_dashboard": False}
    head = {"num_cpus": HEAD_CPUS, "_system_config": SOON_DEAD} | small
    cluster = Cluster(initialize_head=True, head_node_args=head)
    print(cluster.address, flush=True)
    nodes = []
    for line in sys.stdin:
        match line.split():
            case ["add", cpus]:
                nodes.append(cluster.add_node(num_cpus=int(cpus), object_store_memory=100 << 20))
                print("added", flush=True)
            case ["remove"]:
                cluster.remove_node(nodes.pop(0), allow_graceful=False)
                print("removed", flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    main()
