"""The Serve deployment around one expert shard: which process it is, whether it is healthy, and how it ends. Serve
sends it no requests: engines reach it over the data plane. What it does is `ShardHost`'s matter."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ray import serve

from .config import HerdConfig, parse_tree
from .replica_logging import log_with_serve

if TYPE_CHECKING:
    from .shard_host import ShardHost


@serve.deployment
class ExpertShard:
    """One replica: the experts of one lease."""

    _host: ShardHost | None = None

    async def __init__(self, tree: Mapping[str, Any]) -> None:
        config = parse_tree(tree)
        log_with_serve()
        context = serve.get_replica_context()
        self._drain_timeout_s = config.http.drain_timeout_s
        # Beside the event loop, so that Serve can end a replica that waits for a lease or loads.
        await asyncio.to_thread(self._open, config, context.app_name, context.replica_id.unique_id)

    def check_health(self) -> None:
        """Raise once the shard computes no more: Serve then replaces the replica."""
        if self._host is not None:
            self._host.check()

    def __del__(self) -> None:
        """Called by Serve before it ends the process. Blocks the event loop, which nobody needs any more."""
        host, self._host = self._host, None
        if host is not None:
            host.drain(self._drain_timeout_s)

    def _open(self, config: HerdConfig, application: str, shard_id: str) -> None:
        # Here, because the process that deploys imports this module too and has no need of torch.
        from .shard_host import ShardHost

        self._host = ShardHost(config, application, shard_id)
        self._host.open()
