"""What the soak test asks: a seeded stream of random requests, each with what must come of it. Knows nothing of how
they are sent."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

_LIST = (
    "sheep herd river shepherd dog wolf field gate night count lamb grass hill stone bridge water road cloud rain wind "
    "house fire bread milk wool knife rope bell song child winter morning village market silver horse wagon forest "
    "déjà naïve Füße 漢字 Привет 🐑 42 1,000 {x: [1, 2]} <|eot|> <|im_end|>"
)
WORDS = _LIST.split()
STOPS = (" the", ".", "\n\n", "sheep and", "ing ", "漢", " a very long stop string that nobody ever says")
MAX_PROMPT_WORDS = 900
"""About 1,500 tokens."""


@dataclass(frozen=True)
class Leave:
    """The client goes away: after so many seconds, or so many pieces of the answer, whichever comes first."""

    seconds: float
    pieces: int


@dataclass(frozen=True)
class Ask:
    """One request."""

    label: str
    """What kind it is, for the report."""
    path: str
    body: dict[str, Any] | bytes
    headers: dict[str, str] = field(default_factory=dict)
    status: int = 200
    param: str | None = None
    """For an expected error: what its body must name."""
    leave: Leave | None = None
    deadline: bool = False
    """It brings a deadline of its own, and may end with 504."""
    reference: int | None = None
    """Number of a request that is asked again and again and must always be answered alike."""

    @property
    def streams(self) -> bool:
        return isinstance(self.body, dict) and bool(self.body.get("stream"))


Change = tuple[str, dict[str, Any], str]
_BAD_SAMPLING: tuple[Change, ...] = (
    ("temperature", {"temperature": 9}, "temperature"),
    ("top_p", {"top_p": -0.5}, "top_p"),
    ("n", {"n": 0}, "n"),
    ("max_tokens", {"max_tokens": 0}, "max_tokens"),
    ("seed", {"seed": "x"}, "seed"),
    ("stop", {"stop": [""]}, "stop"),
    ("logit_bias", {"logit_bias": {"sheep": 1}}, "logit_bias"),
    ("stop_token_ids", {"stop_token_ids": [10**9]}, "stop_token_ids"),
    ("stream_options", {"stream": False, "stream_options": {}}, "stream_options"),
)
_BAD_CHAT: tuple[Change, ...] = (
    ("messages", {"messages": []}, "messages"),
    ("role", {"messages": [{"role": "wizard", "content": "x"}]}, "messages.[0].role"),
    ("top_logprobs", {"logprobs": True, "top_logprobs": 99}, "top_logprobs"),
)
_BAD_COMPLETION: tuple[Change, ...] = (
    ("prompt", {"prompt": {"a": 1}}, "prompt"),
    ("ids", {"prompt": [1, 10**9]}, "prompt"),
    ("best_of", {"best_of": 4}, "best_of"),
)
_MALFORMED = (b"", b"{", b"[]", b'"x"', b"\xff\xfe", b'{"prompt": ')


class Traffic:
    """Draws requests. Equal seeds and facts give equal requests in equal order."""

    def __init__(self, seed: int, model: str, max_model_len: int, token_ids: Sequence[int]) -> None:
        """`token_ids`: any text's ids, of which prompts of ids are cut."""
        self._rng = random.Random(seed)
        self._model = model
        self._max_model_len = max_model_len
        self._ids = list(token_ids)
        self._prefixes = [self._text(self._rng.randint(40, 400)) for _ in range(6)]
        self._references = [
            self._generation(stream=False, n=1) | {"seed": 1000 + k, "max_tokens": 24, "temperature": 0.9}
            for k in range(4)
        ]

    def __iter__(self) -> Iterator[Ask]:
        """Without end."""
        kinds: dict[Callable[[], Ask], int] = {
            self._good: 60,
            self._leaving: 20,
            self._bad: 12,
            self._cut: 2,
            self._large: 1,
            self._with_deadline: 2,
            self._again: 5,
            self._tokenize: 3,
        }
        while True:
            (draw,) = self._rng.choices(list(kinds), weights=list(kinds.values()))
            yield draw()

    def _good(self) -> Ask:
        body = self._generation()
        return Ask(self._kind(body), self._path(body), body)

    def _leaving(self) -> Ask:
        """Mostly before the first token or soon after it, at times late."""
        rng = self._rng
        body = self._generation() | {"max_tokens": rng.randint(20, 300)}
        leave = Leave(rng.choice((0.01, 0.1, 1.0, 10.0, 60.0, 60.0)) * rng.random(), rng.choice((1, 2, 5, 20, 100)))
        return Ask(f"leave {self._kind(body)}", self._path(body), body, leave=leave)

    def _cut(self) -> Ask:
        """The connection ends within the body."""
        body = self._generation()
        return Ask("cut body", self._path(body), body, leave=Leave(0.0, 0))

    def _bad(self) -> Ask:
        rng = self._rng
        body = self._generation(n=1)
        chat = "messages" in body
        roll = rng.random()
        if roll < 0.1:
            return Ask("bad: JSON", self._path(body), rng.choice(_MALFORMED), status=400)
        if roll < 0.2:
            return Ask("bad: model", self._path(body), body | {"model": "gpt-9"}, status=404, param="model")
        if roll < 0.3:
            name = "messages" if chat else "prompt"
            long = "sheep " * (self._max_model_len + 1)
            value = [{"role": "user", "content": long}] if chat else long
            return Ask("bad: too long", self._path(body), body | {name: value}, status=400, param=name)
        label, change, param = rng.choice(_BAD_SAMPLING + (_BAD_CHAT if chat else _BAD_COMPLETION))
        return Ask(f"bad: {label}", self._path(body), body | change, status=400, param=param)

    def _large(self) -> Ask:
        return Ask("bad: 10 MB", "/v1/completions", b'{"prompt": "' + b"x" * (10 << 20) + b'"}', status=413)

    def _with_deadline(self) -> Ask:
        body = self._generation() | {"max_tokens": 400, "ignore_eos": True}
        headers = {"x-request-timeout-seconds": f"{self._rng.uniform(0.05, 5):.2f}"}
        return Ask("deadline", self._path(body), body, headers, deadline=True)

    def _again(self) -> Ask:
        number = self._rng.randrange(len(self._references))
        body = self._references[number]
        return Ask("reference", self._path(body), body, reference=number)

    def _tokenize(self) -> Ask:
        text = self._text(self._rng.randint(1, 200))
        return Ask("tokenize", "/tokenize", {"prompt": text, "add_special_tokens": False})

    def _generation(self, *, stream: bool | None = None, n: int | None = None) -> dict[str, Any]:
        rng = self._rng
        body: dict[str, Any] = {
            "model": self._model,
            "max_tokens": round(96 ** rng.random()),
            "n": n or rng.choices((1, 2, 3), weights=(8, 1, 1))[0],
        }
        if rng.random() < 0.5 if stream is None else stream:
            body["stream"] = True
            if rng.random() < 0.7:
                body["stream_options"] = {"include_usage": True}
        return body | self._prompt() | self._sampling()

    def _prompt(self) -> dict[str, Any]:
        rng = self._rng
        shared = f"{rng.choice(self._prefixes)} " if rng.random() < 0.4 else ""
        text = shared + self._text(max(1, round(MAX_PROMPT_WORDS ** rng.random()) - len(shared.split())))
        if rng.random() < 0.5:
            messages = [{"role": "user", "content": text}]
            if shared and rng.random() < 0.5:
                messages = [{"role": "system", "content": shared}, {"role": "user", "content": text[len(shared) :]}]
            logprobs = {"logprobs": True, "top_logprobs": rng.randint(0, 5)} if rng.random() < 0.1 else {}
            return {"messages": messages} | logprobs
        prompt: Any = text
        if rng.random() < 0.3:
            start = rng.randrange(len(self._ids))
            prompt = self._ids[start : start + rng.randint(1, 1500)]
        elif rng.random() < 0.1:
            prompt = [self._text(rng.randint(1, 20)) for _ in range(rng.randint(1, 3))]
        return {"prompt": prompt} | ({"logprobs": rng.randint(0, 5)} if rng.random() < 0.1 else {})

    def _sampling(self) -> dict[str, Any]:
        rng = self._rng
        choices: dict[str, Callable[[], Any]] = {
            "temperature": lambda: rng.choice((0, 0.3, 0.7, 1, 1.5)),
            "top_p": lambda: rng.uniform(0.1, 1),
            "top_k": lambda: rng.choice((-1, 0, 1, 5, 50)),
            "min_p": lambda: rng.uniform(0, 0.3),
            "presence_penalty": lambda: rng.uniform(-2, 2),
            "frequency_penalty": lambda: rng.uniform(-2, 2),
            "repetition_penalty": lambda: rng.uniform(0.8, 1.5),
            "seed": lambda: rng.randrange(-(2**63), 2**63),
            "stop": lambda: rng.sample(STOPS, rng.randint(1, 3)),
            "stop_token_ids": lambda: rng.sample(self._ids, 2),
            "logit_bias": lambda: {str(i): rng.uniform(-100, 100) for i in rng.sample(self._ids, 3)},
            "ignore_eos": lambda: True,
            "priority": lambda: rng.randint(-3, 3),
        }
        return {name: draw() for name, draw in choices.items() if rng.random() < 0.2}

    def _text(self, words: int) -> str:
        return " ".join(self._rng.choices(WORDS, k=words))

    @staticmethod
    def _path(body: dict[str, Any]) -> str:
        return "/v1/chat/completions" if "messages" in body else "/v1/completions"

    @staticmethod
    def _kind(body: dict[str, Any]) -> Literal["chat", "chat stream", "text", "text stream"]:
        if "messages" in body:
            return "chat stream" if body.get("stream") else "chat"
        return "text stream" if body.get("stream") else "text"
