"""What it costs clients when a process dies: runs the kill tests and stores the longest gaps between tokens.

    python bench/kills.py [--out bench/results/kills.json]

32 streams of 200 tokens over HTTP, greedy and seeded, a tiny model in float32; in the middle a process (or a node) is
killed or stopped. The tests fail unless every token equals that of an undisturbed run; the baseline of each figure is
an undisturbed run on the same server right before. Needs the packages that the tests need.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "kills.json")
    out = parser.parse_args().out
    with tempfile.TemporaryDirectory() as folder:
        costs = Path(folder) / "costs.json"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "chaos", "tests/chaos"]
        done = subprocess.run(command, cwd=ROOT, env=os.environ | {"HERD_KILL_COSTS": str(costs)}, check=False)
        rows = json.loads(costs.read_text())
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    result = {
        "machine": {"cpus": os.cpu_count(), "processor": platform.processor() or platform.machine()},
        "versions": {"python": platform.python_version(), "ray": version("ray"), "torch": version("torch")},
        "commit": commit.stdout.strip(),
        "kills": [{k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()} for row in rows],
    }
    out.write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
