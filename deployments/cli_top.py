"""`herd top`: the cluster's status, again and again: full screen in a terminal, else one text after the other."""

from __future__ import annotations

import contextlib
import os
import select
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from . import cli_options as o

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from .status_client import StatusClient


def top(
    url: o.Url = None,
    interval: Annotated[float, typer.Option(metavar="S", min=0.1, help="seconds between two looks")] = 1.0,
) -> None:
    """Watch the shards, the router and the engines; q or Ctrl-C ends.

    herd top --interval 0.5
    """
    from rich.console import Console

    from .client import ServerError
    from .status_client import StatusClient

    console = Console(highlight=False)
    live = console.is_terminal and not console.is_dumb_terminal
    with contextlib.suppress(KeyboardInterrupt), StatusClient(url or o.local_url()) as client:
        try:
            watch = Watch(client)
        except ServerError as error:
            o.fail(str(error), status=1)
        if live:
            _fill_screen(console, watch, interval)
        else:
            _print_each(console, watch, interval)


class Watch:
    """The latest status of a server, kept over times in which it cannot be had."""

    def __init__(self, client: StatusClient) -> None:
        """Looks for the first time: raises ServerError."""
        self._client = client
        self._status = client.read()
        self._read_at = time.monotonic()
        self.error: str | None = None

    def look(self) -> None:
        """Ask the server again; `error` says why that failed."""
        from .client import ServerError

        try:
            self._status, self.error = self._client.read(), None
            self._read_at = time.monotonic()
        except ServerError as error:
            self.error = str(error)

    def view(self, hint: str = "") -> RenderableType:
        from rich.console import Group
        from rich.text import Text

        from .status_view import status_view

        head = Text(f"{self._client.url}  {time.strftime('%H:%M:%S')}{hint}", style="dim")
        if self.error is None:
            return Group(head, "", status_view(self._status))
        age_s = time.monotonic() - self._read_at
        stale = Text(f"{self.error} (what follows is {age_s:.0f} s old)", style="bold red")
        return Group(head, stale, "", status_view(self._status))


def _print_each(console: Console, watch: Watch, interval_s: float) -> None:
    while True:
        if watch.error is None:
            console.print(watch.view(), "", sep="\n")
        else:
            typer.echo(f"error: {watch.error}", err=True)
        time.sleep(interval_s)
        watch.look()


def _fill_screen(console: Console, watch: Watch, interval_s: float) -> None:
    """Until q is typed or a signal comes; the terminal is then as it was."""
    from rich.live import Live

    from .terminal import StopSignals

    hint = f"  every {interval_s:g} s, q ends"
    signals = StopSignals()
    screen = Live(watch.view(hint), console=console, screen=True, auto_refresh=False)
    # Signals interrupt only inside, so that a second one cannot cut the restoring short.
    with contextlib.suppress(KeyboardInterrupt), _keyboard() as typed_q, screen, signals.interrupting():
        screen.refresh()
        while not typed_q(interval_s):
            watch.look()
            screen.update(watch.view(hint), refresh=True)


@contextlib.contextmanager
def _keyboard() -> Iterator[Callable[[float], bool]]:
    """A function that waits so many seconds, or until a key is typed, and tells whether that was q."""
    if not sys.stdin.isatty():
        yield lambda seconds: bool(time.sleep(seconds))
        return
    import termios
    import tty

    stdin = sys.stdin.fileno()

    def typed_q(seconds: float) -> bool:
        readable, _, _ = select.select([stdin], [], [], seconds)
        return bool(readable) and b"q" in os.read(stdin, 1024)

    before = termios.tcgetattr(stdin)
    tty.setcbreak(stdin)
    try:
        yield typed_q
    finally:
        termios.tcsetattr(stdin, termios.TCSADRAIN, before)
