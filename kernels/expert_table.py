"""Where the weights of a layer's experts lie in a GPU's memory. Knows nothing of the kernels that read it or of how
experts get there.

Shapes: E experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch

from .gpu_weight import GpuWeight


class PackedExpert(Protocol):
    """`grouped_mlp.GpuExpert`: two `TritonLinear`s."""

    @property
    def gate_up(self) -> Any: ...
    @property
    def down(self) -> Any: ...


class ExpertTable:
    """Where the weights of E experts lie. One expert can be replaced without touching the others or any CUDA graph that
    reads the table. All have one layout; None stands for an expert that is not here and must get no rows."""

    def __init__(
        self, experts: Sequence[PackedExpert | None], device: torch.device | str, cap: float | None = None
    ) -> None:
        """`cap` is for experts whose rows become e4m3, see `fp8_tokens`."""
        present = [expert for expert in experts if expert is not None]
        assert present, "a table needs one expert to know the layout"
        self.num_experts = len(experts)
        self.gate_up = _without_weights(present[0].gate_up.packed)
        self.down = _without_weights(present[0].down.packed)
        self._layouts = tuple(_layout(linear.packed) for linear in (present[0].gate_up, present[0].down))
        self.cap = cap
        self.addresses = torch.zeros((4, self.num_experts), dtype=torch.int64, device=device)
        """Of gate_up's values and scales and down's values and scales."""
        self._experts: list[PackedExpert | None] = [None] * self.num_experts
        for index, expert in enumerate(experts):
            self.replace(index, expert)

    def replace(self, index: int, expert: PackedExpert | None) -> None:
        """Put an expert in place of another, in stream order. The caller keeps the old one alive until what was
        launched before has ended."""
        if expert is None:
            self._experts[index] = None
            self.addresses[:, index] = 0
            return
        column = []
        for packed, layout in zip((expert.gate_up.packed, expert.down.packed), self._layouts, strict=True):
            assert _layout(packed) == layout, "experts of one table have one layout"
            column += [packed.values.data_ptr(), 0 if packed.scales_GO is None else packed.scales_GO.data_ptr()]
        assert not any(address % 16 for address in column), "weights begin at multiples of 16 bytes"
        self._experts[index] = expert
        self.addresses[:, index] = torch.tensor(column, dtype=torch.int64)


def _without_weights(packed: GpuWeight) -> GpuWeight:
    """What kernels need to know of all experts, holding none of them."""
    scales = packed.scales_GO
    return replace(
        packed, values=packed.values.new_empty(16), scales_GO=None if scales is None else scales.new_empty(16)
    )


def _layout(packed: GpuWeight) -> tuple[Any, ...]:
    scales = packed.scales_GO
    return (
        *(packed.kind, packed.group, packed.plane, packed.out_features, packed.in_features),
        *(packed.values.dtype, packed.values.shape, None if scales is None else (scales.dtype, scales.shape)),
    )
