"""A shard's lease against the router's own decisions, and what the deployment tells Serve. No Ray is started."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from herd.cluster.errors import DigestMismatch, ExpertUnavailable, PlacementError
from herd.cluster.expert_compute import ExpertCompute
from herd.cluster.expert_map import Expert, pack_experts, unpack_experts
from herd.cluster.router_spec import RouterSpec
from herd.cluster.router_state import RouterState
from herd.deployments import expert_shard, shard_lease
from herd.deployments.config import load_config
from herd.deployments.router_client import RouterAway
from herd.deployments.shard_host import ShardHost, read_expert
from herd.deployments.shard_lease import LeaseAbandoned, ShardIdentity, ShardLease
from herd.model.checkpoint import DummySource
from herd.model.loading import Loader
from herd.model.quantization import SCHEMES
from herd.model.tensor_names import text_tensors

from ..tiny_models import tiny_config

WAIT_S = 10.0
ADDRESS = ("127.0.0.1", 1, "/s")


class LocalRouter:
    """A `RouterState` behind `RouterClient.call`'s face; `away` says that nobody answers."""

    def __init__(self, shards: int = 1, replicas: int = 1) -> None:
        self._spec = RouterSpec("model", (0,), 4, expert_bytes=10, shards=shards, replicas=replicas)
        self.now = 0.0
        self.state = self._new_state("secret")
        self.away = False
        self.cut: dict[str, tuple[bool, Exception]] = {}
        """The methods whose next call fails: whether it is done, and how it fails."""
        self.calls: list[str] = []
        self._lock = threading.Lock()

    def call(self, method: str, *args: Any, timeout_s: float = 0.0) -> Any:
        with self._lock:
            self.calls.append(method)
            if self.away:
                raise RouterAway("away")
            is_done, error = self.cut.pop(method, (True, None))
            own = getattr(self, f"_{method}", None)
            answer = (own or getattr(self.state, method))(*args) if is_done else None
            if error is not None:
                raise error
            return answer

    def forget_everything(self) -> None:
        """As a router does whose checkpoint is lost."""
        with self._lock:
            self.state = self._new_state("another secret")

    def _new_state(self, token: str) -> RouterState:
        return RouterState(self._spec, lambda: self.now, token=token)

    def _request_lease(self, shard: str, node: str, gpu: str, room: int | None, hosted: Any, pid: int) -> Any:
        lease = self.state.request_lease(shard, node, gpu, room, unpack_experts(hosted), pid)
        return lease and {"slot": lease.slot, "experts": pack_experts(lease.experts), "token": self.state.map.token}

    def _check_digests(self, shard: str, digests: Any) -> None:
        self.state.check_digests(shard, {(layer, expert): digest for layer, expert, digest in digests})

    def _ready(self, shard: str, host: str, port: int, uds: str) -> int | None:
        return self.state.ready(shard, host=host, port=port, uds=uds)

    def _leave(self, shard: str, only_if_spared: bool) -> bool:
        replicas = self.state.map.replicas
        if only_if_spared and any(len(replicas[e]) < 2 for e in self.state.map.hosted.get(shard, ())):
            return False
        self.state.leave(shard)
        return True


def eventually(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture
def leases(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., ShardLease]]:
    monkeypatch.setattr(shard_lease, "BEAT_S", 0.01)
    monkeypatch.setattr(shard_lease, "_ASK_S", 0.01)
    made: list[ShardLease] = []

    def make(router: LocalRouter, name: str = "a", room: int | None = None) -> ShardLease:
        made.append(ShardLease(router.call, ShardIdentity(name, "node", "", room, 1)))
        return made[-1]

    yield make
    for lease in made:
        lease._ending.set()


def serve(lease: ShardLease, entries: list[int] | None = None) -> tuple[Expert, ...]:
    """Acquire and enter the map."""
    experts, token = lease.acquire()
    assert token == "secret"
    assert lease.serve(experts, ADDRESS, lambda: {"rows": 5}, (entries if entries is not None else []).append)
    return experts


def test_it_asks_until_the_router_is_there_and_the_others_have_asked(leases: Callable[..., ShardLease]) -> None:
    router = LocalRouter(shards=2)
    router.away = True
    held: list[Any] = []
    first, second = leases(router, "a"), leases(router, "b")
    waiting = threading.Thread(target=lambda: held.append(first.acquire()[0]), daemon=True)
    waiting.start()
    eventually(lambda: len(router.calls) > 2)
    router.away = False
    held.append(second.acquire()[0])
    waiting.join(WAIT_S)
    assert sorted(held[0] + held[1]) == [(0, e) for e in range(4)]


def test_beats_keep_the_lease_while_it_loads_and_serves(leases: Callable[..., ShardLease]) -> None:
    router = LocalRouter()
    lease = leases(router)
    experts, _ = lease.acquire()
    for _ in range(10):  # beats go on beside the loading
        router.calls.clear()
        eventually(lambda: router.calls.count("beat") > 1)
        router.now += 0.4
        router.state.tick()
    epochs: list[int] = []
    assert lease.serve(experts, ADDRESS, lambda: {"rows": 5}, epochs.append)
    assert epochs == [router.state.map.epoch]
    eventually(lambda: router.state.status()["shards"][0]["rows"] == 5)


def test_a_shard_that_was_let_go_of_comes_back_without_loading(leases: Callable[..., ShardLease]) -> None:
    router, epochs = LocalRouter(), []
    lease = leases(router)
    experts = serve(lease, epochs)
    router.state.leave("a")
    eventually(lambda: len(epochs) == 2)
    assert epochs[1] > epochs[0]
    assert router.state.map.hosted == {"a": experts}
    assert lease.failure is None


@pytest.mark.parametrize("error", [RouterAway("restarting"), ExpertUnavailable("the change cannot be stored")])
@pytest.mark.parametrize("is_done", [False, True])
@pytest.mark.parametrize("method", ["request_lease", "ready"])
def test_a_return_that_was_cut_short_is_finished(
    leases: Callable[..., ShardLease], method: str, is_done: bool, error: Exception
) -> None:
    router, epochs = LocalRouter(), []
    lease = leases(router)
    experts = serve(lease, epochs)
    router.cut[method] = (is_done, error)
    router.state.leave("a")
    eventually(lambda: len(epochs) == 2)
    assert not router.cut
    assert epochs[1] == router.state.map.epoch
    assert router.state.map.hosted == {"a": experts}
    router.calls.clear()
    eventually(lambda: router.calls.count("beat") > 3)
    assert set(router.calls) == {"beat"}
    assert lease.failure is None


def test_a_router_that_cannot_store_a_change_is_asked_again(leases: Callable[..., ShardLease]) -> None:
    router = LocalRouter()
    lease = leases(router)
    unstored = (True, ExpertUnavailable("the change cannot be stored"))
    router.cut = dict.fromkeys(("request_lease", "beat", "check_digests", "ready", "leave"), unstored)
    experts, _ = lease.acquire()
    lease.check_digests({(0, 1): "aa"})
    assert lease.serve(experts, ADDRESS, dict, lambda epoch: None)
    assert router.state.map.hosted == {"a": experts}
    eventually(lambda: "beat" not in router.cut)
    assert lease.leave()
    assert lease.failure is None
    assert not router.cut


def test_a_shard_gives_up_where_the_router_has_another_token(leases: Callable[..., ShardLease]) -> None:
    router = LocalRouter()
    lease = leases(router)
    serve(lease)
    router.cut["leave"] = (True, RouterAway("restarting"))  # who does not hear it will notice
    router.forget_everything()
    eventually(lease._ending.is_set)
    assert "token" in (lease.failure or "")
    assert not router.state.status()["shards"]


def test_a_shard_whose_experts_went_elsewhere_gives_up(leases: Callable[..., ShardLease]) -> None:
    router = LocalRouter(shards=2)
    lease = leases(router, "a")
    threading.Thread(target=leases(router, "b").acquire, daemon=True).start()
    lease.acquire()
    assert lease.serve([(0, 3)], ADDRESS, dict, lambda epoch: None)  # it holds what no slot holds
    router.state.leave("a")
    eventually(lambda: lease.failure)


def test_nothing_happens_while_the_router_is_away(leases: Callable[..., ShardLease]) -> None:
    router, epochs = LocalRouter(), []
    lease = leases(router)
    serve(lease, epochs)
    router.away = True
    router.calls.clear()
    eventually(lambda: router.calls.count("beat") > 3)
    assert lease.failure is None
    assert len(epochs) == 1
    assert lease.leave()


def test_it_stays_for_experts_that_nobody_else_has(leases: Callable[..., ShardLease]) -> None:
    router = LocalRouter()
    lease = leases(router)
    serve(lease)
    assert not lease.leave(only_if_spared=True)
    assert router.state.map.shards
    assert lease.leave()
    assert not router.state.map.shards
    router.away = True
    with pytest.raises(LeaseAbandoned):
        lease.acquire()


def test_refusals_reach_who_asked(leases: Callable[..., ShardLease]) -> None:
    router = LocalRouter()
    with pytest.raises(PlacementError):
        leases(router, room=5).acquire()
    leases(router).check_digests({(0, 1): "aa"})
    with pytest.raises(DigestMismatch):
        leases(router, "b").check_digests({(0, 1): "bb"})


def test_a_digest_tells_bytes_apart() -> None:
    config = tiny_config()

    def digests(seed: int, dtype: torch.dtype = torch.bfloat16) -> set[str]:
        loader = Loader(DummySource(text_tensors(config), seed, torch.float32), config, dtype=dtype)
        return {read_expert(loader, (layer, 2))[1] for layer in config.moe_layers}

    assert digests(0) == digests(0)
    assert len(digests(0) | digests(1) | digests(0, torch.float32)) == 3 * len(config.moe_layers)


def test_a_digest_tells_number_formats_apart() -> None:
    config = tiny_config(hidden_size=64, expert_width=64, num_layers=6, moe_layers=frozenset(range(6)))
    source = DummySource(text_tensors(config), 0, torch.float32)

    def digest(scheme: str, layer: int = 2) -> str:
        loader = Loader(source, config, dtype=torch.bfloat16, scheme=SCHEMES[scheme])
        return read_expert(loader, (layer, 1))[1]

    assert digest("int4") == digest("int4")
    assert len({digest(scheme) for scheme in SCHEMES}) == len(SCHEMES)


def test_what_is_read_computes_like_the_whole_model() -> None:
    config = tiny_config()
    loader = Loader(DummySource(text_tensors(config), 0, torch.float32), config, dtype=torch.float32)
    rows_ND = torch.randn(5, config.hidden_size)
    with torch.inference_mode():
        assert torch.equal(read_expert(loader, (1, 3))[0](rows_ND), loader.expert(1, 3)(rows_ND))


# The process


class FakeServer:
    def __init__(self) -> None:
        self.alive = True
        self.stuck_for_s = 0.0
        self.num_peers = 0


class FakeLease:
    """Of a shard whose experts get another copy once it has asked to leave `spared_after` times."""

    def __init__(self, server: FakeServer, spared_after: float = 0) -> None:
        self.failure: str | None = None
        self.asked: list[bool] = []
        self._server, self._spared_after = server, spared_after

    def leave(self, only_if_spared: bool = False) -> bool:
        self.asked.append(only_if_spared)
        gone = not only_if_spared or len(self.asked) > self._spared_after
        if gone:
            self._server.num_peers = 0  # engines follow the next map
        return gone


@pytest.fixture
def server() -> FakeServer:
    return FakeServer()


def host_of(server: FakeServer, lease: FakeLease, call_timeout_s: float = 1.0) -> ShardHost:
    """Without a model or a router."""
    host = object.__new__(ShardHost)
    host._id, host._server, host._lease = "a", server, lease  # pyright: ignore[reportAttributeAccessIssue]
    host._compute = ExpertCompute({})
    host._config = load_config(sets=[f"experts.call_timeout_s={call_timeout_s}"], env={}).config
    return host


def test_a_call_that_never_ends_is_a_fault_and_a_long_one_is_not(server: FakeServer) -> None:
    host, patient = (host_of(server, FakeLease(server), timeout_s) for timeout_s in (1.0, 30.0))
    for stuck_s, faulty in ((0.0, False), (1.5, False), (2.5, True), (59.0, True)):
        server.stuck_for_s = stuck_s
        patient.check()
        with pytest.raises(ExpertUnavailable) if faulty else nullcontext():
            host.check()


def test_a_shard_whose_calls_all_fail_is_faulty(server: FakeServer) -> None:
    host = host_of(server, FakeLease(server))
    assert host._compute is not None
    for faults, faulty in ((2, False), (3, True), (4, True), (0, False)):
        host._compute.faults_in_a_row = faults
        with pytest.raises(ExpertUnavailable, match="in a row") if faulty else nullcontext():
            host.check()


def test_a_shard_that_serves_no_more_is_faulty(server: FakeServer) -> None:
    host = host_of(server, FakeLease(server))
    host.check()
    server.alive = False
    with pytest.raises(ExpertUnavailable, match="serves no more"):
        host.check()


def test_a_shard_that_may_not_return_is_faulty(server: FakeServer) -> None:
    lease = FakeLease(server)
    lease.failure = "others have its experts"
    with pytest.raises(ExpertUnavailable, match="others have its experts"):
        host_of(server, lease).check()


def test_it_goes_at_once_where_no_engine_is_connected(server: FakeServer) -> None:
    lease = FakeLease(server, spared_after=float("inf"))
    host_of(server, lease).drain(60)
    assert lease.asked == [False]


def test_it_goes_once_its_experts_have_other_copies(server: FakeServer) -> None:
    server.num_peers = 1
    lease = FakeLease(server, spared_after=3)
    host_of(server, lease).drain(60)
    assert lease.asked[:4] == [True] * 4


def test_it_does_not_wait_for_ever(server: FakeServer) -> None:
    server.num_peers = 1
    lease = FakeLease(server, spared_after=float("inf"))
    host_of(server, lease).drain(0.2)
    assert lease.asked[0] is True
    assert lease.asked[-1] is False


# The deployment


class FakeHost:
    def __init__(self) -> None:
        self.fault: Exception | None = None
        self.drained: list[float] = []

    def check(self) -> None:
        if self.fault is not None:
            raise self.fault

    def drain(self, timeout_s: float) -> None:
        self.drained.append(timeout_s)


def test_health_and_end_are_the_hosts() -> None:
    deployment: Any = expert_shard.ExpertShard
    replica = object.__new__(deployment.func_or_class)
    replica.check_health()  # it still loads
    host = replica._host = FakeHost()
    replica._drain_timeout_s = 3.0
    replica.check_health()
    host.fault = ExpertUnavailable("stuck")
    with pytest.raises(ExpertUnavailable):
        replica.check_health()
    replica.__del__()
    replica.__del__()
    assert host.drained == [3.0]
