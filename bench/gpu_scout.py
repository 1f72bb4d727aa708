"""Scout, all 48 layers, int4, random weights, on one GPU: whether it fits, how fast it decodes and prefills, and what
share of the memory bandwidth that is.

    python bench/gpu_scout.py [--layers 48] [--quantize int4] [--numerics exact] [--out FILE]

Weights are drawn on the device in their quantised form. Decoding: random prompts of 128 tokens, greedy, no stop,
tok/s = B (new - 1) / (t(new) - t(1)), medians of three. The limit of one stream: the bandwidth of a copy within the
device, measured in the same run (bytes read and written), over the bytes of all weights that a token reads.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from engine_decode import Bench

from herd.cluster.config import EngineConfig
from herd.cluster.engine_builder import build_engine, choose
from herd.cluster.request import StepOutput
from herd.kernels.grouped_mlp import ExpertWeights
from herd.kernels.linear import Linear
from herd.kernels.quantized import QuantizedWeight
from herd.model.config import Llama4Config, parse_config
from herd.model.decoder import AttentionWeights, Decoder, LayerWeights
from herd.model.device_experts import DeviceExperts
from herd.model.experts import LocalExperts
from herd.model.presets import PRESETS
from herd.model.quantization import SCHEMES, Recipe, Scheme

_COPY_BYTES = 4 << 30


class RandomWeights:
    """Layers of a model with random weights, made where they are used."""

    def __init__(self, config: Llama4Config, scheme: Scheme, device: torch.device, exact: bool) -> None:
        self._config, self._scheme, self._device, self._exact = config, scheme, device, exact
        self._generator = torch.Generator(device).manual_seed(0)
        self.bytes_per_token = 0
        """That one stream reads for a token, with one expert of each layer."""

    def linear(self, name: str, num_out: int, num_in: int) -> Linear:
        recipe = self._scheme.recipe(name, self._config)
        if recipe is None:
            plain = torch.empty(num_out, num_in, dtype=torch.bfloat16, device=self._device)
            weight = plain.normal_(0, num_in**-0.5, generator=self._generator)
        else:
            weight = self._quantized(recipe, num_out, num_in)
        if ".experts." not in name or ".experts.0." in name:
            self.bytes_per_token += weight.num_bytes if isinstance(weight, QuantizedWeight) else weight.nbytes
        return Linear(weight, self._exact)

    def mlp(self, name: str, width: int) -> ExpertWeights:
        hidden = self._config.hidden_size
        return ExpertWeights(
            self.linear(f"{name}.gate_proj", 2 * width, hidden), self.linear(f"{name}.down_proj", hidden, width)
        )

    def vector(self) -> torch.Tensor:
        return torch.ones(self._config.hidden_size, dtype=torch.bfloat16, device=self._device)

    def layer(self, index: int) -> LayerWeights:
        """All but the routed experts."""
        config, name = self._config, f"model.layers.{index}"
        heads = config.num_heads * config.head_dim
        qkv = heads + 2 * config.num_kv_heads * config.head_dim
        attention = AttentionWeights(
            self.linear(f"{name}.self_attn.q_proj", qkv, config.hidden_size),
            self.linear(f"{name}.self_attn.o_proj", config.hidden_size, heads),
        )
        if not config.is_moe(index):
            mlp = self.mlp(f"{name}.feed_forward", config.dense_width)
            return LayerWeights(self.vector(), attention, self.vector(), mlp, None)
        mlp = self.mlp(f"{name}.feed_forward.shared_expert", config.expert_width)
        router = self.linear(f"{name}.feed_forward.router", config.num_experts, config.hidden_size)
        return LayerWeights(self.vector(), attention, self.vector(), mlp, router)

    def decoder(self) -> Decoder:
        config = self._config
        layers, experts = [], {}
        for i in range(config.num_layers):
            layers.append(self.layer(i))
            if config.is_moe(i):
                name = f"model.layers.{i}.feed_forward.experts"
                experts[i] = [self.mlp(f"{name}.{e}", config.expert_width) for e in range(config.num_experts)]
        table = torch.empty(config.vocab_size, config.hidden_size, dtype=torch.bfloat16, device=self._device)
        return Decoder(
            config,
            embedding_VD=table.normal_(generator=self._generator),
            layers=layers,
            norm_D=self.vector(),
            head=self.linear("lm_head", config.vocab_size, config.hidden_size),
            experts=DeviceExperts(experts, self._exact) if self._device.type == "cuda" else LocalExperts(experts),
            exact=self._exact,
        )

    def _quantized(self, recipe: Recipe, num_out: int, num_in: int) -> QuantizedWeight:
        group = recipe.group("a weight", num_in)
        shape = (num_out, num_in // 2 if recipe.kind == "int4" else num_in)
        q = torch.randint(0, 255, shape, dtype=torch.uint8, device=self._device, generator=self._generator)
        if recipe.kind == "int8":
            q = q.view(torch.int8)
        elif recipe.kind == "fp8":
            q = (q.float() - 127).to(torch.float8_e4m3fn)
        size = 2.5 / {"int4": 7, "int8": 127, "fp8": 127}[recipe.kind] * num_in**-0.5
        dtype = torch.bfloat16 if recipe.kind == "int4" else torch.float32
        scales = torch.full((num_out, num_in // group), size, dtype=dtype, device=self._device)
        return QuantizedWeight(recipe.kind, q, scales, group)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written together."""
    size = _COPY_BYTES if device.type == "cuda" else _COPY_BYTES >> 6
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = []
    for _ in range(6):
        finish(device)
        began = time.perf_counter()
        target.copy_(source)
        finish(device)
        times.append(time.perf_counter() - began)
    return 2 * size / statistics.median(times[1:])


def finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(decoder: Decoder, args: argparse.Namespace, batches: Sequence[int]) -> dict[str, float]:
    settings = EngineConfig.model_validate(
        {"prefix_caching": False, "numerics": args.numerics, "kv_memory": args.kv_memory, "max_num_seqs": max(batches)}
    )
    sink: list[StepOutput] = []
    plan = choose(decoder, settings, 8192)
    engine = build_engine(decoder, settings, plan, eos_ids=frozenset(), on_outputs=sink.extend)
    bench = Bench(engine, decoder.config.vocab_size)
    found: dict[str, float] = {}
    bench.run(1, args.prefill, 2)
    found["prefill_tok_s"] = round(args.prefill / bench.median(3, 1, args.prefill, 1), 1)
    for batch in batches:
        bench.run(batch, args.prompt, 4)  # records the step
        short, long = bench.median(3, batch, args.prompt, 1), bench.median(3, batch, args.prompt, args.new)
        found[f"decode_tok_s_b{batch}"] = round(batch * (args.new - 1) / (long - short), 1)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="scout")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--quantize", default="int4", choices=list(SCHEMES))
    parser.add_argument("--numerics", default="exact", choices=["exact", "fast"])
    parser.add_argument("--batches", default="1,16,64")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--prefill", type=int, default=4096)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--kv-memory", default="4GiB")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "gpu_scout.json")
    args = parser.parse_args()
    config = parse_config(dict(PRESETS[args.model].config))
    if args.layers:
        config = config.model_copy(update={"num_layers": args.layers, **_first_layers(config, args.layers)})
    device, scheme = torch.device(args.device), SCHEMES[args.quantize]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    began = time.perf_counter()
    with torch.inference_mode():
        weights = RandomWeights(config, scheme, device, args.numerics == "exact")
        decoder = weights.decoder()
    finish(device)
    result: dict[str, object] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "commit": commit.stdout.strip(),
        "model": f"{args.model}, {config.num_layers} layers, {args.quantize}, {args.numerics}",
        "make_s": round(time.perf_counter() - began, 1),
    }
    if device.type == "cuda":
        result["weights_gib"] = round(torch.cuda.memory_allocated(device) / 2**30, 2)
    found = measure(decoder, args, [int(text) for text in args.batches.split(",")])
    bandwidth = copy_bandwidth(device)
    limit = bandwidth / weights.bytes_per_token
    result |= found
    result |= {"copy_gb_s": round(bandwidth / 1e9, 1), "limit_tok_s_b1": round(limit, 1)}
    if "decode_tok_s_b1" in found:
        result["share_of_limit_b1"] = round(found["decode_tok_s_b1"] / limit, 3)
    print(json.dumps(result, indent=1))
    args.out.write_text(json.dumps(result, indent=1) + "\n")


def _first_layers(config: Llama4Config, count: int) -> dict[str, frozenset[int]]:
    kept = range(count)
    return {
        "moe_layers": frozenset(config.moe_layers & set(kept)),
        "rope_layers": frozenset(config.rope_layers & set(kept)),
    }


if __name__ == "__main__":
    main()
