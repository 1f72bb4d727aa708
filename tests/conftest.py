"""What any test may ask for: a local Ray with Serve, ports, and files that only some machines have."""

from __future__ import annotations

import importlib
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from herd.deployments.ports import free_ports

_BEFORE_IMPORT = {
    "OMP_NUM_THREADS": "1",
    "RAY_AUTH_MODE": "disabled",
    "RAY_DEDUP_LOGS": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_SERVE_LOG_TO_STDERR": "0",
    "RAY_SERVE_PROXY_MIN_DRAINING_PERIOD_S": "0.1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_memory_monitor_refresh_ms": "0",
}
_REPLICAS_ONLY = {
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
}
"""As in production, but not for this process: Serve reads them on import, and a test has no running event loop."""

# Ray reads them when it is imported, which a test module may do before any fixture runs.
os.environ.update(_BEFORE_IMPORT)
if not importlib.import_module("torch").cuda.is_available():
    # Read when Triton is imported: its kernels then run on CPU tensors, one program at a time.
    os.environ["TRITON_INTERPRET"] = "1"

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def ray_session() -> Iterator[str]:
    """A local Ray cluster with Serve and its HTTP proxy, shared by the whole run; the value is the base URL. Tests
    deploy under an application name and a route of their own and delete what they deployed."""
    ray = importlib.import_module("ray")
    serve = importlib.import_module("ray.serve")
    os.environ.update(_REPLICAS_ONLY)
    # A short path: Ray puts Unix sockets deep inside, and their paths end at 107 bytes.
    folder = tempfile.mkdtemp(prefix="herd-test-", dir="/tmp")
    (port,) = free_ports(1)
    ray.init(
        address="local",
        num_cpus=32,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=128 << 20,
        _temp_dir=folder,
    )
    try:
        serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
        yield f"http://127.0.0.1:{port}"
        serve.shutdown()
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def deploy(ray_session: str) -> Iterator[Callable[..., Any]]:
    """`deploy(application, name="app", route_prefix="/app")`: run it on the shared cluster until the test ends; returns
    the handle of its ingress."""
    serve = importlib.import_module("ray.serve")
    names: list[str] = []

    def run(application: Any, name: str = "app", route_prefix: str | None = "/app") -> Any:
        names.append(name)
        return serve.run(application, name=name, route_prefix=route_prefix)

    yield run
    for name in names:
        serve.delete(name)


@pytest.fixture
def free_port() -> int:
    return free_ports(1)[0]


@pytest.fixture(scope="session")
def shared_folder() -> Path:
    """Reference material that lies beside the checkout on some machines."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("the shared reference material is not on this machine")
    return folder
