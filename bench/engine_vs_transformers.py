"""Decoding in this process, Herd's engine and transformers taking turns on one checkpoint, one compute thread.

    python bench/engine_vs_transformers.py CHECKPOINT [--batches 1,32] [--rounds 5] [--out bench/results/NAME.json]

Random prompts of 32 tokens, greedy, end-of-sequence ignored. Decode tok/s = B (new - 1) / (t(new) - t(1)), the median
over the rounds. transformers computes every expert for every token: a reference, not the bar.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from engine_decode import Bench, load_engine, open_weights

from herd.cluster.config import EngineConfig

PROMPT = 32
NEW = {"herd": 64, "transformers": 16}


class Transformers:
    """The same calls as `Bench`, answered by transformers."""

    def __init__(self, path: Path, dtype: torch.dtype) -> None:
        self._model: Any = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
        self._model.generation_config.eos_token_id = None
        self._rng = random.Random(0)

    @torch.inference_mode()
    def run(self, batch: int, prompt: int, new: int) -> float:
        vocab = self._model.config.get_text_config().vocab_size
        ids = torch.tensor([[self._rng.randrange(300, vocab - 300) for _ in range(prompt)] for _ in range(batch)])
        began = time.perf_counter()
        self._model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new, min_new_tokens=new
        )
        return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batches", default="1,32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    dtype = getattr(torch, args.dtype)
    engine = load_engine(args.checkpoint, dtype, EngineConfig(prefix_caching=False), [])
    runners: dict[str, Bench | Transformers] = {
        "herd": Bench(engine, open_weights(args.checkpoint)[0].vocab_size),
        "transformers": Transformers(args.checkpoint, dtype),
    }
    result: dict[str, object] = {"machine": platform.machine(), "torch": torch.__version__}
    result |= {"transformers": transformers.__version__, "dtype": args.dtype, "threads": 1, "rounds": args.rounds}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    result["commit"] = commit.stdout.strip()
    for batch in map(int, args.batches.split(",")):
        speeds: dict[str, list[float]] = {label: [] for label in runners}
        for _ in range(args.rounds):
            for label, runner in runners.items():
                short, long = runner.run(batch, PROMPT, 1), runner.run(batch, PROMPT, NEW[label])
                speeds[label].append(batch * (NEW[label] - 1) / (long - short))
        medians = {label: round(statistics.median(values), 1) for label, values in speeds.items()}
        result[f"decode_tok_s_b{batch}"] = medians
        result[f"ratio_b{batch}"] = round(medians["herd"] / medians["transformers"], 2)
    print(json.dumps(result))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
