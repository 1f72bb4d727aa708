"""CPU seconds of a process tree by role, read from /proc. A role is a word in a process's title."""

from __future__ import annotations

from collections import defaultdict

import psutil

ROLES = {"ServeReplica:herd:Gateway": "gateway", "haproxy -db": "ingress", "HTTPProxyActor": "ingress"}
ROLES |= {"ProxyActor": "ingress", "ServeReplica:herd:Engine": "engine", "ServeReplica:herd:ExpertShard": "shards"}
OTHER = "ray"


def cpu_by_role(root: int) -> dict[str, float]:
    """CPU seconds (user and system) of the process `root` and everything below it, since each began."""
    seconds: dict[str, float] = defaultdict(float)
    parent = psutil.Process(root)
    for process in [parent, *parent.children(recursive=True)]:
        try:
            title = " ".join(process.cmdline()) or process.name()
            times = process.cpu_times()
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        role = next((role for word, role in ROLES.items() if word in title), OTHER)
        seconds[role] += times.user + times.system
    return seconds
