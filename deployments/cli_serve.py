"""`herd serve`: the options, and the words for what `server.py` does."""

from __future__ import annotations

from typing import Annotated

import typer

from . import cli_options as o


def serve(
    model: Annotated[
        str | None, typer.Argument(help="checkpoint directory or preset (default: pocket)", show_default=False)
    ] = None,
    host: o.Host = None,
    port: o.Port = None,
    engines: o.Engines = None,
    gateways: o.Gateways = None,
    expert_shards: o.ExpertShards = None,
    expert_replicas: o.ExpertReplicas = None,
    dtype: o.Dtype = None,
    quantize: o.Quantize = None,
    device: o.Device = None,
    threads: o.Threads = None,
    load_format: o.LoadFormat = None,
    max_model_len: o.MaxModelLen = None,
    kv_memory: o.KvMemory = None,
    max_num_seqs: o.MaxNumSeqs = None,
    served_name: o.ServedName = None,
    ingress: o.Ingress = None,
    ray_address: o.RayAddress = None,
    config: o.ConfigFile = None,
    sets: o.Sets = None,
    attached: Annotated[bool, typer.Option("--attached", hidden=True)] = False,
) -> None:
    """Serve a model over the OpenAI API until Ctrl-C.

    \b
    herd serve
    herd serve ./Llama-4-Scout-17B-16E-Instruct --port 9000 --kv-memory 16GiB
    herd serve ./Llama-4-Scout-17B-16E-Instruct --quantize int4
    herd serve ./Llama-4-Scout-17B-16E-Instruct --expert-shards 3 --expert-replicas 2
    herd serve maverick --load-format dummy --set engine.block_size=32
    """
    options = {
        "model.path": model,
        "model.dtype": dtype,
        "model.quantize": quantize,
        "model.load_format": load_format,
        "model.max_model_len": max_model_len,
        "model.served_names": served_name or None,
        "engine.replicas": engines,
        "engine.device": device,
        "engine.threads": threads,
        "engine.kv_memory": kv_memory,
        "engine.max_num_seqs": max_num_seqs,
        "experts.shards": expert_shards,
        "experts.replicas": expert_replicas,
        "gateway.replicas": gateways,
        "http.host": host,
        "http.port": port,
        "http.ingress": ingress,
        "ray.address": ray_address,
    }
    effective = o.effective_config(config, sets, options)
    from .server import run_server  # imports Ray's launcher: not for --help

    raise typer.Exit(run_server(effective, attached=attached))
