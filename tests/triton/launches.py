"""Run by test_variants.py, in a process whose Triton compiles: pretends that there is a Hopper GPU, has every listed
variant compiled by a compiler that does nothing, then launches products, experts and routing at the real models' shapes
and counts what would have to be compiled still."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
import triton.compiler
from triton.backends.compiler import GPUTarget

from herd.kernels import launch, triton_experts, triton_linear, triton_route
from herd.kernels.expert_table import ExpertTable
from herd.kernels.gpu_weight import GpuWeight, WeightKind
from herd.kernels.grouped_mlp import GpuExpert

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent / "bench"))
kernels_aot = importlib.import_module("kernels_aot")

D, F = 5120, 8192
ROWS = (1, 2, 16, 64, 256, 4096)
compiled: list[str] = []


class Kernel:
    """What a launch needs of a compiled kernel."""

    hash = function = packed_metadata = None

    def launch_metadata(self, *_: Any) -> None: ...

    def run(self, *_: Any) -> None: ...


def compiler(source: Any, **_: Any) -> Kernel:
    compiled.append(source.fn.__name__)
    return Kernel()


def weight(kind: WeightKind, channels: int, columns: int) -> GpuWeight:
    """Memory that nobody touches."""
    if kind == "plain":
        return GpuWeight(kind, torch.empty(channels, columns, dtype=torch.bfloat16), None, 0, 64, channels, columns)
    group = 128 if kind == "int4" else 0
    dtype = torch.uint8 if kind == "fp8_rows" else torch.int16
    values = torch.empty(channels * columns // (4 if kind == "int4" else 2), dtype=dtype)
    scales = torch.empty(columns // group if group else 1, channels, dtype=torch.bfloat16 if group else torch.float32)
    return GpuWeight(kind, values, scales, group, 64 if kind == "fp8_rows" else 32, channels, columns)


def launch_all(kind: WeightKind, exact: bool) -> None:
    expert = GpuExpert(
        triton_linear.TritonLinear(weight(kind, 2 * F, D), exact), triton_linear.TritonLinear(weight(kind, D, F), exact)
    )
    for rows in ROWS:
        x = torch.empty(rows, D, dtype=torch.bfloat16)
        for E in (16, 128):
            table = ExpertTable([expert] * E, "cpu")
            for k in (1, 2):
                route = triton_route.route_device(torch.empty(rows, E, dtype=torch.bfloat16), k)
                triton_experts.moe_mlp(x, route, table, x, exact)
            triton_experts.grouped_mlp_triton(x, route.counts_E, table, exact)
        triton_experts.mlp_triton(x, expert, exact)
        for channels in (16, 128, 5120, 7168) if kind == "plain" else ():
            triton_linear.TritonLinear(weight(kind, channels, D), exact)(x)


def main() -> None:
    target = GPUTarget("cuda", 90, 32)
    driver = SimpleNamespace(
        get_current_target=lambda: target, get_current_device=lambda: 0, get_current_stream=lambda _: 0
    )
    triton.runtime.driver.set_active(driver)  # type: ignore[arg-type]
    triton.compiler.compile = compiler  # type: ignore[assignment]
    for module in (launch, triton_linear, triton_experts):
        module.platform = lambda: "cuda"  # type: ignore[assignment]
    for name in ("triton_linear", "triton_experts", "triton_route", "triton_tokens"):
        for index, variant in enumerate(kernels_aot.variants_of(name)):
            fault = kernels_aot.warm(name, index) if "sm_90" in variant.targets else ""
            assert not fault, fault
    listed = len(compiled)
    kinds: tuple[WeightKind, ...] = ("plain", "int4", "int8", "fp8", "fp8_rows")
    for kind in kinds:
        for exact in (True, False):
            launch_all(kind, exact)
    print(f"{listed} listed, {len(compiled) - listed} not: {sorted(set(compiled[listed:]))}")
    raise SystemExit(len(compiled) > listed or listed < 100)


if __name__ == "__main__":
    main()
