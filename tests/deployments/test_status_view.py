from __future__ import annotations

import io
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console, RenderableType

from herd.deployments.status_view import layer_view, status_view

from .cluster_statuses import engine_figures, local, routerless, shard, sharded

RED = "\x1b[1;31m"


def shown(view: RenderableType, *, coloured: bool = False) -> str:
    """What comes out at 80 columns."""
    console = Console(
        file=io.StringIO(),
        width=80,
        highlight=False,
        force_terminal=coloured,
        color_system="standard" if coloured else None,
    )
    console.print(view)
    text = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert coloured or all(len(line) <= 80 for line in text.splitlines())
    return text


def row(text: str, first: str) -> str:
    """The line that begins with `first`, its cells one space apart."""
    (line,) = [line for line in text.splitlines() if line.split()[:1] == [first]]
    return " ".join(line.split())


def test_everything_of_the_contract_is_shown() -> None:
    text = shown(status_view(sharded()))
    assert row(text, "model") == "model tiny, experts in shards"
    assert row(text, "map") == "map epoch 12 of weights 0123456789ab"
    assert row(text, "router") == "router up 2 h 1 min, 2 restarts, on node 10.0.0.1"
    elsewhere = sharded() | {"router": {"node": "f" * 56}}
    assert row(shown(status_view(elsewhere)), "router") == "router up -, no restart, on node ffffffffffff"
    assert "2 layers x 8 of 256 MiB, 15 copies, 1 missing" in text
    assert "1.12 x the mean load; worst in layer 3: 1.40 x" in text
    assert "3:5 25.0% x1" in text
    assert row(text, "0") == "0 ready 10.0.0.0 8 2.0 GiB 1234 37% 41 0.2 s"
    assert row(text, "engine-a") == "engine-a 12 32 5 812.4 0.5 s"
    assert row(text, "engine-b") == "engine-b 11 - - - 9.0 s"
    assert [line.split()[0] for line in text.splitlines() if "ready" in line] == ["0", "1"], "by slot"


def test_trouble_is_red_and_only_where_colours_are_wanted() -> None:
    status = sharded()
    assert f"{RED}1 missing" in shown(status_view(status), coloured=True)
    assert "\x1b" not in shown(status_view(status))
    status["experts"]["missing"] = 0
    calm = shown(status_view(status), coloured=True)
    assert RED not in calm
    assert "none missing" in calm


def test_nodes_that_share_a_host_are_told_apart() -> None:
    status = sharded()
    status["shards"] = [shard(slot, [], host="127.0.0.1") for slot in (1, 2)]
    text = shown(status_view(status))
    assert [row(text, str(slot)).split()[2] for slot in (1, 2)] == ["1" * 12, "2" * 12]
    loading = shard(2, [], host="", node_id="1" * 56, state="loading")
    status["shards"] = [shard(1, [], host="127.0.0.1"), loading]
    text = shown(status_view(status))
    assert [row(text, str(slot)).split()[2] for slot in (1, 2)] == ["127.0.0.1"] * 2


def test_widest_figures_fit_eighty_columns() -> None:
    status = sharded()
    wide = {"state": "suspect", "host": "255.255.255.255", "experts": 99_999, "bytes": 1023 << 30, "busy": 1.0}
    wide |= {"slot": 999, "rows_per_s": 123_456_789.0, "queued_rows": 99_999, "beat_age_s": 59.9}
    status["shards"] = [shard(0, []) | wide]
    cells = "999 suspect 255.255.255.255 99999 1023 GiB 123M 100% 99999 59.9 s"
    assert row(shown(status_view(status)), "999") == cells


def test_local_mode_has_no_shards() -> None:
    text = shown(status_view(local()))
    assert "experts in the engines" in text
    assert "SLOT" not in text
    assert row(text, "engine-a") == "engine-a - 32 5 812.4 0.5 s"
    assert "no engine has reported yet" in shown(status_view(local() | {"engine_stats": []}))


def test_without_a_router_what_the_gateway_knows_is_left() -> None:
    text = shown(status_view(routerless()))
    assert "away (no answer within 2 s)" in text
    assert "engine-a" in text
    assert "SLOT" not in text


def test_names_are_not_markup() -> None:
    status = local() | {"name": "[red]x[/red]", "engine_stats": [engine_figures("[b]e[/b]")]}
    text = shown(status_view(status))
    assert "[red]x[/red]" in text
    assert "[b]e[/b]" in text


def test_a_layer_shows_who_has_what_and_what_nobody_has() -> None:
    text = shown(layer_view(sharded(), 3))
    assert row(text, "0") == "0 ready 4 0, 2, 4, 6"
    assert row(text, "1") == "1 ready 3 1, 3, 5"
    assert row(text, "missing:") == "missing: 7"
    assert "3:5 25.0%" in text
    assert "missing" not in shown(layer_view(sharded(), 1))


def test_a_shard_that_loads_does_not_serve_its_experts_yet() -> None:
    status = sharded()
    status["shards"][0]["state"] = "loading"
    assert "missing: 1, 3, 5, 7" in shown(layer_view(status, 1))
    status["shards"][1]["state"] = "loading"
    assert "missing: 0-7" in shown(layer_view(status, 1))


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (local(), "there are no shards"),
        (routerless(), "router is away"),
        (sharded(), "no shard holds experts of layer 2"),
    ],
)
def test_a_layer_of_which_nothing_is_known(status: dict[str, Any], reason: str) -> None:
    with pytest.raises(LookupError, match=reason):
        layer_view(status, 2)


@given(st.data())
def test_whatever_a_status_leaves_out_is_shown_as_absent(data: st.DataObject) -> None:
    """A server of another version may know less."""

    def thinned(value: Any) -> Any:
        if isinstance(value, list):
            return [thinned(v) for v in value if data.draw(st.booleans())]
        if isinstance(value, dict):
            kept = {k: thinned(v) for k, v in value.items() if data.draw(st.booleans())}
            return kept | {k: None for k in value.keys() - kept.keys() if data.draw(st.booleans())}
        return value

    status = sharded()
    hosted = [s.pop("hosted") for s in status["shards"]]  # whole, or not at all
    status = thinned(status) | {"mode": "shards"}
    shown(status_view(status))
    for known, experts in zip(status.get("shards") or (), hosted, strict=False):
        known["hosted"] = experts
        shown(layer_view(status, 1))
