"""`herd chat` and `herd complete`: talk to a server, and start one for the time being where there is none."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import cli_options as o

if TYPE_CHECKING:
    from .client import Client, Usage

Model = Annotated[
    str | None, typer.Argument(help="served name, or what to serve if no server runs", show_default=False)
]
MaxTokens = Annotated[int | None, typer.Option("--max-tokens", min=1, help="longest answer", show_default=False)]
Temperature = Annotated[float | None, typer.Option(min=0, help="randomness, 0 for none", show_default=False)]

_HELP = (
    "/reset forgets the conversation, /system TEXT sets the instructions, /quit ends; a trailing \\ continues the line"
)


def chat(
    model: Model = None,
    question: Annotated[str | None, typer.Option("-q", help="ask this and exit", show_default=False)] = None,
    url: o.Url = None,
    system: Annotated[str | None, typer.Option(help="instructions for the model", show_default=False)] = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
) -> None:
    """Talk to a model in the terminal.

    \b
    herd chat
    herd chat -q "What is the capital of France?"
    herd chat --url http://10.0.0.5:8000
    """
    sampling = {"max_tokens": max_tokens, "temperature": temperature}
    with _client(url, model) as (client, name):
        conversation = Conversation(client, name, system, sampling)
        if question is not None:
            conversation.ask(question)
            return
        typer.echo(f"{name} at {client.url}. {_HELP}")
        for line in _inputs():
            if not conversation.handle(line):
                break


def complete(
    text: Annotated[str, typer.Argument(help="what the model shall go on from")],
    model: Annotated[str | None, typer.Option(help="served name", show_default=False)] = None,
    url: o.Url = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
) -> None:
    """Let a model go on from a text.

    herd complete "Once upon a time" --max-tokens 50
    """
    with _client(url, model) as (client, name):
        body = _without_none({"model": name, "prompt": text, "max_tokens": max_tokens, "temperature": temperature})
        _show(client.stream_completion, body, before=text)


class Conversation:
    """The messages so far, and what a line typed by the user does to them."""

    def __init__(self, client: Client, model: str, system: str | None, sampling: dict[str, Any]) -> None:
        self.client = client
        self.model = model
        self.sampling = sampling
        self.messages: list[dict[str, str]] = []
        self._set_system(system)

    def handle(self, line: str) -> bool:
        """Do what `line` says; False when it ends the session."""
        command, _, rest = line.strip().partition(" ")
        if command == "/quit":
            return False
        if command == "/reset":
            self.messages = [m for m in self.messages if m["role"] == "system"]
            typer.echo("(forgotten)")
        elif command == "/system":
            self._set_system(rest.strip() or None)
            typer.echo("(a new conversation with these instructions)" if rest.strip() else "(no instructions)")
        elif command in ("/help", "/?"):
            typer.echo(_HELP)
        elif line.strip():
            with contextlib.suppress(typer.Exit):  # a failed answer does not end the session
                self.ask(line)
        return True

    def ask(self, text: str) -> None:
        """Send `text` and show the answer. A question that got no whole answer is taken back."""
        question = {"role": "user", "content": text}
        body = _without_none({"model": self.model, "messages": [*self.messages, question], **self.sampling})
        answer = _show(self.client.stream_chat, body)
        self.messages += [question, {"role": "assistant", "content": answer}]

    def _set_system(self, text: str | None) -> None:
        self.messages = [{"role": "system", "content": text}] if text else []


@contextlib.contextmanager
def _client(url: str | None, model: str | None) -> Iterator[tuple[Client, str]]:
    """A client and the model name to send, for `url`, the local server, or one that lives as long as the session."""
    from .client import Client, ServerError
    from .session_server import SessionServerError, session_server

    with contextlib.ExitStack() as stack:
        name = model
        try:
            if url is None:
                url, started = stack.enter_context(session_server(model))
                name = None if started else model  # a directory is served under the model's own name
            client = stack.enter_context(Client(url))
            served = client.models()
        except (ServerError, SessionServerError) as error:
            o.fail(str(error), status=1)
        yield client, name or served[0]


def _show(stream: Callable[[dict[str, Any], Usage], Iterator[str]], body: dict[str, Any], before: str = "") -> str:
    """Print `before` and an answer as it comes, then its speed on standard error. Ctrl-C cuts the answer short."""
    from .client import ServerError, Usage

    usage, shown = Usage(), []
    try:
        with contextlib.closing(stream(body, usage)) as pieces:  # pyright: ignore[reportArgumentType]
            for piece in pieces:
                typer.echo(piece if shown else before + piece, nl=False)
                shown.append(piece)
                sys.stdout.flush()
    except KeyboardInterrupt:
        typer.echo(" (stopped)")
    except ServerError as error:
        typer.echo("" if shown else None, nl=bool(shown))
        o.fail(str(error), status=1)
    else:
        typer.echo()
        typer.echo(_speed(usage), err=True)
    return "".join(shown)


def _speed(usage: Usage) -> str:
    parts = [f"{usage.completion_tokens} tokens"]
    if usage.tokens_per_s is not None:
        parts.append(f"{usage.tokens_per_s:.1f} tokens/s")
    if usage.first_token_s is not None:
        parts.append(f"first after {usage.first_token_s:.2f} s")
    if usage.finish_reason == "length":
        parts.append("cut at the length limit")
    return f"[{', '.join(parts)}]"


def _inputs() -> Iterator[str]:
    """What the user types; a trailing backslash joins the next line. Ends at end of file and at Ctrl-C."""
    importlib.import_module("readline")  # input() then has history and editing
    interactive = sys.stdin.isatty()
    lines: list[str] = []
    while True:
        try:
            line = input((". " if lines else "> ") if interactive else "")
        except (EOFError, KeyboardInterrupt):
            if interactive:
                typer.echo()
            return
        if line.endswith("\\"):
            lines.append(line[:-1])
            continue
        yield "\n".join([*lines, line])
        lines = []


def _without_none(body: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in body.items() if value is not None}
