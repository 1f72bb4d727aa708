"""`herd convert`, then `herd serve` of what it wrote: the commands as a user runs them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from herd.deployments.ports import free_ports

from ..serve_process import Server
from .live_app import TINY

pytestmark = pytest.mark.slow


def answer(*arguments: str) -> tuple[dict[str, object], str]:
    """Of a server that runs for one request; and its banner."""
    options = ["--kv-memory", "16MiB", "--threads", "1", "--served-name", "tiny"]
    server = Server(*arguments, *options, port=free_ports(1)[0])
    try:
        server.wait_for("Ready after")
        body = {
            "model": "tiny",
            "prompt": [1, 2, 3],
            "max_tokens": 12,
            "ignore_eos": True,
            "temperature": 0,
            "logprobs": 2,
        }
        response = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
        assert response.status_code == 200, response.text
        return response.json()["choices"][0], server.text
    finally:
        folder = server.folder
        server.kill()
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def test_a_copy_answers_as_the_model_quantised_while_loading(tmp_path: Path) -> None:
    model, out = tmp_path / "tiny", tmp_path / "copy"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(TINY | {"vocab_size": 4096}))
    command = [sys.executable, "-m", "herd.deployments.cli", "convert", str(model), str(out)]
    done = subprocess.run(
        [*command, "--quantize", "int4", "--load-format", "dummy"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    copied, banner = answer(str(out))
    assert "int4+int8 weights, bfloat16 on cpu" in banner
    loaded, banner = answer(str(model), "--load-format", "dummy", "--quantize", "int4")
    assert "int4 weights, bfloat16 on cpu" in banner
    assert copied == loaded
