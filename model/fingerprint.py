"""A name for one set of weights as it is served: cheap to work out, equal wherever the same files lie, another one for
any other model, number format or seed. Reads a few pieces of each file; what they hold is others' matter."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from .checkpoint_error import CheckpointError
from .quantization import ROUNDING_VERSION
from .source import ModelSource

_PIECES = 32
_PIECE_BYTES = 4096


def fingerprint(source: ModelSource, dtype: str, seed: int, quantize: str = "auto") -> str:
    """32 hex digits. `dtype`: the number format of the model; `seed`: of dummy weights; `quantize`: the
    name of a scheme, or "auto".

    Of a checkpoint it reads names, sizes and evenly spaced pieces of its safetensors files: not their times, which a
    copy on another node does not share. Raises CheckpointError for files that cannot be read.
    """
    facts = {"config": source.config_json, "format": source.load_format, "dtype": dtype}
    facts |= {"quantize": quantize, "rounding": ROUNDING_VERSION}
    if source.load_format == "dummy":
        facts["seed"] = seed
    digest = hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=16)
    if source.load_format == "safetensors" and source.directory is not None:
        for path in sorted(source.directory.glob("*.safetensors")):
            digest.update(_sample(path))
    return digest.hexdigest()


def _sample(path: Path) -> bytes:
    digest = hashlib.blake2b(path.name.encode())
    try:
        with path.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            digest.update(size.to_bytes(8, "little"))
            for i in range(_PIECES):
                file.seek(max(0, size - _PIECE_BYTES) * i // (_PIECES - 1))
                digest.update(file.read(_PIECE_BYTES))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    return digest.digest()
