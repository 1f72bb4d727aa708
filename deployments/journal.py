"""What the gateway keeps of a choice so that the death of its engine ends nothing: the request, every token that has
come, the engines it has lost and how long it has waited. Decides whether, when and with what to ask again; knows
nothing of Ray, sockets or streams."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..cluster.errors import EngineUnavailable, GatewayUnreachable, HerdError, Overloaded, from_wire

MAX_LOST_ENGINES = 3
"""A request that has cost so many engines is given up: it may be what kills them."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 1.0


class EngineLost(EngineUnavailable):
    """An engine was lost while it may have worked on the request. Never crosses a process."""


class Journal:
    """One choice from its first submission to its end. `extend` it with what comes, tell it of every failed attempt
    (`pause_after`), and submit its `next_request`."""

    __slots__ = (
        "_clock",
        "_deadline_s",
        "_failure",
        "_first",
        "_give_up_at",
        "_num_cached_tokens",
        "_num_lost",
        "_pause_s",
        "_recovery_timeout_s",
        "_token_ids",
        "lost_engines",
    )

    def __init__(
        self, request: Mapping[str, Any], recovery_timeout_s: float, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`request`: fields of EngineRequest as plain values. `recovery_timeout_s`: longest time without a new token
        from an engine's loss on; 0: no second attempt."""
        self._first = request
        self._recovery_timeout_s = recovery_timeout_s
        self._clock = clock
        timeout_s = request.get("timeout_s")
        self._deadline_s = None if timeout_s is None else clock() + timeout_s
        self._token_ids: list[int] = []
        self._num_cached_tokens: int | None = None
        self._num_lost = 0
        self._pause_s = 0.0
        self._give_up_at: float | None = None
        self._failure: HerdError | None = None
        self.lost_engines: list[str] = []
        """Ids of engines that had the request and are better avoided."""

    def next_request(self) -> Mapping[str, Any]:
        """What to ask of the next engine: the prompt followed by the tokens that have come, within the time left."""
        if self._failure is None:
            return self._first
        now_s, deadline_s = self._clock(), self._deadline_s
        return {
            **self._first,
            "prompt_ids": [*self._first["prompt_ids"], *self._token_ids],
            "num_resumed_tokens": len(self._token_ids),
            "timeout_s": None if deadline_s is None else max(0.0, deadline_s - now_s),
        }

    @property
    def patience_s(self) -> float | None:
        """How much longer to wait for a token; None unless an attempt has failed since the last one."""
        return None if self._give_up_at is None else max(0.0, self._give_up_at - self._clock())

    def extend(self, token_ids: Sequence[int]) -> None:
        """These tokens have come: whatever failed before is made good."""
        self._token_ids += token_ids
        self._pause_s, self._give_up_at = 0.0, None

    def failure_of(self, end: Mapping[str, Any]) -> HerdError | None:
        """What an attempt that the engine ended so failed with; None if the choice is complete."""
        if "error" in end:
            error = from_wire(end["error"])
            return EngineLost(error.message) if type(error) is EngineUnavailable else error
        if self._num_cached_tokens is None:
            self._num_cached_tokens = end.get("num_cached_tokens")
        if end["finish_reason"] == "abort":
            return EngineLost("the engine gave the request up before it was complete")
        return None

    def whole(self, end: Mapping[str, Any]) -> dict[str, Any]:
        """The choice's end, all attempts counted as one."""
        return {**end, "num_cached_tokens": self._num_cached_tokens, "num_output_tokens": len(self._token_ids)}

    def pause_after(self, failure: HerdError, engine_id: str | None = None) -> float:
        """Seconds until the next attempt, now that one has failed; `engine_id`: where, if that is known. Raises what
        the choice ends with if there shall be none."""
        if not self._may_pass(failure):
            raise failure
        self._failure = failure
        if isinstance(failure, EngineLost | GatewayUnreachable):
            self._num_lost += 1
            if engine_id is not None:
                self.lost_engines.append(engine_id)
            if self._num_lost >= MAX_LOST_ENGINES:
                raise EngineUnavailable(f"{self._num_lost} engines were lost with this request; the last: {failure}")
        if self._give_up_at is None:
            self._give_up_at = self._clock() + self._recovery_timeout_s
        if not self.patience_s:
            raise self.gave_up()
        pause_s = self._pause_s
        self._pause_s = min(max(FIRST_PAUSE_S, 2 * pause_s), LONGEST_PAUSE_S)
        return pause_s

    def gave_up(self) -> EngineUnavailable:
        """What the choice ends with once patience has run out."""
        return EngineUnavailable(f"{self._failure}, and no other took over within {self._recovery_timeout_s:g} s")

    def _may_pass(self, failure: HerdError) -> bool:
        """Whether another attempt may fare better. Who was being served already is not turned away by a full queue."""
        return isinstance(failure, EngineUnavailable) or (self._failure is not None and isinstance(failure, Overloaded))
