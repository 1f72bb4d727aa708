"""Keys and values of all layers in one array of uniform pages, shared by global and local layers.

A page holds `block_size` tokens of `layers_per_page` layers. Layers of one kind are numbered in order; a block of the
kind takes as many pages as its layers need. P pages, K key/value heads, B tokens a page, d head_dim. Knows where a
layer's numbers lie, not which request they belong to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .config import Llama4Config


@dataclass(frozen=True, slots=True)
class LayerPlace:
    """Where one layer's keys and values lie."""

    local: bool
    """Whether the layer belongs to the local (chunked) group."""
    page_of_block: int
    """Which of its block's pages."""
    slot: int
    """Which layer inside the page."""


def layer_places(config: Llama4Config, layers_per_page: int) -> list[LayerPlace]:
    """The place of every layer, in order."""
    seen = {False: 0, True: 0}
    places = []
    for i in range(config.num_layers):
        local = config.is_local(i)
        places.append(LayerPlace(local, *divmod(seen[local], layers_per_page)))
        seen[local] += 1
    return places


class KvCache:
    """The storage. Views of one layer: keys [P, K, d, B] (transposed inside a page), values [P, K, B, d]."""

    def __init__(
        self,
        config: Llama4Config,
        *,
        num_pages: int,
        layers_per_page: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        self.places = layer_places(config, layers_per_page)
        self.block_size = block_size
        shape = (num_pages, layers_per_page, config.num_kv_heads)
        self._keys = torch.zeros((*shape, config.head_dim, block_size), dtype=dtype, device=device)
        self._values = torch.zeros((*shape, block_size, config.head_dim), dtype=dtype, device=device)
        self._views = [(self._keys[:, place.slot], self._values[:, place.slot]) for place in self.places]

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """(keys, values) views of one layer."""
        return self._views[index]

    @property
    def num_bytes(self) -> int:
        return self._keys.nbytes + self._values.nbytes


def page_bytes(config: Llama4Config, layers_per_page: int, block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one page: keys and values of `block_size` tokens in `layers_per_page` layers."""
    return 2 * layers_per_page * block_size * config.num_kv_heads * config.head_dim * dtype.itemsize
