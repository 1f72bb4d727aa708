"""A generation request as the engine sees it: what came in, its state, and what goes out. Knows nothing of HTTP, text
or tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from ..model.sampling_params import SamplingParams


class FinishReason(StrEnum):
    STOP = "stop"
    """An end-of-sequence or stop id was drawn."""
    LENGTH = "length"
    """max_tokens or the model's context is used up."""
    ABORT = "abort"
    """The client went away or asked for it."""


class RequestState(StrEnum):
    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"
    FINISHED = "finished"


LEGAL_MOVES: dict[RequestState, frozenset[RequestState]] = {
    RequestState.WAITING: frozenset({RequestState.RUNNING, RequestState.FINISHED}),
    RequestState.RUNNING: frozenset({RequestState.PREEMPTED, RequestState.FINISHED}),
    RequestState.PREEMPTED: frozenset({RequestState.RUNNING, RequestState.FINISHED}),
    RequestState.FINISHED: frozenset(),
}


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """What an engine is asked to do."""

    id: str
    prompt_ids: Sequence[int]
    sampling: SamplingParams
    priority: int = 0
    """Lower runs first; ties go by arrival."""
    deadline_s: float | None = None
    """On the engine's clock; the request fails with DeadlineExceeded once it has passed."""
    cache_salt: str = ""
    """Requests share cached prefixes only with requests of the same salt."""
    num_resumed_tokens: int = 0
    """How many of the last `prompt_ids` are output of an earlier attempt: they count as output for penalties,
    min_tokens and max_tokens, and are not sent again."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probabilities (natural) at one output position."""

    logprob: float
    """Of the drawn token."""
    top_ids: tuple[int, ...]
    top_logprobs: tuple[float, ...]


@dataclass(slots=True, eq=False)
class Request:
    """A request's life inside one engine; equal only to itself. `num_computed_tokens` catches up with `num_tokens`:
    prefill, chunked prefill, prefix hits, decoding, preemption and resumption are all the same movement."""

    spec: EngineRequest
    arrival: int
    """Engine-wide arrival number; breaks ties of priority."""
    state: RequestState = RequestState.WAITING
    token_ids: list[int] = field(default_factory=list)
    """Prompt followed by output."""
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0
    """Prompt tokens that the prefix cache supplied when the request was first scheduled."""
    finish_reason: FinishReason | None = None
    stop_ids: frozenset[int] = frozenset()
    """Ids that end the output; set by the scheduler, which knows the model's own."""
    max_num_tokens: int = 0
    """`num_tokens` at which the output ends for length; set by the scheduler, which knows the limits."""
    block_hashes: list[bytes] = field(default_factory=list)
    """Chain hashes of its full KV blocks, extended as they fill (see `prefix_cache.py`)."""

    def __post_init__(self) -> None:
        if not self.token_ids:
            self.token_ids = list(self.spec.prompt_ids)

    @property
    def id(self) -> str:
        return self.spec.id

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.spec.prompt_ids) - self.spec.num_resumed_tokens

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def order(self) -> tuple[int, int]:
        """Sort key: who runs first."""
        return (self.spec.priority, self.arrival)

    def advance(self, to: RequestState) -> None:
        """Move to `to`; an illegal move is a defect of the engine."""
        if to not in LEGAL_MOVES[self.state]:
            raise AssertionError(f"request {self.id}: illegal move {self.state} -> {to}")
        self.state = to


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What one engine step produced for one request: zero or more tokens and perhaps its end."""

    request_id: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    num_cached_tokens: int = 0
    error: Exception | None = None

    @property
    def is_last(self) -> bool:
        """Whether the request ended with this output."""
        return self.finish_reason is not None or self.error is not None
