"""What this machine can do at best, for judging what an engine makes of it: bytes a second that one thread copies, and
operations a second of its matrix products; and what a token of a model needs of both.

    python bench/machine_limits.py

Copying counts bytes read and written, of buffers that no cache holds. Products: 1,024 x 2,048 by 2,048 x 2,048 random
numbers, torch's fastest packed form. One thread; medians.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable

import torch

from herd.model.config import Llama4Config

_COPY_BYTES = 128 << 20
_ROWS, _WIDTH = 1024, 2048


def copy_bandwidth() -> float:
    """Bytes per second, read and written together."""
    source = torch.randint(0, 255, (_COPY_BYTES,), dtype=torch.uint8)
    target = torch.zeros_like(source)
    return 2 * _COPY_BYTES / _seconds(lambda: target.copy_(source), 9)


def product_rate(dtype: torch.dtype) -> float:
    """Multiplications and additions per second."""
    x, weight = torch.randn(_ROWS, _WIDTH).to(dtype), torch.randn(_WIDTH, _WIDTH).to(dtype)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS)
    seconds = _seconds(lambda: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], ""), 7)
    return 2 * _ROWS * _WIDTH * _WIDTH / seconds


def weights_per_step(config: Llama4Config, rows: int) -> tuple[float, float]:
    """Weights of the matrix products that a decoding step of `rows` sequences reads: (routed experts', others').
    Routing taken as even: rows hit E (1 - (1 - k / E)^rows) experts of a layer."""
    hidden, heads = config.hidden_size, (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    moe, layers = len(config.moe_layers), config.num_layers
    expert = 3 * hidden * config.expert_width
    hit = config.num_experts * (1 - (1 - config.experts_per_token / config.num_experts) ** rows)
    others = layers * hidden * heads + config.vocab_size * hidden
    others += moe * (expert + hidden * config.num_experts) + (layers - moe) * 3 * hidden * config.dense_width
    return moe * hit * expert, others


def products_per_token(config: Llama4Config) -> float:
    """Multiplications and additions in the matrix products of one prompt token, without the output head."""
    experts, others = weights_per_step(config, 1)
    return 2 * (experts + others - config.vocab_size * config.hidden_size)


def _seconds(call: Callable[[], object], repeats: int) -> float:
    call()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def main() -> None:
    torch.set_num_threads(1)
    rates = {str(dtype).removeprefix("torch."): product_rate(dtype) for dtype in (torch.bfloat16, torch.float32)}
    gflops = {f"products_{name}_gflop_s": round(rate / 1e9, 1) for name, rate in rates.items()}
    print(json.dumps({"copy_gb_s": round(copy_bandwidth() / 1e9, 2)} | gflops))


if __name__ == "__main__":
    main()
