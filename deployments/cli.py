"""The `herd` command: which commands there are. Each lives in its own file and imports what is heavy only when it runs,
so that help and listings come at once."""

from __future__ import annotations

import importlib.metadata
import sys
from typing import Annotated

import typer

from . import cli_bench, cli_chat, cli_config, cli_convert, cli_models, cli_serve, cli_status, cli_top

app = typer.Typer(
    name="herd",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(cli_serve.serve)
app.command()(cli_chat.chat)
app.command()(cli_chat.complete)
app.command()(cli_models.models)
app.command()(cli_convert.convert)
app.command()(cli_status.status)
app.command()(cli_top.top)
app.command()(cli_bench.bench)
app.add_typer(cli_config.app, name="config")


def _say_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"herd {importlib.metadata.version('herd-serve')}")
        raise typer.Exit


@app.callback()
def herd(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_say_version, is_eager=True)
    ] = False,
) -> None:
    """Serve Llama 4 models from a Ray cluster, or from this machine, over the OpenAI API.

    \b
    herd serve                      serve the small built-in model on port 8000
    herd chat                       talk to the server, or to one started for it
    herd serve ./DIR --port 9000    serve a checkpoint in Hugging Face format
    """


def main() -> None:
    """Entry point of the `herd` command."""
    try:
        app()
    except BrokenPipeError:  # the reader of our output left, as in `herd models | head -1`
        sys.stderr.close()
        sys.exit(1)


if __name__ == "__main__":
    main()
