"""Every error that a user, a peer or the network can cause, as one tree. Knows nothing of HTTP beyond the status
number that each class suggests to the gateway.

    HerdError
    ├── RequestError (400)            the request can never work as sent; `param` names the field
    │   ├── UnknownModel (404)
    │   └── ContextLengthExceeded     carries both numbers
    ├── Overloaded (429)              a queue is full; `retry_after_s` says when to try again
    ├── DeadlineExceeded (504)        the request's own deadline passed
    ├── EngineUnavailable (503)       not ready, draining, or the engine died
    │   └── GatewayUnreachable        nobody would read the answer
    ├── ExpertUnavailable (503)       no shard hosts an expert that the request needs, and none came in time
    ├── PlacementError (503)          the experts do not fit the shards; the message says by how much
    ├── DigestMismatch (503)          an expert was loaded with other bytes than its copies have
    ├── ProtocolError (503)           a peer sent bytes that are no frame, or one that cannot be sent
    └── EngineFault (500)             a step failed; a defect of ours
"""

from __future__ import annotations

from typing import Any


class HerdError(Exception):
    """Base of all typed errors. `code` is the stable machine-readable name that clients see."""

    status = 500
    code = "internal_error"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param

    def to_wire(self) -> dict[str, Any]:
        """Plain values that rebuild the same error in another process (see `from_wire`)."""
        extra = {k: v for k, v in vars(self).items() if k not in ("message", "param")}
        return {"type": type(self).__name__, "message": self.message, "param": self.param, "extra": extra}


class RequestError(HerdError):
    status = 400
    code = "invalid_value"


class UnknownModel(RequestError):
    status = 404
    code = "model_not_found"


class ContextLengthExceeded(RequestError):
    code = "context_length_exceeded"

    def __init__(self, message: str, *, param: str | None = None, limit: int = 0, requested: int = 0) -> None:
        super().__init__(message, param=param)
        self.limit = limit
        self.requested = requested


class Overloaded(HerdError):
    status = 429
    code = "queue_full"

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: float = 1.0) -> None:
        super().__init__(message, param=param)
        self.retry_after_s = retry_after_s


class DeadlineExceeded(HerdError):
    status = 504
    code = "deadline_exceeded"


class EngineUnavailable(HerdError):
    status = 503
    code = "engine_unavailable"

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: float = 1.0) -> None:
        super().__init__(message, param=param)
        self.retry_after_s = retry_after_s


class GatewayUnreachable(EngineUnavailable):
    code = "gateway_unreachable"


class ExpertUnavailable(HerdError):
    status = 503
    code = "expert_unavailable"

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: float = 5.0) -> None:
        super().__init__(message, param=param)
        self.retry_after_s = retry_after_s


class PlacementError(HerdError):
    status = 503
    code = "placement_failed"


class DigestMismatch(HerdError):
    status = 503
    code = "digest_mismatch"


class ProtocolError(HerdError):
    status = 503
    code = "protocol_error"


class EngineFault(HerdError):
    status = 500
    code = "engine_fault"


_BY_NAME: dict[str, type[HerdError]] = {
    c.__name__: c
    for c in (
        HerdError,
        RequestError,
        UnknownModel,
        ContextLengthExceeded,
        Overloaded,
        DeadlineExceeded,
        EngineUnavailable,
        GatewayUnreachable,
        ExpertUnavailable,
        PlacementError,
        DigestMismatch,
        ProtocolError,
        EngineFault,
    )
}


def from_wire(wire: dict[str, Any]) -> HerdError:
    """Rebuild the error that `HerdError.to_wire` described; an unknown type becomes `EngineFault`."""
    cls = _BY_NAME.get(str(wire.get("type")), EngineFault)
    return cls(str(wire.get("message", "")), param=wire.get("param"), **dict(wire.get("extra") or {}))
