"""A batch as arrays on the host: what a step plan and the page tables say, before any of it is on a device.

Shapes: T tokens of S sequences, N blocks of the longest sequence. Knows neither requests nor where it will run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from torch import Tensor

from ..kernels.paged_attention import PagedKeys, SpanList, span_arrays
from ..model.decoder import Batch, GroupPages
from .page_tables import GroupPage
from .upload import Array


@dataclass(frozen=True, slots=True)
class HostPages:
    """What `GroupPages` is made of."""

    slots_T: npt.NDArray[np.int64]
    tables_SN: npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class HostBatch:
    """`arrays` lists everything that the device needs, and `batch` takes it in the same order."""

    ids_T: npt.NDArray[np.int64]
    positions_T: npt.NDArray[np.int64]
    starts_S: npt.NDArray[np.int64]
    """[S + 1]"""
    lens_S: dict[bool, npt.NDArray[np.int32]]
    """By group (local?): keys of each sequence."""
    pages: dict[GroupPage, HostPages]
    num_spans: dict[bool, int] = field(default_factory=dict)
    """By group: to how many spans its list is filled up; by default not at all."""

    def span_counts(self) -> dict[bool, int]:
        """By group: spans of keys that a GPU visits for decoding sequences."""
        return {local: int(span_arrays(lens_S, self.starts_S)[1][-1]) for local, lens_S in self.lens_S.items()}

    def arrays(self, *, spans: bool) -> list[Array]:
        """`spans`: with the lists that GPUs need."""
        found: list[Array] = [self.ids_T, self.positions_T, self.starts_S]
        for local, lens_S in self.lens_S.items():
            found.append(lens_S)
            if spans:
                found += span_arrays(lens_S, self.starts_S, self.num_spans.get(local))
        for pages in self.pages.values():
            found += (pages.slots_T, pages.tables_SN)
        return found

    def batch(self, tensors: Iterator[Tensor], *, spans: bool) -> Batch:
        """The batch on a device, from the tensors of `arrays`."""
        ids_T, positions_T, starts_S = next(tensors), next(tensors), next(tensors)
        starts = self.starts_S.tolist()
        groups = {}
        for local, lens_S in self.lens_S.items():
            there_S = next(tensors)
            groups[local] = there_S, lens_S.tolist(), SpanList(next(tensors), next(tensors)) if spans else None
        pages = {}
        for kind in self.pages:
            slots_T, tables_SN = next(tensors), next(tensors)
            lens_S, lens, span_list = groups[kind[0]]
            pages[kind] = GroupPages(slots_T, PagedKeys(tables_SN, lens_S, starts_S, lens, starts, span_list))
        return Batch(ids_T, positions_T, pages)
