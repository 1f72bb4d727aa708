"""Is `pocket`, as converted and served here, the language model that was trained? Perplexity on held-out text."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from herd.deployments.config import HerdConfig, cache_directory
from herd.model import decoder as decoder_module
from herd.model.served_model import ServedModel, open_model
from herd.model.source import resolve_model

pytestmark = pytest.mark.slow

REFERENCE = 10.77
"""Geometric mean over the nine domains, bfloat16, of the people who trained it."""
SAMPLE = ("python", "manual", "euro")


@pytest.fixture(scope="module")
def perplexity() -> ModuleType:
    path = Path(__file__).parents[2] / "bench" / "pocket_perplexity.py"
    spec = importlib.util.spec_from_file_location("pocket_perplexity", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["pocket_perplexity"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def served() -> ServedModel:
    return open_model(resolve_model("pocket", cache_dir=cache_directory(HerdConfig().model)))


@pytest.fixture(scope="module")
def texts(shared_folder: Path) -> dict[str, str]:
    return {path.stem: path.read_text("utf-8") for path in (shared_folder / "pocket" / "heldout").glob("*.txt")}


def test_perplexity_is_that_of_the_trained_model(
    perplexity: ModuleType, served: ServedModel, texts: dict[str, str]
) -> None:
    scorer = perplexity.Scorer(served, torch.bfloat16)
    domains = {name: perplexity.windows(served, text) for name, text in texts.items()}
    assert len(domains) == 9
    assert perplexity.perplexity(scorer, domains)["geometric_mean"] == pytest.approx(REFERENCE, rel=0.01)


def test_off_by_one_routing_shows(
    perplexity: ModuleType, served: ServedModel, texts: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = perplexity.Scorer(served, torch.bfloat16)
    domains = {name: perplexity.windows(served, texts[name])[:4] for name in SAMPLE}
    right = perplexity.perplexity(scorer, domains)["geometric_mean"]
    shifted = perplexity.with_routing(lambda chosen_T: (chosen_T + 1) % served.config.num_experts)
    monkeypatch.setattr(decoder_module, "route", shifted)
    assert perplexity.perplexity(scorer, domains)["geometric_mean"] >= 1.05 * right
