"""Tokens per second of the engine in this process, without HTTP or Ray: prefill and decoding at several batch sizes.

    python bench/engine_decode.py [CHECKPOINT] [--dtype bfloat16] [--quantize none] [--batches 1,8,32] [--profile]

Without a checkpoint: seeded random weights of a small Scout-like shape (8 layers, hidden 512, 16 experts, 253M).

Method of the peers' scripts: decode tok/s = B (new - 1) / (t(new) - t(1)), medians; random prompts, greedy, no stop.
Prints one JSON object. `share_of_limit`: decoding against weights read at the rate at which this machine copies (bytes
read and written), prefill against its fastest products; both measured in the same run (`machine_limits.py`).
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from pathlib import Path

import torch
from machine_limits import copy_bandwidth, product_rate, products_per_token, weights_per_step

from herd.cluster.config import EngineConfig
from herd.cluster.engine import Engine
from herd.cluster.engine_builder import build_engine, choose
from herd.cluster.request import EngineRequest, StepOutput
from herd.model.checkpoint import DummySource, SafetensorsSource, WeightSource
from herd.model.config import Llama4Config, load_config, parse_config
from herd.model.loading import Loader
from herd.model.quantization import SCHEMES, Part, weight_sizes
from herd.model.sampling_params import SamplingParams
from herd.model.tensor_names import text_tensors

SHAPE = {
    "model_type": "llama4_text",
    "vocab_size": 32768,
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 1024,
    "intermediate_size_mlp": 2048,
    "num_local_experts": 16,
    "attention_chunk_size": 512,
    "max_position_embeddings": 8192,
}


def open_weights(path: Path | None) -> tuple[Llama4Config, WeightSource]:
    """The checkpoint, or random weights of `SHAPE`."""
    if path is not None:
        return load_config(path / "config.json"), SafetensorsSource(path)
    config = parse_config(SHAPE)
    return config, DummySource(text_tensors(config), 0, torch.bfloat16)


def load_engine(
    path: Path | None, dtype: torch.dtype, settings: EngineConfig, sink: list[StepOutput], quantize: str = "none"
) -> Engine:
    """An engine over the checkpoint that appends its outputs to `sink`."""
    config, weights = open_weights(path)
    scheme = None if quantize == "none" else SCHEMES[quantize]
    decoder = Loader(weights, config, dtype=dtype, scheme=scheme).decoder()
    plan = choose(decoder, settings, 2048)
    return build_engine(decoder, settings, plan, eos_ids=frozenset(), on_outputs=sink.extend)


class Bench:
    """Runs batches of random prompts through one engine."""

    def __init__(self, engine: Engine, vocab_size: int) -> None:
        self._engine = engine
        self._vocab_size = vocab_size
        self._rng = random.Random(0)
        self._count = 0

    def run(self, batch: int, prompt: int, new: int) -> float:
        """Seconds for `batch` prompts of `prompt` tokens to give `new` tokens each."""
        for _ in range(batch):
            self._count += 1
            ids = [self._rng.randrange(300, self._vocab_size - 300) for _ in range(prompt)]
            params = SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True)
            self._engine.submit(EngineRequest(str(self._count), ids, params))
        started = time.perf_counter()
        while self._engine.step():
            pass
        return time.perf_counter() - started

    def median(self, reps: int, batch: int, prompt: int, new: int) -> float:
        return statistics.median(self.run(batch, prompt, new) for _ in range(reps))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, nargs="?")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--quantize", default="none", choices=list(SCHEMES))
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--prefill", type=int, default=512)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--reps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--profile", action="store_true", help="print where the time of decoding goes")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    sink: list[StepOutput] = []
    settings = EngineConfig(prefix_caching=False)
    started = time.perf_counter()
    engine = load_engine(args.checkpoint, getattr(torch, args.dtype), settings, sink, args.quantize)
    result: dict[str, object] = {"engine": "herd", "torch": torch.__version__, "dtype": args.dtype}
    result["quantize"] = args.quantize
    result |= {"threads": args.threads, "load_s": round(time.perf_counter() - started, 2)}
    bench = Bench(engine, open_weights(args.checkpoint)[0].vocab_size)
    bench.run(1, args.prefill, 2)
    bench.run(2, 16, 4)
    result["prefill_tok_s"] = round(args.prefill / bench.median(args.reps + 2, 1, args.prefill, 1), 1)
    for batch in map(int, args.batches.split(",")):
        if args.profile:
            _profile(bench, batch, args.prompt, args.new)
        short = bench.median(args.reps, batch, args.prompt, 1)
        long = bench.median(args.reps, batch, args.prompt, args.new)
        result[f"decode_tok_s_b{batch}"] = round(batch * (args.new - 1) / (long - short), 1)
    result["share_of_limit"] = _shares(result, open_weights(args.checkpoint)[0], args)
    print(json.dumps(result))


def _shares(result: dict[str, object], config: Llama4Config, args: argparse.Namespace) -> dict[str, float]:
    """Rates against what this machine allows."""
    dtype = getattr(torch, args.dtype)
    sizes = weight_sizes(config, SCHEMES[args.quantize], dtype.itemsize)
    routed = sizes[Part.ROUTED]
    item = dtype.itemsize
    embedding = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size * item
    others = sum(sizes.values()) - routed - embedding
    count = len(config.moe_layers) * config.num_experts * 3 * config.hidden_size * config.expert_width
    bandwidth, shares = copy_bandwidth(), {}
    for batch in map(int, args.batches.split(",")):
        step = others + routed * weights_per_step(config, batch)[0] / count
        shares[f"decode_b{batch}"] = round(float(str(result[f"decode_tok_s_b{batch}"])) / batch * step / bandwidth, 3)
    rate = product_rate(dtype) / products_per_token(config)
    shares["prefill"] = round(float(str(result["prefill_tok_s"])) / rate, 3)
    return shares


def _profile(bench: Bench, batch: int, prompt: int, new: int) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], with_stack=False) as profile:
        bench.run(batch, prompt, new)
    print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=12, max_name_column_width=50))


if __name__ == "__main__":
    main()
