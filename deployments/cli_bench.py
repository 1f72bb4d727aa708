"""`herd bench`: the options and the table of a load test; the load itself is `load_test.py`'s."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated

import typer

from . import cli_options as o

_COLUMNS = (
    ("streams", "concurrency", "d"),
    ("requests", "requests", "d"),
    ("errors", "errors", "d"),
    ("tok/s", "output_tokens_per_s", ".1f"),
    ("req/s", "requests_per_s", ".2f"),
    ("TTFT p50", "ttft_p50_ms", ".0f"),
    ("p99", "ttft_p99_ms", ".0f"),
    ("ITL p50", "itl_p50_ms", ".1f"),
    ("p99", "itl_p99_ms", ".1f"),
)


def bench(
    url: o.Url = None,
    model: Annotated[str | None, typer.Option(help="served name", show_default=False)] = None,
    concurrency: Annotated[str, typer.Option(help="streams at a time, one run for each number")] = "1,8,32",
    requests: Annotated[
        int | None, typer.Option(min=1, help="per run (default: 4 a stream)", show_default=False)
    ] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="length of every answer")] = 128,
    prompt_words: Annotated[int, typer.Option("--prompt-words", min=1, help="length of every prompt")] = 32,
    as_json: o.Json = False,
) -> None:
    """Measure a server under load: so many streams, each sending its next request when one ends.

    herd bench --concurrency 1,32 --max-tokens 64

    TTFT is the time to the first token and ITL that between tokens, both in milliseconds.
    """
    from .client import Client, ServerError
    from .load_test import Load, run_load

    try:
        levels = [int(part) for part in concurrency.split(",")]
    except ValueError:
        o.fail(f"--concurrency {concurrency!r}: write it like 1,8,32")
    if min(levels) < 1:
        o.fail("--concurrency: every number must be at least 1")
    try:
        with Client(url or o.local_url()) as client:
            model = model or client.models()[0]
    except ServerError as error:
        o.fail(str(error), status=1)
    if not as_json:
        typer.echo("  ".join(f"{title:>8}" for title, _, _ in _COLUMNS))
    results = []
    for level in levels:
        load = Load(client.url, model, level, requests or 4 * level, max_tokens, prompt_words)
        result = run_load(load)
        results.append(result)
        if not as_json:
            values = (getattr(result, name) for _, name, _ in _COLUMNS)
            cells = ("-" if v is None else format(v, form) for v, (_, _, form) in zip(values, _COLUMNS, strict=True))
            typer.echo("  ".join(f"{cell:>8}" for cell in cells))
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(result) for result in results], indent=2))
    for reason in sorted({reason for result in results for reason in result.reasons}):
        typer.echo(f"error: {reason}", err=True)
    if any(result.errors for result in results):
        raise typer.Exit(1)
