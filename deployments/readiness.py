"""Whether a server can be talked to."""

from __future__ import annotations

import urllib.request


def is_ready(url: str, timeout_s: float = 2.0) -> bool:
    """Whether `url`/ready answers 200, that is, a model can be talked to."""
    try:
        with urllib.request.urlopen(f"{url}/ready", timeout=timeout_s) as response:
            return response.status == 200
    except OSError:  # refused, timed out, or any other status
        return False
