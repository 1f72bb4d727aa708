"""`herd config`: what the settings are, after all sources, and where each one comes from."""

from __future__ import annotations

import json

import typer

from . import cli_options as o

app = typer.Typer(help="Show the effective settings.", no_args_is_help=True)


@app.callback()
def config_group() -> None:
    """Show the effective settings and where each comes from."""


@app.command()
def show(
    config: o.ConfigFile = None,
    sets: o.Sets = None,
    as_json: o.Json = False,
) -> None:
    """Print every setting, its value and its origin.

    Each is also an environment variable: http.port is HERD_HTTP_PORT.
    """
    effective = o.effective_config(config, sets, {})
    rows = list(effective.rows())
    if as_json:
        typer.echo(json.dumps({key: {"value": value, "origin": origin} for key, value, origin in rows}, indent=2))
        return
    widths = [max(len(str(row[column])) for row in rows) for column in (0, 1)]
    for key, value, origin in rows:
        shown = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        typer.echo(f"{key:<{widths[0]}}  {shown or '-':<{widths[1]}}  {origin}")
