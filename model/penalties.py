"""What a request does to its logits before the draw: penalties, logit_bias and suppressed ids, for a whole batch as a
few sparse edits. Knows nothing of temperature, filtering or noise.

Shapes: R rows, V vocabulary, E edits (one per touched row and id).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .sampling_params import SamplingParams


class PenaltyState:
    """One request's token counts between steps, so that a long output is not counted anew for each token. Opaque to
    the caller, who makes one per request and hands it in with every `SamplingRow` of that request."""

    __slots__ = ("_bias", "_counts", "_ids", "_num_output", "_num_prompt", "_slots")

    def __init__(self) -> None:
        self._bias: tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]] | None = None
        self._forget()

    def _forget(self) -> None:
        self._num_prompt = -1
        self._num_output = 0
        self._slots: dict[int, int] = {}
        self._ids = np.empty(0, dtype=np.int64)
        self._counts = np.empty(0, dtype=np.float32)

    def seen(self, row: SamplingRow, vocab_size: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """Distinct ids that penalties touch and how often each occurs in the output (0: in the prompt only)."""
        if len(row.output_ids) < self._num_output or self._num_prompt not in (-1, len(row.prompt_ids)):
            self._forget()
        if self._num_prompt < 0:
            self._num_prompt = len(row.prompt_ids)
            if row.params.repetition_penalty != 1.0:
                distinct = np.unique(np.asarray(row.prompt_ids, dtype=np.int64))
                self._ids = distinct[(distinct >= 0) & (distinct < vocab_size)]
                self._counts = np.zeros(len(self._ids), dtype=np.float32)
                self._slots = {token: slot for slot, token in enumerate(self._ids.tolist())}
        for at in range(self._num_output, len(row.output_ids)):
            self._count(row.output_ids[at])
        self._num_output = len(row.output_ids)
        return self._ids[: len(self._slots)], self._counts[: len(self._slots)]

    def _count(self, token: int) -> None:
        slot = self._slots.setdefault(token, len(self._slots))
        if slot == len(self._ids):
            self._ids = np.concatenate((self._ids, np.zeros(slot + 64, dtype=np.int64)))
            self._counts = np.concatenate((self._counts, np.zeros(slot + 64, dtype=np.float32)))
        self._ids[slot] = token
        self._counts[slot] += 1.0

    def bias(self, row: SamplingRow, vocab_size: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """The request's logit_bias as arrays of distinct ids (repeated pairs add up; unknown ids have no effect)."""
        if self._bias is None:
            total: dict[int, float] = {}
            for token, value in row.params.logit_bias:
                if 0 <= token < vocab_size:
                    total[token] = total.get(token, 0.0) + value
            self._bias = (np.array(list(total), dtype=np.int64), np.array(list(total.values()), dtype=np.float32))
        return self._bias


@dataclass(slots=True)
class SamplingRow:
    """One row of logits and what is needed to draw from it."""

    params: SamplingParams
    position: int
    """Absolute index that the drawn token will have in its sequence: half of the noise's key."""
    prompt_ids: Sequence[int] = ()
    """Without the resumed output. Read only by rows for which `needs_history` holds."""
    output_ids: Sequence[int] = ()
    """Everything generated so far, resumed tokens included. Read like `prompt_ids`."""
    state: PenaltyState | None = None
    """Saves recounting; None recounts each time."""


def needs_history(params: SamplingParams) -> bool:
    """Whether rows of this request need `prompt_ids` and `output_ids`."""
    return has_penalties(params) or params.min_tokens > 0


def has_penalties(params: SamplingParams) -> bool:
    """Whether any of the three penalties has an effect."""
    return params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0


class LogitEdits:
    """Applies the edits of many rows at once, in the order that `SamplingParams` states."""

    def __init__(self, vocab_size: int, eos_ids: Collection[int], suppressed_ids: Collection[int]) -> None:
        self._vocab_size = vocab_size
        self._eos_ids = tuple(sorted(eos_ids))
        self._suppressed = torch.tensor(sorted(set(suppressed_ids)), dtype=torch.long)
        assert all(0 <= token < vocab_size for token in (*self._eos_ids, *self._suppressed.tolist()))

    def touch(self, rows: Sequence[SamplingRow]) -> bool:
        """Whether `apply_` would change anything."""
        return len(self._suppressed) > 0 or any(
            has_penalties(row.params) or row.params.logit_bias or len(row.output_ids) < row.params.min_tokens
            for row in rows
        )

    def apply_(self, x_RV: Tensor, rows: Sequence[SamplingRow]) -> None:
        """Edit float32 logits in place."""
        self._penalise_(x_RV, rows)
        self._bias_(x_RV, rows)
        if len(self._suppressed):
            self._suppressed = self._suppressed.to(x_RV.device)
            x_RV.index_fill_(1, self._suppressed, float("-inf"))
        self._suppress_stops_(x_RV, rows)

    def _penalise_(self, x_RV: Tensor, rows: Sequence[SamplingRow]) -> None:
        touched = [index for index, row in enumerate(rows) if has_penalties(row.params)]
        if not touched:
            return
        seen = [(rows[i].state or PenaltyState()).seen(rows[i], self._vocab_size) for i in touched]
        sizes = [len(ids) for ids, _ in seen]
        params = [rows[i].params for i in touched]
        settings_3N = np.array(
            [
                [p.repetition_penalty for p in params],
                [p.presence_penalty for p in params],
                [p.frequency_penalty for p in params],
            ],
            dtype=np.float32,
        )
        device = x_RV.device
        settings_3E = torch.from_numpy(np.repeat(settings_3N, sizes, axis=1)).to(device)
        counts_E = torch.from_numpy(np.concatenate([counts for _, counts in seen])).to(device)
        where = _places(touched, [ids for ids, _ in seen], device)
        x_E = x_RV[where]
        x_E = torch.where(x_E > 0, x_E / settings_3E[0], x_E * settings_3E[0])
        x_E -= settings_3E[1] * (counts_E > 0)
        x_E -= settings_3E[2] * counts_E
        x_RV[where] = x_E

    def _bias_(self, x_RV: Tensor, rows: Sequence[SamplingRow]) -> None:
        touched = [index for index, row in enumerate(rows) if row.params.logit_bias]
        if not touched:
            return
        biases = [(rows[i].state or PenaltyState()).bias(rows[i], self._vocab_size) for i in touched]
        where = _places(touched, [ids for ids, _ in biases], x_RV.device)
        x_RV[where] += torch.from_numpy(np.concatenate([values for _, values in biases])).to(x_RV.device)

    def _suppress_stops_(self, x_RV: Tensor, rows: Sequence[SamplingRow]) -> None:
        touched = [index for index, row in enumerate(rows) if len(row.output_ids) < row.params.min_tokens]
        if not touched:
            return
        stops = [
            np.array(
                [*self._eos_ids, *(t for t in rows[i].params.stop_token_ids if 0 <= t < self._vocab_size)],
                dtype=np.int64,
            )
            for i in touched
        ]
        x_RV[_places(touched, stops, x_RV.device)] = float("-inf")


def _places(
    touched: Sequence[int], ids: Sequence[npt.NDArray[np.int64]], device: torch.device
) -> tuple[Tensor, Tensor]:
    rows_E = np.repeat(np.array(touched, dtype=np.int64), [len(part) for part in ids])
    return torch.from_numpy(rows_E).to(device), torch.from_numpy(np.concatenate(ids)).to(device)
