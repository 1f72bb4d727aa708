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
    """Keys and values of S sequences of the given lengths; `key(s)` and `value(s)` are [length, K, d]."""

    k_pages: Tensor
    v_pages: Tensor
    keys: PagedKeys

    def double(self) -> tuple[Tensor, Tensor]:
        return self.k_pages.double(), self.v_pages.double()

    def only(self, s: int) -> PagedKeys:
        """The page table of one sequence."""
        tables, lens = self.keys.tables_SN[s : s + 1].contiguous(), self.keys.lens_S[s : s + 1].clone()
        return PagedKeys(tables, lens, [self.keys.lens[s]])

    def shortened(self, s: int, length: int) -> PagedKeys:
        """One sequence as it was when it had `length` keys."""
        alone = self.only(s)
        return PagedKeys(alone.tables_SN, torch.tensor([length], dtype=torch.int32), [length])


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
    return Pages(k_pages, v_pages, PagedKeys(tables, torch.tensor(lens, dtype=torch.int32), list(lens)))
