from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from herd.deployments import cli

from ..integration.live_app import write_tiny


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny"
    write_tiny(folder)
    return folder


def herd(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, ["convert", *arguments])


def test_it_reports_the_sizes(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = herd(str(tiny), str(out), "--quantize", "int8", "--load-format", "dummy")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["WEIGHTS", "BEFORE", "AFTER", "RATIO"]
    assert any(line.startswith("routed experts") for line in lines)
    assert f"herd serve {out}" in lines[-1]
    assert (out / "config.json").exists()


def test_json_adds_up(tiny: Path, tmp_path: Path) -> None:
    arguments = (str(tiny), str(tmp_path / "out"), "--quantize", "fp8", "--load-format", "dummy", "--json")
    said = json.loads(herd(*arguments).stdout)
    before, after = (sum(row[key] for row in said["bytes"].values()) for key in ("before", "after"))
    assert said["ratio"] == pytest.approx(after / before)
    written = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert after < written < after + 100_000


@pytest.mark.parametrize(
    ("arguments", "message", "status"),
    [
        ((), "say int8, int4 or fp8", 2),
        (("--quantize", "int3"), "int3", 2),
        (("--quantize", "int8"), "safetensors", 1),
    ],
    ids=["no scheme", "unknown scheme", "no weights"],
)
def test_nonsense_is_refused(tiny: Path, tmp_path: Path, arguments: tuple[str, ...], message: str, status: int) -> None:
    result = herd(str(tiny), str(tmp_path / "out"), *arguments)
    assert result.exit_code == status, result.output
    assert message in result.output
    assert not (tmp_path / "out").exists()


def test_a_second_copy_needs_force(tiny: Path, tmp_path: Path) -> None:
    arguments = (str(tiny), str(tmp_path / "out"), "--quantize", "int8", "--load-format", "dummy")
    assert herd(*arguments).exit_code == 0
    refused = herd(*arguments)
    assert refused.exit_code == 1
    assert "--force" in refused.output
    assert herd(*arguments, "--force").exit_code == 0
