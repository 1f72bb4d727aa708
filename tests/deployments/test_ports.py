from __future__ import annotations

import socket

import pytest

from herd.deployments.ports import PortUnavailable, check_port, free_ports, replica_port_range


def test_a_free_port_passes_and_stays_free() -> None:
    (port,) = free_ports(1)
    check_port("127.0.0.1", port)
    check_port("127.0.0.1", port)


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "localhost"])
def test_a_port_in_use_is_refused_with_a_way_out(host: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(
            PortUnavailable, match=f"port {port} is in use by another process; choose another with --port"
        ):
            check_port(host, port)


def test_even_a_listener_that_shares_its_port_counts() -> None:
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        server.bind(("127.0.0.1", 0))
        server.listen()
        with pytest.raises(PortUnavailable):
            check_port("127.0.0.1", server.getsockname()[1])


def test_an_address_of_another_machine() -> None:
    with pytest.raises(PortUnavailable, match="not an address of this machine"):
        check_port("192.0.2.77", 8000)
    with pytest.raises(PortUnavailable, match="not an address of this machine"):
        check_port("no.such.host.invalid", 8000)


def test_free_ports_differ() -> None:
    assert len(set(free_ports(20))) == 20


def test_replica_ranges_stay_inside() -> None:
    for _ in range(200):
        first, end = replica_port_range(128, range(20000, 20600))
        assert 20000 <= first < end <= 20600
        assert end - first == 128
