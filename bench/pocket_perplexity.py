"""Perplexity of `pocket` on held-out text, by domain, with right and with wrong routing, and quantised.

    python bench/pocket_perplexity.py [HELDOUT_DIR] [--dtype bfloat16] [--wrong-routing] [--quantize int8,int4,fp8]
        [--windows N] [--cache-dir DIR] [--out FILE]

HELDOUT_DIR (../shared/pocket/heldout) holds one text file a domain, documents separated by NUL. Windows: the first
1,024 tokens of each document, about 6,000 tokens a domain; in chat transcripts only the answer counts. `--windows`
takes only so many of each domain. `--quantize` adds each scheme's perplexity and its ratio to that of the plain
weights. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as functional
from torch import Tensor

from herd.kernels import route as route_module
from herd.kernels.paged_attention import PagedKeys
from herd.kernels.route import Route
from herd.model import decoder as decoder_module
from herd.model.decoder import Batch, Decoder, GroupPages
from herd.model.kv_cache import KvCache
from herd.model.quantization import served_scheme, weight_sizes
from herd.model.served_model import ServedModel, open_model
from herd.model.source import resolve_model

ANSWER = "<|im_start|>assistant\n"
WINDOW = 1024
TOKENS_PER_DOMAIN = 6000
MIN_TOKENS = 16
_ROWS = 128
"""Rows of logits at a time: whole windows of them would take 200 MB."""


class Scorer:
    """Negative log-likelihoods of one sequence at a time, through the decoder that serves."""

    def __init__(self, served: ServedModel, dtype: torch.dtype, quantize: str = "none") -> None:
        self.decoder: Decoder = served.decoder(dtype=dtype, quantize=quantize)
        config = served.config
        self._local = config.num_local_layers > 0
        self._cache = KvCache(
            config,
            num_pages=WINDOW // 16 + 1,
            layers_per_page=config.num_layers,
            block_size=16,
            dtype=dtype,
        )

    def nll(self, ids: list[int]) -> Tensor:
        """-log p(ids[i] | ids[:i]) for i >= 1."""
        count = len(ids) - 1
        positions_T = torch.arange(count)
        tables = torch.arange(self._cache.places[0].slot, WINDOW // 16 + 1, dtype=torch.int32)[None]
        keys = PagedKeys.build(tables, [count], [0, count])
        pages = {(self._local, 0): GroupPages(positions_T, keys)}
        batch = Batch(torch.tensor(ids[:-1]), positions_T, pages)
        hidden_TD = self.decoder.forward(batch, self._cache)
        targets_T = torch.tensor(ids[1:])
        parts = zip(hidden_TD.split(_ROWS), targets_T.split(_ROWS), strict=True)
        return torch.cat(
            [functional.cross_entropy(self.decoder.logits(h).float(), t, reduction="none") for h, t in parts]
        )


def windows(served: ServedModel, text: str) -> list[tuple[list[int], int]]:
    """(ids, tokens of the head that do not count) of a domain's documents."""
    encode = served.tokenizer.encode_with_special
    found, total = [], 0
    for document in text.split("\0"):
        head: list[int] = []
        body = document
        if ANSWER in document:
            before, body = document.split(ANSWER, 1)
            head = encode(before + ANSWER)
        skip = max(0, len(head) - 1)
        ids = (head + encode(body))[: WINDOW + 1]
        if len(ids) - skip >= MIN_TOKENS and total < TOKENS_PER_DOMAIN:
            found.append((ids, skip))
            total += len(ids) - 1 - skip
    return found


def perplexity(scorer: Scorer, domains: dict[str, list[tuple[list[int], int]]]) -> dict[str, float]:
    """Perplexity of each domain and their geometric mean."""
    logs = {}
    for name, found in domains.items():
        losses = torch.cat([scorer.nll(ids)[skip:] for ids, skip in found])
        logs[name] = losses.double().mean().item()
    result = {name: round(math.exp(value), 3) for name, value in logs.items()}
    return {"geometric_mean": round(math.exp(sum(logs.values()) / len(logs)), 3), **result}


def with_routing(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor, int], Route]:
    """A router that sends each token where `change` says, with the score of the expert it should have gone to."""

    def route(logits_TE: Tensor, k: int) -> Route:
        chosen_T = logits_TE.float().argmax(-1)
        wrong_TE = torch.full_like(logits_TE, float("-inf"))
        wrong_TE.scatter_(1, change(chosen_T)[:, None], logits_TE.gather(1, chosen_T[:, None]))
        plan = route_module.route_ref(wrong_TE, k)
        return replace(plan, scores_N=plan.scores_N.contiguous())

    return route


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    heldout = Path(__file__).resolve().parents[2] / "shared" / "pocket" / "heldout"
    parser.add_argument("heldout", type=Path, nargs="?", default=heldout)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--wrong-routing", action="store_true")
    parser.add_argument("--quantize", default="", help="schemes, separated by commas")
    parser.add_argument("--windows", type=int, help="of each domain at most (default: about 6,000 tokens' worth)")
    parser.add_argument("--cache-dir", type=Path, default=Path.home() / ".cache" / "herd")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    served = open_model(resolve_model("pocket", cache_dir=args.cache_dir))
    dtype = getattr(torch, args.dtype)
    scorer = Scorer(served, dtype)
    domains = {
        path.stem: windows(served, path.read_text(encoding="utf-8"))[: args.windows]
        for path in sorted(args.heldout.glob("*.txt"))
    }
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    result: dict[str, object] = {
        "dtype": args.dtype,
        "torch": torch.__version__,
        "machine": platform.machine(),
        "commit": commit.stdout.strip(),
        "tokens": sum(len(ids) - 1 - skip for found in domains.values() for ids, skip in found),
    }
    plain = result["right"] = perplexity(scorer, domains)
    if args.wrong_routing:
        experts = served.config.num_experts
        original = decoder_module.route
        try:
            decoder_module.route = with_routing(lambda chosen_T: (chosen_T + 1) % experts)
            result["next_expert"] = perplexity(scorer, domains)
        finally:
            decoder_module.route = original
    del scorer
    for scheme in filter(None, args.quantize.split(",")):
        found = perplexity(Scorer(served, dtype, scheme), domains)
        sizes = weight_sizes(served.config, served_scheme(scheme, served.config), dtype.itemsize)
        result[scheme] = {
            "ratio": round(found["geometric_mean"] / plain["geometric_mean"], 4),
            "bytes": sum(sizes.values()),
            **found,
        }
    print(json.dumps(result))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
