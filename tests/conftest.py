"""Fixtures that tests of several packages share."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from .oracles import FORMS, Oracle, make_oracle


@pytest.fixture(scope="session")
def oracles(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Oracle]:
    """By name of its form: a tiny checkpoint and the transformers model behind it, made at first use."""
    made: dict[str, Oracle] = {}

    def get(name: str) -> Oracle:
        if name not in made:
            made[name] = make_oracle(FORMS[name], tmp_path_factory.mktemp(name))
        return made[name]

    return get
