"""Aborts at any moment give everything back, and touch nobody else."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from herd.model.decoder import Decoder

from ..tiny_models import EngineLab, random_ids, tiny_config, tiny_decoder

ENDLESS: dict[str, Any] = {"max_tokens": 450, "ignore_eos": True}
WAIT_S = 30.0


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return tiny_decoder(tiny_config())


def prompt(length: int, seed: int = 0) -> list[int]:
    return random_ids(length, vocab_size=61, seed=seed)


@pytest.mark.parametrize("steps", [0, 1, 2, 9])
def test_an_abort_gives_every_page_back(decoder: Decoder, steps: int) -> None:
    """While it waits, in the middle of its prompt, while it generates."""
    lab = EngineLab(decoder, budget=16)
    id_ = lab.submit(prompt(40), **ENDLESS)
    for _ in range(steps):
        lab.engine.step()
    assert (lab.kv.usage.used > 0) == (steps > 0)
    assert bool(lab.tokens(id_)) == (steps == 9)
    lab.engine.abort(id_)
    lab.run()
    assert (lab.end(id_).finish_reason, lab.end(id_).error) == ("abort", None)
    stats = lab.engine.stats()
    assert (stats.running, stats.waiting, stats.pages_used) == (0, 0, 0)


def test_an_abort_leaves_the_others_alone(decoder: Decoder) -> None:
    alone = EngineLab(decoder)
    kept = alone.submit(prompt(20, seed=1), max_tokens=30, ignore_eos=True)
    alone.run()
    lab = EngineLab(decoder, max_num_seqs=3)
    ids = [lab.submit(prompt(20, seed), **ENDLESS | ({"max_tokens": 30} if seed == 1 else {})) for seed in range(6)]
    for _ in range(8):
        lab.engine.step()
    stats = lab.engine.stats()
    assert (stats.running, stats.waiting) == (3, 3)
    for n in (0, 2, 4, 5, 3):  # running and waiting ones
        lab.engine.abort(ids[n])
    lab.run()
    assert lab.tokens(ids[1]) == alone.tokens(kept)
    assert [lab.end(id_).finish_reason for id_ in ids] == ["abort", "length", *["abort"] * 4]


def test_a_preempted_request_can_be_aborted(decoder: Decoder) -> None:
    layout = EngineLab(decoder).kv.layout
    lab = EngineLab(decoder, num_pages=layout.pages_for(60) + layout.pages_for(8), budget=16, max_num_seqs=4)
    ids = [lab.submit(prompt(16, seed), max_tokens=44, ignore_eos=True) for seed in range(4)]
    while not lab.engine.stats().preemptions:
        assert lab.engine.step()
    for id_ in ids:
        lab.engine.abort(id_)
    lab.run()
    assert [lab.end(id_).finish_reason for id_ in ids] == ["abort"] * 4


def test_aborts_of_what_has_ended_or_never_was_change_nothing(decoder: Decoder) -> None:
    lab = EngineLab(decoder)
    id_ = lab.submit(prompt(5), max_tokens=3, ignore_eos=True)
    lab.run()
    for name in (id_, id_, "nobody"):
        lab.engine.abort(name)
    lab.run()
    assert lab.end(id_).finish_reason == "length"


def test_an_abort_from_another_thread(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    lab = EngineLab(decoder)
    generating, ended = threading.Event(), threading.Event()
    take = lab._take

    def watch(outputs: list[Any]) -> None:
        take(outputs)
        generating.set()
        if any(output.is_last for output in outputs):
            ended.set()

    monkeypatch.setattr(lab.engine, "_on_outputs", watch)
    lab.engine.start()
    id_ = lab.submit(prompt(9), **ENDLESS)
    assert generating.wait(WAIT_S)
    lab.engine.abort(id_)
    assert ended.wait(WAIT_S)
    lab.engine.stop(WAIT_S)
    assert lab.end(id_).finish_reason == "abort"
    lab.assert_no_page_held()
