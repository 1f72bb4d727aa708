"""Philox against the known answers that its authors publish, a literal scalar version, and what a uniform must be."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from herd.model.philox import philox4x32, uniforms

WORD = 0xFFFFFFFF
words = st.integers(0, WORD)


def literal(counter: list[int], key: list[int]) -> list[int]:
    c, k = list(counter), list(key)
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & WORD, (p0 >> 32) ^ c[3] ^ k[1], p0 & WORD]
        k = [(k[0] + 0x9E3779B9) & WORD, (k[1] + 0xBB67AE85) & WORD]
    return c


def columns(values: list[list[int]]) -> np.ndarray:
    return np.array(values, dtype=np.uint64).T


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([WORD] * 4, [WORD] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_known_answers(counter, key, answer):
    assert philox4x32(columns([counter]), columns([key]))[:, 0].tolist() == answer


@given(st.lists(st.tuples(*[words] * 6), min_size=1, max_size=5))
def test_columns_are_independent_and_equal_the_scalar_version(rows):
    counters, keys = [list(r[:4]) for r in rows], [list(r[4:]) for r in rows]
    got = philox4x32(columns(counters), columns(keys))
    assert got.T.tolist() == [literal(c, k) for c, k in zip(counters, keys, strict=True)]


@given(st.integers(-(2**63), 2**64 - 1), st.integers(0, 2**40), st.integers(0, 6))
def test_a_number_does_not_depend_on_its_neighbours(seed, position, place):
    seeds, positions = list(range(7)), list(range(100, 107))
    seeds[place], positions[place] = seed, position
    u = uniforms([seed], [position])[0]
    assert uniforms(seeds, positions)[place] == u
    assert 0.0 <= u < 1.0
    assert float(u * 2.0**53).is_integer()


def test_every_bit_of_seed_and_position_matters():
    base = uniforms([12345], [678])[0]
    others = [uniforms([12345 ^ (1 << bit)], [678])[0] for bit in range(64)]
    others += [uniforms([12345], [678 ^ (1 << bit)])[0] for bit in range(63)]
    assert len({base, *others}) == 128


def test_uniform_over_positions_and_over_seeds():
    n, cells = 40_000, 50
    for u in (uniforms([7] * n, list(range(n))), uniforms(list(range(n)), [7] * n)):
        counts = np.histogram(u, bins=cells, range=(0, 1))[0]
        chi2 = float(((counts - n / cells) ** 2 / (n / cells)).sum())
        # 49 degrees of freedom: mean 49, deviation 9.9; both inputs are fixed, so this cannot flake.
        assert 49 - 4 * 9.9 < chi2 < 49 + 4 * 9.9
        assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 4 / n**0.5
