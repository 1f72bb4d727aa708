"""Slots in host memory: private to one process (where a socket carries the rows), or a memfd that both ends map (so
that only doorbells travel). Where the layout's device is a GPU, the memory is pinned and rows are staged through it.

Shapes: N rows, D hidden, S slots."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .row_slots import slot_bytes
from .transport import HandshakeRefused, RowLayout

_SEALS = getattr(fcntl, "F_SEAL_SHRINK", 0) | getattr(fcntl, "F_SEAL_GROW", 0)
_memmove = ctypes.memmove


def create_memfd(layout: RowLayout, max_rows: int, max_calls: int) -> int:
    """A descriptor of memory for the slots, whose size is fixed for good. Pages cost nothing until they are used."""
    fd = os.memfd_create("herd-slots", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, slot_bytes(layout, max_rows) * max_calls)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    return fd


def open_memfd(fd: int, layout: RowLayout, max_rows: int, max_calls: int) -> HostSlots:
    """The slots in a peer's descriptor (-1: it sent none), which stays the caller's to close. Raises `HandshakeRefused`
    unless its size is right and sealed: the peer could end this process by shrinking it."""
    if fd < 0:
        raise HandshakeRefused("no shared memory came", "slots")
    try:
        sealed = fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS == _SEALS
        if not sealed or os.fstat(fd).st_size != slot_bytes(layout, max_rows) * max_calls:
            raise HandshakeRefused("the shared memory has another size or may be resized", "slots")
        return HostSlots(layout, max_rows, max_calls, fd)
    except (OSError, RuntimeError) as error:  # RuntimeError: of CUDA, which is to pin it
        raise HandshakeRefused(f"the shared memory cannot be used: {error}", "slots") from error


class HostSlots:
    """See `row_slots.RowSlots`. `memfd`: -1 for private memory. Raises OSError where there is not enough."""

    def __init__(self, layout: RowLayout, max_rows: int, max_calls: int, memfd: int = -1) -> None:
        self._layout = layout
        self._row_bytes = layout.row_bytes
        self._slot_bytes = slot_bytes(layout, max_rows)
        self._on_host = layout.device.type == "cpu"
        size = self._slot_bytes * max_calls
        self._map = mmap.mmap(memfd, size)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self._bytes = memoryview(self._map)
        all_ND = torch.frombuffer(self._map, dtype=layout.dtype).view(max_calls, max_rows, layout.hidden)
        self._slots_ND = all_ND.unbind()
        self._views_ND: list[Tensor] = list(self._slots_ND)
        """The last view of each slot: the same number of rows tends to come again."""
        if not self._on_host:
            code = _cudart().cudaHostRegister(self._address, size, 0)
            if code != 0:
                raise OSError(f"CUDA cannot pin {size} bytes: error {code}")
            self._is_pinned = True

    def __del__(self) -> None:
        if hasattr(self, "_is_pinned"):
            _cudart().cudaHostUnregister(self._address)

    def write(self, slot: int, rows_ND: Tensor, ranges: Sequence[tuple[int, int]]) -> None:
        if not self._on_host:
            at = 0
            for start, end in ranges:
                self._slots_ND[slot][at : at + end - start].copy_(rows_ND[start:end], non_blocking=True)
                at += end - start
            torch.cuda.current_stream(rows_ND.device).synchronize()
            return
        row, target, source = self._row_bytes, self._address + slot * self._slot_bytes, rows_ND.data_ptr()
        for start, end in ranges:
            _memmove(target, source + start * row, (end - start) * row)
            target += (end - start) * row

    def read(self, slot: int, out_ND: Tensor, ranges: Sequence[tuple[int, int]]) -> None:
        if not self._on_host:
            at = 0
            for start, end in ranges:
                out_ND[start:end].copy_(self._slots_ND[slot][at : at + end - start], non_blocking=True)
                at += end - start
            torch.cuda.current_stream(out_ND.device).synchronize()  # the slot is free for the next call
            return
        row, source, target = self._row_bytes, self._address + slot * self._slot_bytes, out_ND.data_ptr()
        for start, end in ranges:
            _memmove(target + start * row, source, (end - start) * row)
            source += (end - start) * row

    def rows(self, slot: int, num_rows: int) -> Tensor:
        view_ND = self._views_ND[slot]
        if view_ND.shape[0] != num_rows:
            view_ND = self._views_ND[slot] = self._slots_ND[slot][:num_rows]
        return view_ND if self._on_host else view_ND.to(self._layout.device)

    def publish(self, slot: int, rows_ND: Tensor) -> None:
        if not self._on_host:
            self._slots_ND[slot][: rows_ND.shape[0]].copy_(rows_ND)

    def memory(self, slot: int, num_bytes: int) -> memoryview:
        start = slot * self._slot_bytes
        return self._bytes[start : start + num_bytes]


def _cudart() -> Any:
    return torch.cuda.cudart()
