"""What the kill tests share: small models, a server with expert shards, a table of what each kill cost."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from herd.deployments.ports import free_ports

from ..integration.live_app import TINY
from ..serve_process import Server
from .streams import Run, assert_same, bodies, run_streams
from .victims import end, pids_of, wait_ready, wait_until

VOCAB = 4096
MODEL = TINY | {"vocab_size": VOCAB, "num_local_experts": 8, "hidden_size": 256, "intermediate_size": 192}
"""Random weights, which make experts disagree: one bit that differs may choose another expert."""


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In bfloat16, as real checkpoints are."""
    return write_model(tmp_path_factory.mktemp("chaos") / "tiny", "bfloat16")


def write_model(folder: Path, dtype: str) -> Path:
    """A checkpoint without weights (load it as `dummy`)."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(MODEL | {"torch_dtype": dtype}))
    return folder


@dataclass
class Cost:
    """One line of the table."""

    kill: str
    longest_gap_s: float
    undisturbed_gap_s: float
    seconds: float
    undisturbed_seconds: float


@pytest.fixture(scope="session")
def costs() -> Iterator[list[Cost]]:
    """Printed at the end; also written where HERD_KILL_COSTS points."""
    table: list[Cost] = []
    yield table
    lines = [f"{cost.kill:<44} longest gap {cost.longest_gap_s:6.2f} s" for cost in table]
    print("\n" + "\n".join(lines))
    if "HERD_KILL_COSTS" in os.environ:
        path = Path(os.environ["HERD_KILL_COSTS"])
        before = json.loads(path.read_text()) if path.exists() else []
        path.write_text(json.dumps(before + [vars(cost) for cost in table], indent=1))


@dataclass
class Herd:
    """A running server under test, with its undisturbed answers."""

    server: Server
    costs: list[Cost]
    num_shards: int
    num_engines: int
    tree: Callable[[], list[psutil.Process]]
    """Every process that may be killed."""
    requests: list[dict[str, Any]] = field(default_factory=lambda: bodies("tiny", VOCAB))
    undisturbed: Run | None = None

    def pids(self, role: str) -> list[int]:
        return pids_of(role, self.tree())

    def status(self) -> dict[str, Any]:
        """The cluster's state as `herd status --json` gets it."""
        return httpx.get(f"{self.server.url}/herd/status", timeout=30).json()

    def survive(self, what: str, disturb: Callable[[], object]) -> None:
        """Run the streams with a disturbance in their middle; nothing may differ from the undisturbed run."""
        self.settle()
        if self.undisturbed is None:
            self.undisturbed = run_streams(self.server.url, self.requests)
            assert all(len(answer.ids) == self.requests[0]["max_tokens"] for answer in self.undisturbed.answers)
        # A second one, so that what is compared with is as warm as what follows.
        calm = run_streams(self.server.url, self.requests)
        assert_same(calm, self.undisturbed)
        run = run_streams(self.server.url, self.requests, disturb)
        self.costs.append(Cost(what, run.longest_gap_s, calm.longest_gap_s, run.seconds, calm.seconds))
        print(f"{what}: longest gap {run.longest_gap_s:.2f} s, undisturbed {calm.longest_gap_s:.2f} s")
        assert_same(run, self.undisturbed)

    def kill(self, role: str, count: int = 1) -> Callable[[], None]:
        """Ends `count` of those processes of a role that there are when it is called, at once."""

        def kill() -> None:
            pids = self.pids(role)[:count]
            assert len(pids) == count, f"there are only {len(pids)} of {role}"
            end(pids)

        return kill

    def settle(self) -> None:
        """Wait until every process is back and ready."""
        wait_ready(self.server.url)
        wait_until(self._is_whole, "every process coming back")

    def _is_whole(self) -> bool:
        if len(self.pids("engine")) != self.num_engines or len(self.pids("shard")) != self.num_shards:
            return False
        status = self.status()
        ready = [shard for shard in status.get("shards", ()) if shard["state"] == "ready"]
        seen = [engine for engine in status.get("engines", ()) if engine["epoch"] == status["epoch"]]
        return len(ready) == self.num_shards and len(seen) >= self.num_engines


def serve(
    model: Path,
    costs: list[Cost],
    *,
    shards: int,
    copies: int,
    engines: int,
    options: tuple[str, ...] = (),
    env: Mapping[str, str] | None = None,
    tree: Callable[[], list[psutil.Process]] | None = None,
    meanwhile: Callable[[], None] = lambda: None,
) -> Generator[Herd]:
    """A server with expert shards, until the generator is closed. `meanwhile` is called while it starts; `tree`: where
    its processes are, if not below it."""
    arguments = ["--load-format", "dummy", "--kv-memory", "32MiB", "--threads", "1", "--engines", str(engines)]
    arguments += ["--expert-shards", str(shards), "--expert-replicas", str(copies), *options]
    server = Server(str(model), *arguments, port=free_ports(1)[0], env=env)
    try:
        meanwhile()
        server.wait_for("Ready after")
        yield Herd(server, costs, shards, engines, tree or server.tree)
    finally:
        server.kill()
        if server.folder is not None:
            shutil.rmtree(server.folder, ignore_errors=True)
