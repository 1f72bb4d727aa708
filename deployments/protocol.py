"""What the OpenAI-shaped endpoints share: reading a body into a model, naming the parameter that is wrong, and the
sampling fields. Checks here need nothing but the request itself and `Limits`; tokens, text and engines are others'."""

from __future__ import annotations

import hashlib
import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, NoReturn, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, WithJsonSchema
from pydantic_core import ErrorDetails, PydanticCustomError

from ..cluster.errors import RequestError
from ..model.sampling_params import SamplingParams
from .http_errors import MissingParameter, UnsupportedParameter

INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1
MAX_STOPS = 16
MAX_BIASES = 1024
MAX_STOP_IDS = 256


@dataclass(frozen=True, slots=True)
class Limits:
    """What this server can do, for checks that the request alone cannot decide."""

    max_model_len: int
    """Prompt plus output, in tokens."""
    vocab_size: int
    max_n: int
    max_logprobs: int


class SamplingDefaults(BaseModel):
    """What a checkpoint's `generation_config.json` recommends where the user says nothing; other keys are not ours."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)
    min_p: float = Field(default=0.0, ge=0, le=1)
    repetition_penalty: float = Field(default=1.0, gt=0)


def invalid(reason: str) -> NoReturn:
    """For validators: the value is wrong, and why."""
    raise PydanticCustomError("invalid", "{reason}", {"reason": reason})


def unsupported(reason: str, at: str = "") -> NoReturn:
    """For validators: the value is legal in the OpenAI API but not served here. `at` extends the parameter's path."""
    raise PydanticCustomError("unsupported", "{reason}", {"reason": reason, "at": at})


def _check_stop(value: Any) -> list[str]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(s, str) for s in stops):
        invalid("must be a string or a list of strings")
    if len(stops) > MAX_STOPS:
        invalid(f"at most {MAX_STOPS} stop strings are allowed, {len(stops)} were given")
    if "" in stops:
        invalid("a stop string must not be empty")
    return stops


def _check_logit_bias(value: Any) -> dict[int, float]:
    if not isinstance(value, dict):
        invalid("must map token ids to biases")
    if len(value) > MAX_BIASES:
        invalid(f"at most {MAX_BIASES} biases are allowed, {len(value)} were given")
    biases: dict[int, float] = {}
    for key, bias in value.items():
        if not (isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 10):
            invalid(f"key {str(key)[:40]!r} is not a token id")
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not -100 <= bias <= 100:
            invalid(f"the bias of token {key} must be a number from -100 to 100")
        biases[int(key)] = float(bias)
    return biases


def check_token_ids(value: Any) -> list[int]:
    if not isinstance(value, list) or not all(type(i) is int for i in value):
        invalid("must be a list of token ids")
    return value


def _check_stop_ids(value: Any) -> list[int]:
    if len(check_token_ids(value)) > MAX_STOP_IDS:
        invalid(f"at most {MAX_STOP_IDS} ids are allowed")
    return value


def _check_response_format(value: Any) -> Any:
    kind = value.get("type") if isinstance(value, dict) else None
    if kind in ("json_object", "json_schema", "regex", "grammar", "structural_tag"):
        unsupported(f"{kind!r} is not supported yet; only {{'type': 'text'}} is", ".type")
    if kind != "text":
        invalid("must be an object with a 'type' of 'text'")
    return value


_STRINGS = {"type": "array", "items": {"type": "string"}}
_IDS = {"type": "array", "items": {"type": "integer"}}
Stop = Annotated[
    Any,
    AfterValidator(_check_stop),
    WithJsonSchema({"anyOf": [{"type": "string"}, _STRINGS | {"maxItems": MAX_STOPS}]}),
]
LogitBias = Annotated[
    Any,
    AfterValidator(_check_logit_bias),
    WithJsonSchema({"type": "object", "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100}}),
]
TokenIds = Annotated[Any, AfterValidator(check_token_ids), WithJsonSchema(_IDS)]
StopIds = Annotated[Any, AfterValidator(_check_stop_ids), WithJsonSchema(_IDS)]
ResponseFormat = Annotated[
    Any,
    AfterValidator(_check_response_format),
    WithJsonSchema({"type": "object", "properties": {"type": {"const": "text"}}, "required": ["type"]}),
]


class Body(BaseModel):
    """A request body. Unknown fields are kept in `model_extra`, so that they can be reported."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    model: str | None = None


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class GenerationBody(Body):
    """Fields of both generating endpoints. Null means absent, as OpenAI's clients send it."""

    n: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1, le=INT64_MAX)
    min_p: float | None = Field(default=None, ge=0, le=1)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    repetition_penalty: float | None = Field(default=None, gt=0, le=1e6)
    logit_bias: LogitBias | None = None
    seed: int | None = Field(default=None, ge=INT64_MIN, le=INT64_MAX)
    stop: Stop | None = None
    stop_token_ids: StopIds | None = None
    include_stop_str_in_output: bool | None = None
    max_tokens: int | None = Field(default=None, ge=1, le=INT64_MAX)
    min_tokens: int | None = Field(default=None, ge=0, le=INT64_MAX)
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    priority: int | None = Field(default=None, ge=-(2**31), le=2**31 - 1)
    cache_salt: str | None = Field(default=None, max_length=1024)
    request_id: str | None = Field(default=None, pattern=r"^[A-Za-z0-9._:\-]{1,128}$")
    response_format: ResponseFormat | None = None
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    parallel_tool_calls: Any = None

    @property
    def ignored(self) -> list[str]:
        """Names of top-level fields that this server does not know."""
        return list(self.model_extra or ())

    @property
    def token_limit(self) -> tuple[str, int | None]:
        """The field that bounds the output, and its value if the user gave one."""
        return "max_tokens", self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        """None: no log-probabilities wanted; k: the k most likely tokens at each position."""
        return None

    def check(self, limits: Limits) -> None:
        """Raise RequestError for what only the server's limits make wrong."""
        if self.n is not None and self.n > limits.max_n:
            raise RequestError(f"n must be at most {limits.max_n}, got {self.n}", param="n")
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options is only allowed when stream is true", param="stream_options")
        check_vocabulary("stop_token_ids", self.stop_token_ids or (), limits.vocab_size)
        check_vocabulary("logit_bias", self.logit_bias or (), limits.vocab_size)
        name, value = self.token_limit
        if self.min_tokens is not None and value is not None and self.min_tokens > value:
            raise RequestError(f"min_tokens ({self.min_tokens}) must not exceed {name} ({value})", param="min_tokens")

    def sampling(self, index: int, max_tokens: int, seed: int, defaults: SamplingDefaults) -> SamplingParams:
        """The settings of choice `index`; `seed` is the request's (see `choice_seed`)."""
        return SamplingParams(
            max_tokens=max_tokens,
            min_tokens=min(self.min_tokens or 0, max_tokens),
            temperature=defaults.temperature if self.temperature is None else self.temperature,
            top_p=defaults.top_p if self.top_p is None else self.top_p,
            top_k=defaults.top_k if self.top_k is None else max(self.top_k, 0),
            min_p=defaults.min_p if self.min_p is None else self.min_p,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            repetition_penalty=(
                defaults.repetition_penalty if self.repetition_penalty is None else self.repetition_penalty
            ),
            logit_bias=tuple((self.logit_bias or {}).items()),
            seed=choice_seed(seed, index),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
            logprobs=self.num_logprobs,
        )


def draw_seed() -> int:
    """A seed for a request that brought none."""
    return secrets.randbits(64) + INT64_MIN


def choice_seed(seed: int, index: int) -> int:
    """Signed 64-bit seed of choice `index`: the request's own for the first, unrelated ones for the others."""
    if index == 0:
        return seed
    digest = hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def check_vocabulary(param: str, ids: Any, vocab_size: int) -> None:
    for token_id in ids:
        if not 0 <= token_id < vocab_size:
            raise RequestError(
                f"{param}: token id {token_id} is outside the vocabulary (0 to {vocab_size - 1})", param=param
            )


BodyT = TypeVar("BodyT", bound=Body)


def parse_body(model: type[BodyT], raw: bytes) -> BodyT:
    """Read `raw` as a JSON object of that shape; RequestError names the first wrong parameter."""
    try:
        return model.model_validate_json(raw)
    except ValidationError as error:
        raise to_request_error(error.errors(include_url=False, include_input=False)[0]) from None


def to_request_error(detail: ErrorDetails) -> RequestError:
    """One finding of pydantic as our error, with the parameter's path such as `messages.[0].role`."""
    kind, context = detail["type"], detail.get("ctx") or {}
    if kind == "json_invalid":
        return RequestError(f"The request body is not valid JSON: {context.get('error', 'no JSON value')}.")
    param = param_path(detail["loc"]) + str(context.get("at", ""))
    if not param:
        return RequestError("The request body must be a JSON object.")
    if kind == "missing":
        return MissingParameter(f"Missing required parameter: '{param}'.", param=param)
    reason = detail["msg"]
    if kind == "unsupported":
        return UnsupportedParameter(f"{param}: {reason}", param=param)
    return RequestError(f"{param}: {reason[0].lower()}{reason[1:]}", param=param)


def param_path(loc: tuple[int | str, ...]) -> str:
    return ".".join(f"[{part}]" if isinstance(part, int) else part for part in loc)


def timeout_of(headers: Mapping[str, str], default_s: float | None) -> float | None:
    """Seconds this request may take: the smaller of the server's limit and `x-request-timeout-seconds`.

    Serve's own ingress reads the same header and would cut the request with a plain-text 408, so a request's own limit
    ends slightly early here, where it becomes a proper error."""
    text = headers.get("x-request-timeout-seconds")
    if text is None:
        return default_s
    try:
        asked_s = float(text)
    except ValueError:
        asked_s = math.nan
    if not (asked_s > 0 and math.isfinite(asked_s)):
        raise RequestError("x-request-timeout-seconds must be a positive number", param="x-request-timeout-seconds")
    asked_s -= min(0.1, asked_s * 0.1)
    return asked_s if default_s is None else min(asked_s, default_s)
