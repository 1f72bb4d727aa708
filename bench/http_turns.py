"""Several OpenAI servers under the same closed loop, taking turns, and where the CPU time of each goes.

    python bench/http_turns.py --target herd=http://127.0.0.1:8000@PID --target vllm=http://127.0.0.1:8201@PID \\
        --model bench-scout [--concurrency 1,8,32] [--rounds 5] [--ids 512] [--out bench/results/NAME.json]

N workers, each sending its next request when the last has ended; streaming, greedy, end-of-sequence ignored, about 28
prompt tokens, 128 new ones, every prompt beginning with another number so that no prefix cache helps; with `--ids N`
prompts are N random token ids, for measuring prefill: its rate is N over the time to the first token. In each round
every target runs every level once; figures are medians over the rounds. `@PID` is the server's process: with it come
tokens per CPU second of its whole tree, and for Herd the CPU share of gateway and ingress. Loopback only.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import random
import statistics
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlparse

import aiohttp
from process_cpu import cpu_by_role

Prompt = str | list[int]
WORDS = ("index", "yield", "value", "object", "queue", "string", "method", "import", "return", "thread", "error")


@dataclass(frozen=True)
class Target:
    label: str
    url: str
    pid: int | None

    @classmethod
    def parse(cls, text: str) -> Target:
        label, _, rest = text.partition("=")
        url, _, pid = rest.partition("@")
        if urlparse(url).hostname not in ("127.0.0.1", "localhost", "::1"):
            raise argparse.ArgumentTypeError(f"{url!r} is not a loopback address")
        return cls(label, url.rstrip("/"), int(pid) if pid else None)


async def one(session: aiohttp.ClientSession, target: Target, model: str, max_tokens: int, prompt: Prompt) -> dict:
    """One streamed completion: time to the first token, total seconds, tokens."""
    body = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0.0, "ignore_eos": True}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    began, first, last, usage, rest = time.perf_counter(), None, 0.0, None, b""
    async with session.post(f"{target.url}/v1/completions", json=body) as response:
        if response.status != 200:
            raise RuntimeError(f"{target.label}: {response.status} {await response.text()}")
        async for piece in response.content.iter_any():
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line[6:])
                usage = event.get("usage") or usage
                if event.get("choices"):
                    last = time.perf_counter()
                    first = first or last
    if usage is None or first is None:
        raise RuntimeError(f"{target.label}: the stream ended without usage")
    tokens = usage["completion_tokens"]
    return {"ttft": first - began, "tokens": tokens, "tpot": (last - first) / max(1, tokens - 1)}


def random_prompt(args: argparse.Namespace, rng: random.Random) -> Prompt:
    """Text, or token ids that are no special ones."""
    if args.ids:
        return [rng.randrange(300, args.vocab - 300) for _ in range(args.ids)]
    return f"{rng.randrange(10**9)} " + " ".join(rng.choice(WORDS) for _ in range(args.prompt_words))


async def level(target: Target, args: argparse.Namespace, streams: int, rng: random.Random) -> dict:
    """One round of one target at one number of streams."""
    left = streams * args.per_worker if streams > 1 else args.single
    total, done = left, []

    async def worker(session: aiohttp.ClientSession) -> None:
        nonlocal left
        while left > 0:
            left -= 1
            prompt = random_prompt(args, rng)
            done.append(await one(session, target, args.model, args.max_tokens, prompt))

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, force_close=True)) as session:
        before = cpu_by_role(target.pid) if target.pid else {}
        began = time.perf_counter()
        await asyncio.gather(*(worker(session) for _ in range(streams)))
        wall = time.perf_counter() - began
        after = cpu_by_role(target.pid) if target.pid else {}
    assert len(done) == total
    tokens = sum(request["tokens"] for request in done)
    cpu = {role: after[role] - before.get(role, 0.0) for role in after}
    spent = sum(cpu.values())
    return {
        "tok_s": tokens / wall,
        "prefill_tok_s": args.ids / statistics.median(request["ttft"] for request in done) if args.ids else None,
        "ttft_ms": 1e3 * statistics.median(request["ttft"] for request in done),
        "tpot_ms": 1e3 * statistics.median(request["tpot"] for request in done),
        "tok_per_cpu_s": tokens / spent if spent else None,
        "cpu_ms_per_request": {role: 1e3 * seconds / total for role, seconds in cpu.items()} if spent else None,
        "edge_share": (cpu.get("gateway", 0.0) + cpu.get("ingress", 0.0)) / spent if spent else None,
    }


def median_of(rounds: list[dict]) -> dict:
    """Medians of the figures over the rounds."""
    merged: dict[str, object] = {}
    for key in rounds[0]:
        values = [figures[key] for figures in rounds if figures[key] is not None]
        if values and isinstance(values[0], dict):
            roles = {role for value in values for role in value}
            merged[key] = {r: round(statistics.median(v.get(r, 0.0) for v in values), 2) for r in sorted(roles)}
        else:
            merged[key] = round(statistics.median(values), 3) if values else None
    return merged


async def versions(targets: list[Target]) -> dict:
    """What each server says of its version."""
    said = {}
    async with aiohttp.ClientSession() as session:
        for target in targets:
            async with session.get(f"{target.url}/version") as response:
                said[target.label] = await response.json() if response.status == 200 else None
    return said


async def run(args: argparse.Namespace) -> dict:
    rng = random.Random(args.seed)
    levels = [int(text) for text in args.concurrency.split(",")]
    for target in args.target:
        await level(target, args, max(levels), rng)
    rounds: dict[tuple[str, int], list[dict]] = {}
    for _ in range(args.rounds):
        for streams in levels:
            for target in args.target:
                rounds.setdefault((target.label, streams), []).append(await level(target, args, streams, rng))
    rate = "prefill_tok_s" if args.ids else "tok_s"
    cells = {streams: {t.label: median_of(rounds[t.label, streams]) for t in args.target} for streams in levels}
    base = args.target[-1].label
    ratios = {
        streams: {label: round(figures[rate] / by_label[base][rate], 2) for label, figures in by_label.items()}
        for streams, by_label in cells.items()
    }
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "machine": f"{platform.machine()}, {platform.processor() or 'cpu'}",
        "commit": commit.stdout.strip(),
        "versions": await versions(args.target),
        "rounds": args.rounds,
        f"{rate} ratio to {base}": ratios,
        "medians": cells,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", action="append", required=True, type=Target.parse)
    parser.add_argument("--model", default="bench-scout")
    parser.add_argument("--concurrency", default="1,8,32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--per-worker", type=int, default=2)
    parser.add_argument("--single", type=int, default=4, help="requests a round at one stream")
    parser.add_argument("--prompt-words", type=int, default=24)
    parser.add_argument("--ids", type=int, default=0, help="prompts of this many random token ids instead of words")
    parser.add_argument("--vocab", type=int, default=32768, help="below which --ids draws")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    result = asyncio.run(run(args))
    print(json.dumps(result, indent=1))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
