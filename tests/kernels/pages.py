"""Sequences in pages, as kernels see them: shuffled pages of several layers, of which one is looked at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from herd.kernels.paged_attention import PagedKeys

from .tolerances import noise


@dataclass
class Pages:
    """Keys and values of S sequences of the given lengths."""

    k_pages: Tensor
    v_pages: Tensor
    tables_SN: Tensor
    lens: list[int]

    def double(self) -> tuple[Tensor, Tensor]:
        return self.k_pages.double(), self.v_pages.double()

    def keys(self, starts: Sequence[int]) -> PagedKeys:
        """All sequences, with these borders of their pieces."""
        return PagedKeys.build(self.tables_SN, self.lens, starts)

    def only(self, s: int, length: int, queries: int = 1) -> PagedKeys:
        """One sequence as it was when it had `length` keys, of which the last have `queries`."""
        return PagedKeys.build(self.tables_SN[s : s + 1].contiguous(), [length], [0, queries])

    def to(self, device: str) -> Pages:
        """On another device, with pages that are as far apart."""
        k_all, v_all = self.k_pages._base, self.v_pages._base
        assert k_all is not None
        assert v_all is not None
        return Pages(k_all.to(device)[:, 1], v_all.to(device)[:, 1], self.tables_SN.to(device), self.lens)

    def as_fp8(self) -> Pages:
        """The same rounded to e4m3, pages as far apart."""
        k_all, v_all = self.k_pages._base, self.v_pages._base
        assert k_all is not None
        assert v_all is not None
        k, v = (pages.clamp(-448, 448).to(torch.float8_e4m3fn)[:, 1] for pages in (k_all, v_all))
        return Pages(k, v, self.tables_SN, self.lens)

    def spoil_behind(self) -> None:
        """NaN in every slot that no sequence owns."""
        owned = torch.zeros(self.k_pages.shape[0], self.k_pages.shape[-1], dtype=torch.bool)
        B = owned.shape[1]
        for table, length in zip(self.tables_SN.long(), self.lens, strict=True):
            slots = torch.arange(length)
            owned[table[slots // B], slots % B] = True
        self.k_pages.masked_fill_(~owned[:, None, None, :], float("nan"))
        self.v_pages.masked_fill_(~owned[:, None, :, None], float("nan"))


def make_pages(
    lens: Sequence[int], *, K: int, d: int, B: int, dtype: torch.dtype = torch.float32, seed: int = 0, layers: int = 2
) -> Pages:
    """Pages of `layers` layers in a row, so that a layer's pages are not contiguous with each other."""
    width = max(-(-length // B) for length in lens)
    P = len(lens) * width + 1
    k_pages = noise(P, layers, K, d, B, dtype=dtype, seed=seed)[:, 1]
    v_pages = noise(P, layers, K, B, d, dtype=dtype, seed=seed + 1)[:, 1]
    order = torch.randperm(P, generator=torch.Generator().manual_seed(seed))[:-1]
    tables = order.view(len(lens), width).int()
    return Pages(k_pages, v_pages, tables, list(lens))
