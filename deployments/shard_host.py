"""What an expert shard's process does: takes a lease, loads just those experts, has their bytes checked, and computes
for engines until it is told to go. Knows nothing of Serve; arithmetic, sockets and decisions are others' matter."""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Iterable
from typing import Any

import ray
import torch
from torch import Tensor

from ..cluster.engine_builder import choose_device
from ..cluster.errors import ExpertUnavailable
from ..cluster.expert_compute import ExpertCompute
from ..cluster.expert_map import Expert
from ..cluster.sizes import format_size
from ..cluster.transport import RowLayout
from ..cluster.transport_server import TransportServer
from ..kernels.grouped_mlp import ExpertWeights
from ..kernels.quantized import QuantizedWeight
from ..model.exact_probe import expert_check, probe_operations
from ..model.heap import trim_heap
from ..model.loading import Loader
from ..model.numerics import numeric_class
from ..model.quantization import served_scheme
from ..model.served_model import open_model
from ..model.source import resolve_model
from .config import HerdConfig, cache_directory, progress_file
from .expert_plan import dtype_name, router_spec
from .load_progress import LoadProgress
from .router_client import RouterClient
from .shard_lease import ShardIdentity, ShardLease
from .threads import live_nodes, shard_threads, usable_cores

logger = logging.getLogger("herd.shard")

_GPU_SHARE = 0.9
"""Of a GPU's free memory, for experts."""
_MAX_QUEUED_ROWS = 1 << 16
_STUCK_S = 2.0
"""A call that takes longer than this and twice the time that engines wait is taken to hang."""
_MAX_FAULTS_IN_A_ROW = 2
"""More than bad luck: a GPU's error stays until its process ends."""
_WARM_ROWS = (1, 2, 8, 32)
_DRAIN_POLL_S = 0.05


class ShardHost:
    """One shard. `open` once, then `check` and `drain` from any thread."""

    def __init__(self, config: HerdConfig, application: str, shard_id: str) -> None:
        self._config = config
        self._id = shard_id
        model = config.model
        source = resolve_model(model.path, load_format=model.load_format, cache_dir=cache_directory(model))
        self._model = open_model(source)
        self._spec = router_spec(config, source, self._model.config)
        self._device = choose_device(config.experts.device)
        self._dtype: torch.dtype = getattr(torch, dtype_name(config, self._model.config))
        self._exact = config.engine.numerics == "exact"
        self._layout = RowLayout(self._model.config.hidden_size, self._dtype, self._device)
        self._lease = ShardLease(RouterClient(application, self._spec).call, self._identity())
        self._experts: dict[Expert, ExpertWeights] = {}
        self._digests: dict[Expert, str] = {}
        self._compute: ExpertCompute | None = None
        self._server: TransportServer | None = None

    def open(self) -> None:
        """Return once this shard is in the map. Raises PlacementError, CheckpointError, DigestMismatch."""
        if self._device.type == "cpu":
            torch.set_num_threads(shard_threads(self._config, usable_cores(), live_nodes()))
        try:
            while not self._enter():
                logger.info("shard %s was let go of while it loaded", self._id)
        except BaseException:
            self._lease.leave()
            raise

    def check(self) -> None:
        """Raise when this process should be replaced."""
        if self._lease.failure is not None:
            raise ExpertUnavailable(f"shard {self._id}: {self._lease.failure}")
        if self._server is not None and not self._server.alive:
            raise ExpertUnavailable(f"shard {self._id} serves no more")
        faults = self._compute.faults_in_a_row if self._compute else 0
        if faults > _MAX_FAULTS_IN_A_ROW:
            raise ExpertUnavailable(f"shard {self._id} failed to compute {faults} times in a row")
        stuck_s = self._server.stuck_for_s if self._server else 0.0
        if stuck_s > max(_STUCK_S, 2 * self._config.experts.call_timeout_s):
            raise ExpertUnavailable(f"shard {self._id} has been computing one call for {stuck_s:.1f} s")

    def drain(self, timeout_s: float) -> None:
        """Leave once no engine needs this shard: when all its experts have other copies, when no engine is connected,
        or after `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while self._has_engines() and time.monotonic() < deadline and not self._lease.leave(only_if_spared=True):
            time.sleep(_DRAIN_POLL_S)
        self._lease.leave()
        while self._has_engines() and time.monotonic() < deadline:  # until they follow the map without us
            time.sleep(_DRAIN_POLL_S)

    def _enter(self) -> bool:
        wanted, token = self._lease.acquire(self._experts)
        self._load(wanted)
        compute = self._compute = ExpertCompute(self._experts)
        server = self._server = TransportServer(
            shard_id=self._id,
            token=token,
            model=self._spec.model,
            layout=self._layout,
            host=ray.util.get_node_ip_address(),
            handler=compute,
            max_queued_rows=_MAX_QUEUED_ROWS,
        )
        server.start()

        def load() -> dict[str, Any]:
            return compute.load() | {"stuck_for_s": server.stuck_for_s, "beat_faults": self._lease.faults}

        def enter(epoch: int) -> None:
            compute.entered_epoch = epoch

        if self._lease.serve(self._experts, server.address, load, enter):
            return True
        server.stop()
        return False

    @torch.inference_mode()
    def _load(self, wanted: Iterable[Expert]) -> None:
        """Hold exactly the experts that are wanted, and have their bytes compared with those of their copies."""
        began = time.monotonic()
        wanted = tuple(wanted)
        self._experts = {expert: weights for expert, weights in self._experts.items() if expert in set(wanted)}
        missing = [expert for expert in wanted if expert not in self._experts]
        progress = LoadProgress(progress_file())
        total = self._spec.num_bytes(missing)
        model = self._config.model
        with self._model.loader(
            dtype=self._dtype, device=self._device, seed=model.seed, quantize=model.quantize, exact=self._exact
        ) as loader:
            for number, expert in enumerate(missing, 1):
                self._experts[expert], digest = read_expert(loader, expert)
                self._digests[expert] = self._name(digest)
                progress("weights", self._spec.num_bytes(missing[:number]), total)
        trim_heap()
        if self._exact:
            checks = [expert_check("routed expert", self._experts[expert]) for expert in missing]
            probe_operations(checks, self._dtype, self._device)
        self._lease.check_digests({expert: self._digests[expert] for expert in wanted})
        if self._experts:
            some = next(iter(self._experts.values()))
            for rows in _WARM_ROWS:  # the first call of each shape compiles
                some(torch.zeros(rows, self._layout.hidden, dtype=self._dtype, device=self._device))
        took_s = time.monotonic() - began
        logger.info("shard %s: %d experts, %s, in %.1f s", self._id, len(missing), format_size(total), took_s)

    def _name(self, digest: str) -> str:
        """In exact mode copies must agree in how they compute, too: where an expert is asked shall not show."""
        if not self._exact:
            return digest
        scheme = served_scheme(self._config.model.quantize, self._model.config)
        return f"{digest}, numeric class {numeric_class(self._device, self._dtype, scheme.name)}"

    def _has_engines(self) -> bool:
        return self._server is not None and self._server.num_peers > 0

    def _identity(self) -> ShardIdentity:
        gpus = ray.get_runtime_context().get_accelerator_ids().get("GPU", [])
        capacity = self._config.experts.memory
        if capacity is None and self._device.type == "cuda":
            capacity = int(torch.cuda.mem_get_info(self._device)[0] * _GPU_SHARE)
        node_id = ray.get_runtime_context().get_node_id()
        return ShardIdentity(self._id, node_id, ",".join(map(str, gpus)), capacity, os.getpid())


def read_expert(loader: Loader, expert: Expert) -> tuple[ExpertWeights, str]:
    """One expert laid out for its device, and the digest of its bytes before that."""
    gate_up_2FD, down_DF = loader.expert_tensors(*expert)
    digest = hashlib.blake2b(digest_size=16)
    for weight in (gate_up_2FD, down_DF):
        if isinstance(weight, QuantizedWeight):
            digest.update(f"{weight.kind} {weight.group} {weight.scales_OG.dtype}".encode())
            digest.update(_bytes_of(weight.q))
            digest.update(_bytes_of(weight.scales_OG))
        else:
            digest.update(_bytes_of(weight))
    return loader.expert_weights(gate_up_2FD, down_DF), digest.hexdigest()


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.cpu().contiguous().view(torch.uint8).flatten().numpy().data
