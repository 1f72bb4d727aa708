"""`herd convert`: the options, the progress bar and the table of a conversion; the work is `model/convert.py`'s."""

from __future__ import annotations

import importlib
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Protocol

import typer

from ..cluster.sizes import format_size
from ..model.checkpoint_error import CheckpointError
from ..model.config import ConfigError
from . import cli_options as o
from .config import HerdConfig, cache_directory

_FAILED = 1
_STAGES = {"download": "downloading", "unpack": "unpacking", "convert": "making pocket", "quantize": "quantising"}


def convert(
    model: Annotated[str, typer.Argument(help="checkpoint directory or preset", show_default=False)],
    out: Annotated[Path, typer.Argument(help="directory to write", show_default=False)],
    quantize: o.Quantize = None,
    dtype: o.Dtype = None,
    load_format: o.LoadFormat = None,
    threads: o.Threads = None,
    force: Annotated[bool, typer.Option("--force", help="replace a checkpoint that is there")] = False,
    config: o.ConfigFile = None,
    sets: o.Sets = None,
    as_json: o.Json = False,
) -> None:
    """Write a quantised copy of a checkpoint, in the format of compressed-tensors.

    \b
    herd convert pocket ./pocket-int4 --quantize int4
    herd convert ./Llama-4-Scout-17B-16E-Instruct ./Scout-int4 --quantize int4

    It computes what herd serve --quantize computes at every start. --dtype is that of the weights which stay plain.
    """
    options = {
        "model.path": model,
        "model.quantize": quantize,
        "model.dtype": dtype,
        "model.load_format": load_format,
        "engine.threads": threads,
    }
    settings = o.effective_config(config, sets, options).config
    if settings.model.quantize in ("auto", "none"):
        o.fail("--quantize: say int8, int4 or fp8")
    began = time.monotonic()
    try:
        with _bar() as progress:
            result = _convert(settings, out, force, progress)
    except (CheckpointError, ConfigError) as error:
        o.fail(str(error), status=_FAILED)
    except KeyboardInterrupt:
        o.fail("stopped; nothing was written", status=130)
    sizes: dict[str, tuple[int, int]] = result.sizes
    before, after = (sum(column) for column in zip(*sizes.values(), strict=True))
    if as_json:
        rows = {name: {"before": of_kind[0], "after": of_kind[1]} for name, of_kind in sizes.items()}
        typer.echo(
            json.dumps({"out": str(out), "files": result.files, "bytes": rows, "ratio": after / before}, indent=2)
        )
        return
    typer.echo(f"{'WEIGHTS':<26}{'BEFORE':>10}{'AFTER':>10}{'RATIO':>8}")
    for name, (was, now) in (sizes | {"all": (before, after)}).items():
        ratio = f"{now / was:.2f}" if was else "new"
        typer.echo(f"{name:<26}{format_size(was):>10}{format_size(now):>10}{ratio:>8}")
    files = "1 file" if result.files == 1 else f"{result.files} files"
    typer.echo(f"{out}: {files} in {time.monotonic() - began:.0f} s; serve it with: herd serve {out}")


class _Report(Protocol):
    def __call__(self, stage: str, done: int, total: int) -> None: ...


def _convert(settings: HerdConfig, out: Path, force: bool, progress: _Report) -> Any:
    # Here, because they need torch.
    source = importlib.import_module("herd.model.source")
    convert = importlib.import_module("herd.model.convert")
    threads = importlib.import_module("herd.deployments.threads")
    torch = importlib.import_module("torch")
    torch.set_num_threads(threads.engine_threads(settings, threads.usable_cores()))
    model = settings.model
    found = source.resolve_model(
        model.path, load_format=model.load_format, cache_dir=cache_directory(model), progress=progress
    )
    return convert.convert(
        found, out, model.quantize, dtype=model.dtype, seed=model.seed, force=force, progress=progress
    )


@contextmanager
def _bar() -> Iterator[_Report]:
    """A bar for each stage on standard error, if that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("  {task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    bars = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    tasks: dict[str, TaskID] = {}

    def report(stage: str, done: int, total: int) -> None:
        if stage in _STAGES:
            if stage not in tasks:
                tasks[stage] = bars.add_task(_STAGES[stage], total=total or None)
            bars.update(tasks[stage], completed=done, total=total or None)

    with bars:
        yield report
