"""The products, experts and routing of Scout and Maverick on a GPU, at 1 to 4,096 rows: microseconds, and the shares of
what the card reaches in this very run, of the bytes per second of a copy and of the operations per second of a bfloat16
product of 8,192^3. Bytes are those of the weights that the rows need, once each, and of the rows.

    python bench/gpu_kernels.py

Random data. Each call of a round reads other weights, together more than the second-level cache holds; a round is one
CUDA graph. `exact` is what gives a row the same bits in any company; `fast` is shown where it is something else (for
plain weights the platform's library). Stops after 150 seconds, compiling included (`kernels_aot.py --here` does that on
all cores beforehand). Writes results/gpu_kernels.json."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from device_clock import limits, seconds_per_call
from torch import Tensor

from herd.kernels.expert_table import ExpertTable
from herd.kernels.gpu_weight import CHANNELS, GpuWeight, WeightKind
from herd.kernels.grouped_mlp import GpuExpert
from herd.kernels.launch import platform
from herd.kernels.triton_experts import mlp_triton, moe_mlp
from herd.kernels.triton_linear import TritonLinear, tile_for
from herd.kernels.triton_route import route_device

D, F, DENSE_F = 5120, 8192, 16384
ROWS = (1, 16, 64, 256, 4096)
MODELS: dict[str, tuple[int, tuple[WeightKind, ...]]] = {
    "Scout": (16, ("plain", "int4", "int8", "fp8", "fp8_rows")),
    "Maverick": (128, ("int4", "fp8", "fp8_rows")),
}
NAMES = {"plain": "bf16", "fp8_rows": "fp8 x fp8"}
ATTENTION = {"qkv": (7168, D), "attention output": (D, D), "router of 16": (16, D), "router of 128": (128, D)}
CACHE_BYTES = 256 << 20
MOST_COPIES = 24
MOST_SECONDS = 150.0

Call = Callable[[], object]


def random_weight(kind: WeightKind, channels: int, columns: int) -> GpuWeight:
    """As `pack` would lay it out, of values of about the size that real ones have."""
    if kind == "plain":
        values = torch.randn(channels, columns, dtype=torch.bfloat16, device="cuda") * columns**-0.5
        return GpuWeight("plain", values, None, 0, 64, channels, columns)
    assert channels % CHANNELS == 0
    size = channels * columns // 2 if kind == "int4" else channels * columns
    values = torch.randint(0, 256, (size,), dtype=torch.uint8, device="cuda")
    group, largest = (128, 8) if kind == "int4" else (0, 127)
    if kind in ("fp8", "fp8_rows"):
        values &= 0xBF  # below 2 and never NaN
        largest = 2
    if kind != "fp8_rows":
        values = values.view(torch.int16)
    scales = torch.rand(columns // group if group else 1, channels, device="cuda") * (columns**-0.5 / largest)
    scales = scales.bfloat16() if kind == "int4" else scales
    return GpuWeight(kind, values, scales, group, 64 if kind == "fp8_rows" else 32, channels, columns)


def random_mlp(kind: WeightKind, width: int, exact: bool) -> GpuExpert:
    gate_up, down = random_weight(kind, 2 * width, D), random_weight(kind, D, width)
    return GpuExpert(TritonLinear(gate_up, exact), TritonLinear(down, exact))


def bytes_of(mlp: GpuExpert) -> int:
    return mlp.gate_up.packed.nbytes + mlp.down.packed.nbytes


def hidden(rows: int) -> Tensor:
    return torch.randn(rows, D, dtype=torch.bfloat16, device="cuda")


def copies(weight_bytes: int) -> int:
    """Of a weight, so that a round does not find it in the cache."""
    return max(2, min(MOST_COPIES, -(-CACHE_BYTES // weight_bytes)))


def modes(kind: WeightKind, rows: int, channels: int, library: bool = False) -> list[bool]:
    """exact, and fast where that differs."""
    exact, fast = (tile_for(rows, channels, which, platform(), kind == "int4") for which in (True, False))
    return [True, False] if exact != fast or (library and kind == "plain") else [True]


Case = tuple[dict[str, Any], float, float, list[Call]]
"""What it is, bytes, operations, the calls of a round."""


def linears() -> Iterator[Case]:
    for name, (channels, columns) in ATTENTION.items():
        number = copies(channels * columns * 2)
        weights = [random_weight("plain", channels, columns) for _ in range(number)]
        for rows in ROWS:
            x = hidden(rows)
            for exact in modes("plain", rows, channels, library=True):
                calls: list[Call] = [partial(TritonLinear(weight, exact), x) for weight in weights]
                total = weights[0].nbytes + 2 * rows * (channels + columns)
                about = {"op": name, "model": "both", "kind": "bf16", "rows": rows, "exact": exact}
                yield about, total, 2 * rows * channels * columns, calls


def mlps() -> Iterator[Case]:
    """The shared expert, and the dense MLP of every other layer of Maverick."""
    for model, name, width in (("both", "shared expert", F), ("Maverick", "dense MLP", DENSE_F)):
        for kind in MODELS["Scout"][1] if width == F else ("plain",):
            weights = [random_mlp(kind, width, True)]
            weights += [random_mlp(kind, width, True) for _ in range(copies(bytes_of(weights[0])) - 1)]
            for rows in ROWS:
                x = hidden(rows)
                for exact in modes(kind, rows, 2 * width):
                    calls: list[Call] = [partial(mlp_triton, x, weight, exact) for weight in weights]
                    total = bytes_of(weights[0]) + 2 * rows * (2 * D + 2 * width)
                    about = {"op": name, "model": model, "kind": NAMES.get(kind, kind), "rows": rows, "exact": exact}
                    yield about, total, 6 * rows * D * width, calls
            del weights


def experts() -> Iterator[Case]:
    for model, (number, kinds) in MODELS.items():
        for kind in kinds:
            mlps = [random_mlp(kind, F, True) for _ in range(number)]
            table = ExpertTable(mlps, "cuda")
            for rows in ROWS:
                rounds = copies(bytes_of(mlps[0]) * min(rows, number))
                x, shared = hidden(rows), hidden(rows)
                logits = [torch.randn(rows, number, device="cuda").bfloat16() for _ in range(rounds)]
                if rows == 1:
                    logits = [torch.eye(number, device="cuda")[i * 5 % number, None].bfloat16() for i in range(rounds)]
                routes = [route_device(each, 1) for each in logits]
                used = sum(int((route.counts_E > 0).sum()) for route in routes) / rounds
                total = bytes_of(mlps[0]) * used + 2 * rows * (3 * D + 2 * F)
                for exact in modes(kind, -(-rows // min(rows, number)), 2 * F):
                    calls: list[Call] = [partial(moe_mlp, x, route, table, shared, exact) for route in routes]
                    about = {"op": "experts", "model": model, "kind": NAMES.get(kind, kind), "rows": rows}
                    yield about | {"exact": exact, "experts_used": round(used, 2)}, total, 6 * rows * D * F, calls
            del mlps, table
            gc.collect()
            torch.cuda.empty_cache()


def routing() -> Iterator[Case]:
    for model, (number, _) in MODELS.items():
        for rows in ROWS:
            logits = torch.randn(rows, number, device="cuda").bfloat16()
            calls: list[Call] = [partial(route_device, logits, 1)] * 8
            yield (
                {"op": "routing", "model": model, "kind": "bf16", "rows": rows, "exact": True},
                logits.nbytes,
                0,
                calls,
            )


def main() -> None:
    began = time.monotonic()
    torch.manual_seed(0)
    card = limits()
    print(f"{torch.cuda.get_device_name()}: copies {card['copied_bytes_per_s'] / 1e12:.2f} TB/s, products", end=" ")
    print(f"{card['product_flop_per_s'] / 1e12:.0f} TFLOP/s")
    results: list[dict[str, Any]] = []
    complete = True
    for cases in (experts, mlps, linears, routing):
        for about, total, operations, calls in cases():
            if time.monotonic() - began > MOST_SECONDS:
                complete = False
                break
            seconds = seconds_per_call(calls)
            results.append(
                {
                    **about,
                    "us": round(seconds * 1e6, 2),
                    "of_bandwidth": round(total / seconds / card["copied_bytes_per_s"], 3),
                    "of_product_rate": round(operations / seconds / card["product_flop_per_s"], 3),
                }
            )
            row = results[-1]
            print(
                f"{row['op']:17}{row['model']:9}{row['kind']:10}{row['rows']:5} {'exact' if row['exact'] else 'fast':6}"
                f"{row['us']:10.1f} us {row['of_bandwidth']:7.1%} of bandwidth {row['of_product_rate']:7.1%} of rate",
                flush=True,
            )
    folder = Path(__file__).resolve().parent / "results"
    report = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        **card,
        "complete": complete,
        "seconds": round(time.monotonic() - began, 1),
    }
    lines = ",\n".join(json.dumps(row) for row in results)
    (folder / "gpu_kernels.json").write_text(json.dumps(report)[:-1] + f', "kernels": [\n{lines}\n]}}\n')
    print(f"{len(results)} in {report['seconds']} s{'' if complete else ', incomplete'}")


if __name__ == "__main__":
    main()
