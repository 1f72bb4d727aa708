"""Slots in a GPU's memory that the engine allocates and the shard maps through CUDA IPC. Every copy has ended when a
method returns, so that a doorbell may ring. The same interface as `host_slots.py`.

Shapes: N rows, D hidden, S slots."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .row_slots import slot_bytes
from .transport import HandshakeRefused, RowLayout

_HANDLE_TYPES = (bytes, int, int, bytes, int, bytes, bool)
"""What `UntypedStorage._share_cuda_` gives after the device: memory, size, offset, reference counter's file and offset,
event, whether to wait for it."""


class CudaSlots:
    """See `row_slots.RowSlots`."""

    def __init__(self, slots_SND: Tensor) -> None:
        self._all_SND = slots_SND
        self._slots_ND = slots_SND.unbind()

    @classmethod
    def create(cls, layout: RowLayout, max_rows: int, max_calls: int) -> CudaSlots:
        """New memory on the layout's device."""
        return cls(torch.zeros(max_calls, max_rows, layout.hidden, dtype=layout.dtype, device=layout.device))

    @classmethod
    def open(cls, handle: list[Any], layout: RowLayout, max_rows: int, max_calls: int) -> CudaSlots:
        """A peer's memory, mapped into this process. Raises `HandshakeRefused` where CUDA cannot."""
        size = slot_bytes(layout, max_rows) * max_calls
        if layout.device.type != "cuda":
            raise HandshakeRefused("this end has no GPU", "slots")
        if tuple(map(type, handle)) != _HANDLE_TYPES or handle[1] != size:
            raise HandshakeRefused("the GPU memory has another size", "slots")
        try:
            # The two processes may number GPUs differently.
            device = torch.cuda.current_device() if layout.device.index is None else layout.device.index
            storage = torch.UntypedStorage._new_shared_cuda(device, *handle)
        except RuntimeError as error:
            raise HandshakeRefused(f"the GPU memory cannot be mapped: {error}", "slots") from error
        flat = torch.empty(0, dtype=layout.dtype, device=storage.device).set_(storage)  # type: ignore[call-overload]
        return cls(flat.view(max_calls, max_rows, layout.hidden))

    def handle(self) -> list[Any]:
        """What `open` needs in the other process. Raises `HandshakeRefused` where CUDA cannot share."""
        try:
            _, *handle = self._all_SND.untyped_storage()._share_cuda_()
        except RuntimeError as error:
            raise HandshakeRefused(f"the GPU memory cannot be shared: {error}", "slots") from error
        return handle

    def write(self, slot: int, rows_ND: Tensor, ranges: Sequence[tuple[int, int]]) -> None:
        at = 0
        for start, end in ranges:
            self._slots_ND[slot][at : at + end - start].copy_(rows_ND[start:end])
            at += end - start
        self._synchronize()

    def read(self, slot: int, out_ND: Tensor, ranges: Sequence[tuple[int, int]]) -> None:
        at = 0
        for start, end in ranges:
            out_ND[start:end].copy_(self._slots_ND[slot][at : at + end - start])
            at += end - start
        self._synchronize()

    def rows(self, slot: int, num_rows: int) -> Tensor:
        return self._slots_ND[slot].narrow(0, 0, num_rows)

    def publish(self, slot: int, rows_ND: Tensor) -> None:
        self._synchronize()

    def memory(self, slot: int, num_bytes: int) -> memoryview:
        raise AssertionError("rows on a GPU do not go through sockets")

    def _synchronize(self) -> None:
        torch.cuda.current_stream(self._all_SND.device).synchronize()
