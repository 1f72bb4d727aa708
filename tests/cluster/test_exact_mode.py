"""Exact mode at sizes where plain products and attention differ: whatever a request shares a step with, however its
prompt is cut, whatever the cache holds, wherever its experts are, by one thread or two, no bit of any logit changes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as functional
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from herd.kernels.paged_attention import PagedKeys
from herd.model.checkpoint import DummySource
from herd.model.decoder import AttentionWeights, Decoder
from herd.model.loading import Loader
from herd.model.tensor_names import text_tensors

from ..shard_threads import shard_threads
from ..tiny_models import EngineLab, random_ids, tiny_config

pytestmark = pytest.mark.slow

WIDE = tiny_config(
    vocab_size=2048,
    hidden_size=2048,
    num_heads=16,
    num_kv_heads=4,
    head_dim=128,
    expert_width=1024,
    attention_chunk_size=32,
)
SHARED = random_ids(21, vocab_size=WIDE.vocab_size, seed=99)
LENGTHS = (1, 12, 5, 60, 33, 2)
PROMPTS = [random_ids(n, vocab_size=WIDE.vocab_size, seed=n) for n in LENGTHS]
PROMPTS += [[*SHARED, n] for n in range(3, 6)]
MAX_TOKENS = 8


@dataclass(frozen=True)
class Seen:
    """What one request got: its tokens, and the logits of every position."""

    tokens: list[int]
    logits: dict[int, Tensor]


def loader_of(dtype: torch.dtype) -> Loader:
    return Loader(DummySource(text_tensors(WIDE), 0, torch.float32), WIDE, dtype=dtype)


def run(decoder: Decoder, which: Sequence[int], **lab: Any) -> dict[int, Seen]:
    """The requests of these numbers together, greedy and seeded in turn. A position that was computed twice had the
    same bits both times."""
    engine = EngineLab(decoder, **lab)
    ids = {n: engine.submit(PROMPTS[n], max_tokens=MAX_TOKENS, temperature=float(n % 2), seed=n) for n in which}
    engine.run()
    seen = {}
    for number, id_ in ids.items():
        logits: dict[int, Tensor] = {}
        for position, row_V in engine.logits[id_]:
            assert torch.equal(logits.setdefault(position, row_V), row_V), (number, position)
        seen[number] = Seen(engine.tokens(id_), logits)
    return seen


def alone(decoder: Decoder) -> dict[int, Seen]:
    """Each request by itself, its prompt in one piece as far as attention chunks allow, nothing cached."""
    seen: dict[int, Seen] = {}
    for number in range(len(PROMPTS)):
        seen |= run(decoder, [number], max_num_seqs=1, prefix_caching=False, budget=512)
    return seen


def assert_same(seen: dict[int, Seen], expected: dict[int, Seen]) -> None:
    for number, mine in seen.items():
        assert mine.tokens == expected[number].tokens, number
        for position, row_V in mine.logits.items():
            assert torch.equal(row_V, expected[number].logits[position]), (number, position)


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float32], ids=str)
def models(request: pytest.FixtureRequest) -> Iterator[dict[int, Decoder]]:
    """The same model with its experts in 0 (here), 1, 3 and 5 shards."""
    dtype = request.param
    with ExitStack() as stack:
        made = {0: loader_of(dtype).decoder()}
        for num_shards in (1, 3, 5):
            loader = loader_of(dtype)
            shards = stack.enter_context(shard_threads(WIDE, loader, dtype, num_shards=num_shards))
            made[num_shards] = loader.decoder(shards.dispatcher)
        yield made


@pytest.fixture(scope="module")
def expected(models: dict[int, Decoder]) -> dict[int, Seen]:
    return alone(models[0])


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


COMPANY = st.lists(st.sampled_from(range(len(PROMPTS))), unique=True, min_size=1)


@settings(max_examples=16, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(
    which=COMPANY,
    budget=st.integers(8, 200),
    max_num_seqs=st.integers(1, 8),
    num_shards=st.sampled_from([0, 1, 3, 5]),
    threads=st.integers(1, 2),
    prefix_caching=st.booleans(),
    scarce=st.booleans(),
)
def test_no_bit_depends_on_anything_but_the_request(
    models: dict[int, Decoder],
    expected: dict[int, Seen],
    which: list[int],
    budget: int,
    max_num_seqs: int,
    num_shards: int,
    threads: int,
    prefix_caching: bool,
    scarce: bool,
) -> None:
    """`scarce`: so few pages that requests are preempted and computed again."""
    torch.set_num_threads(threads)
    lab = {"budget": budget, "max_num_seqs": max_num_seqs, "prefix_caching": prefix_caching}
    if scarce:
        lab["num_pages"] = EngineLab(models[0]).kv.layout.pages_for(90)
    assert_same(run(models[num_shards], which, **lab), expected)


class PlainLinear:
    """torch's own product, whose rows depend on how many there are."""

    def __init__(self, weight_OI: Tensor) -> None:
        self.weight_OI = weight_OI
        self.out_features, self.in_features = weight_OI.shape

    def __call__(self, x_TI: Tensor) -> Tensor:
        return functional.linear(x_TI, self.weight_OI)


def with_plain_products(decoder: Decoder, loader: Loader) -> None:
    for i, layer in enumerate(decoder.layers):
        weights = [loader._plain(f"model.layers.{i}.self_attn.{name}_proj.weight") for name in "qkvo"]
        qkv, output = PlainLinear(torch.cat(weights[:3])), PlainLinear(weights[3])
        decoder.layers[i] = replace(layer, attention=AttentionWeights(qkv, output))  # pyright: ignore


def test_plain_products_fail_it() -> None:
    """The negative control: attention's projections by torch's `linear` in float32."""
    loader = loader_of(torch.float32)
    decoder = loader.decoder()
    with_plain_products(decoder, loader)
    lonely = alone(decoder)
    with pytest.raises(AssertionError):
        assert_same(run(decoder, range(len(PROMPTS)), budget=64), lonely)


def fused_attention(
    q_THd: Tensor, k_pages: Tensor, v_pages: Tensor, keys: PagedKeys, scale: float, *, exact: bool = True
) -> Tensor:
    """`paged_attention` by torch, over gathered keys."""
    out_THd = torch.empty_like(q_THd)
    _, K, d, B = k_pages.shape
    for s, length in enumerate(keys.lens):
        lo, hi = keys.starts[s], keys.starts[s + 1]
        pages = keys.tables_SN[s, : -(-length // B)].long()
        k_KLd = k_pages[pages].permute(1, 0, 3, 2).reshape(K, -1, d)[:, :length]
        v_KLd = v_pages[pages].transpose(0, 1).reshape(K, -1, d)[:, :length]
        mask = torch.ones((hi - lo, length), dtype=torch.bool).tril_(length - (hi - lo))
        q_1HQd = q_THd[lo:hi].transpose(0, 1)[None]
        out_1HQd = functional.scaled_dot_product_attention(
            q_1HQd, k_KLd[None], v_KLd[None], attn_mask=mask, scale=scale, enable_gqa=True
        )
        out_THd[lo:hi] = out_1HQd[0].transpose(0, 1)
    return out_THd


def test_fused_attention_fails_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: torch's scaled_dot_product_attention over the same keys."""
    monkeypatch.setattr("herd.model.decoder.paged_attention", fused_attention)
    decoder = loader_of(torch.float32).decoder()
    lonely = alone(decoder)
    with pytest.raises(AssertionError):
        assert_same(run(decoder, range(len(PROMPTS)), budget=64), lonely)
