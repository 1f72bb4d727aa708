"""One request's life at the HTTP edge: admission, body, deadline, disconnect, the answer's bytes, the error if it
fails, and the line in the log. What is asked and answered is the handlers' matter."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ..cluster.errors import DeadlineExceeded, EngineFault, HerdError, RequestError
from .http_errors import BodyTooLarge, error_body, error_headers, error_object
from .protocol import timeout_of
from .responses import sse
from .service import Service

access_log = logging.getLogger("herd.access")
log = logging.getLogger("herd.gateway")

JSON_TYPE = b"application/json"
CLIENT_LEFT = 499
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:\-]{1,128}")
_IGNORED_NAME = re.compile(r"[^A-Za-z0-9_.\-]")

Handler = Callable[["Exchange"], Awaitable[None]]


class Exchange(Response):
    """An ASGI response that runs `handler` and turns whatever it raises into an OpenAI error: an HTTP status while
    nothing has been sent, an event in the stream after that. The client's leaving cancels the handler at once."""

    def __init__(self, service: Service, endpoint: str, handler: Handler) -> None:
        super().__init__()
        self.service = service
        self.endpoint = endpoint
        self.arrived = time.monotonic()
        self.request_id = ""
        self.timeout_s: float | None = None
        self.ignored: list[str] = []
        """Fields of the body that were not understood; set before the answer starts."""
        self.prompt_tokens = 0
        self.output_tokens = 0
        self.finish = ""
        self.streamed = False
        self._first_token_at: float | None = None
        self._handler = handler
        self._status = 0
        self._complete = False
        self._client_left = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._receive, self._send = receive, send
        try:
            headers = Headers(scope=scope)
            self.request_id = _request_id(headers)
            self.timeout_s = timeout_of(headers, self.service.config.request_timeout_s)
            with self.service.admit():
                await self._handle(headers)
        except HerdError as error:
            await self._fail(error)
        except asyncio.CancelledError:
            self._status = CLIENT_LEFT
            raise
        except OSError:
            self._status = CLIENT_LEFT
        except Exception:
            log.exception("request %s failed", self.request_id)
            await self._fail(EngineFault("The server had an internal error; it has been logged."))
        finally:
            self._record()

    async def _handle(self, headers: Headers) -> None:
        """Run the handler under the deadline, while watching for the client to leave."""
        task = asyncio.current_task()
        assert task is not None
        watcher: asyncio.Task[None] | None = None
        try:
            async with asyncio.timeout(self.timeout_s):
                self._raw = await self._read_body(headers)
                watcher = asyncio.get_running_loop().create_task(self._watch(task))
                await self._handler(self)
        except TimeoutError:
            raise DeadlineExceeded(f"The request took longer than {self.timeout_s:.3g} s.") from None
        except asyncio.CancelledError:
            if not self._client_left:
                raise
            task.uncancel()
            self._status = CLIENT_LEFT
        finally:
            if watcher is not None:
                watcher.cancel()

    @property
    def raw_body(self) -> bytes:
        return self._raw

    @property
    def time_left_s(self) -> float | None:
        """Until the deadline; None without one."""
        return None if self.timeout_s is None else max(0.0, self.timeout_s - (time.monotonic() - self.arrived))

    def note_tokens(self, count: int) -> None:
        """That many tokens have come from the engine."""
        if count and self._first_token_at is None:
            self._first_token_at = time.monotonic()
        self.output_tokens += count

    async def reply(self, body: bytes, status: int = 200, media_type: bytes = JSON_TYPE) -> None:
        """Send a whole answer."""
        await self._start(status, media_type, [(b"content-length", str(len(body)).encode())])
        self._complete = True
        await self._send({"type": "http.response.body", "body": body})

    async def write(self, data: bytes, *, last: bool = False) -> None:
        """Send a piece of an event stream; the first piece starts it."""
        if not self.streamed:
            self.streamed = True
            extra = [(b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]
            await self._start(200, b"text/event-stream; charset=utf-8", extra)
        self._complete = last
        await self._send({"type": "http.response.body", "body": data, "more_body": not last})

    async def _start(self, status: int, media_type: bytes, extra: list[tuple[bytes, bytes]]) -> None:
        headers = [(b"content-type", media_type), *extra]
        if self.service.returns_request_id:
            headers.append((b"x-request-id", self.request_id.encode()))
        if self.ignored:
            names = ", ".join(_IGNORED_NAME.sub("?", name)[:64] for name in self.ignored[:32])
            headers.append((b"x-herd-ignored", names.encode()))
        self._status = status
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def _fail(self, error: HerdError) -> None:
        self.service.metrics.errors.labels(error.code).inc()
        self.finish = error.code
        try:
            if self.streamed:
                await self.write(sse(error_object(error)), last=True)
            elif self._status == 0:
                body = error_body(error)
                extra = [(b"content-length", str(len(body)).encode()), *error_headers(error)]
                await self._start(error.status, JSON_TYPE, extra)
                await self._send({"type": "http.response.body", "body": body})
        except OSError:
            self._status = CLIENT_LEFT

    async def _read_body(self, headers: Headers) -> bytes:
        """The whole body. Raises BodyTooLarge as soon as it is known to be, leaving the rest unread."""
        limit = self.service.config.max_body_bytes
        announced = headers.get("content-length", "")
        if announced.isdigit() and int(announced) > limit:
            raise BodyTooLarge(f"The request body has {announced} bytes; at most {limit} are allowed.")
        pieces: list[bytes] = []
        size = 0
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ConnectionResetError("the client left while sending")
            piece = message.get("body", b"")
            size += len(piece)
            if size > limit:
                raise BodyTooLarge(f"The request body has more than {limit} bytes, which is the limit.")
            pieces.append(piece)
            if not message.get("more_body", False):
                return b"".join(pieces)

    async def _watch(self, task: asyncio.Task[None]) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        if not self._complete:  # a server says so too once the whole answer has been sent
            self._client_left = True
            task.cancel()

    def _record(self) -> None:
        """Metrics and the access line: never a word of prompt or answer."""
        now = time.monotonic()
        metrics, took_s = self.service.metrics, now - self.arrived
        metrics.requests.labels(self.endpoint, str(self._status)).inc()
        metrics.duration.labels(self.endpoint).observe(took_s)
        metrics.prompt_tokens.inc(self.prompt_tokens)
        metrics.output_tokens.inc(self.output_tokens)
        first_s = None
        if self._first_token_at is not None:
            first_s = self._first_token_at - self.arrived
            metrics.first_token.observe(first_s)
            if self.output_tokens > 1:
                metrics.token_interval.observe((now - self._first_token_at) / (self.output_tokens - 1))
        if self.service.config.log_requests:
            access_log.info(
                "%s %s %d prompt=%d output=%d ttft=%s duration=%.3f finish=%s%s",
                self.request_id,
                self.endpoint,
                self._status,
                self.prompt_tokens,
                self.output_tokens,
                "-" if first_s is None else f"{first_s:.3f}",
                took_s,
                self.finish or ("client_left" if self._status == CLIENT_LEFT else "-"),
                " stream" if self.streamed else "",
            )

    def take_request_id(self, request_id: str | None) -> None:
        """The body's own request id goes before the header's."""
        if request_id is not None:
            self.request_id = request_id


def _request_id(headers: Headers) -> str:
    given = headers.get("x-request-id")
    if given is None:
        return uuid.uuid4().hex
    if not _REQUEST_ID.fullmatch(given):
        raise RequestError("x-request-id must be 1 to 128 of A-Z a-z 0-9 . _ : -", param="x-request-id")
    return given
