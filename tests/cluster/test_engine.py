"""The engine's loop: aborts at any moment give everything back, failures end in an error for everybody."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from herd.cluster.errors import EngineFault
from herd.model.decoder import Decoder

from ..tiny_models import EngineLab, random_ids, tiny_config, tiny_decoder

ENDLESS = {"max_tokens": 400, "ignore_eos": True}
WAIT_S = 30.0


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return tiny_decoder(tiny_config())


def prompt(length: int, seed: int = 0) -> list[int]:
    return random_ids(length, vocab_size=61, seed=seed)


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_an_abort_gives_every_page_back(decoder: Decoder, steps: int) -> None:
    """While it waits (0 steps), in the middle of its prompt (1 of 3 pieces), while it generates."""
    lab = EngineLab(decoder, budget=16)
    id_ = lab.submit(prompt(40), **ENDLESS)
    for _ in range(steps):
        lab.engine.step()
    assert (lab.kv.usage.used > 0) == (steps > 0)
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
    ids = [lab.submit(prompt(20, seed=seed), **ENDLESS | ({"max_tokens": 30} if seed == 1 else {})) for seed in range(6)]
    for _ in range(4):
        lab.engine.step()
    for id_ in (ids[0], ids[2], ids[4], ids[5], ids[3]):
        lab.engine.abort(id_)
    lab.run()
    assert lab.tokens(ids[1]) == alone.tokens(kept)
    assert [lab.end(id_).finish_reason for id_ in ids] == ["abort", "length", *["abort"] * 4]


def test_aborts_of_what_has_ended_or_never_was_change_nothing(decoder: Decoder) -> None:
    lab = EngineLab(decoder)
    id_ = lab.submit(prompt(5), max_tokens=3, ignore_eos=True)
    lab.run()
    lab.engine.abort(id_)
    lab.engine.abort("nobody")
    lab.run()
    assert lab.end(id_).finish_reason == "length"


def test_one_abort_ends_a_request_that_another_thread_computes(decoder: Decoder) -> None:
    lab = threaded(EngineLab(decoder))
    id_ = lab.submit(prompt(9), **ENDLESS | {"max_tokens": 500})
    lab.arrived.wait(WAIT_S)  # pyright: ignore[reportAttributeAccessIssue]
    lab.engine.abort(id_)
    lab.ended.wait(WAIT_S)  # pyright: ignore[reportAttributeAccessIssue]
    lab.engine.stop(WAIT_S)
    assert lab.end(id_).finish_reason == "abort"
    lab.assert_no_page_held()
