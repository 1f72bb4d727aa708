"""How far the processes that load a model are, told to the log and, on one machine, to `herd serve` through a file of
each. Knows neither who shows it nor what is loaded."""

from __future__ import annotations

import json
import logging
import os
import time
from pathlib import Path

from ..cluster.sizes import format_size

logger = logging.getLogger("herd.engine")

_WRITE_PERIOD_S = 0.1
_LOG_SHARE = 0.1


class LoadProgress:
    """Called with (stage, bytes done, bytes in all); cheap enough to be called for every tensor."""

    def __init__(self, path: Path | None) -> None:
        """`path`: where `read_progress` looks; this process adds its id to the name."""
        self._path = None if path is None else path.with_suffix(f".{os.getpid()}{path.suffix}")
        self._written_at = float("-inf")
        self._logged_share = 0.0

    def __call__(self, stage: str, done: int, total: int) -> None:
        share = done / total if total else 0.0
        if share >= self._logged_share + _LOG_SHARE or (share >= 1.0 > self._logged_share):
            self._logged_share = share
            logger.info("loading %s: %.0f %% of %s", stage, 100 * share, format_size(total))
        now = time.monotonic()
        if self._path is not None and (done >= total or now - self._written_at >= _WRITE_PERIOD_S):
            self._written_at = now
            draft = self._path.with_suffix(".draft")  # whole or not at all: a reader may look at any moment
            draft.write_text(json.dumps([stage, done, total]), "utf-8")
            draft.replace(self._path)


def read_progress(path: Path) -> tuple[str, int, int] | None:
    """What was written last by all processes together; None when nothing was."""
    told = [json.loads(own.read_text("utf-8")) for own in path.parent.glob(f"{path.stem}.*{path.suffix}")]
    if not told:
        return None
    return told[0][0], sum(done for _, done, _ in told), sum(total for _, _, total in told)
