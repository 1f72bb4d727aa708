from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from herd.deployments.config import (
    ConfigError,
    HerdConfig,
    cache_directory,
    environment_names,
    fields,
    is_secret,
    load_config,
    parse_tree,
)
from herd.deployments.config_values import nearest, value_from_text


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_every_source_overrides_the_one_before(tmp_path: Path) -> None:
    file = write(tmp_path / "herd.yaml", "http: {port: 1001, host: 10.0.0.1}\ngateway: {replicas: 2, max_n: 7}\n")
    env = {"HERD_HTTP_PORT": "1002", "HERD_GATEWAY_REPLICAS": "3", "HERD_ENGINE_REPLICAS": "4"}
    effective = load_config(file, ["http.port=1003", "gateway.replicas=5"], {"http.port": 1004, "http.host": None}, env)
    config = effective.config
    assert (config.http.port, effective.origins["http.port"]) == (1004, "option")
    assert (config.gateway.replicas, effective.origins["gateway.replicas"]) == (5, "--set")
    assert (config.engine.replicas, effective.origins["engine.replicas"]) == (4, "env HERD_ENGINE_REPLICAS")
    assert (config.gateway.max_n, effective.origins["gateway.max_n"]) == (7, f"file {file}")
    assert (config.http.host, effective.origins["http.host"]) == ("10.0.0.1", f"file {file}")
    assert (config.model.path, effective.origins["model.path"]) == ("pocket", "default")


def test_json_files_and_empty_sections_are_fine(tmp_path: Path) -> None:
    assert load_config(write(tmp_path / "a.json", json.dumps({"http": {"port": 1}})), env={}).config.http.port == 1
    assert load_config(write(tmp_path / "b.yaml", "http:\n"), env={}).config == HerdConfig()
    assert load_config(write(tmp_path / "c.yaml", ""), env={}).config == HerdConfig()


def test_a_whole_tree_survives_a_file(tmp_path: Path) -> None:
    config = load_config(sets=["model.served_names=a,b", "engine.kv_memory=2GiB"], env={}).config
    file = write(tmp_path / "herd.json", config.model_dump_json())
    assert load_config(file, env={}).config == config
    assert parse_tree(config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"sets": ["http.prt=1"]}, ["--set", "'http.prt'", "did you mean http.port?"]),
        ({"sets": ["port=1"]}, ["did you mean http.port?"]),
        ({"sets": ["engine.max_seqs=1"]}, ["did you mean engine.max_num_seqs?"]),
        ({"sets": ["http.port"]}, ["--set http.port=9000"]),
        ({"sets": ["http.port=no"]}, ["http.port", "'no'", "--set"]),
        ({"env": {"HERD_HTTP_PORT": "70000"}}, ["http.port", "65535", "env HERD_HTTP_PORT"]),
        ({"options": {"model.dtype": "int4"}}, ["model.dtype", "'float32'", "option"]),
        ({"sets": ["engine.kv_memory=2xB"]}, ["engine.kv_memory", "2GiB"]),
        ({"sets": ["model.served_names=[a"]}, ["model.served_names", "YAML"]),
        ({"sets": ["engine.replicas=0", "gateway.replicas=0"]}, ["engine.replicas", "gateway.replicas"]),
    ],
)
def test_mistakes_name_the_key_and_the_source(arguments: dict[str, object], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(**{"env": {}, **arguments})  # pyright: ignore[reportArgumentType]
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("text", "word"),
    [("http: {prt: 1}", "http.port"), ("- a", "mapping"), ("a: [", "not valid YAML"), ("http: 3", "'http'")],
)
def test_mistakes_in_files_name_the_file(tmp_path: Path, text: str, word: str) -> None:
    file = write(tmp_path / "herd.yaml", text)
    with pytest.raises(ConfigError) as caught:
        load_config(file, env={})
    assert str(file) in str(caught.value)
    assert word in str(caught.value)


def test_a_missing_file_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml"):
        load_config(tmp_path / "none.yaml", env={})


def test_values_from_text() -> None:
    sets = ["model.served_names=a, b", "gateway.request_timeout_s=none", "engine.prefix_caching=false"]
    config = load_config(sets=[*sets, "gateway.max_body_bytes=1MiB"], env={}).config
    assert config.model.served_names == ("a", "b")
    assert config.gateway.request_timeout_s is None
    assert config.engine.prefix_caching is False
    assert config.gateway.max_body_bytes == 1 << 20


def test_environment_aliases() -> None:
    env = {"HERD_CACHE_DIR": "/c", "RAY_ADDRESS": "10.0.0.1:6379"}
    effective = load_config(env=env)
    assert effective.config.model.cache_dir == "/c"
    assert effective.config.ray.address == "10.0.0.1:6379"
    assert load_config(env=env | {"HERD_RAY_ADDRESS": "auto"}).config.ray.address == "auto"


def test_kubernetes_service_links_are_not_settings() -> None:
    env = {"HERD_HTTP_PORT": "tcp://10.1.2.3:8000", "HERD_SERVICE_HOST": "10.1.2.3", "HERD_PORT_8000_TCP_PROTO": "tcp"}
    assert load_config(env=env).config == HerdConfig()


def test_the_real_environment_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HERD_HTTP_PORT", "1234")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config = load_config().config
    assert config.http.port == 1234
    assert cache_directory(config.model) == tmp_path / "herd"
    monkeypatch.setenv("HERD_CACHE_DIR", "~/models")
    assert cache_directory(load_config().config.model) == Path.home() / "models"


def test_application_arguments_ignore_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HERD_HTTP_PORT", "1234")
    assert parse_tree({}).http.port == 8000
    with pytest.raises(ConfigError, match=r"did you mean gateway\.replicas\?"):
        parse_tree({"gateway": {"replica": 2}})


def test_every_field_is_described_and_every_name_is_unique() -> None:
    described = fields()
    assert all(field.description for field in described.values())
    names = environment_names()
    assert {name for name in names if name.startswith("HERD_")} >= {
        f"HERD_{k.upper().replace('.', '_')}" for k in described
    }
    assert set(names.values()) == set(described)


def test_the_tree_is_frozen() -> None:
    with pytest.raises(ValidationError):
        HerdConfig().http.port = 1  # pyright: ignore[reportAttributeAccessIssue]


def test_rows_follow_the_tree_and_carry_origins() -> None:
    rows = list(load_config(sets=["http.port=1"], env={}).rows())
    assert [key for key, _, _ in rows] == list(fields())
    assert ("http.port", 1, "--set") in rows


@given(st.sampled_from(sorted(fields())), st.data())
def test_a_key_with_one_slip_is_recognised(key: str, data: st.DataObject) -> None:
    position = data.draw(st.integers(0, len(key) - 1))
    slipped = key[:position] + key[position + 1 :]
    assert nearest(slipped, fields()) is not None
    assert nearest(key, fields()) == key


@given(st.text())
def test_text_stays_text_for_text_fields(text: str) -> None:
    assert value_from_text(text, str) == text


def test_nothing_close_gives_no_suggestion() -> None:
    assert nearest("zzzzqq", fields()) is None
    assert nearest("anything", []) is None


@pytest.mark.parametrize(
    "key", ["gateway.api_key", "gateway.api_keys", "a.auth_token", "a.password", "a.client_secret"]
)
def test_keys_are_secret(key: str) -> None:
    assert is_secret(key)


def test_no_present_setting_is_secret() -> None:
    assert not [key for key in fields() if is_secret(key)]
