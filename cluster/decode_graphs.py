"""Decoding steps as CUDA graphs: what a step of one shape launches is recorded once and replayed afterwards, so that a
step costs the host one copy and one launch, whatever the number of layers. Steps are filled up to a few shapes:
sequences that see no key and write none, table columns and spans that nobody reads.

Knows batches and how to record, not what the model does with them. Shapes: S sequences, N blocks, W spans."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..model.decoder import Batch
from .host_batch import HostBatch
from .upload import Array, Staging

logger = logging.getLogger(__name__)

_FINE = 8
"""Up to here numbers of sequences are powers of two, above multiples of it."""
_SMALLEST_TABLE = 16
_SMALLEST_SPANS = 8
_MAX_GRAPHS = 128
"""Kept at once; the one not used for longest goes first."""

_Int = TypeVar("_Int", np.int32, np.int64)

Replay = Callable[[], None]
Record = Callable[[Callable[[], Tensor]], tuple[Replay, Tensor]]
"""Runs a function once and returns how to run it again, and the tensor that it leaves its result in each time."""


@dataclass(frozen=True, slots=True)
class _Graph:
    """One recorded shape."""

    staging: Staging
    replay: Replay
    result: Tensor


class DecodeGraphs:
    """Runs steps in which every sequence has one token."""

    def __init__(self, run: Callable[[Batch], Tensor], device: torch.device, record: Record | None = None) -> None:
        """`run`: the model, from a batch to a tensor of as many rows. `record` is for tests without a GPU."""
        self._run = run
        self._device = device
        self._record = record or cuda_recorder(device)
        self._graphs: OrderedDict[tuple[int, ...], _Graph] = OrderedDict()

    def __len__(self) -> int:
        return len(self._graphs)

    def run(self, host: HostBatch) -> Tensor:
        """What `run` gives for the batch, valid until the next call."""
        count = len(host.ids_T)
        assert len(host.starts_S) == count + 1, "a piece has several tokens"
        filled = fill_up(host)
        arrays = filled.arrays(spans=True)
        key = tuple(size for array in arrays for size in array.shape)
        graph = self._graphs.get(key)
        if graph is None:
            graph = self._graphs[key] = self._capture(filled, arrays)
            if len(self._graphs) > _MAX_GRAPHS:
                self._graphs.popitem(last=False)
        else:
            self._graphs.move_to_end(key)
            graph.staging.write(arrays)
            graph.replay()
        return graph.result[:count]

    def _capture(self, filled: HostBatch, arrays: list[Array]) -> _Graph:
        staging = Staging(arrays, self._device)
        staging.write(arrays)
        batch = filled.batch(iter(staging.tensors), spans=True)
        replay, result = self._record(lambda: self._run(batch))
        logger.info("recorded a decoding step of %d sequences", len(filled.ids_T))
        return _Graph(staging, replay, result)


def fill_up(host: HostBatch) -> HostBatch:
    """The same batch in the next larger recorded shape: further sequences have no keys (length 0) and write nothing
    (slot -1), further table columns hold page 0, further spans belong to sequence -1."""
    count = len(host.ids_T)
    size = _sequences(count)
    extra = size - count
    starts_S = np.arange(size + 1, dtype=host.starts_S.dtype)
    pages = {
        kind: replace(
            place,
            slots_T=np.concatenate((place.slots_T, np.full(extra, -1, place.slots_T.dtype))),
            tables_SN=_table(place.tables_SN, size),
        )
        for kind, place in host.pages.items()
    }
    return HostBatch(
        ids_T=_longer(host.ids_T, size),
        positions_T=_longer(host.positions_T, size),
        starts_S=starts_S,
        lens_S={local: _longer(lens_S, size) for local, lens_S in host.lens_S.items()},
        pages=pages,
        num_spans={local: max(_SMALLEST_SPANS, _power_of_two(n)) for local, n in host.span_counts().items()},
    )


def cuda_recorder(device: torch.device) -> Record:
    """Records CUDA graphs that share one pool of memory."""
    pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    def record(run: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            run()  # compiles kernels and makes allocations that must not happen while recording
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            result = run()
        graph.replay()  # recording computes nothing
        return graph.replay, result

    return record


def _sequences(count: int) -> int:
    return _power_of_two(count) if count <= _FINE else -(-count // _FINE) * _FINE


def _power_of_two(count: int) -> int:
    return 1 << max(0, count - 1).bit_length()


def _longer(array: npt.NDArray[_Int], size: int) -> npt.NDArray[_Int]:
    return np.concatenate((array, np.zeros(size - len(array), array.dtype)))


def _table(tables_SN: npt.NDArray[np.int32], size: int) -> npt.NDArray[np.int32]:
    count, width = tables_SN.shape
    wider = np.zeros((size, max(_SMALLEST_TABLE, _power_of_two(width))), np.int32)
    wider[:count, :width] = tables_SN
    return wider
