"""Runs a planned generation: submits its choices, follows their updates and answers as a stream or whole. The same for
chat and completions. Knows nothing of bodies' shapes beyond the common fields, nor of how engines are reached."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from .exchange import Exchange
from .generation import Choice
from .generation_stream import GenerationStream
from .prompts import PromptPlan
from .protocol import GenerationBody, draw_seed
from .responses import DONE, Delta, Header, Kind, StreamEncoder, WholeChoice, usage_object, whole_body


class Generation:
    """One request being generated: `n` choices for each prompt; choice i belongs to prompt i // n."""

    def __init__(self, exchange: Exchange, kind: Kind, model: str, body: GenerationBody, plans: Sequence[PromptPlan]):
        self._exchange = exchange
        self._service = exchange.service
        self._body = body
        self._plans = plans
        self._n = body.n or 1
        prefix = "chatcmpl-" if kind == "chat" else "cmpl-"
        self._header = Header(kind, prefix + exchange.request_id, int(time.time()), model)
        self._choices = [
            Choice(
                self._service.tokenizer,
                stops=body.stop or (),
                stop_token_ids=body.stop_token_ids or (),
                include_stop=bool(body.include_stop_str_in_output),
                wants_logprobs=body.num_logprobs is not None,
            )
            for _ in range(len(plans) * self._n)
        ]
        self._unfinished = len(self._choices)
        exchange.prompt_tokens = sum(len(plan.ids) for plan in plans)

    async def run(self) -> None:
        """Generate and answer. Whatever happens, no choice is left running."""
        stream = self._service.engines.submit(self._requests())
        try:
            await (self._stream(stream) if self._body.stream else self._whole(stream))
        finally:
            stream.close()

    def _requests(self) -> list[dict[str, Any]]:
        body, exchange = self._body, self._exchange
        seed = draw_seed() if body.seed is None else body.seed
        unique = uuid.uuid4().hex[:8]  # clients may use one request id twice at the same time
        requests = []
        for number, plan in enumerate(self._plans):
            for k in range(self._n):
                sampling = body.sampling(k, plan.max_tokens, seed, self._service.defaults)
                requests.append(
                    {
                        "id": f"{exchange.request_id}-{unique}-{number * self._n + k}",
                        "prompt_ids": plan.ids,
                        "sampling": asdict(sampling),
                        "priority": body.priority or 0,
                        "timeout_s": exchange.time_left_s,
                        "cache_salt": body.cache_salt or "",
                        "num_resumed_tokens": 0,
                    }
                )
        return requests

    async def _deltas(self, stream: GenerationStream) -> list[tuple[int, Delta]]:
        """The next updates as deltas; those of choices that are over are left out."""
        deltas = []
        for index, token_ids, logprobs, end in await stream.updates():
            choice = self._choices[index]
            before = choice.num_tokens
            delta = choice.push(token_ids, logprobs, end)
            self._exchange.note_tokens(choice.num_tokens - before)
            if delta.finish_reason is not None:
                self._unfinished -= 1
                stream.abort(index)
            deltas.append((index, delta))
        return deltas

    async def _whole(self, stream: GenerationStream) -> None:
        parts = [WholeChoice(text=self._plan_of(i).echo, prompt_ids=self._plan_of(i).ids) for i in self._indices()]
        while self._unfinished:
            for index, delta in await self._deltas(stream):
                parts[index].add(delta)
        self._note_finish()
        answer = whole_body(
            self._header,
            parts,
            self._usage(),
            self._service.tokenizer,
            with_logprobs=self._body.num_logprobs is not None,
            with_token_ids=bool(self._body.return_token_ids),
        )
        await self._exchange.reply(answer)

    async def _stream(self, stream: GenerationStream) -> None:
        options = self._body.stream_options
        include_usage = options is not None and bool(options.include_usage)
        continuous = include_usage and options is not None and bool(options.continuous_usage_stats)
        encoder = StreamEncoder(
            self._header,
            self._service.tokenizer,
            null_usage=include_usage,
            with_logprobs=self._body.num_logprobs is not None,
            with_token_ids=bool(self._body.return_token_ids),
        )
        pieces: list[bytes] = []
        opened = False
        while self._unfinished:
            deltas = await self._deltas(stream)
            pieces = [] if opened else [self._opening(encoder, i) for i in self._indices()]
            opened = True
            usage = self._usage() if continuous else None
            pieces += [encoder.delta(index, delta, usage) for index, delta in deltas]
            if self._unfinished and any(pieces):
                await self._exchange.write(b"".join(pieces))
        self._note_finish()
        if include_usage:
            pieces.append(encoder.usage(self._usage()))
        await self._exchange.write(b"".join([*pieces, DONE]), last=True)

    def _opening(self, encoder: StreamEncoder, index: int) -> bytes:
        plan = self._plan_of(index)
        start = encoder.opening(index, plan.ids if self._body.return_token_ids else None)
        return start + encoder.delta(index, Delta(plan.echo)) if plan.echo else start

    def _indices(self) -> range:
        return range(len(self._choices))

    def _plan_of(self, index: int) -> PromptPlan:
        return self._plans[index // self._n]

    def _usage(self) -> dict[str, Any]:
        """Each prompt counts once, and its cached tokens are those of its first choice; left out while unknown."""
        cached = [choice.num_cached_tokens for choice in self._choices[:: self._n]]
        known = [count for count in cached if count is not None]
        output_tokens = sum(choice.num_tokens for choice in self._choices)
        total_cached = sum(known) if len(known) == len(cached) else None
        return usage_object(self._exchange.prompt_tokens, output_tokens, total_cached)

    def _note_finish(self) -> None:
        self._exchange.finish = ",".join(sorted({str(choice.finish_reason) for choice in self._choices}))
