"""The Serve deployment around one engine: loads the model, takes requests as pending unary calls, and sends their
tokens to the gateways over the token stream. Thin: scheduling and arithmetic are the cluster's and the model's."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import ray
from ray import serve

from ..cluster.errors import EngineFault, EngineUnavailable, HerdError
from ..cluster.request import EngineRequest, FinishReason, StepOutput
from ..cluster.token_link import GatewayLink, TokenStreamClient
from ..model.quantization import served_scheme, weight_sizes
from ..model.sampling_params import SamplingParams
from ..model.source import resolve_model
from .config import HerdConfig, cache_directory, parse_tree, progress_file
from .expert_plan import dtype_name, router_spec
from .load_progress import LoadProgress
from .replica_logging import log_with_serve
from .threads import engine_threads, live_nodes, usable_cores

if TYPE_CHECKING:
    import torch

    from ..model.served_model import ServedModel
    from .remote_experts import RemoteExperts

logger = logging.getLogger("herd.engine")

_STATS_PERIOD_S = 1.0


@dataclass(slots=True)
class _Live:
    """A request in progress."""

    link: GatewayLink
    handle: int
    done: asyncio.Future[dict[str, Any]]
    num_output_tokens: int = 0


@serve.deployment
class Engine:
    """One replica: one model, one device, one engine thread. Arguments and results are plain values."""

    def __init__(self, tree: Mapping[str, Any], shards: object = None) -> None:
        """`tree`: the configuration, planned; `shards`: the deployment of expert shards, which it reaches by itself."""
        del shards
        # Here, because the process that deploys imports this module too and has no need of torch.
        import torch

        from ..cluster.engine_builder import build_engine, choose, choose_device
        from ..cluster.overlap import OverlapTuner
        from ..model.numerics import numeric_class
        from ..model.served_model import open_model

        config = parse_tree(tree)
        log_with_serve()
        started = time.monotonic()
        source = resolve_model(
            config.model.path, load_format=config.model.load_format, cache_dir=cache_directory(config.model)
        )
        served = open_model(source)
        device = choose_device(config.engine.device)
        if device.type == "cpu":
            torch.set_num_threads(engine_threads(config, usable_cores(), live_nodes()))
        progress = LoadProgress(progress_file())
        dtype = getattr(torch, dtype_name(config, served.config))
        self._id = serve.get_replica_context().replica_id.unique_id
        self._node_id = ray.get_runtime_context().get_node_id()
        remote = self._remote = self._follow_shards(config, served, dtype, device)
        experts = None if remote is None else remote.backend
        exact = config.engine.numerics == "exact"
        decoder = served.decoder(
            dtype=dtype,
            device=device,
            seed=config.model.seed,
            progress=progress,
            experts=experts,
            quantize=config.model.quantize,
            exact=exact,
        )
        if remote is not None:
            remote.wait()  # before memory is shared out: shards may be on the same device
        plan = choose(decoder, config.engine, config.model.max_model_len)
        self._engine = build_engine(
            decoder,
            config.engine,
            plan,
            eos_ids=served.eos_ids,
            suppressed_ids=served.suppressed_ids,
            on_outputs=self._on_outputs,
            on_fault=self._on_fault,
            overlap=None if remote is None else OverlapTuner(config.experts.micro_batches),
        )
        scheme = served_scheme(config.model.quantize, served.config)
        self._info = {
            "model": source.name,
            "assumed": source.assumed,
            "parameters": served.config.num_parameters,
            "active_parameters": served.config.num_active_parameters,
            "weights_bytes": sum(weight_sizes(served.config, scheme, decoder.dtype.itemsize).values()),
            "quantize": scheme.name,
            "numerics": config.engine.numerics,
            "numeric_class": numeric_class(device, dtype, scheme.name),
            "kv_bytes": plan.kv_bytes,
            "kv_tokens": plan.layout.short_tokens,
            "max_model_len": self._engine.scheduler.max_num_tokens,
            "dtype": str(dtype).removeprefix("torch."),
            "device": str(device),
            "threads": torch.get_num_threads(),
            "load_s": time.monotonic() - started,
        }
        if remote is not None:
            self._info |= {"expert_shards": config.experts.shards, "expert_copies": config.experts.replicas}
        self._live: dict[str, _Live] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._streams: TokenStreamClient | None = None
        self._engine.start()
        logger.info("engine %s is ready: %s", self._id, self._info)

    async def generate(self, wire: Mapping[str, Any], prefix: object = None) -> dict[str, Any]:
        """Run one request to its end; the tokens go to the gateway named in `wire`. Cancelling the call aborts it.

        `prefix` is for whoever chooses the replica. Returns the request's end, as the last frame carries it.
        """
        del prefix
        link = await self._stream_client().link(wire["reply_to"], self._node_id)
        spec = _engine_request(wire["request"], f"{link.id}-{wire['handle']}", time.monotonic())
        done: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._live[spec.id] = _Live(link, wire["handle"], done)
        if self._engine.fault is not None:  # it ends what it finds in _live, and has done so
            self._live.pop(spec.id, None)
            raise EngineUnavailable(f"the engine stopped: {self._engine.fault}")
        self._engine.submit(spec)
        try:
            return await done
        except asyncio.CancelledError:
            self._engine.abort(spec.id)
            raise

    async def info(self) -> dict[str, Any]:
        """Facts about the model and its memory."""
        return self._info

    async def stats(self) -> dict[str, Any]:
        """Counters and gauges of this replica."""
        return self._stats()

    def check_health(self) -> None:
        """Raise once the engine thread has ended: Serve then replaces the replica."""
        if not self._engine.alive:
            raise EngineUnavailable(f"the engine thread has ended: {self._engine.fault!r}")

    def _follow_shards(
        self, config: HerdConfig, served: ServedModel, dtype: torch.dtype, device: torch.device
    ) -> RemoteExperts | None:
        """The way to the experts where they are in shards."""
        if config.experts.mode != "shards":
            return None
        from ..cluster.transport import RowLayout
        from .remote_experts import RemoteExperts

        return RemoteExperts(
            config,
            router_spec(config, served.source, served.config),
            RowLayout(served.config.hidden_size, dtype, device),
            application=serve.get_replica_context().app_name,
            engine_id=self._id,
            node_id=self._node_id,
        )

    def _stats(self) -> dict[str, Any]:
        """Any thread."""
        experts = {} if self._remote is None else self._remote.stats()
        return asdict(self._engine.stats()) | experts

    def _stream_client(self) -> TokenStreamClient:
        if self._streams is None:
            self._loop = asyncio.get_running_loop()
            self._streams = TokenStreamClient(self._id, on_abort=self._on_abort, on_lost=self._on_lost)
            self._reporter = self._loop.create_task(self._report())
        return self._streams

    async def _report(self) -> None:
        """Tell every connected gateway how this engine is doing, once a period."""
        assert self._streams is not None
        while True:
            self._streams.send_stats(self._stats())
            await asyncio.sleep(_STATS_PERIOD_S)

    def _on_outputs(self, outputs: list[StepOutput]) -> None:
        """Engine thread: one frame per gateway, and word to the pending calls that ended."""
        frames: dict[GatewayLink, list[list[Any]]] = defaultdict(list)
        ended: list[tuple[_Live, dict[str, Any]]] = []
        for output in outputs:
            live = self._live.get(output.request_id)
            if live is None:
                continue
            live.num_output_tokens += len(output.token_ids)
            logprobs = [[p.logprob, p.top_ids, p.top_logprobs] for p in output.logprobs] or None
            end = None
            if output.is_last:
                end = _end(output, live.num_output_tokens)
                ended.append((live, end))
                del self._live[output.request_id]
            frames[live.link].append([live.handle, output.token_ids, logprobs, end])
        for link, updates in frames.items():
            link.send_updates(updates)
        if ended and self._loop is not None:
            self._loop.call_soon_threadsafe(_resolve, ended)

    def _on_fault(self, error: BaseException) -> None:
        """Engine thread, dying: every request ends with an error rather than in silence."""
        fault = EngineUnavailable(f"the engine stopped: {error}")
        self._on_outputs([StepOutput(request_id, (), error=fault) for request_id in list(self._live)])

    def _on_abort(self, link: GatewayLink, handles: list[int]) -> None:
        for handle in handles:
            self._engine.abort(f"{link.id}-{handle}")

    def _on_lost(self, link: GatewayLink) -> None:
        for request_id, live in list(self._live.items()):
            if live.link is link:
                self._engine.abort(request_id)


def _engine_request(fields: Mapping[str, Any], request_id: str, now_s: float) -> EngineRequest:
    sampling = dict(fields["sampling"])
    sampling["logit_bias"] = tuple((int(token), float(bias)) for token, bias in sampling.get("logit_bias", ()))
    sampling["stop_token_ids"] = tuple(sampling.get("stop_token_ids", ()))
    timeout_s = fields.get("timeout_s")
    return EngineRequest(
        id=request_id,
        prompt_ids=fields["prompt_ids"],
        sampling=SamplingParams(**sampling),
        priority=fields.get("priority", 0),
        deadline_s=None if timeout_s is None else now_s + timeout_s,
        cache_salt=fields.get("cache_salt") or "",
        num_resumed_tokens=fields.get("num_resumed_tokens", 0),
    )


def _end(output: StepOutput, num_output_tokens: int) -> dict[str, Any]:
    if output.error is None:
        reason = output.finish_reason or FinishReason.ABORT
        cached = output.num_cached_tokens
        return {"finish_reason": str(reason), "num_cached_tokens": cached, "num_output_tokens": num_output_tokens}
    error = output.error if isinstance(output.error, HerdError) else EngineFault(str(output.error))
    return {"error": error.to_wire()}


def _resolve(ended: list[tuple[_Live, dict[str, Any]]]) -> None:
    for live, end in ended:
        if not live.done.done():
            live.done.set_result(end)
