"""Why a server did not come up, in words. Knows how Ray and Serve wrap an exception on its way from a replica."""

from __future__ import annotations

import re

_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_RAISED = re.compile(r"(?:\w+\.)*(\w+)(?:: (.*)|$)")
_TELL_NOTHING = frozenset({"RuntimeError", "ValueError", "Exception", "StartFailure"})
_LONGEST = 3000
_DIED = "its process died while it started; most often the machine had too little memory (see the logs)"


class StartFailure(Exception):
    """The server cannot start; the message is for the user."""


def root_cause(message: str) -> str:
    """The exception in a Serve status message: its text, and its type where that says more. Serve sends the formatted
    traceback of the replica, in which the exception that ended it stands last, after its last frame. Without a
    traceback, the message itself."""
    plain = _ANSI.sub("", message)
    text = (plain.partition("Error:\n")[2] or plain).strip()
    if text.startswith("ActorDiedError"):
        return _DIED
    lines = text.splitlines()
    last_frame = max((i for i, line in enumerate(lines) if line.startswith('  File "')), default=None)
    if last_frame is None:
        return text[:_LONGEST]
    raised = next((i for i in range(last_frame + 1, len(lines)) if not lines[i].startswith("    ")), last_frame)
    match = _RAISED.match(lines[raised])
    if match is None:
        return text[-_LONGEST:]
    detail = "\n".join([match[2] or "", *lines[raised + 1 :]]).strip()
    return (detail if detail and match[1] in _TELL_NOTHING else f"{match[1]}: {detail}")[:_LONGEST].rstrip(": \n")
