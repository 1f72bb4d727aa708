"""Puts an engine together from a model and its settings: sizes the KV cache, chooses what the settings left open and
says what it chose. Knows devices and memory, not requests."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import psutil
import torch

from ..model.decoder import Decoder
from ..model.device_experts import DeviceExperts
from ..model.exact_probe import probe_decoder
from ..model.kv_cache import KvCache, page_bytes
from ..model.sampling import Sampler
from .config import EngineConfig
from .decode_graphs import DecodeGraphs
from .engine import Engine
from .kv_layout import KvLayout
from .kv_manager import KvManager
from .overlap import OverlapTuner
from .request import StepOutput
from .runner import ModelRunner
from .scheduler import Scheduler

logger = logging.getLogger(__name__)

_CPU_SHARE = 0.25
"""Share of the free memory that the KV cache may take on a CPU machine, where other programs live too."""
_GPU_SHARE = 0.9
_STEP_TOKENS = {"cpu": 256, "cuda": 8192}
"""Tokens per step where nothing is configured: enough to saturate the device, few enough not to stall decoding."""
_BLOCK_SIZE = {"cpu": 16, "cuda": 64}
"""Tokens per block where nothing is configured. The GPU kernels visit 64 keys at a time: a whole page has one address.
Smaller blocks share more of a prefix."""

_WARM_UP_TOKENS = 20
"""Prompt length of the first, unseen request: a piece of several queries, more than one page."""


@dataclass(frozen=True, slots=True)
class EnginePlan:
    """What an engine will use; `choose` makes it."""

    layout: KvLayout
    kv_dtype: torch.dtype
    kv_bytes: int
    max_model_len: int
    max_num_batched_tokens: int


def choose_device(device: str) -> torch.device:
    """`auto` is cuda where there is one."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def choose(decoder: Decoder, settings: EngineConfig, max_model_len: int | None) -> EnginePlan:
    """Fill in what the settings leave open. Raises ValueError when the KV cache cannot hold a single block, or not in
    the wanted type."""
    config = decoder.config
    local = config.num_local_layers
    layout = KvLayout.build(
        num_global_layers=config.num_layers - local,
        num_local_layers=local,
        chunk=config.attention_chunk_size,
        block_size=settings.block_size or _BLOCK_SIZE[decoder.device.type],
    )
    kv_dtype = choose_kv_dtype(decoder, settings)
    length = min(max_model_len or config.max_position_embeddings, config.max_position_embeddings)
    one_page = page_bytes(config, layout.layers_per_page, layout.block_size, kv_dtype)
    wanted = settings.max_num_seqs * layout.pages_for(length) * one_page
    if settings.kv_memory is not None:
        memory = settings.kv_memory
    elif decoder.device.type == "cuda":
        memory = min(wanted, int(torch.cuda.mem_get_info(decoder.device)[0] * _GPU_SHARE))
    else:
        memory = min(wanted, int(psutil.virtual_memory().available * _CPU_SHARE))
    num_pages = memory // one_page
    if num_pages < layout.pages_for(1):
        raise ValueError(
            f"kv_memory of {memory} bytes holds no block; one takes {layout.pages_for(1) * one_page} bytes"
        )
    step = settings.max_num_batched_tokens or max(_STEP_TOKENS[decoder.device.type], settings.max_num_seqs)
    return EnginePlan(layout.with_pages(num_pages), kv_dtype, num_pages * one_page, length, step)


def choose_kv_dtype(decoder: Decoder, settings: EngineConfig) -> torch.dtype:
    """How keys and values are stored. Raises ValueError where the device cannot read them."""
    if settings.kv_dtype == "auto":
        return decoder.dtype
    if decoder.device.type != "cuda":
        raise ValueError(
            f"engine.kv_dtype=fp8 needs a GPU, and the model runs on {decoder.device.type}: leave it at auto"
        )
    capability = torch.cuda.get_device_capability(decoder.device)
    if torch.version.hip is not None or capability < (8, 9):
        raise ValueError("engine.kv_dtype=fp8 needs an NVIDIA GPU of compute capability 8.9 or newer: leave it at auto")
    return torch.float8_e4m3fn


def build_engine(
    decoder: Decoder,
    settings: EngineConfig,
    plan: EnginePlan,
    *,
    eos_ids: frozenset[int],
    suppressed_ids: frozenset[int] = frozenset(),
    on_outputs: Callable[[list[StepOutput]], None],
    on_fault: Callable[[BaseException], None] = lambda error: None,
    overlap: OverlapTuner | None = None,
) -> Engine:
    """An engine that is ready to step. `overlap` is for experts that compute elsewhere (see `ModelRunner`). Raises
    NumericsError where exact numerics are wanted and this machine does not keep their promise."""
    layout = plan.layout
    kv = KvManager(layout, settings.prefix_caching)
    cache = KvCache(
        decoder.config,
        num_pages=layout.num_pages,
        layers_per_page=layout.layers_per_page,
        block_size=layout.block_size,
        dtype=plan.kv_dtype,
        device=decoder.device,
    )
    sampler = Sampler(decoder.config.vocab_size, eos_ids=eos_ids, suppressed_ids=suppressed_ids, device=decoder.device)
    scheduler = Scheduler(
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=plan.max_num_batched_tokens,
        max_queued=settings.max_queued,
        max_model_len=plan.max_model_len,
        kv=kv,
        eos_ids=eos_ids,
    )
    if settings.numerics == "exact":
        probe_decoder(decoder, layout.block_size, plan.kv_dtype)
    graphs = None
    if settings.cuda_graphs and isinstance(decoder.experts, DeviceExperts):
        graphs = DecodeGraphs(lambda batch: decoder.logits(decoder.forward(batch, cache)), decoder.device)
    runner = ModelRunner(decoder, cache, sampler, kv, settings.max_num_seqs, overlap, graphs)
    logger.info(
        "KV cache: %d pages, %.1f MiB, %s; %d tokens a step; context %d",
        layout.num_pages,
        plan.kv_bytes / 2**20,
        str(plan.kv_dtype).removeprefix("torch."),
        plan.max_num_batched_tokens,
        scheduler.max_num_tokens,
    )
    engine = Engine(scheduler, runner, on_outputs=on_outputs, on_fault=on_fault)
    engine.warm_up(range(max(1, min(_WARM_UP_TOKENS, scheduler.max_num_tokens - 2, decoder.config.vocab_size))))
    return engine
