"""Where Herd's log lines go inside a Serve replica: beside Serve's own. Knows nothing of what is logged."""

from __future__ import annotations

import logging


def log_with_serve() -> None:
    """Send the loggers under `herd` to the handlers of this replica's Serve logger: its log file, and stderr where
    Serve writes there. Serve sets up no logger but its own, and takes the process's stderr away."""
    herd = logging.getLogger("herd")
    herd.handlers = list(logging.getLogger("ray.serve").handlers)
    herd.setLevel(logging.INFO)
    herd.propagate = False
