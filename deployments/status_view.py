"""How the cluster's status looks in a terminal of 80 columns. Pure: a status, as GET /herd/status answers it, becomes
something that rich can print. Whatever a status leaves out is shown as `-`; knows nothing of where it comes from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..cluster.sizes import format_size
from .banner import format_count

Status = Mapping[str, Any]
_Justify = Literal["left", "right"]

_STATE_STYLES = {"ready": "green", "loading": "yellow", "suspect": "red"}
_SHARD_COLUMNS: tuple[tuple[str, _Justify], ...] = (
    ("SLOT", "right"),
    ("STATE", "left"),
    ("NODE", "left"),
    ("EXPERTS", "right"),
    ("SIZE", "right"),
    ("ROWS/S", "right"),
    ("BUSY", "right"),
    ("QUEUED", "right"),
    ("BEAT", "right"),
)
_ENGINE_COLUMNS: tuple[tuple[str, _Justify], ...] = (
    ("ENGINE", "left"),
    ("EPOCH", "right"),
    ("RUNNING", "right"),
    ("WAITING", "right"),
    ("TOKENS/S", "right"),
    ("SEEN", "right"),
)
_ID_CHARACTERS = 12
_NAME_CHARACTERS = 15
"""An IPv4 address fits."""


def status_view(status: Status) -> RenderableType:
    """The whole status."""
    parts: list[RenderableType] = [_facts(status)]
    if status.get("mode") == "shards" and status.get("router") is not None:
        parts += ["", _shard_table(status)]
    return Group(*parts, "", _engine_table(status))


def layer_view(status: Status, layer: int) -> RenderableType:
    """Which shard hosts which experts of one layer. Raises LookupError if that is not known of any."""
    held = [(shard, _experts_of(shard, layer)) for shard in _shards(status)]
    if not any(experts for _, experts in held):
        raise LookupError(_why_unknown(status, layer))
    table = _table((("SLOT", "right"), ("STATE", "left"), ("COUNT", "right")))
    table.add_column("EXPERTS", overflow="fold")
    present: set[int] = set()
    for shard, experts in held:
        table.add_row(_number(shard.get("slot")), _state(shard), str(len(experts)), _ranges(experts))
        present.update(experts if shard.get("state") != "loading" else ())
    parts: list[RenderableType] = [table]
    if missing := sorted(set(range(_section(status, "experts").get("per_layer") or 0)) - present):
        parts.append(Text(f"missing: {_ranges(missing)}", style="bold red"))
    if hot := [e for e in status.get("hot_experts") or () if e.get("layer") == layer]:
        parts.append(Text(f"hot: {_hot(hot)}"))
    return Group(Text(f"layer {layer}, epoch {status.get('epoch', '-')}"), "", *parts)


def _why_unknown(status: Status, layer: int) -> str:
    if status.get("mode") == "local":
        return "every engine holds all experts itself; there are no shards"
    if status.get("router") is None:
        return f"the router is away: {status.get('router_error', 'it does not answer')}"
    return f"no shard holds experts of layer {layer}"


def _facts(status: Status) -> Table:
    """Name and value, one a line."""
    facts = Table.grid(padding=(0, 2, 0, 0))
    facts.add_column(no_wrap=True)
    facts.add_column(overflow="fold")

    def add(name: str, value: Text | str) -> None:
        facts.add_row(Text(name, style="bold"), value if isinstance(value, Text) else Text(value))

    mode = status.get("mode", "-")
    add("model", f"{status.get('name', '-')}, experts in {'the engines' if mode == 'local' else mode}")
    if mode == "local":
        return facts
    if (router := status.get("router")) is None:
        reason = status.get("router_error", "it does not answer")
        add("router", Text(f"away ({reason}); engines and shards go on with the last map", style="red"))
        return facts
    add("map", f"epoch {status.get('epoch', '-')} of weights {str(status.get('model', '-'))[:_ID_CHARACTERS]}")
    add("router", _router(router, _node_names(_shards(status))))
    add("experts", _experts(_section(status, "experts")))
    add("imbalance", _imbalance(_section(status, "imbalance")))
    if hot := status.get("hot_experts"):
        add("hottest", _hot(hot))
    return facts


def _router(router: Mapping[str, Any], node_names: Mapping[Any, str]) -> str:
    restarts = router.get("restarts", 0)
    times = "no restart" if not restarts else "1 restart" if restarts == 1 else f"{restarts} restarts"
    node = router.get("node", "-")
    return f"up {_duration(router.get('up_s'))}, {times}, on node {node_names.get(node, str(node)[:_ID_CHARACTERS])}"


def _experts(experts: Mapping[str, Any]) -> Text:
    size = experts.get("bytes_each")
    text = Text(f"{experts.get('layers', '-')} layers x {experts.get('per_layer', '-')}")
    text.append(f" of {format_size(size)}" if size is not None else "")
    text.append(f", {experts.get('copies', '-')} copies, ")
    missing = experts.get("missing", 0)
    text.append(f"{missing} missing" if missing else "none missing", style="bold red" if missing else "")
    return text


def _imbalance(imbalance: Mapping[str, Any]) -> str:
    if imbalance.get("max_over_mean") is None:
        return "not known yet"
    text = f"the busiest shard has {imbalance['max_over_mean']:.2f} x the mean load"
    if worst := imbalance.get("worst_layer"):
        text += f"; worst in layer {worst.get('layer', '-')}: {_format(worst.get('max_over_mean'), '.2f')} x"
    return text


def _hot(experts: Iterable[Mapping[str, Any]]) -> str:
    """Layer and index of each, its share of the layer's rows and how many copies it has."""
    named = (
        f"{e.get('layer', '-')}:{e.get('expert', '-')} {_format(e.get('share'), '.1%')} x{e.get('copies', '-')}"
        for e in experts
    )
    return ", ".join(named) + " (layer:expert, share, copies)"


def _shard_table(status: Status) -> RenderableType:
    table = _table(_SHARD_COLUMNS)
    shards = _shards(status)
    names = _node_names(shards)
    for shard in shards:
        table.add_row(
            _number(shard.get("slot")),
            _state(shard),
            Text(names[shard.get("node_id")]),
            _number(shard.get("experts")),
            "-" if shard.get("bytes") is None else format_size(shard["bytes"]),
            _number(shard.get("rows_per_s")),
            _format(shard.get("busy"), ".0%"),
            _number(shard.get("queued_rows")),
            _duration(shard.get("beat_age_s")),
        )
    return table if shards else Text("no shard has come up yet", style="red")


def _engine_table(status: Status) -> RenderableType:
    """One row for each engine that the router or the gateway knows of."""
    table = _table(_ENGINE_COLUMNS)
    known = {e.get("engine_id"): e for e in status.get("engines") or ()}
    figures = {e.get("engine_id"): e for e in status.get("engine_stats") or ()}
    for engine_id in sorted(known.keys() | figures.keys(), key=str):
        seen, own = known.get(engine_id, {}), figures.get(engine_id, {})
        epoch = seen.get("epoch")
        behind = epoch is not None and epoch < (status.get("epoch") or 0)
        ages = [age for age in (seen.get("seen_age_s"), own.get("age_s")) if age is not None]
        table.add_row(
            Text(str(engine_id)[:_ID_CHARACTERS]),
            Text("-" if epoch is None else str(epoch), style="yellow" if behind else ""),
            _number(own.get("running")),
            _number(own.get("waiting")),
            _format(own.get("tokens_per_s"), ".1f"),
            _duration(min(ages, default=None)),
        )
    return table if table.rows else Text("no engine has reported yet; they do from their first request on")


def _table(columns: Iterable[tuple[str, _Justify]]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for title, justify in columns:
        table.add_column(title, justify=justify, no_wrap=True)
    return table


def _section(status: Status, name: str) -> Mapping[str, Any]:
    return status.get(name) or {}


def _shards(status: Status) -> list[Mapping[str, Any]]:
    return sorted(status.get("shards") or (), key=lambda s: (s.get("slot") or 0, str(s.get("shard_id"))))


def _experts_of(shard: Mapping[str, Any], layer: int) -> list[int]:
    """From the packed form of `cluster/expert_map.py`."""
    return [expert for number, ids in shard.get("hosted") or () if number == layer for expert in ids]


def _node_names(shards: Iterable[Mapping[str, Any]]) -> dict[Any, str]:
    """Node id -> its host, or the id's beginning where the host is not known or has several nodes."""
    hosts: dict[Any, str] = {}
    for shard in shards:  # one that still loads has no address yet
        hosts[shard.get("node_id")] = shard.get("host") or hosts.get(shard.get("node_id"), "")
    nodes_on = Counter(hosts.values())
    return {
        node: host[:_NAME_CHARACTERS] if host and nodes_on[host] == 1 else str(node)[:_ID_CHARACTERS]
        for node, host in hosts.items()
    }


def _state(shard: Mapping[str, Any]) -> Text:
    state = str(shard.get("state", "-"))
    return Text(state, style=_STATE_STYLES.get(state, ""))


def _ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers, runs of them as first-last."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _format(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _number(value: float | None) -> str:
    """Whole up to five digits, then with a unit letter."""
    if value is None:
        return "-"
    return f"{value:.0f}" if value < 100_000 else format_count(value)


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, hours = seconds // 60, seconds // 3600
    if hours == 0:
        return f"{minutes:.0f} min"
    return f"{hours:.0f} h {minutes % 60:.0f} min" if hours < 48 else f"{hours // 24:.0f} days"
