from __future__ import annotations

import importlib.metadata
import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from herd.deployments import cli, cli_options
from herd.deployments.client import Client, ServerError, Usage
from herd.deployments.config import Effective, fields
from herd.model.presets import PRESETS

from .stub_server import StubServer, stub_server


@pytest.fixture
def stub() -> Iterator[StubServer]:
    with stub_server() as running:
        yield running


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The tests' own environment is not the user's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "100")


def herd(*arguments: str, typed: str | None = None) -> Result:
    return CliRunner().invoke(cli.app, list(arguments), input=typed)


def test_help_starts_with_examples_and_fits_a_screen() -> None:
    text = herd("--help").stdout
    assert len(text.splitlines()) <= 40
    assert text.index("herd serve") < text.index("Options")
    for command in ("serve", "chat", "complete", "convert", "models", "bench", "config"):
        assert command in text
        shown = herd(command, "--help")
        assert shown.exit_code == 0
        assert len(shown.stdout.splitlines()) <= 50


def test_version() -> None:
    assert herd("--version").stdout.strip() == f"herd {importlib.metadata.version('herd-serve')}"


def test_config_show_gives_value_and_origin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "herd.yaml"
    file.write_text("engine: {max_num_seqs: 3}")
    monkeypatch.setenv("HERD_HTTP_HOST", "::1")
    shown = herd("config", "show", "--config", str(file), "--set", "http.port=9000", "--json")
    tree = json.loads(shown.stdout)
    assert tree["engine.max_num_seqs"] == {"value": 3, "origin": f"file {file}"}
    assert tree["http.host"] == {"value": "::1", "origin": "env HERD_HTTP_HOST"}
    assert tree["http.port"] == {"value": 9000, "origin": "--set"}
    assert list(tree) == list(fields())
    lines = herd("config", "show").stdout.splitlines()
    assert [line.split()[0] for line in lines] == list(fields())


@pytest.mark.parametrize("command", [("config", "show"), ("serve",), ("models",)])
def test_a_wrong_setting_ends_in_one_line(command: tuple[str, ...]) -> None:
    done = herd(*command, "--set", "http.prt=1")
    assert done.exit_code == cli_options.USAGE_ERROR
    assert done.stderr == "error: --set: there is no setting 'http.prt'; did you mean http.port?\n"


def test_serve_options_are_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Effective] = []

    def run_server(effective: Effective, *, attached: bool = False) -> int:
        seen.append(effective)
        return 7

    monkeypatch.setattr("herd.deployments.server.run_server", run_server)
    options = {
        "--host": ("http.host", "0.0.0.0"),
        "--port": ("http.port", 9000),
        "--ingress": ("http.ingress", "proxy"),
        "--engines": ("engine.replicas", 2),
        "--gateways": ("gateway.replicas", 3),
        "--dtype": ("model.dtype", "float32"),
        "--quantize": ("model.quantize", "int4"),
        "--device": ("engine.device", "cpu"),
        "--threads": ("engine.threads", 4),
        "--load-format": ("model.load_format", "dummy"),
        "--max-model-len": ("model.max_model_len", 99),
        "--kv-memory": ("engine.kv_memory", 2 << 30),
        "--max-num-seqs": ("engine.max_num_seqs", 5),
        "--served-name": ("model.served_names", ("mine",)),
        "--ray-address": ("ray.address", "10.0.0.1:6379"),
    }
    words = [str(word) for flag, (_, value) in options.items() for word in (flag, value)]
    words[words.index("('mine',)")] = "mine"
    assert herd("serve", "scout", *words, "--set", "gateway.max_n=2").exit_code == 7
    rows = {key: (value, origin) for key, value, origin in seen[0].rows()}
    assert rows["model.path"] == ("scout", "option")
    assert rows["gateway.max_n"] == (2, "--set")
    for key, value in options.values():
        assert rows[key] == (value, "option")
    assert herd("serve").exit_code == 7
    assert {origin for _, _, origin in seen[1].rows()} == {"default"}


def test_serve_refuses_a_port_in_use_before_anything_else() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        done = herd("serve", "--port", str(port))
    assert done.exit_code == 2
    assert done.stderr == f"error: port {port} is in use by another process; choose another with --port\n"


def test_models_lists_the_presets(tmp_path: Path) -> None:
    rows = json.loads(herd("models", "--json").stdout)
    assert [row["name"] for row in rows] == list(PRESETS)
    assert {row["name"] for row in rows if row["assumed"]} == {"behemoth"}
    assert 1.0e11 < rows[1]["parameters"] < 1.15e11
    assert rows[1]["int4_bytes"] < 0.31 * rows[1]["bf16_bytes"]
    assert "fetched at first use" in rows[0]["weights"]
    kept = tmp_path / "cache" / "herd" / "pocket-1-abc"
    kept.mkdir(parents=True)
    (kept / "manifest.json").touch()
    table = herd("models").stdout
    assert "ready in" in table
    assert "behemoth*" in table


def test_one_question(stub: StubServer) -> None:
    done = herd("chat", "--url", stub.url, "-q", "Capital?", "--system", "Be brief.", "--max-tokens", "9")
    assert done.stdout == "Paris.\n"
    assert done.stderr.startswith("[3 tokens")
    (body,) = stub.bodies
    assert body["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Capital?"}]
    assert body["model"] == "pocket"
    assert body["max_tokens"] == 9
    assert "temperature" not in body


def test_a_conversation(stub: StubServer) -> None:
    typed = "one\\\ntwo\nthree\n/reset\nfour\n/system Rhyme.\nfive\n\n/quit\nsix\n"
    done = herd("chat", "other", "--url", f"{stub.url}/v1/", typed=typed)
    assert done.exit_code == 0
    said = [[m["content"] for m in body["messages"]] for body in stub.bodies]
    assert said == [["one\ntwo"], ["one\ntwo", "Paris.", "three"], ["four"], ["Rhyme.", "five"]]
    assert {body["model"] for body in stub.bodies} == {"other"}


def test_a_refused_question_is_taken_back(stub: StubServer) -> None:
    stub.refusal = (429, {"error": {"message": "the queue is full"}})
    done = herd("chat", "--url", stub.url, typed="one\n")
    assert "error: 429: the queue is full" in done.stderr
    assert done.exit_code == 0
    asked = herd("chat", "--url", stub.url, "-q", "one")
    assert asked.exit_code == 1
    assert asked.stdout == ""


def test_complete_shows_the_text_it_went_on_from(stub: StubServer) -> None:
    assert herd("complete", "I love ", "--url", stub.url).stdout == "I love Paris.\n"
    assert stub.bodies[0]["prompt"] == "I love "


def test_the_local_server_is_found(
    stub: StubServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HERD_HTTP_PORT", stub.url.rpartition(":")[2])
    assert herd("chat", "-q", "x").stdout == "Paris.\n"


def test_no_server_at_a_given_url(free_port: int) -> None:
    done = herd("chat", "--url", f"http://127.0.0.1:{free_port}", "-q", "x")
    assert done.exit_code == 1
    assert "nothing answers at" in done.stderr
    assert "herd serve" in done.stderr


def test_a_cut_stream_is_an_error(stub: StubServer) -> None:
    stub.end = None
    usage = Usage()
    with Client(stub.url) as client, pytest.raises(ServerError, match="before it was complete"):
        list(client.stream_chat({"model": "pocket", "messages": []}, usage))


def test_an_error_in_the_stream_is_an_error(stub: StubServer) -> None:
    stub.end = json.dumps({"error": {"message": "the engine died"}})
    with Client(stub.url) as client, pytest.raises(ServerError, match="the engine died"):
        list(client.stream_chat({"model": "pocket", "messages": []}, Usage()))


def test_bench_counts_what_it_sent(stub: StubServer) -> None:
    done = herd("bench", "--url", stub.url, "--concurrency", "1,3", "--requests", "6", "--json")
    assert done.exit_code == 0
    first, second = json.loads(done.stdout)
    assert (first["concurrency"], second["concurrency"]) == (1, 3)
    assert first["output_tokens"] == second["output_tokens"] == 6 * 3
    assert first["errors"] == second["errors"] == 0
    assert 0 < first["ttft_p50_ms"] <= first["ttft_p99_ms"]
    prompts = [body["prompt"] for body in stub.bodies]
    assert len(stub.bodies) == 12
    assert len({prompt.split()[0] for prompt in prompts}) == 6


def test_bench_reports_errors(stub: StubServer) -> None:
    stub.refusal = (503, {"error": {"message": "draining"}})
    done = herd("bench", "--url", stub.url, "--concurrency", "2", "--requests", "4")
    assert done.exit_code == 1
    assert "503" in done.stderr
    assert done.stdout.splitlines()[1].split()[:3] == ["2", "4", "4"]
    stub.refusal, stub.end = None, json.dumps({"error": {"message": "the engine died"}})
    done = herd("bench", "--url", stub.url, "--concurrency", "1", "--requests", "1")
    assert "the engine died" in done.stderr


@pytest.mark.parametrize("levels", ["a", "1,,2", "0", "1,-2"])
def test_bench_refuses_strange_concurrency(levels: str) -> None:
    assert herd("bench", "--concurrency", levels, "--url", "http://127.0.0.1:1").exit_code == 2
