"""One way to compile one Triton kernel: what ahead-of-time compilation enumerates. Knows no kernel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Variant:
    """Each `kernels/triton_*.py` lists its own in `variants()`: every configuration that it can launch for the real
    models' shapes."""

    name: str
    kernel: Any
    """The `triton.jit` function."""
    signature: Mapping[str, str]
    """Triton types of the runtime arguments, such as {"x": "*bf16", "rows": "i32"}."""
    constexprs: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    divisible_by_16: tuple[str, ...] = field(default=())
    """Arguments, pointers above all, that are multiples of 16: what the launcher finds out by itself."""
    targets: tuple[str, ...] = ("sm_80", "sm_90", "sm_100", "gfx942")
    same_bits: str = ""
    """Variants with the same label promise the same bits, so they must multiply with the same instructions."""
