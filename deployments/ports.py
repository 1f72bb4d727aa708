"""TCP ports of this machine: whether one can be listened on, and which are free. Knows nothing of who will use them."""

from __future__ import annotations

import errno
import random
import socket
from collections.abc import Sequence

_REPLICA_PORTS = range(20000, 30000)
"""Below the range that Linux hands out by itself, and away from Ray's own."""


class PortUnavailable(OSError):
    """Nobody can listen there; the message says why."""


def check_port(host: str, port: int) -> None:
    """Raise PortUnavailable unless this process could listen on `host`:`port` now."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise PortUnavailable(f"{host} is not an address of this machine: {error}") from error
    with socket.socket(family, kind, protocol) as probe:
        # As servers do: a port whose old connections are still winding down is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            raise PortUnavailable(_reason(error, host, port)) from error


def free_ports(count: int, host: str = "127.0.0.1") -> list[int]:
    """`count` different ports that nobody uses at the moment."""
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind((host, 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def replica_port_range(width: int, choices: Sequence[int] = _REPLICA_PORTS) -> tuple[int, int]:
    """A random (first, end) of `width` ports, so that two servers on one machine rarely meet. Who uses the range must
    skip ports that are taken."""
    first = random.randrange(choices[0], choices[-1] + 2 - width, width)
    return first, first + width


def _reason(error: OSError, host: str, port: int) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} is in use by another process; choose another with --port"
    if error.errno == errno.EACCES:
        return f"port {port} needs more rights than this user has; choose one above 1023 with --port"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"{host} is not an address of this machine; choose another with --host"
    return f"cannot listen on {host}:{port}: {error.strerror}"
