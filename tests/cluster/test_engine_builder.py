from __future__ import annotations

import pytest
import torch

from herd.cluster.config import EngineConfig
from herd.cluster.engine_builder import build_engine, choose, choose_device
from herd.cluster.overlap import OverlapTuner
from herd.cluster.request import EngineRequest, StepOutput
from herd.model.decoder import Decoder
from herd.model.kv_cache import page_bytes
from herd.model.sampling_params import SamplingParams

from ..tiny_models import EngineLab, tiny_config, tiny_decoder


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return tiny_decoder(tiny_config())


def settings_of(**changes: object) -> EngineConfig:
    return EngineConfig.model_validate({"device": "cpu", "block_size": 4, "max_num_seqs": 4} | changes)


def test_the_cache_takes_what_it_may_and_no_more(decoder: Decoder) -> None:
    plan = choose(decoder, settings_of(kv_memory="1MiB"), 512)
    one_page = page_bytes(decoder.config, plan.layout.layers_per_page, 4, torch.float32)
    assert plan.kv_bytes == plan.layout.num_pages * one_page
    assert 2**20 - one_page < plan.kv_bytes <= 2**20


def test_without_a_limit_every_seat_gets_the_whole_context(decoder: Decoder) -> None:
    plan = choose(decoder, settings_of(), 100)
    assert plan.max_model_len == 100
    assert plan.layout.num_pages == 4 * plan.layout.pages_for(100)


def test_the_models_own_context_bounds_the_wanted_one(decoder: Decoder) -> None:
    assert choose(decoder, settings_of(), 5000).max_model_len == decoder.config.max_position_embeddings == 1024
    assert choose(decoder, settings_of(), None).max_model_len == 1024


def test_the_block_size_divides_the_chunk(decoder: Decoder) -> None:
    assert choose(decoder, settings_of(block_size=16), None).layout.block_size == 8
    assert choose(decoder, settings_of(block_size=3), None).layout.block_size == 2


def test_the_block_size_of_a_cpu() -> None:
    wide = tiny_decoder(tiny_config(attention_chunk_size=64))
    assert choose(wide, EngineConfig(device="cpu"), None).layout.block_size == 16


def test_keys_and_values_are_stored_as_the_model_computes(decoder: Decoder) -> None:
    assert choose(decoder, settings_of(), None).kv_dtype is torch.float32


def test_fp8_keys_and_values_need_a_gpu(decoder: Decoder) -> None:
    with pytest.raises(ValueError, match=r"engine\.kv_dtype=fp8 needs a GPU, and the model runs on cpu"):
        choose(decoder, settings_of(kv_dtype="fp8"), None)


def test_a_step_has_room_for_every_seat(decoder: Decoder) -> None:
    assert choose(decoder, settings_of(), None).max_num_batched_tokens == 256
    assert choose(decoder, settings_of(max_num_seqs=600), None).max_num_batched_tokens == 600
    assert choose(decoder, settings_of(max_num_batched_tokens=33), None).max_num_batched_tokens == 33


def test_a_cache_without_a_block_is_refused(decoder: Decoder) -> None:
    with pytest.raises(ValueError, match=r"kv_memory of 100 bytes holds no block; one takes \d+ bytes"):
        choose(decoder, settings_of(kv_memory=100), None)


def test_choose_device() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("max_model_len", [2, 3, 16, 512])
def test_a_built_engine_is_warm_and_as_good_as_new(decoder: Decoder, max_model_len: int) -> None:
    outputs: list[StepOutput] = []
    settings = settings_of()
    plan = choose(decoder, settings, max_model_len)
    engine = build_engine(decoder, settings, plan, eos_ids=frozenset(), on_outputs=outputs.extend)
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.pages_used) == (0, 0, 0)
    assert (stats.steps, stats.generated_tokens, stats.prefix_query_tokens) == (0, 0, 0)
    assert outputs == []
    engine.submit(EngineRequest("first", [0], SamplingParams(max_tokens=1, temperature=0.0)))
    while engine.step():
        pass
    assert [output.token_ids for output in outputs] == [tuple(EngineLab(decoder).generate([0], max_tokens=1))]
    assert outputs[0].num_cached_tokens == 0


@pytest.mark.parametrize(
    ("overlap", "splits"), [(None, False), (OverlapTuner("off"), False), (OverlapTuner("on"), True)]
)
def test_steps_are_split_as_the_builder_was_told(decoder: Decoder, overlap: OverlapTuner | None, splits: bool) -> None:
    settings = settings_of()
    plan = choose(decoder, settings, 64)
    engine = build_engine(
        decoder, settings, plan, eos_ids=frozenset(), on_outputs=lambda outputs: None, overlap=overlap
    )
    for name in "ab":
        engine.submit(EngineRequest(name, [0, 1], SamplingParams(max_tokens=3, temperature=0.0)))
    while engine.step():
        pass
    stats = engine.stats()
    assert stats.split_steps == (stats.steps if splits else 0)
