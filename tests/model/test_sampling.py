"""The sampler against a slow float64 reference, against itself in other company, and against its own distribution."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from herd.model import sampling
from herd.model.philox import uniforms
from herd.model.sampling import Drawn, Sampler, SamplingError, SamplingRow
from herd.model.sampling_params import SamplingParams

EOS = frozenset({3})
FLOAT32_STEP = 2.0**-24


def params(**fields: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 100, **fields})


def row(position: Any = 0, prompt=(), output=(), state: Any = None, **fields: Any) -> SamplingRow:
    return SamplingRow(params(**fields), position, prompt, output, state)


def make_sampler(vocab: int, suppressed=()) -> Sampler:
    return Sampler(vocab, eos_ids=EOS, suppressed_ids=suppressed)


def logits(rows: int, vocab: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


# ---- the reference ---------------------------------------------------------------------------------------------------


def filtered_reference(x_V: np.ndarray, p: SamplingParams) -> np.ndarray:
    """Final probabilities in float64 of edited logits, each filter on what the one before it left."""
    order = np.lexsort((np.arange(len(x_V)), -x_V))
    if p.temperature == 0:
        return np.eye(len(x_V))[order[0]]
    mass = np.exp((x_V - x_V.max()) / p.temperature)
    mass[mass < p.min_p] = 0.0
    if p.top_k:
        mass[order[p.top_k :]] = 0.0
    if p.top_p < 1.0:
        target, reached = p.top_p * mass.sum(), 0.0
        for count, token in enumerate(order):
            if count and reached >= target:
                mass[token] = 0.0
            reached += mass[token]
    return mass / mass.sum()


def draw_distribution(sampler: Sampler, x_V: torch.Tensor, r: SamplingRow, monkeypatch: pytest.MonkeyPatch):
    """The exact probabilities that the sampler draws by, read off by handing it chosen noise: bisect for each boundary
    of the inverse CDF."""

    def tokens(us: np.ndarray) -> np.ndarray:
        monkeypatch.setattr(sampling, "uniforms", lambda seeds, positions: us)
        return np.array([d.token_id for d in sampler.sample(x_V.expand(len(us), -1), [r] * len(us))])

    vocab = len(x_V)
    low, high = np.zeros(vocab), np.ones(vocab)
    for _ in range(45):
        middle = (low + high) / 2
        above = tokens(middle) > np.arange(vocab)
        low, high = np.where(above, low, middle), np.where(above, middle, high)
    monkeypatch.undo()
    # high[i] = least u whose token is greater than i, that is the CDF at i.
    return np.diff(np.concatenate(([0.0], high)))


FILTERS = {
    "plain": {},
    "hot": {"temperature": 1.7},
    "cold": {"temperature": 0.3},
    "top_k": {"top_k": 7},
    "top_k beyond V": {"top_k": 10_000},
    "top_p": {"top_p": 0.8},
    "top_p zero": {"top_p": 0.0},
    "top_p almost one": {"top_p": 0.9999},
    "min_p": {"min_p": 0.05},
    "min_p one": {"min_p": 1.0},
    "all": {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.01},
}


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize(("vocab", "seed"), [(50, 1), (64, 2), (131, 3)])
def test_distribution_equals_the_float64_reference(name, vocab, seed, monkeypatch):
    sampler, r = make_sampler(vocab), row(**FILTERS[name])
    x_V = logits(1, vocab, seed)[0]
    want = filtered_reference(x_V.double().numpy(), r.params)
    got = draw_distribution(sampler, x_V, r, monkeypatch)
    # float32 (x - max) / T is off by 2 roundings of a value below 40, exp by under 2 ulp; bisection resolves 2**-45.
    tolerance = (2 * 40 + 4) * FLOAT32_STEP
    # Whole-number weights and the bisection both end near 2**-43, so only what is well above that must show.
    shown = set(np.flatnonzero(got > 2.0**-41))
    assert set(np.flatnonzero(want > 2.0**-38)) <= shown <= set(np.flatnonzero(want))
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance)


def test_ties_keep_the_lowest_ids(monkeypatch):
    x_V = torch.tensor([0.0, 2.0, 1.0, 2.0, 2.0, 1.0] + [-5.0] * 10)
    sampler = make_sampler(len(x_V))
    for fields, kept in [
        ({"top_k": 2}, {1, 3}),
        ({"top_k": 4}, {1, 2, 3, 4}),
        ({"top_p": 0.3}, {1, 3}),
        ({"top_p": 0.0}, {1}),
        ({"min_p": 1.0}, {1, 3, 4}),
        ({"min_p": 1.0, "top_k": 2}, {1, 3}),
    ]:
        got = draw_distribution(sampler, x_V, row(**fields), monkeypatch)
        assert set(np.flatnonzero(got > 2.0**-40)) == kept, fields
    assert sampler.sample(x_V[None], [row(temperature=0.0)])[0].token_id == 1
    assert sampler.sample(x_V[None], [row(top_k=1)])[0].token_id == 1


# ---- bias and suppression --------------------------------------------------------------------------------------------


def test_bias_bans_and_forces():
    sampler, x_SV = make_sampler(100), logits(1, 100)
    best = int(x_SV.argmax())
    assert sampler.sample(x_SV, [row(temperature=0.0, logit_bias=((best, -100.0),))])[0].token_id != best
    for position in range(50):
        assert sampler.sample(x_SV, [row(position, logit_bias=((42, 100.0),))])[0].token_id == 42
        assert sampler.sample(x_SV, [row(position, logit_bias=((best, -100.0),))])[0].token_id != best


def test_min_tokens_holds_back_every_stop():
    sampler, x_SV = make_sampler(10), torch.zeros(1, 10)
    x_SV[0, 3], x_SV[0, 6] = 50.0, 60.0
    for fields in ({"temperature": 0.0}, {"temperature": 1.0}, {"top_k": 3}, {"ignore_eos": True}):
        held: dict[str, Any] = {"min_tokens": 2, "stop_token_ids": (6,), **fields}
        assert sampler.sample(x_SV, [row(output=[1], **held)])[0].token_id not in (3, 6)
        assert sampler.sample(x_SV, [row(output=[1, 1], **held)])[0].token_id == 6


# ---- independence, to the bit ----------------------------------------------------------------------------------------

VOCAB = 8192
ANY_PARAMS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 1e-5, 0.2, 0.7, 1.0, 2.0, 5.0]),
        "top_p": st.sampled_from([1.0, 0.999, 0.9, 0.5, 0.01]),
        "top_k": st.sampled_from([0, 1, 2, 40, 50, 500, 4000, VOCAB]),
        "min_p": st.sampled_from([0.0, 0.0, 0.02, 0.5]),
        "presence_penalty": st.sampled_from([0.0, 0.0, 1.0]),
        "repetition_penalty": st.sampled_from([1.0, 1.0, 1.2]),
        "min_tokens": st.sampled_from([0, 0, 5]),
        "logprobs": st.sampled_from([None, None, 0, 5]),
        "seed": st.integers(0, 2**64 - 1),
        "prompt": st.lists(st.integers(0, VOCAB - 1), max_size=5),
        "output": st.lists(st.integers(0, VOCAB - 1), max_size=5),
        "logit_bias": st.sampled_from([(), ((5, 3.0), (17, -100.0))]),
    }
)


@given(st.lists(ANY_PARAMS, min_size=1, max_size=12), st.integers(0, 10_000), st.sampled_from(["f32", "bf16"]))
@settings(deadline=None, max_examples=60)
def test_company_changes_nothing(fields, seed, dtype):
    sampler = make_sampler(VOCAB, suppressed=range(8000, 8100))
    rows = [row(position=seed + i, **f) for i, f in enumerate(fields)]
    # bf16 logits are full of ties, which is where order matters.
    x_SV = logits(len(rows), VOCAB, seed).to(torch.bfloat16 if dtype == "bf16" else torch.float32)
    before = x_SV.clone()
    together = sampler.sample(x_SV, rows)
    assert torch.equal(before, x_SV)
    alone = [sampler.sample(x_SV[i : i + 1], [r])[0] for i, r in enumerate(rows)]
    assert together == alone
    turned = list(range(len(rows)))[::-1]
    assert sampler.sample(x_SV[turned], [rows[i] for i in turned]) == [together[i] for i in turned]
    assert sampler.sample(x_SV.float(), rows) == together


def test_company_of_64_changes_nothing():
    kinds = [
        {},
        {"temperature": 0.0},
        {"temperature": 0.6, "top_p": 0.9},
        {"top_k": 50, "top_p": 0.95},
        {"min_p": 0.1, "logprobs": 4},
        {"temperature": 4.0, "top_p": 0.99},
        {"top_k": 3000},
    ]
    sampler, x_SV = make_sampler(VOCAB), logits(64, VOCAB, 9)
    rows = [row(i, seed=i, **kinds[i % len(kinds)]) for i in range(64)]
    assert sampler.sample(x_SV, rows) == [sampler.sample(x_SV[i : i + 1], [r])[0] for i, r in enumerate(rows)]


def exact_reference(x_V: torch.Tensor, r: SamplingRow) -> int:
    """The same whole-number weights, but everything after them with Python's integers over the fully sorted row."""
    p, vocab = r.params, len(x_V)
    ids = sorted(range(vocab), key=lambda i: (-float(x_V[i]), i))
    if p.greedy:
        return ids[0]
    e_V = ((x_V - x_V.max()) / torch.tensor(p.temperature)).exp()
    e_V[e_V < torch.tensor(p.min_p)] = 0.0
    bits = 52 - (vocab + -vocab % 64).bit_length()
    weights = [int(w) for w in (e_V * 2.0**bits).round().tolist()]
    kept = ids[: p.top_k or vocab]
    if p.top_p < 1.0:
        target, reached, count = max(1.0, p.top_p * float(sum(weights[i] for i in kept))), 0, 0
        while count < len(kept) and reached < target:
            reached += weights[kept[count]]
            count += 1
        kept = kept[:count]
    total = sum(weights[i] for i in kept)
    target = min(math.floor(float(uniforms([p.seed], [r.position])[0]) * float(total)), total - 1)
    until = 0
    for i in sorted(kept):
        until += weights[i]
        if until > target:
            return i
    raise AssertionError("the weights do not reach their own total")


@given(ANY_PARAMS, st.integers(0, 1000), st.sampled_from([200, 2048, 5000]), st.booleans())
@settings(deadline=None, max_examples=60)
def test_fast_paths_equal_the_slow_path(fields, seed, vocab, ties):
    bare = {k: fields[k] for k in ("temperature", "top_p", "top_k", "min_p", "seed")}
    x_V = logits(1, vocab, seed)[0]
    x_V = x_V.bfloat16().float() if ties else x_V
    r = row(seed, **bare)
    assert make_sampler(vocab).sample(x_V[None], [r])[0].token_id == exact_reference(x_V, r)


def test_a_row_of_equal_logits_takes_the_whole_order():
    x_SV = torch.zeros(1, 4096)
    for fields in ({"top_k": 100}, {"top_p": 0.5}, {"top_k": 100, "top_p": 0.5}):
        for position in range(20):
            r = row(position, **fields)
            token = make_sampler(4096).sample(x_SV, [r])[0].token_id
            assert token == exact_reference(x_SV[0], r)
            assert token < {"top_k": 100, "top_p": 2048}[next(iter(fields))]


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_nothing(threads):
    x_SV = logits(6, 50_000, 4)
    rows = [row(i, seed=5, temperature=1.5, top_p=0.95 if i % 2 else 1.0, logprobs=3) for i in range(6)]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = make_sampler(50_000).sample(x_SV, rows)
        torch.set_num_threads(threads)
        assert make_sampler(50_000).sample(x_SV, rows) == one
    finally:
        torch.set_num_threads(before)


# ---- the draws themselves --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILTERS)
def test_draws_follow_the_distribution(name):
    vocab, n = 40, 4000
    x_V = logits(1, vocab, 11, scale=1.5)[0]
    rows = [row(position, seed=77, **FILTERS[name]) for position in range(n)]
    drawn = [d.token_id for d in make_sampler(vocab).sample(x_V.expand(n, -1), rows)]
    want = filtered_reference(x_V.double().numpy(), rows[0].params)
    counts = np.bincount(drawn, minlength=vocab)
    assert not counts[want == 0].any()
    big = want * n >= 5
    observed = np.append(counts[big], counts[~big].sum())
    expected = np.append(want[big], want[~big].sum()) * n
    observed, expected = observed[expected > 0], expected[expected > 0]
    freedom = len(expected) - 1
    chi2 = float(((observed - expected) ** 2 / expected).sum())
    # Mean and deviation of chi-square; seed and positions are fixed, so the outcome is too.
    assert chi2 <= freedom + 4 * math.sqrt(2 * freedom)


def test_same_seed_and_position_same_draw_other_position_other_draw():
    sampler, x_SV = make_sampler(5000), logits(1, 5000)
    draws = [sampler.sample(x_SV, [row(p, seed=3)])[0].token_id for p in range(30)]
    assert draws == [sampler.sample(x_SV, [row(p, seed=3)])[0].token_id for p in range(30)]
    assert len(set(draws)) > 5
    assert draws != [sampler.sample(x_SV, [row(p, seed=4)])[0].token_id for p in range(30)]


def test_extreme_noise_never_draws_a_token_of_no_probability(monkeypatch):
    x_SV = torch.full((1, 300), -math.inf)
    x_SV[0, [70, 150]] = 1.0
    for u in (0.0, 1.0 - 2.0**-53, 0.5, 0.5 - 2.0**-54):
        monkeypatch.setattr(sampling, "uniforms", lambda seeds, positions, u=u: np.full(len(seeds), u))
        for fields in ({}, {"top_k": 5}, {"top_p": 0.99}, {"min_p": 0.1}):
            want = 70 if u < 0.5 else 150
            assert make_sampler(300).sample(x_SV, [row(**fields)])[0].token_id == want


@pytest.mark.parametrize("temperature", [1e-5, 1e-30, 1e-320])
def test_tiny_temperatures_are_greedy(temperature):
    x_SV = logits(8, 1000, 5) * 1000
    for fields in ({}, {"top_p": 0.9}, {"top_k": 30}):
        rows = [row(p, temperature=temperature, **fields) for p in range(8)]
        assert [d.token_id for d in make_sampler(1000).sample(x_SV, rows)] == x_SV.argmax(-1).tolist()


# ---- log-probabilities -----------------------------------------------------------------------------------------------


def test_logprobs_are_of_the_raw_distribution():
    sampler = make_sampler(3000, suppressed=[0])
    x_SV = logits(5, 3000, 6)
    rows = [
        row(1, temperature=0.4, top_p=0.5, logprobs=5),
        row(2),
        row(3, temperature=0.0, repetition_penalty=2.0, output=[int(x_SV[2].argmax())], logprobs=0),
        row(4, logit_bias=((9, 100.0),), logprobs=20),
        row(5, temperature=0.0, logprobs=3000),
    ]
    want_SV = torch.log_softmax(x_SV.double(), -1)
    drawn = sampler.sample(x_SV, rows)
    assert drawn[1] == Drawn(drawn[1].token_id)
    # The sum's relative error: exp within 2 ulp plus the rounding to whole weights; log makes it absolute.
    tolerance = 8 * FLOAT32_STEP
    for index, count in ((0, 5), (2, 0), (3, 20), (4, 3000)):
        got, want_V = drawn[index], want_SV[index]
        assert got.logprob == pytest.approx(float(want_V[got.token_id]), abs=tolerance)
        order = sorted(range(3000), key=lambda i, v=x_SV[index]: (-float(v[i]), i))[:count]
        assert list(got.top_ids) == order
        assert got.top_logprobs == pytest.approx(want_V[order].tolist(), abs=tolerance)
    assert drawn[3].token_id == 9


def test_top_logprobs_break_ties_by_id():
    x_SV = torch.zeros(2, 5000)
    x_SV[1, 4000] = 1.0
    drawn = make_sampler(5000).sample(x_SV, [row(logprobs=3, temperature=0.0)] * 2)
    assert drawn[0].top_ids == (0, 1, 2)
    assert drawn[1].top_ids == (4000, 0, 1)


# ---- rows that cannot be drawn from ----------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{}, {"temperature": 0.0}, {"top_k": 5}, {"top_p": 0.5}, {"logprobs": 2}])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_poisoned_row_is_named_and_the_others_are_drawn(fields, poison):
    sampler, x_SV = make_sampler(700), logits(4, 700)
    rows = [row(i, **fields) for i in range(4)]
    good = sampler.sample(x_SV, rows)
    x_SV[2, 345] = poison
    with pytest.raises(SamplingError, match="row\\(s\\) 2") as caught:
        sampler.sample(x_SV, rows)
    assert caught.value.rows == (2,)
    assert caught.value.drawn == (good[0], good[1], None, good[3])


def test_a_row_with_nothing_left_is_named():
    with pytest.raises(SamplingError):
        make_sampler(4, suppressed=[0, 1, 2]).sample(torch.zeros(1, 4), [row(min_tokens=1)])


def test_no_rows():
    assert make_sampler(10).sample(torch.empty(0, 10), []) == []
