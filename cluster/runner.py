"""Turns a step plan into tensors, runs the model and draws tokens. The only part of the engine that touches torch;
knows requests and page tables, but neither why they were scheduled nor who waits for them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..model.decoder import Batch, Decoder
from ..model.kv_cache import KvCache
from ..model.penalties import PenaltyState, SamplingRow, needs_history
from ..model.sampling import Drawn, Sampler
from .decode_graphs import DecodeGraphs
from .host_batch import HostBatch, HostPages
from .kv_manager import KvManager
from .overlap import OverlapTuner
from .page_tables import GroupPage, PageTables
from .request import Request, TokenLogprob
from .scheduler import PlannedRequest, StepPlan
from .upload import upload

Draw = tuple[int, TokenLogprob | None]


class ModelRunner:
    """Executes step plans on one device."""

    def __init__(
        self,
        decoder: Decoder,
        cache: KvCache,
        sampler: Sampler,
        kv: KvManager,
        max_num_seqs: int,
        overlap: OverlapTuner | None = None,
        graphs: DecodeGraphs | None = None,
    ) -> None:
        """`overlap` may split steps in halves; None never does, which is right for experts that compute here.
        `graphs`, of a function from a batch to its logits, replays decoding steps; None computes each anew."""
        self._decoder = decoder
        self._cache = cache
        self._sampler = sampler
        self._kv = kv
        self._device = decoder.device
        self._tables = PageTables(kv.layout, max_num_seqs)
        self._penalties: dict[str, PenaltyState] = {}
        self._overlap = overlap or OverlapTuner("off")
        self._graphs = graphs
        self.split_steps = 0
        """Steps that were computed as two halves."""

    def run(self, plan: StepPlan) -> list[Draw]:
        """Compute a non-empty plan; one draw for each entry of `plan.sampling`. Raises SamplingError for rows without
        a finite logit (it carries what the others drew), and ExpertsUnavailable for tokens without an expert, counted
        through the plan; nothing is drawn then."""
        for request in plan.preempted:
            self._tables.forget(request.id)
        logits_SV = self._logits(plan)
        if logits_SV is None:
            return []
        rows = [self._sampling_row(entry.request) for entry in plan.sampling]
        return [to_draw(drawn) for drawn in self._sampler.sample(logits_SV, rows)]

    def refresh(self) -> None:
        """Let what lies behind the model keep up with the world while there is nothing to compute."""
        self._decoder.experts.refresh()

    def forget(self, request_id: str) -> None:
        """Drop what is kept for a request that has ended."""
        self._tables.forget(request_id)
        self._penalties.pop(request_id, None)

    def _logits(self, plan: StepPlan) -> Tensor | None:
        """Of the rows that are sampled from, in order; None if there are none."""
        if self._graphs is not None and len(plan.sampling) == plan.total_tokens:
            return self._graphs.run(self._host_batch(plan.entries))
        hidden_SD = self._forward(plan.entries)
        return self._decoder.logits(hidden_SD) if plan.sampling else None

    def _forward(self, entries: Sequence[PlannedRequest]) -> Tensor:
        """Hidden states of the rows that are sampled from, in order."""
        with self._overlap.step([entry.num_tokens for entry in entries]) as cut:
            parts = [entries[:cut], entries[cut:]] if cut else [entries]
            batches, last_S = self._batches(parts)
            if cut:
                self.split_steps += 1
                hidden_TD = torch.cat(self._decoder.forward_interleaved(batches, self._cache))
            else:
                hidden_TD = self._decoder.forward(batches[0], self._cache)
        return hidden_TD if last_S is None else hidden_TD[last_S]

    def _batches(self, parts: Sequence[Sequence[PlannedRequest]]) -> tuple[list[Batch], Tensor | None]:
        """The parts of a step on the device, and which rows of all of them are sampled from; None for every row."""
        spans = self._device.type == "cuda"
        hosts = [self._host_batch(entries) for entries in parts]
        arrays = [array for host in hosts for array in host.arrays(spans=spans)]
        last_S = _last_rows([entry for entries in parts for entry in entries])
        if last_S is not None:
            arrays.append(last_S)
        tensors = iter(upload(arrays, self._device))
        return [host.batch(tensors, spans=spans) for host in hosts], next(tensors, None)

    def _host_batch(self, entries: Sequence[PlannedRequest]) -> HostBatch:
        layout = self._kv.layout
        requests = [entry.request for entry in entries]
        tables = [self._kv.tables(request.id) for request in requests]
        rows_S = np.array([self._tables.sync(r.id, t) for r, t in zip(requests, tables, strict=True)], np.int64)
        counts_S = np.array([entry.num_tokens for entry in entries], np.int64)
        firsts_S = np.array([request.num_computed_tokens for request in requests], np.int64)
        starts_S = np.concatenate(([0], np.cumsum(counts_S)))
        sequence_T = np.repeat(np.arange(len(entries)), counts_S)
        positions_T = np.arange(len(sequence_T)) - starts_S[sequence_T] + firsts_S[sequence_T]
        ids: list[int] = []
        for request, num_tokens, _ in entries:
            first = request.num_computed_tokens
            ids += request.token_ids[first : first + num_tokens]
        origins_S = {False: np.zeros_like(firsts_S), True: np.array([t.local_start for t in tables], np.int64)}
        lens_S: dict[bool, npt.NDArray[np.int32]] = {}
        pages: dict[GroupPage, HostPages] = {}
        for kind in self._tables.kinds:
            origin_S = origins_S[kind[0]]
            keys_S = firsts_S + counts_S - origin_S
            lens_S[kind[0]] = keys_S.astype(np.int32)
            block_T = (positions_T - origin_S[sequence_T]) // layout.block_size
            page_T = self._tables.pages(kind, rows_S[sequence_T], block_T).astype(np.int64)
            pages[kind] = HostPages(
                slots_T=page_T * layout.block_size + positions_T % layout.block_size,
                tables_SN=self._tables.tables(kind, rows_S, -(-int(keys_S.max()) // layout.block_size)),
            )
        return HostBatch(np.array(ids, np.int64), positions_T, starts_S, lens_S, pages)

    def _sampling_row(self, request: Request) -> SamplingRow:
        params = request.spec.sampling
        if not needs_history(params):
            return SamplingRow(params, request.num_tokens)
        state = self._penalties.setdefault(request.id, PenaltyState())
        split = request.num_prompt_tokens
        return SamplingRow(params, request.num_tokens, request.token_ids[:split], request.token_ids[split:], state)


def _last_rows(entries: Sequence[PlannedRequest]) -> npt.NDArray[np.int64] | None:
    """Rows that are sampled from; None if that is every row, or if there is none."""
    ends_S = np.cumsum([entry.num_tokens for entry in entries]) - 1
    last_S = ends_S[[entry.samples for entry in entries]]
    return last_S if 0 < len(last_S) <= ends_S[-1] else None


def to_draw(drawn: Drawn) -> Draw:
    """A sampler's token as the scheduler takes it."""
    if drawn.logprob is None:
        return drawn.token_id, None
    return drawn.token_id, TokenLogprob(drawn.logprob, drawn.top_ids, drawn.top_logprobs)
