"""The sockets under the token stream and the data plane: where they live, how they connect, when a silent peer is given
up. Knows nothing of what is sent over them."""

from __future__ import annotations

import asyncio
import os
import socket
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PEER_TIMEOUT_S = 20
"""How long a peer on another node may leave packets unanswered."""
DATA_TIMEOUT_S = 4
"""The same for rows of activations: connecting anew is cheap, and they can go elsewhere."""
_DATA_BUFFER_BYTES = 4 << 20
_MAX_UNIX_PATH = 107


async def connected_socket(reply_to: Mapping[str, Any], my_node_id: str) -> socket.socket:
    """A non-blocking socket connected to a gateway: its Unix socket on the same node, else TCP. Raises OSError."""
    loop = asyncio.get_running_loop()
    path = reply_to["uds"]
    if reply_to["node_id"] == my_node_id and path and os.path.exists(path):
        with _socket(socket.AF_UNIX) as sock:
            await loop.sock_connect(sock, path)
            return sock
    infos = await loop.getaddrinfo(reply_to["host"], reply_to["port"], type=socket.SOCK_STREAM)
    family, _, _, _, address = infos[0]
    with _socket(family) as sock:
        await loop.sock_connect(sock, address)
        tune_socket(sock)
        return sock


@contextmanager
def _socket(family: int) -> Iterator[socket.socket]:
    """A non-blocking socket that is closed unless the body leaves with it connected."""
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setblocking(False)
    try:
        yield sock
    except BaseException:
        sock.close()
        raise


def tune_socket(sock: Any, peer_timeout_s: int = PEER_TIMEOUT_S) -> None:
    """No delay for small frames; a silent peer is given up after `peer_timeout_s`, at least 4."""
    if sock.family == socket.AF_UNIX:
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        ("TCP_KEEPIDLE", peer_timeout_s // 2),
        ("TCP_KEEPINTVL", peer_timeout_s // 4),
        ("TCP_KEEPCNT", 2),
        ("TCP_USER_TIMEOUT", peer_timeout_s * 1000),
    ):
        if hasattr(socket, option):  # macOS lacks some
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def tune_data_socket(sock: Any) -> None:
    """For calls with rows: as `tune_socket`, with an early end and large buffers."""
    tune_socket(sock, DATA_TIMEOUT_S)
    for option, limit in ((socket.SO_SNDBUF, "wmem_max"), (socket.SO_RCVBUF, "rmem_max")):
        # Linux grows buffers by itself until they are set, and setting them may give less than that.
        if _kernel_limit(limit) >= _DATA_BUFFER_BYTES:
            sock.setsockopt(socket.SOL_SOCKET, option, _DATA_BUFFER_BYTES)


def _kernel_limit(name: str) -> int:
    try:
        return int(Path("/proc/sys/net/core", name).read_text())
    except (OSError, ValueError):
        return 0


def private_directory() -> Path:
    """A directory of mode 0700 whose path is short enough for a Unix socket in it."""
    directory = tempfile.mkdtemp(prefix="herd-")
    if len(os.fsencode(directory)) + 2 > _MAX_UNIX_PATH:
        os.rmdir(directory)
        directory = tempfile.mkdtemp(prefix="herd-", dir="/tmp")
    return Path(directory)
