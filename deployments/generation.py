"""One choice's way from token ids to text: detokenization, stop strings, log-probabilities, counts and the finish
reason. A streamed and a whole answer go through the same steps, so they say the same. Knows nothing of JSON, HTTP or
engines."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from ..cluster.errors import EngineUnavailable, from_wire
from ..model.detokenizer import IncrementalDetokenizer
from ..model.stop_strings import StopStrings
from ..model.tokenizer import Tokenizer

LOWEST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON lacks."""

RawLogprobs = Sequence[Any]
"""Of one token, as engines send it: `[logprob, [top ids], [top logprobs]]`."""


class Detokenizer(Protocol):
    def push(self, ids: Sequence[int]) -> str: ...
    def finish(self) -> str: ...


@dataclass(frozen=True, slots=True)
class ScoredToken:
    """One generated token with its log-probabilities and where its text begins."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    offset: int
    """In characters from the start of this choice's own text."""


@dataclass(slots=True)
class Delta:
    """What one update added to a choice. Tokens whose text is still held back wait for the text."""

    text: str
    token_ids: list[int] = field(default_factory=list)
    scored: list[ScoredToken] = field(default_factory=list)
    finish_reason: str | None = None


class Choice:
    """One choice being generated. Feed it the engine's updates; it says what the client may see."""

    __slots__ = (
        "_careful",
        "_characters",
        "_detokenizer",
        "_pending_ids",
        "_pending_scored",
        "_silent_ids",
        "_stops",
        "_wants_logprobs",
        "finish_reason",
        "num_cached_tokens",
        "num_tokens",
    )

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        stops: Sequence[str] = (),
        stop_token_ids: Collection[int] = (),
        include_stop: bool = False,
        wants_logprobs: bool = False,
    ) -> None:
        self._detokenizer: Detokenizer = IncrementalDetokenizer(tokenizer)
        self._stops = StopStrings(stops, include_stop) if stops else None
        self._silent_ids = frozenset() if include_stop else frozenset(stop_token_ids)
        self._wants_logprobs = wants_logprobs
        self._careful = bool(stops) or bool(self._silent_ids) or wants_logprobs
        self._characters = 0
        self._pending_ids: list[int] = []
        self._pending_scored: list[ScoredToken] = []
        self.num_tokens = 0
        """Generated so far, up to and including the one that completed a stop string."""
        self.num_cached_tokens: int | None = None
        """Prompt tokens that the engine had in cache; known once the engine has ended the request."""
        self.finish_reason: str | None = None

    def push(self, ids: Sequence[int], logprobs: Sequence[RawLogprobs] | None, end: dict[str, Any] | None) -> Delta:
        """Take one update of the engine. Raises the error that the engine ended the request with. After the choice has
        finished, further updates change nothing but `num_cached_tokens`."""
        if self.finish_reason is not None:
            self._note_end(end)
            return Delta("")
        text = self._push_each(ids, logprobs) if self._careful else self._push_all(ids)
        reason = self._note_end(end)
        if reason is not None and self.finish_reason is None:
            text += self._flush()
            self.finish_reason = self.finish_reason or reason
        if not text and self.finish_reason is None:
            return Delta("")
        delta = Delta(text, self._pending_ids, self._pending_scored, self.finish_reason)
        self._pending_ids, self._pending_scored = [], []
        return delta

    def _push_all(self, ids: Sequence[int]) -> str:
        self.num_tokens += len(ids)
        self._pending_ids += ids
        return self._detokenizer.push(ids)

    def _push_each(self, ids: Sequence[int], logprobs: Sequence[RawLogprobs] | None) -> str:
        """Token by token, because the one that completes a stop string is the last that counts."""
        pieces = []
        for i, token_id in enumerate(ids):
            self.num_tokens += 1
            self._pending_ids.append(token_id)
            if self._wants_logprobs and logprobs is not None:
                self._pending_scored.append(_scored(token_id, logprobs[i], self._characters))
            if token_id in self._silent_ids:
                continue
            piece = self._detokenizer.push((token_id,))
            self._characters += len(piece)
            pieces.append(self._through_stops(piece))
            if self.finish_reason is not None:
                break
        return "".join(pieces)

    def _through_stops(self, piece: str) -> str:
        if self._stops is None:
            return piece
        piece, stopped = self._stops.push(piece)
        if stopped:
            self.finish_reason = "stop"
        return piece

    def _flush(self) -> str:
        """What was held back, now that nothing follows."""
        text = self._through_stops(self._detokenizer.finish())
        return text if self._stops is None or self.finish_reason is not None else text + self._stops.finish()

    def _note_end(self, end: dict[str, Any] | None) -> str | None:
        """The engine's finish reason. An error after the client has all it will get is of no interest to it."""
        if end is None:
            return None
        if "error" in end:
            if self.finish_reason is None:
                raise from_wire(end["error"])
            return None
        self.num_cached_tokens = end.get("num_cached_tokens")
        reason = end["finish_reason"]
        if reason == "abort" and self.finish_reason is None:
            raise EngineUnavailable("the engine gave the request up before it was complete")
        return reason


def _scored(token_id: int, raw: RawLogprobs, offset: int) -> ScoredToken:
    logprob, top_ids, top_logprobs = raw
    top = tuple((i, _finite(value)) for i, value in zip(top_ids, top_logprobs, strict=True))
    return ScoredToken(token_id, _finite(logprob), top, offset)


def _finite(logprob: float) -> float:
    return logprob if logprob > LOWEST_LOGPROB else LOWEST_LOGPROB
