"""The one mapping from Herd's errors to what an OpenAI client sees: status, headers and body. Also the errors that only
HTTP can cause. Knows nothing of engines or of where an error came from.

    RequestError (400)
    ├── MissingParameter        a required field is absent
    ├── UnsupportedParameter    known to the OpenAI API, not served here
    ├── UnknownRoute (404)
    ├── MethodNotAllowed (405)
    └── BodyTooLarge (413)
"""

from __future__ import annotations

import json
import math
from typing import Any

from ..cluster.errors import HerdError, RequestError


class MissingParameter(RequestError):
    code = "missing_required_parameter"


class UnsupportedParameter(RequestError):
    code = "unsupported_parameter"


class UnknownRoute(RequestError):
    status = 404
    code = "unknown_url"


class MethodNotAllowed(RequestError):
    status = 405
    code = "method_not_allowed"


class BodyTooLarge(RequestError):
    status = 413
    code = "request_too_large"


_TYPE_OF_STATUS = {404: "not_found_error", 429: "rate_limit_error"}


def error_object(error: HerdError) -> dict[str, Any]:
    """The OpenAI error object: `{"error": {"message", "type", "param", "code"}}`."""
    kind = _TYPE_OF_STATUS.get(error.status) or ("server_error" if error.status >= 500 else "invalid_request_error")
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}


def error_body(error: HerdError) -> bytes:
    return json.dumps(error_object(error), ensure_ascii=False).encode("utf-8", "replace")


def error_headers(error: HerdError) -> list[tuple[bytes, bytes]]:
    """Headers that the error adds: Retry-After in whole seconds on 429 and 503."""
    if error.status not in (429, 503):
        return []
    retry_after_s = max(1, math.ceil(getattr(error, "retry_after_s", 1.0)))
    return [(b"retry-after", str(retry_after_s).encode())]
