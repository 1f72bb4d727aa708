"""Reads the cluster's status from a server, and says in one line what went wrong. Knows nothing of what the status
means nor of how it is shown."""

from __future__ import annotations

import json
from typing import Any

import httpx

from .client import ServerError

_CONNECT_S = 5.0
_ANSWER_S = 5.0
"""More than a gateway waits for the router."""


class StatusClient:
    """Talks to one server. Close it, or use it in a `with`."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self._http = httpx.Client(timeout=httpx.Timeout(_ANSWER_S, connect=_CONNECT_S))

    def __enter__(self) -> StatusClient:
        return self

    def __exit__(self, *exc: object) -> None:
        self._http.close()

    def read(self) -> dict[str, Any]:
        """What GET /herd/status answers now. Raises ServerError."""
        try:
            response = self._http.get(f"{self.url}/herd/status")
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise ServerError(f"nothing answers at {self.url}; start a server with: herd serve") from error
        except httpx.TimeoutException as error:
            raise ServerError(f"{self.url} does not answer within {_ANSWER_S:.0f} s") from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise ServerError(f"{self.url}: {error or type(error).__name__}") from error
        if response.status_code == 404:
            raise ServerError(f"{self.url} has no /herd/status; is it a Herd server of this version?")
        if response.status_code != 200:
            raise ServerError(f"{self.url} answers {response.status_code} {response.reason_phrase}")
        try:
            status = response.json()
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ServerError(f"{self.url}/herd/status is not JSON") from error
        if not isinstance(status, dict) or "mode" not in status:
            raise ServerError(f"{self.url}/herd/status does not answer like a Herd server")
        return status
