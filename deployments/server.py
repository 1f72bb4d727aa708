"""The life of `herd serve`: check, fetch, start, announce, wait, drain, stop. Owns the order, the exit status and what
the terminal shows; the parts are others'."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from .banner import ready_banner
from .config import ConfigError, Effective, HerdConfig, cache_directory
from .load_progress import read_progress
from .ports import PortUnavailable, check_port
from .ray_runtime import LocalRay, RunningRay
from .start_failure import StartFailure
from .terminal import StopSignals, quiet_terminal

DONE, FAILED, USAGE_ERROR, INTERRUPTED = 0, 1, 2, 130
_POLL_S = 0.1
_STAGES = {
    "wait": "waiting for another process that makes it",
    "download": "downloading",
    "unpack": "unpacking",
    "verify": "checking",
    "convert": "converting",
    "start": "starting its processes",
    "weights": "loading weights",
}


def run_server(effective: Effective, *, attached: bool = False) -> int:
    """Serve until a signal; returns the exit status. `attached`: say nothing but what goes wrong, and stop when the
    process that started this one is gone."""
    local = effective.config.ray.address is None
    try:
        if local:
            check_port(effective.config.http.host, effective.config.http.port)
        runtime = LocalRay(effective.config) if local else RunningRay(effective.config)
    except (PortUnavailable, ConfigError) as error:
        Console(stderr=True, highlight=False, markup=False, soft_wrap=True).print(f"error: {error}")
        return USAGE_ERROR
    with quiet_terminal(runtime.folder / "server.log") as console:
        return _run(effective, runtime, console, attached)


def _run(effective: Effective, runtime: RunningRay, console: Console, attached: bool) -> int:
    signals = StopSignals()
    began = time.monotonic()
    try:
        if not attached:
            console.print(f"Herd {importlib.metadata.version('herd-serve')}: starting {effective.config.model.path}")
        _start(effective.config, runtime, signals, console)
        if not attached:
            facts = runtime.engine_info()
            console.print(ready_banner(effective, runtime.url, facts, runtime.ingress, runtime.log_folder))
            console.print(f"Ready after {time.monotonic() - began:.0f} s")
    except KeyboardInterrupt:
        runtime.kill()
        runtime.remove_files()
        console.print("stopped before it was ready")
        return INTERRUPTED
    except Exception as error:  # noqa: BLE001 - the edge of the process: every way to fail ends in one explanation
        traceback.print_exc()  # into the log
        runtime.kill()
        console.print(_explanation(error))
        if runtime.log_folder.exists():
            console.print(f"logs: {runtime.log_folder}")
        else:  # Ray was not started yet
            runtime.remove_files()
        return FAILED
    return _serve_until_stopped(effective.config, runtime, signals, console, attached)


def _start(config: HerdConfig, runtime: RunningRay, signals: StopSignals, console: Console) -> None:
    with signals.interrupting():
        if config.ray.address is None:
            _fetch_model(config, console)
        with _activity(console, "starting Ray"):
            runtime.start()
        signals.install()  # ray.init takes SIGTERM for itself
        with _stage_bars(console) as report:
            if console.is_terminal:
                report("start", 0, 0)
            application = importlib.import_module("herd.deployments.app").build(config)
            runtime.deploy(application)
            while not runtime.is_ready():
                progress = read_progress(runtime.progress_path)
                if progress is not None:
                    report(*progress)
                time.sleep(_POLL_S)


def _serve_until_stopped(
    config: HerdConfig, runtime: RunningRay, signals: StopSignals, console: Console, attached: bool
) -> int:
    parent = os.getppid()
    while not signals.count and not (attached and os.getppid() != parent):
        time.sleep(_POLL_S)
    if not attached:
        console.print("draining: running requests may finish, new ones are refused (Ctrl-C again to stop at once)")
    deadline = time.monotonic() + config.http.drain_timeout_s
    drained = runtime.drain(lambda: signals.count > 1 or time.monotonic() > deadline)
    if signals.count > 1:
        runtime.kill()
        runtime.remove_files()
        console.print("stopped at once")
        return INTERRUPTED
    runtime.stop()
    if not attached:
        console.print("stopped" if drained else "stopped; requests that ran longer than http.drain_timeout_s were cut")
    return DONE


def _fetch_model(config: HerdConfig, console: Console) -> None:
    """Have the model's files on this machine before any process needs them. Raises what `resolve_model` raises."""
    source = importlib.import_module("herd.model.source")
    with _stage_bars(console) as report:
        source.resolve_model(
            config.model.path,
            load_format=config.model.load_format,
            cache_dir=cache_directory(config.model),
            progress=report,
        )


@contextmanager
def _stage_bars(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """A bar per stage on a terminal, a line per stage elsewhere; the checking of a finished model says nothing."""
    columns = (TextColumn("  {task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
    bars = Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal)
    tasks: dict[str, TaskID] = {}

    def report(stage: str, done: int, total: int) -> None:
        if stage not in tasks:
            text = _STAGES.get(stage, stage)
            tasks[stage] = bars.add_task(text, total=total or None)
            if not console.is_terminal and stage != "verify":
                console.print(f"  the model: {text}")
        bars.update(tasks[stage], completed=done, total=total or None)

    with bars:
        yield report


def _activity(console: Console, text: str) -> AbstractContextManager[object]:
    return console.status(text) if console.is_terminal else nullcontext()


def _explanation(error: Exception) -> str:
    plain = isinstance(error, StartFailure | ValueError)
    return f"error: the server could not start\n{error if plain else f'{type(error).__name__}: {error}'}"
