"""Draws the next token of each row of logits. Knows nothing of requests' lives, text or processes.

A row's token depends on that row's logits and settings alone, to the last bit: every sum over the vocabulary adds whole
numbers in float64 below 2**53, which is exact in any order, and all else is element by element. So batch mates, fast
paths, thread counts and kernels cannot change a draw.

Shapes: S rows of the batch, R rows of one part of it, V vocabulary, B blocks of the vocabulary, P leading tokens.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from .penalties import LogitEdits, PenaltyState, SamplingRow, needs_history
from .philox import uniforms
from .sampling_params import SamplingParams
from .vocab_rows import BLOCK, block_draw, first_argmax, id_order_draw, keep_leading, leading

__all__ = ["Drawn", "PenaltyState", "Sampler", "SamplingError", "SamplingRow", "needs_history"]

_CPU_PART = 1 << 19
"""Elements of logits handled at a time on CPU: temporaries of this size stay in cache and out of mmap."""
_TOP_P_WIDTH = 256
"""Leading tokens looked at first for a row with top_p and no top_k."""
_MIN_WIDTH = 64
_MAX_WIDTH = 2048
"""Beyond this, cutting the whole row is cheaper than ordering its leading tokens."""
_COLDEST = 1e-30


@dataclass(frozen=True, slots=True)
class Drawn:
    """One drawn token. The rest is filled only for rows that ask for logprobs: natural logarithms of the
    distribution before any penalty, bias or temperature; `top_*` most likely first, ties by id."""

    token_id: int
    logprob: float | None = None
    top_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()


class SamplingError(RuntimeError):
    """Rows whose largest logit, after edits, is not a finite number (NaN, infinite, or everything suppressed).

    `rows` are their indices. `drawn` holds what `sample` would have returned, with None in those places, so that the
    other rows need not suffer.
    """

    def __init__(self, rows: Sequence[int], drawn: Sequence[Drawn | None]) -> None:
        super().__init__(f"no finite largest logit in row(s) {', '.join(map(str, rows))}")
        self.rows = tuple(rows)
        self.drawn = tuple(drawn)


class _Kind(IntEnum):
    GREEDY = 0
    WHOLE = 1
    """Temperature and perhaps min_p: needs no order."""
    TOP_K = 2
    TOP_P = 3


class Sampler:
    """Draws tokens from logits over `vocab_size` ids.

    `eos_ids` are suppressed while a row's min_tokens is not reached, `suppressed_ids` always.
    """

    def __init__(
        self,
        vocab_size: int,
        *,
        eos_ids: frozenset[int],
        suppressed_ids: Collection[int] = (),
        device: torch.device | str = "cpu",
    ) -> None:
        self.vocab_size = vocab_size
        self._device = torch.device(device)
        self._edits = LogitEdits(vocab_size, eos_ids, suppressed_ids)
        self._padding = -vocab_size % BLOCK
        padded = vocab_size + self._padding
        self._width = padded
        self._unit = 2.0 ** (52 - padded.bit_length())
        """Whole-number weight of the most likely token: the largest with which V of them sum exactly."""
        self._part_rows = max(1, _CPU_PART // padded) if self._device.type == "cpu" else 1 << 16

    def sample(self, logits_SV: Tensor, rows: Sequence[SamplingRow]) -> list[Drawn]:
        """One token per row. `logits_SV` may have any float dtype and is left as it was.

        min_p, top_k and top_p each act on what the one before it left, and always leave at least one token. Equal
        logits go by ascending id: in greedy rows, and at the edge of a filter.

        Raises `SamplingError` when a row has no finite largest logit.
        """
        assert logits_SV.shape == (len(rows), self.vocab_size), (logits_SV.shape, len(rows), self.vocab_size)
        groups: dict[tuple[_Kind, int], list[int]] = defaultdict(list)
        for index, row in enumerate(rows):
            groups[self._plan(row.params)].append(index)
        if any(kind is not _Kind.GREEDY for kind, _ in groups):
            noise = uniforms([row.params.seed for row in rows], [row.position for row in rows])
            u_S1 = torch.from_numpy(noise).to(self._device)[:, None]
        else:
            u_S1 = None
        token_S = torch.empty(len(rows), dtype=torch.long, device=self._device)
        fine_S = torch.empty(len(rows), dtype=torch.bool, device=self._device)
        for (kind, width), members in groups.items():
            for part in self._parts(members):
                at = _index(part)
                mates = [rows[index] for index in part]
                x_RV = self._edited(logits_SV[at], mates)
                peak_R1, first_R = first_argmax(x_RV)
                fine_S[at] = peak_R1[:, 0].isfinite()
                if u_S1 is None or kind is _Kind.GREEDY:
                    token_S[at] = first_R
                else:
                    token_S[at] = self._draw(kind, width, x_RV, peak_R1, [m.params for m in mates], u_S1[at])
        token_S.clamp_(max=self.vocab_size - 1)
        drawn = self._with_logprobs(logits_SV, rows, token_S)
        bad = [
            index
            for index, (token, fine) in enumerate(zip(drawn, fine_S.tolist(), strict=True))
            if not fine or (token.logprob is not None and not math.isfinite(token.logprob))
        ]
        if bad:
            raise SamplingError(bad, [None if index in bad else token for index, token in enumerate(drawn)])
        return drawn

    def _plan(self, params: SamplingParams) -> tuple[_Kind, int]:
        """Which path a row takes, and how many leading tokens that path looks at first (0: the whole row)."""
        if params.greedy or params.top_k == 1:
            return _Kind.GREEDY, 0
        if 0 < params.top_k < self.vocab_size:
            width = self._leading_width(params.top_k)
            return _Kind.TOP_K, width if width <= _MAX_WIDTH else 0
        if params.top_p < 1.0:
            return _Kind.TOP_P, min(_TOP_P_WIDTH, self._width)
        return _Kind.WHOLE, 0

    def _leading_width(self, count: int) -> int:
        """Twice as many as asked for, so that equal logits at the edge rarely matter."""
        return min(max(_MIN_WIDTH, 1 << (2 * count - 1).bit_length()), self._width)

    def _parts(self, members: list[int]) -> Iterator[list[int]]:
        for start in range(0, len(members), self._part_rows):
            yield members[start : start + self._part_rows]

    def _whole_blocks(self, x_RV: Tensor) -> Tensor:
        x_RV = x_RV.float()
        if self._padding:
            return torch.nn.functional.pad(x_RV, (0, self._padding), value=float("-inf"))
        return x_RV

    def _edited(self, x_RV: Tensor, mates: Sequence[SamplingRow]) -> Tensor:
        if self._edits.touch(mates):
            x_RV = x_RV.to(torch.float32, copy=True)
            self._edits.apply_(x_RV, mates)
        return self._whole_blocks(x_RV)

    def _column(self, values: list[float], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self._device)[:, None]

    def _weights(self, x_RN: Tensor, peak_R1: Tensor, params: Sequence[SamplingParams] | None = None) -> Tensor:
        """Unnormalised probabilities as whole numbers in float32: `_unit` for a logit equal to `peak_R1`."""
        e_RN = x_RN - peak_R1
        if params is not None and any(p.temperature != 1.0 for p in params):
            e_RN /= self._column([max(p.temperature, _COLDEST) for p in params])
        e_RN.exp_()
        if params is not None and any(p.min_p > 0.0 for p in params):
            floor_R1 = self._column([p.min_p for p in params])
            e_RN *= torch.ge(e_RN, floor_R1, out=torch.empty_like(e_RN))
        return e_RN.mul_(self._unit).round_()

    def _draw(
        self, kind: _Kind, width: int, x_RV: Tensor, peak_R1: Tensor, params: Sequence[SamplingParams], u_R1: Tensor
    ) -> Tensor:
        if kind is _Kind.WHOLE:
            return block_draw(self._weights(x_RV, peak_R1, params), u_R1)
        total_R1 = None
        if kind is _Kind.TOP_P:
            total_R1 = self._weights(x_RV, peak_R1, params).sum(-1, keepdim=True, dtype=torch.float64)
        return self._draw_leading(width, x_RV, peak_R1, params, u_R1, total_R1)

    def _draw_leading(
        self,
        width: int,
        x_RV: Tensor,
        peak_R1: Tensor,
        params: Sequence[SamplingParams],
        u_R1: Tensor,
        total_R1: Tensor | None,
    ) -> Tensor:
        """Draw among the `width` leading tokens; rows of which these may not hold all that is kept are drawn anew with
        more of them. `total_R1` is the mass that top_p refers to; None when top_k bounds it."""
        if not width:
            return self._draw_cut(x_RV, peak_R1, params, u_R1)
        x_RP, ids_RP, sure_R = leading(x_RV, width)
        weights_RP = self._weights(x_RP, peak_R1, params).double()
        if total_R1 is None:
            rank_1P = torch.arange(width, device=self._device)[None]
            weights_RP *= rank_1P < self._column([p.top_k for p in params], torch.long)
            sum_R1 = weights_RP.sum(-1, keepdim=True)
        else:
            sum_R1 = total_R1
        kept_RP = weights_RP.cumsum(-1) - weights_RP < self._enough(params, sum_R1)
        token_R = id_order_draw(weights_RP * kept_RP, ids_RP, u_R1)
        left_R = torch.nonzero(kept_RP.sum(-1) > sure_R)[:, 0]
        if len(left_R):
            wider = min(_MAX_WIDTH, self._width) if width < _MAX_WIDTH else 0
            token_R[left_R] = self._draw_leading(
                wider,
                x_RV[left_R],
                peak_R1[left_R],
                [params[i] for i in left_R.tolist()],
                u_R1[left_R],
                None if total_R1 is None else total_R1[left_R],
            )
        return token_R

    def _draw_cut(self, x_RV: Tensor, peak_R1: Tensor, params: Sequence[SamplingParams], u_R1: Tensor) -> Tensor:
        """Draw among however many leading tokens: slower than `_draw_leading`, and always settled."""
        weights_RV = self._weights(x_RV, peak_R1, params)
        if any(p.top_k for p in params):
            count_R1 = self._column([p.top_k or self._width for p in params], torch.float64)
            weights_RV *= keep_leading(x_RV, torch.ones_like(weights_RV), count_R1)
        if any(p.top_p < 1.0 for p in params):
            total_R1 = weights_RV.sum(-1, keepdim=True, dtype=torch.float64)
            weights_RV *= keep_leading(x_RV, weights_RV, self._enough(params, total_R1))
        return block_draw(weights_RV, u_R1)

    def _enough(self, params: Sequence[SamplingParams], total_R1: Tensor) -> Tensor:
        return (self._column([p.top_p for p in params], torch.float64) * total_R1).clamp_(min=1.0)

    def _with_logprobs(self, logits_SV: Tensor, rows: Sequence[SamplingRow], token_S: Tensor) -> list[Drawn]:
        drawn = [Drawn(token) for token in token_S.tolist()]
        asking = [index for index, row in enumerate(rows) if row.params.logprobs is not None]
        for part in self._parts(asking):
            at = _index(part)
            counts = [min(rows[index].params.logprobs or 0, self.vocab_size) for index in part]
            own_R, ids_RP, top_RP = self._logprobs(logits_SV[at], token_S[at], counts)
            columns = zip(part, counts, own_R.tolist(), ids_RP.tolist(), top_RP.tolist(), strict=True)
            for index, count, own, ids, top in columns:
                drawn[index] = Drawn(drawn[index].token_id, own, tuple(ids[:count]), tuple(top[:count]))
        return drawn

    def _logprobs(self, raw_RV: Tensor, token_R: Tensor, counts: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        x_RV = self._whole_blocks(raw_RV)
        peak_R1 = x_RV.amax(-1, keepdim=True)
        mass_R1 = self._weights(x_RV, peak_R1).sum(-1, keepdim=True, dtype=torch.float64) / self._unit
        shift_R1 = peak_R1.double() + mass_R1.log()
        own_R = (x_RV.gather(1, token_R[:, None]).double() - shift_R1)[:, 0]
        most = max(counts)
        if most == 0:
            none_R0 = token_R[:, None][:, :0]
            return own_R, none_R0, none_R0
        width = self._leading_width(most)
        x_RP, ids_RP, sure_R = leading(x_RV, width)
        x_RP, ids_RP = x_RP[:, :most], ids_RP[:, :most]
        left = torch.nonzero(sure_R < torch.tensor(counts, device=self._device))[:, 0]
        if width < self._width and len(left):
            whole_x, whole_ids, _ = leading(x_RV[left], self._width)
            x_RP[left], ids_RP[left] = whole_x[:, :most], whole_ids[:, :most]
        return own_R, ids_RP, x_RP.double() - shift_R1


def _index(part: list[int]) -> slice | list[int]:
    """A slice where the rows are neighbours: it is a view instead of a copy."""
    first, last = part[0], part[-1]
    return slice(first, last + 1) if last - first + 1 == len(part) else part
