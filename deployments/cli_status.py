"""`herd status`: what the cluster is like now, as text or JSON."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from . import cli_options as o


def status(
    url: o.Url = None,
    layer: Annotated[
        int | None, typer.Option(metavar="N", min=0, help="where this layer's experts are", show_default=False)
    ] = None,
    as_json: o.Json = False,
) -> None:
    """Show the expert map, the shards and their load, the router and the engines.

    \b
    herd status
    herd status --url http://10.0.0.5:8000 --layer 7
    """
    from rich.console import Console

    from .client import ServerError
    from .status_client import StatusClient
    from .status_view import layer_view, status_view

    try:
        with StatusClient(url or o.local_url()) as client:
            found = client.read()
    except ServerError as error:
        o.fail(str(error), status=1)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    try:
        view = status_view(found) if layer is None else layer_view(found, layer)
    except LookupError as error:
        o.fail(str(error.args[0]), status=1)
    Console(highlight=False).print(view)
