"""Two claims about CPU kernels: attention over pages against torch's fused attention, and what a new number of rows
costs a packed product.

    python bench/cpu_kernels.py [--out bench/results/cpu_kernels.json]

One thread, bfloat16, medians. Attention: 8 query heads, 2 key/value heads of 64, pages of 16; torch gets its keys
already gathered and repeated. Products: 1,536 x 576, first and second call with each number of rows up to 256.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
import torch.nn.functional as functional

from herd.kernels.paged_attention import PagedKeys, paged_attention

H, K, D, B = 8, 2, 64, 16


def microseconds(call: Callable[[], object], repeats: int = 50) -> float:
    call()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return round(1e6 * statistics.median(times), 1)


def attention(queries: int, keys: int) -> dict[str, float]:
    """The last `queries` tokens of one sequence of `keys` tokens."""
    pages = keys // B
    k = torch.randn(pages, K, D, B).bfloat16()
    v = torch.randn(pages, K, B, D).bfloat16()
    q = torch.randn(queries, H, D).bfloat16()
    where = PagedKeys.build(torch.arange(pages, dtype=torch.int32)[None], [keys], [0, queries])
    ours = microseconds(lambda: paged_attention(q, k, v, where, D**-0.5))
    k_all = k.permute(1, 0, 3, 2).reshape(K, keys, D).repeat_interleave(H // K, 0)[None]
    v_all = v.transpose(0, 1).reshape(K, keys, D).repeat_interleave(H // K, 0)[None]
    mask = torch.ones(queries, keys, dtype=torch.bool).tril_(keys - queries)
    q_all = q.transpose(0, 1)[None]
    torchs = microseconds(lambda: functional.scaled_dot_product_attention(q_all, k_all, v_all, attn_mask=mask))
    return {"herd_us": ours, "torch_us": torchs, "ratio": round(ours / torchs, 2)}


def new_row_counts() -> dict[str, float]:
    """What the first product with a number of rows takes beyond the second, and the memory that 256 of them keep."""
    weight = torch.randn(1536, 576).bfloat16()
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, 1)
    before = psutil.Process().memory_info().rss
    extra = []
    for rows in range(1, 257):
        x = torch.randn(rows, 576).bfloat16()
        times = []
        for _ in range(2):
            began = time.perf_counter()
            torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
            times.append(time.perf_counter() - began)
        extra.append(times[0] - times[1])
    grown = psutil.Process().memory_info().rss - before
    return {"extra_us": round(1e6 * statistics.median(extra), 1), "mib_each": round(grown / 256 / 2**20, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    result = {
        "machine": platform.machine(),
        "torch": torch.__version__,
        "commit": commit.stdout.strip(),
        "new_row_count": new_row_counts(),
        "attention": {f"{q} queries, {n} keys": attention(q, n) for q, n in ((1, 1024), (512, 512), (512, 2048))},
    }
    print(json.dumps(result, indent=1))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
