"""How Triton kernels are launched: floating-point contraction fixed, one MMA shape per kernel, and what the device is.
Bits depend on each of these. Knows no kernel."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal

import torch

Platform = Literal["cuda", "ampere", "hip", "interpreter"]


@functools.cache
def platform() -> Platform:
    """Where kernels run: `interpreter` under TRITON_INTERPRET=1, `ampere` for NVIDIA before Hopper."""
    from triton import knobs

    if knobs.runtime.interpret:
        return "interpreter"
    if torch.version.hip:
        return "hip"
    return "cuda" if torch.cuda.get_device_capability() >= (9, 0) else "ampere"


def launch(
    kernel: Any, grid: Sequence[int], *arguments: Any, num_warps: int = 4, num_stages: int = 3, **constexprs: Any
) -> None:
    """Run `kernel` over `grid`. Multiplications and additions are never contracted but where the kernel says `tl.fma`,
    so that other versions of the compiler and other tiles give the same bits."""
    options: dict[str, Any] = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": False}
    if torch.version.hip:
        options["matrix_instr_nonkdim"] = 16
    kernel[tuple(grid)](*arguments, **constexprs, **options)
