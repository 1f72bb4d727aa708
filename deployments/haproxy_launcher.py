"""Run by Ray in place of HAProxy (see `haproxy.py`): edits the configuration that Ray has rendered, ties HAProxy's life
to that of its parent, and becomes HAProxy. A script of its own, with nothing but the standard library, because it runs
at every change of the replicas.

    python haproxy_launcher.py SETTINGS.json -f RENDERED.cfg [more options of HAProxy]
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

_PR_SET_PDEATHSIG = 1


def edit(rendered: str, *, address: str, port: int, error_page: str, error_body: str, draining: bool) -> str:
    """The configuration to use: everything but the API on the loopback address, no log, our own errors."""
    quoted = error_body.replace("\\", "\\\\").replace('"', '\\"').replace(" ", "\\ ").replace("#", "\\#")
    answer = f"http-request return status 503 content-type application/json hdr Retry-After 1 string {quoted}"
    lines = []
    section = ""
    for line in rendered.splitlines():
        words = line.split()
        if line[:1].strip() and words:
            section = " ".join(words[:2])
        if words[:1] == ["bind"]:
            wanted = (
                f"{address}:{port}" if section == "frontend http_frontend" else re.sub(r".*:", "127.0.0.1:", words[1])
            )
            line = line.replace(words[1], wanted)
        elif words[:1] == ["errorfile"]:
            line = line.replace(words[2], error_page)
        elif section == "backend default_backend" and words[:2] == ["http-request", "return"]:
            line = f"    {answer}"
        elif _is_unwanted(words, draining):
            continue
        lines.append(line)
    return "\n".join(lines) + "\n"


def _is_unwanted(words: list[str], draining: bool) -> bool:
    """Access logs; the stand-in proxy of a draining server; and splicing, with which HAProxy does not notice that a
    client has left when the request's headers and body came apart (2.8.25: 20 of 20 such requests went on)."""
    if words[:1] == ["option"]:
        return words[1].startswith("splice-")
    if words[:1] == ["log"]:
        return words[1] != "global"
    return draining and words[:1] == ["server"] and "backup" in words


def main(settings_file: str, options: list[str]) -> None:
    """Edit the file that `options` name and become HAProxy."""
    settings: dict[str, Any] = json.loads(Path(settings_file).read_text("utf-8"))
    rendered = Path(options[options.index("-f") + 1])
    edited = edit(
        rendered.read_text("utf-8"),
        address=settings["address"],
        port=settings["port"],
        error_page=settings["error_page"],
        error_body=settings["error_body"],
        draining=Path(settings["draining_mark"]).exists(),
    )
    rendered.write_text(edited, "utf-8")
    # Survives exec: were Ray's manager killed, HAProxy would otherwise go on listening.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    os.execv(settings["binary"], [settings["binary"], *options])


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
