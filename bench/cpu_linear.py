"""Matrix products on CPU against those of torch and against what the machine can do.

    python bench/cpu_linear.py [--out bench/results/cpu_linear.json] [--threads 1] [--rows 1,2,4,8,32,512] [--reps 5]

For each kind of weight and shape, as many weights in turn as fill 96 MB, so that they come from memory and not from a
cache; ours and torch's take turns, medians. torch's are its packed products: oneDNN for bfloat16 and float32,
`_weight_int8pack_mm` (one scale per channel) and `_weight_int4pack_mm_for_cpu` (groups of 128). `bandwidth` is the
fraction of the rate at which the same machine sums 256 MB of integers, `compute` that of its largest bfloat16 product.
Then a layer of 16 small experts at once against the same products by oneDNN one after the other, and how long a process
takes to compile its first product of each kind, and to find it compiled.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numba
import torch
from torch import Tensor

from herd.kernels.grouped_mlp import ExpertGroup, ExpertWeights
from herd.kernels.linear import Linear
from herd.kernels.quantized import quantize
from herd.kernels.silu_mul import silu_mul

SHAPES = ((2048, 512), (512, 1024), (2048, 2048), (5120, 8192))
"""(out, in) features: the benchmark model's expert, a square, and a Scout expert's second half."""
KINDS = ("bfloat16", "float32", "int8", "int4")
BYTES = {"bfloat16": 2.0, "float32": 4.0, "int8": 1.0, "int4": 0.5 + 4 / 128}
ROTATE = 96e6
GROUP = 128

Product = Callable[[Tensor], Tensor]


def seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def medians(calls: Mapping[str, Callable[[], object]], reps: int) -> dict[str, float]:
    """Seconds of each, called in turns."""
    for call in calls.values():
        call()
    times = {name: [] for name in calls}
    for _ in range(reps):
        for name, call in calls.items():
            times[name].append(seconds(call))
    return {name: statistics.median(values) for name, values in times.items()}


def limits() -> dict[str, float]:
    """GB/s that a sum reads, GFLOP/s of torch's product of 2,048 cubed."""
    data = torch.ones(1 << 25, dtype=torch.int64)
    x, y = torch.randn(2048, 2048).bfloat16(), torch.randn(2048, 2048).bfloat16()
    times = medians({"read": data.sum, "product": lambda: x @ y}, 7)
    return {"read_gb_s": data.nbytes / times["read"] / 1e9, "product_gflop_s": 2 * 2048**3 / times["product"] / 1e9}


def pair(kind: str, weight_OI: Tensor) -> tuple[Product, Product]:
    """Ours and torch's."""
    if kind == "int8":
        weight = quantize(weight_OI, "int8", weight_OI.shape[1])
        scales = weight.scales_OG[:, 0].bfloat16()
        return Linear(weight), lambda x: torch.ops.aten._weight_int8pack_mm(x, weight.q, scales)
    if kind == "int4":
        weight = quantize(weight_OI, "int4", GROUP)
        codes = (weight.values_OI() + 8).int()
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        scales = weight.scales_OG.t().bfloat16()
        scales_zeros = torch.stack((scales, torch.zeros_like(scales)), dim=-1).contiguous()
        return Linear(weight), lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, GROUP, scales_zeros)
    plain = weight_OI.to(getattr(torch, kind))
    return Linear(plain), packed_by_onednn(plain)


def packed_by_onednn(weight_OI: Tensor) -> Product:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight_OI, 1)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")


def products(kind: str, shape: tuple[int, int], rows: list[int], reps: int, limit: dict[str, float]) -> dict[str, Any]:
    outputs, inputs = shape
    size = BYTES[kind] * outputs * inputs
    pairs = [pair(kind, torch.randn(outputs, inputs)) for _ in range(max(1, round(ROTATE / size)))]
    dtype = torch.float32 if kind == "float32" else torch.bfloat16
    result = {}
    for count in rows:
        x = torch.randn(count, inputs).to(dtype)
        ours, torchs = ([both[n] for both in pairs] for n in (0, 1))
        calls = {"ours": lambda: [f(x) for f in ours], "torch": lambda: [f(x) for f in torchs]}  # noqa: B023
        times = {name: value / len(pairs) for name, value in medians(calls, reps).items()}
        result[str(count)] = {
            "us": round(1e6 * times["ours"], 1),
            "torch_us": round(1e6 * times["torch"], 1),
            "speedup": round(times["torch"] / times["ours"], 2),
            "bandwidth": round(size / times["ours"] / 1e9 / limit["read_gb_s"], 2),
            "compute": round(2 * count * outputs * inputs / times["ours"] / 1e9 / limit["product_gflop_s"], 2),
        }
    return result


def experts(reps: int, limit: dict[str, float]) -> dict[str, Any]:
    """16 experts of the benchmark model (hidden 512, width 1,024), two layers of them in turn, bfloat16."""
    hidden, width, number = 512, 1024, 16
    weights = [
        [(torch.randn(2 * width, hidden).bfloat16(), torch.randn(hidden, width).bfloat16()) for _ in range(number)]
        for _ in range(2)
    ]
    groups = [ExpertGroup([ExpertWeights(Linear(a), Linear(b)) for a, b in layer]) for layer in weights]
    loops = [[(packed_by_onednn(a), packed_by_onednn(b)) for a, b in layer] for layer in weights]
    size = number * 3 * hidden * width * 2
    result = {}
    for each in (1, 2, 4, 32):
        x, counts = torch.randn(number * each, hidden).bfloat16(), [each] * number

        def loop(layer: list[tuple[Product, Product]], x: Tensor, counts: list[int]) -> Tensor:
            parts = zip(layer, x.split(counts), strict=True)
            return torch.cat([down(silu_mul(gate_up(part))) for (gate_up, down), part in parts])

        calls = {
            "ours": lambda: [group(x, counts) for group in groups],  # noqa: B023
            "loop": lambda: [loop(layer, x, counts) for layer in loops],  # noqa: B023
        }
        times = {name: value / 2 for name, value in medians(calls, reps).items()}
        result[f"{each} rows each"] = {
            "us": round(1e6 * times["ours"], 1),
            "onednn_loop_us": round(1e6 * times["loop"], 1),
            "speedup": round(times["loop"] / times["ours"], 2),
            "bandwidth": round(size / times["ours"] / 1e9 / limit["read_gb_s"], 2),
            "compute": round(each * size / times["ours"] / 1e9 / limit["product_gflop_s"], 2),
        }
    return result


_FIRST = """
import sys, time, torch
torch.set_num_threads(int(sys.argv[1]))
from herd.kernels.linear import Linear
from herd.kernels.grouped_mlp import ExpertWeights
from herd.kernels.quantized import quantize
kind, weight = sys.argv[2], torch.randn(64, 64)
began = time.perf_counter()
dtype = torch.float32 if kind == "float32" else torch.bfloat16
def linear(weight):
    return Linear(quantize(weight, kind, 64) if kind.startswith("int") else weight.to(dtype))
ExpertWeights(linear(torch.randn(128, 64)), linear(weight))(torch.randn(1, 64).to(dtype))
linear(weight)(torch.randn(1, 64).to(dtype))
print(time.perf_counter() - began)
"""


def compilation(threads: int) -> dict[str, dict[str, float]]:
    """Seconds until a process has its first results, with an empty and with a filled cache."""
    result = {}
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-c", _FIRST, str(threads), kind]
            environment = {**os.environ, "NUMBA_CACHE_DIR": folder}
            runs = [subprocess.run(command, env=environment, capture_output=True, text=True, check=True) for _ in "ab"]
        cold, cached = (round(float(run.stdout), 2) for run in runs)
        result[kind] = {"cold_s": cold, "cached_s": cached}
    return result


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", default="1,2,4,8,32,512")
    parser.add_argument("--reps", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    limit = limits()
    result: dict[str, Any] = {
        "machine": f"{cpu_name()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "numba": numba.__version__,
        "commit": commit.stdout.strip(),
        "threads": args.threads,
        **{name: round(value, 1) for name, value in limit.items()},
    }
    rows = [int(count) for count in args.rows.split(",")]
    result["products"] = {
        kind: {f"{o} x {i}": products(kind, (o, i), rows, args.reps, limit) for o, i in SHAPES} for kind in KINDS
    }
    result["experts"] = experts(args.reps, limit)
    result["read_gb_s_afterwards"] = round(limits()["read_gb_s"], 1)
    result["compilation"] = compilation(args.threads)
    print(json.dumps(result, indent=1))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
