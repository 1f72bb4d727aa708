"""The engine's loop over a tiny model: how requests end, what fails whom, threads, and what the figures say."""

from __future__ import annotations

import math
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from herd.cluster.errors import ContextLengthExceeded, DeadlineExceeded, EngineFault, Overloaded, RequestError
from herd.cluster.request import EngineRequest
from herd.model.config import Llama4Config
from herd.model.decoder import Decoder
from herd.model.sampling_params import SamplingParams

from ..tiny_models import EngineLab, random_ids, sequence_logits, tiny_config, tiny_decoder

VOCAB = 61
WAIT_S = 30.0


@pytest.fixture
def decoder() -> Decoder:
    return tiny_decoder(tiny_config())


def prompt(length: int, seed: int = 0) -> list[int]:
    return random_ids(length, vocab_size=VOCAB, seed=seed)


def greedy(decoder: Decoder, ids: list[int], count: int) -> list[int]:
    """The model's own choices, computed without an engine."""
    ids = list(ids)
    for _ in range(count):
        ids.append(int(sequence_logits(decoder, ids, piece=len(ids))[-1].argmax()))
    return ids[-count:]


def fail_once(decoder: Decoder, fault: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next forward pass raises."""
    forward = decoder.forward

    def failing(*args: Any) -> Tensor:
        monkeypatch.setattr(decoder, "forward", forward)
        raise fault

    monkeypatch.setattr(decoder, "forward", failing)


def test_greedy_tokens_are_the_models(decoder: Decoder) -> None:
    lab = EngineLab(decoder, budget=7, max_num_seqs=3)
    ids = [lab.submit(prompt(length, seed=length), max_tokens=12) for length in (1, 8, 21)]
    lab.run()
    for id_ in ids:
        assert lab.tokens(id_) == greedy(decoder, lab.prompts[id_], 12)


def test_a_seed_decides_whoever_else_is_there(decoder: Decoder) -> None:
    def settings(seed: int) -> dict[str, Any]:
        return {"max_tokens": 20, "temperature": 1.0, "seed": seed}

    alone = EngineLab(decoder).generate(prompt(9), **settings(5))
    assert EngineLab(decoder).generate(prompt(9), **settings(6)) != alone
    lab = EngineLab(decoder, budget=11, max_num_seqs=4)
    ids = [lab.submit(prompt(9), **settings(seed)) for seed in (4, 5, 6, 5, 7)]
    lab.run()
    texts = [lab.tokens(id_) for id_ in ids]
    assert texts[1] == texts[3] == alone
    assert len(set(map(tuple, texts))) == 4


def test_ends_of_a_request(decoder: Decoder) -> None:
    free = EngineLab(decoder).generate(prompt(10), max_tokens=12)
    at = next(n for n in range(12) if free[n] not in free[:n] and n > 1)
    eos = EngineLab(decoder, eos_ids=[free[at]])
    cases = {
        eos.submit(prompt(10), max_tokens=12): (free[: at + 1], "stop"),
        eos.submit(prompt(10), max_tokens=12, ignore_eos=True): (free, "length"),
        eos.submit(prompt(10), max_tokens=12, ignore_eos=True, stop_token_ids=(free[1],)): (
            free[: free.index(free[1]) + 1],
            "stop",
        ),
        eos.submit(prompt(10), max_tokens=1): (free[:1], "length"),
    }
    eos.run()
    for id_, (tokens, reason) in cases.items():
        assert (eos.tokens(id_), eos.end(id_).finish_reason) == (tokens, reason)


def test_the_context_is_the_end(decoder: Decoder) -> None:
    lab = EngineLab(decoder, max_model_len=32)
    id_ = lab.submit(prompt(25), max_tokens=100)
    lab.run()
    assert len(lab.tokens(id_)) == 7
    assert lab.end(id_).finish_reason == "length"


def test_refusals_are_outputs(decoder: Decoder) -> None:
    lab = EngineLab(decoder, max_model_len=32, max_num_seqs=1, max_queued=1)
    kept = [lab.submit(prompt(3)), lab.submit(prompt(4))]
    refused = {
        lab.submit(prompt(3)): Overloaded,
        lab.submit(prompt(32)): ContextLengthExceeded,
        lab.submit([]): RequestError,
    }
    lab.run()
    for id_, kind in refused.items():
        assert type(lab.end(id_).error) is kind
        assert lab.tokens(id_) == []
    assert [lab.end(id_).finish_reason for id_ in kept] == ["length"] * 2


def test_abort_at_any_moment(decoder: Decoder) -> None:
    for steps in range(12):
        lab = EngineLab(decoder, budget=8, max_num_seqs=2)
        ids = [lab.submit(prompt(20, seed), max_tokens=30) for seed in range(3)]
        for _ in range(steps):
            lab.engine.step()
        for id_ in ids:
            lab.engine.abort(id_)
        lab.run()
        assert [lab.end(id_).finish_reason for id_ in ids] == ["abort"] * 3


def test_the_deadline_is_on_the_engines_clock(decoder: Decoder) -> None:
    now = 100.0
    lab = EngineLab(decoder, clock=lambda: now)
    late, patient = lab.submit(prompt(4), max_tokens=30, deadline_s=105.0), lab.submit(prompt(4), max_tokens=30)
    for _ in range(4):
        lab.engine.step()
    now = 104.9
    lab.engine.step()
    assert not any(output.is_last for output in lab.outputs[late])
    now = 105.0
    lab.run()
    assert isinstance(lab.end(late).error, DeadlineExceeded)
    assert lab.end(patient).finish_reason == "length"


def test_a_resumed_request_goes_on_where_it_was(decoder: Decoder) -> None:
    settings: dict[str, Any] = {"max_tokens": 20, "temperature": 1.0, "seed": 9, "frequency_penalty": 0.7}
    whole = EngineLab(decoder).generate(prompt(9), **settings)
    for done in (1, 7, 19):
        lab = EngineLab(decoder)
        ids = prompt(9) + whole[:done]
        lab.engine.submit(EngineRequest("r", ids, SamplingParams(**settings), num_resumed_tokens=done))
        lab.run()
        assert lab.tokens("r") == whole[done:]
        assert lab.end("r").finish_reason == "length"
    ended = EngineLab(decoder)
    ended.engine.submit(EngineRequest("r", prompt(9) + whole, SamplingParams(**settings), num_resumed_tokens=20))
    ended.run()
    assert (ended.tokens("r"), ended.end("r").finish_reason) == ([], "length")


@pytest.mark.parametrize("fault", [RuntimeError("bad product"), IndexError("out of range")], ids=["fault0", "fault1"])
def test_a_failed_step_ends_its_requests_only(
    decoder: Decoder, fault: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = EngineLab(decoder, max_num_seqs=2)
    hit = [lab.submit(prompt(5, seed), max_tokens=9) for seed in range(2)]
    spared = lab.submit(prompt(5, 2), max_tokens=9)
    for _ in range(3):
        lab.engine.step()
    fail_once(decoder, fault, monkeypatch)
    lab.run()
    for id_ in hit:
        assert isinstance(lab.end(id_).error, EngineFault)
        assert str(fault) in str(lab.end(id_).error)
    assert lab.end(spared).finish_reason == "length"
    assert lab.engine.stats().failed_steps == 1
    assert lab.faults == []


@pytest.mark.parametrize("sampled", [False, True])
def test_not_a_number_fails_only_its_request(decoder: Decoder, sampled: bool) -> None:
    temperature = 1.0 if sampled else 0.0
    expected = EngineLab(decoder).generate(prompt(6, 1), max_tokens=8, temperature=temperature, seed=3)
    lab = EngineLab(decoder)
    broken = lab.submit(prompt(6), max_tokens=8, temperature=temperature, logit_bias=((7, math.nan),))
    sound = lab.submit(prompt(6, 1), max_tokens=8, temperature=temperature, seed=3)
    lab.run()
    assert isinstance(lab.end(broken).error, EngineFault)
    assert lab.tokens(broken) == []
    assert lab.tokens(sound) == expected
    assert lab.engine.stats().failed_steps == 0


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_defect_ends_the_thread_and_is_told(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not of the model's, which ends a step's requests, but of the engine's own."""
    lab = EngineLab(decoder)
    defect = KeyError("a lost request")

    def broken() -> None:
        raise defect

    monkeypatch.setattr(lab.scheduler, "schedule", broken)
    lab.engine.start()
    thread = lab.engine._thread
    assert thread is not None
    lab.submit(prompt(3))
    thread.join(WAIT_S)
    assert not lab.engine.alive
    assert lab.engine.fault is defect
    assert lab.faults == [defect]


def test_from_other_threads(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    lab = EngineLab(decoder, max_num_seqs=4)
    expected = {seed: EngineLab(decoder).generate(prompt(5, seed), max_tokens=6) for seed in range(12)}
    ended = threading.Semaphore(0)
    take = lab._take

    def watch(outputs: list[Any]) -> None:
        take(outputs)
        for output in outputs:
            if output.is_last:
                ended.release()

    monkeypatch.setattr(lab.engine, "_on_outputs", watch)
    lab.engine.start()
    ids: dict[int, str] = {}
    senders = [
        threading.Thread(target=lambda s=seed: ids.update({s: lab.submit(prompt(5, s), max_tokens=6)}))
        for seed in range(12)
    ]
    for sender in senders:
        sender.start()
    for sender in senders:
        sender.join(WAIT_S)
    for _ in range(12):
        assert ended.acquire(timeout=WAIT_S)
    lab.engine.stop(WAIT_S)
    assert not lab.engine.alive
    assert {seed: lab.tokens(id_) for seed, id_ in ids.items()} == expected
    lab.assert_no_page_held()


def test_stopping_before_any_work(decoder: Decoder) -> None:
    never = EngineLab(decoder)
    never.engine.stop(WAIT_S)
    assert not never.engine.alive
    lab = EngineLab(decoder)
    lab.engine.start()
    assert lab.engine.alive
    lab.engine.stop(WAIT_S)
    assert not lab.engine.alive
    assert (lab.engine.fault, lab.faults) == (None, [])


def test_stats(decoder: Decoder) -> None:
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += 1.0
        return now

    lab = EngineLab(decoder, max_num_seqs=2, budget=16, clock=clock)
    ids = [lab.submit(prompt(10, seed), max_tokens=4) for seed in range(3)]
    lab.engine.step()
    stats = lab.engine.stats()
    assert (stats.running, stats.waiting, stats.steps) == (2, 1, 1)
    assert stats.pages_used > 0
    assert stats.pages_used + stats.pages_free + stats.pages_cached == stats.pages_total == 600
    lab.run()
    stats = lab.engine.stats()
    assert (stats.running, stats.waiting, stats.pages_used, stats.failed_steps) == (0, 0, 0, 0)
    assert stats.generated_tokens == sum(len(lab.tokens(id_)) for id_ in ids) == 12
    assert stats.computed_tokens == 3 * (10 + 4 - 1)
    assert stats.step_seconds == stats.steps
    assert stats.prefix_query_tokens > 0


def kv_bytes_per_token_and_layer(config: Llama4Config) -> int:
    return 2 * config.num_kv_heads * config.head_dim * torch.float32.itemsize


def test_kv_memory_at_64_chunks_of_context(decoder: Decoder) -> None:
    """Global layers keep everything, local ones a single chunk; measured in a running engine."""
    config = decoder.config
    chunk = config.attention_chunk_size
    assert chunk is not None
    length = 64 * chunk
    lab = EngineLab(decoder, budget=64, max_model_len=length + 2, prefix_caching=False)
    lab.submit(prompt(length - 1), max_tokens=3)
    most = 0
    while lab.engine.step():
        most = max(most, lab.kv.usage.used)
    per_layer = kv_bytes_per_token_and_layer(config)
    num_global = config.num_layers - config.num_local_layers
    expected = (num_global * length + config.num_local_layers * chunk) * per_layer
    assert most * lab.kv.layout.page_bytes(per_layer) == expected
    assert expected * 3 < config.num_layers * length * per_layer, "four times less, but for the chunk"
