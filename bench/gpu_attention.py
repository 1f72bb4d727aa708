"""Attention and what surrounds it on a GPU, at the shapes of Scout and Maverick (40 query heads on 8 of 128 channels,
5,120 hidden): time per layer, and the share of what the card reaches in this very run. Decoding is judged by the bytes
of keys and values over the rate of a copy (bytes read and written), prefill by its multiplications and additions over
the rate of a bfloat16 product of 8,192^3; torch's own attention over contiguous keys is the baseline of prefill.

    python bench/gpu_attention.py

Random data; each call reads another layer's pages, together more than the second-level cache holds; calls are replayed
as one CUDA graph, so that no launch is timed; medians. Writes results/gpu_attention.json.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as functional
import triton
from torch import Tensor

from herd.kernels.attention_inputs import attention_inputs, rope_table
from herd.kernels.paged_attention import PagedKeys, paged_attention
from herd.kernels.rms_norm import add_rms_norm_

H, K, D, HIDDEN = 40, 8, 128, 5120
CACHE_BYTES = 512 << 20
"""Of keys and values that a round of calls reads at least."""
MOST_BYTES = 12 << 30
FP8 = torch.float8_e4m3fn
DECODE = [(1, 1024), (1, 8192), (1, 131072), (16, 8192), (64, 1024), (64, 8192)]
"""(sequences, keys of each)"""
PREFILL = [(8192, 8192), (2048, 8192), (2048, 131072), (64, 32768)]
"""(queries, keys of the last one) of one sequence."""
FORMS = [(64, torch.bfloat16), (16, torch.bfloat16), (128, torch.bfloat16), (64, FP8)]
"""(tokens of a page, type)"""


def seconds_per_call(calls: Sequence[Callable[[], object]], repeats: int = 5) -> float:
    """Of one of `calls`, run one after the other, again and again."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    took = []
    for _ in range(repeats):
        began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        began.record()
        graph.replay()
        ended.record()
        ended.synchronize()
        took.append(began.elapsed_time(ended) / 1000)
    return statistics.median(took) / len(calls)


def limits() -> dict[str, float]:
    source = torch.randint(0, 255, (1 << 30,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    return {
        "copied_bytes_per_s": 2 * source.nbytes / seconds_per_call([lambda: target.copy_(source)] * 3),
        "product_flop_per_s": 2 * 8192**3 / seconds_per_call([lambda: torch.mm(a, b)] * 3),
    }


class Pages:
    """Random pages of enough layers."""

    def __init__(self, sequences: int, length: int, B: int, dtype: torch.dtype) -> None:
        self.width = -(-length // B)
        layer = 2 * sequences * self.width * B * K * D * dtype.itemsize
        self.layers = max(1, min(-(-CACHE_BYTES // layer), MOST_BYTES // layer, 64))
        count = sequences * self.width
        self.k, self.v = (random_values(count, self.layers, K, *shape, dtype=dtype) for shape in ((D, B), (B, D)))
        self.tables_SN = torch.randperm(count, device="cuda").int().view(sequences, self.width)

    def attention(self, q_THd: Tensor, keys: PagedKeys, exact: bool) -> list[Callable[[], Tensor]]:
        layers = zip(self.k.unbind(1), self.v.unbind(1), strict=True)
        return [partial(paged_attention, q_THd, k, v, keys, D**-0.5, exact=exact) for k, v in layers]


def random_values(*shape: int, dtype: torch.dtype) -> Tensor:
    """Bytes of fp8 are drawn as such; none of them is NaN."""
    if dtype is FP8:
        return torch.randint(0, 120, shape, dtype=torch.uint8, device="cuda").view(FP8)
    return torch.empty(shape, dtype=dtype, device="cuda").normal_()


def decoding(rates: dict[str, float]) -> list[dict[str, Any]]:
    rows = []
    for sequences, length in DECODE:
        q_SHd = torch.randn(sequences, H, D, dtype=torch.bfloat16, device="cuda")
        for B, dtype in FORMS:
            pages = Pages(sequences, length, B, dtype)
            keys = PagedKeys.build(pages.tables_SN, [length] * sequences, list(range(sequences + 1)))
            for exact in (True, False) if B == 64 else (True,):
                took = seconds_per_call(pages.attention(q_SHd, keys, exact))
                rate = 2 * sequences * length * K * D * dtype.itemsize / took
                rows.append(
                    described(sequences, length, B, dtype, exact, took)
                    | {"of_bandwidth": round(rate / rates["copied_bytes_per_s"], 3)}
                )
            del pages
    return rows


def prefill(rates: dict[str, float]) -> list[dict[str, Any]]:
    rows = []
    for queries, length in PREFILL:
        q_THd = torch.randn(queries, H, D, dtype=torch.bfloat16, device="cuda")
        flop = 4 * H * D * queries * (length - (queries - 1) / 2)
        baseline = None
        if queries == length:
            k, v = (torch.randn(1, K, length, D, dtype=torch.bfloat16, device="cuda") for _ in range(2))
            q = q_THd.transpose(0, 1)[None]
            torchs = partial(functional.scaled_dot_product_attention, q, k, v, is_causal=True, enable_gqa=True)
            baseline = seconds_per_call([torchs] * 3)
        for B, dtype in FORMS:
            if B != 64 and queries != length:
                continue
            pages = Pages(1, length, B, dtype)
            keys = PagedKeys.build(pages.tables_SN, [length], [0, queries])
            for exact in (True, False) if (B, dtype) == (64, torch.bfloat16) else (True,):
                took = seconds_per_call(pages.attention(q_THd, keys, exact)[:3], repeats=3)
                rows.append(
                    described(1, length, B, dtype, exact, took)
                    | {"queries": queries, "of_product_rate": round(flop / took / rates["product_flop_per_s"], 3)}
                    | ({"of_torch_speed": round(baseline / took, 3)} if baseline else {})
                )
            del pages
    return rows


def described(sequences: int, length: int, B: int, dtype: torch.dtype, exact: bool, seconds: float) -> dict[str, Any]:
    kind = str(dtype).removeprefix("torch.")
    return {
        "sequences": sequences,
        "keys": length,
        "page": B,
        "type": kind,
        "exact": exact,
        "us": round(1e6 * seconds, 1),
    }


def surroundings(rates: dict[str, float]) -> list[dict[str, Any]]:
    """The kernels before attention and between layers."""
    table_R = rope_table([500000.0 ** (-2 * j / D) for j in range(D // 2)], 8192).cuda()
    rows = []
    for T in (1, 64, 4096):
        B, count = 64, max(3, 1 + (256 << 20) // (T * (H + 2 * K) * D * 2)) if T > 64 else 64
        qkv = torch.randn(count, T, (H + 2 * K) * D, dtype=torch.bfloat16, device="cuda")
        k = torch.zeros(T // B + 1, K, D, B, dtype=torch.bfloat16, device="cuda")
        v = torch.zeros(T // B + 1, K, B, D, dtype=torch.bfloat16, device="cuda")
        at_T = torch.arange(T, device="cuda")

        settings = {"num_heads": H, "table_R": table_R, "rows_T": at_T, "q_scale_T": None, "qk_norm_eps": 1e-5}
        took = seconds_per_call([partial(attention_inputs, qkv[i], k, v, at_T, **settings) for i in range(count)])
        share = 2 * qkv[0].nbytes / took / rates["copied_bytes_per_s"]
        rows.append({"op": "attention inputs", "rows": T, "us": round(1e6 * took, 1), "of_bandwidth": round(share, 3)})
        x = torch.randn(count, 2, T, HIDDEN, dtype=torch.bfloat16, device="cuda")
        weight_D = torch.ones(HIDDEN, dtype=torch.bfloat16, device="cuda")
        took = seconds_per_call([partial(add_rms_norm_, *x[i], weight_D, 1e-5) for i in range(count)])
        share = 4 * x[0, 0].nbytes / took / rates["copied_bytes_per_s"]
        rows.append({"op": "add and norm", "rows": T, "us": round(1e6 * took, 1), "of_bandwidth": round(share, 3)})
    return rows


def main() -> None:
    if not torch.cuda.is_available():
        raise SystemExit("needs a CUDA device")
    began = time.perf_counter()
    with torch.inference_mode():
        rates = limits()
        result: dict[str, Any] = {
            "gpu": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "limits": rates,
            "decode": decoding(rates),
            "prefill": prefill(rates),
            "surroundings": surroundings(rates),
        }
    result["seconds"] = round(time.perf_counter() - began, 1)
    for part in ("decode", "prefill", "surroundings"):
        print(part, *map(json.dumps, result[part]), sep="\n")
    print({name: f"{rate / 1e12:.2f}e12" for name, rate in rates.items()}, f"{result['seconds']} s")
    path = Path(__file__).parent / "results" / "gpu_attention.json"
    lines = {key: value for key, value in result.items() if not isinstance(value, list)}
    lists = {key: value for key, value in result.items() if isinstance(value, list)}
    text = json.dumps(lines)[:-1]
    for key, value in lists.items():
        text += f',\n"{key}": [\n' + ",\n".join(map(json.dumps, value)) + "\n]"
    path.write_text(text + "}\n")


if __name__ == "__main__":
    main()
