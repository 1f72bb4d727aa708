"""The house rules that a machine can check: folders, imports, sizes, what the wheel holds."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("kernels", "model", "cluster", "deployments")
"""From the bottom up: each may import itself and those before it."""
MAX_LINES = 400
READS_ENVIRONMENT = {"deployments/config.py"}
WRITES_ENVIRONMENT = {"deployments/ray_runtime.py"}
MACHINE_PATH = re.compile(r"/(?:work|root|home|Users)/\w")

MODULES = sorted(path for folder in FOLDERS for path in (ROOT / folder).glob("*.py"))
OUTSIDE = sorted(path for folder in ("tests", "bench", "examples") for path in (ROOT / folder).rglob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"), filename=str(path))


def imported_modules(path: Path, *, everywhere: bool = True) -> Iterator[str]:
    """Absolute names of what `path` imports, or of what importing it imports at once."""
    tree = parse(path)
    nodes = ast.walk(tree) if everywhere else top_level(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = ["herd", path.parent.name][: 3 - node.level] if node.level else []
            base = ".".join([*package, *([node.module] if node.module else [])])
            yield from ([base] if node.module else [f"{base}.{alias.name}" for alias in node.names])
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from (a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str))


def top_level(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node that runs on import: not the bodies of functions, nor what only type checkers read."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from top_level(node)


def test_every_folder_holds_modules() -> None:
    assert {path.parent.name for path in MODULES} == set(FOLDERS)


@pytest.mark.parametrize("folder", FOLDERS)
def test_folders_are_flat_and_no_regular_packages(folder: str) -> None:
    """A regular package named `kernels` would shadow another project's; a nested folder would not be in the wheel."""
    inside = [path for path in (ROOT / folder).iterdir() if path.name != "__pycache__"]
    assert not [path for path in inside if path.is_dir()]
    assert ROOT / folder / "__init__.py" not in inside


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_go_down(path: Path) -> None:
    allowed = FOLDERS[: FOLDERS.index(path.parent.name) + 1]
    ours = [name for name in imported_modules(path) if name.split(".")[0] == "herd"]
    assert not [name for name in ours if name.split(".")[1] not in allowed]


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_inside_the_folders_are_relative(path: Path) -> None:
    absolute = [node for node in ast.walk(parse(path)) if isinstance(node, ast.ImportFrom) and node.level == 0]
    assert not [node.module for node in absolute if node.module and node.module.split(".")[0] in {"herd", *FOLDERS}]


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_libraries_stay_where_they_belong(path: Path) -> None:
    roots = {name.split(".")[0] for name in imported_modules(path)}
    assert "transformers" not in roots
    if path.parent.name != "deployments":
        assert not roots & {"ray", "fastapi", "starlette", "typer", "httpx"}
    if path.parent.name != "kernels":
        assert "triton" not in roots


@pytest.mark.parametrize("path", [p for p in MODULES if p.name == "cli.py" or p.name.startswith("cli_")], ids=name_of)
def test_the_command_line_imports_nothing_heavy(path: Path) -> None:
    heavy = {"ray", "torch", "numpy", "fastapi", "httpx"}
    assert not heavy & {name.split(".")[0] for name in imported_modules(path, everywhere=False)}


def test_help_loads_neither_ray_nor_torch() -> None:
    code = (
        "import sys, herd.deployments.cli; heavy = {'ray', 'torch', 'numpy', 'fastapi', 'httpx'} & set(sys.modules); "
        "sys.exit(' '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_environment_is_read_in_one_file(path: Path) -> None:
    uses = []
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("os.environ", "os.getenv", "os.environb"):
            uses.append(node)
    name = name_of(path)
    if name in WRITES_ENVIRONMENT:
        text = path.read_text("utf-8")
        assert len(uses) == text.count("os.environ.update(")
    elif name not in READS_ENVIRONMENT:
        assert not uses


@pytest.mark.parametrize("path", MODULES + OUTSIDE, ids=name_of)
def test_files_are_short(path: Path) -> None:
    assert len(path.read_text("utf-8").splitlines()) <= MAX_LINES


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_modules_say_what_they_own(path: Path) -> None:
    assert ast.get_docstring(parse(path))


def test_the_wheel_holds_every_module_and_all_data(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    built = subprocess.run([*command, "-w", str(tmp_path), str(source)], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        inside = set(archive.namelist())
        entry_points = archive.read(next(name for name in inside if name.endswith("entry_points.txt"))).decode()
    data = [path for folder in FOLDERS for path in (ROOT / folder).iterdir() if path.suffix in (".safetensors",)]
    missing = {f"herd/{name_of(path)}" for path in [*MODULES, *data]} - inside
    assert not missing
    assert not [name for name in inside if name.endswith("__init__.py")]
    assert "herd = herd.deployments.cli:main" in entry_points


def test_no_tracked_file_names_a_machine() -> None:
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    named = []
    for name in filter(None, listed.decode().split("\0")):
        path = ROOT / name
        if path.is_symlink() or not path.is_file():
            continue
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError:
            continue
        named += [f"{name}:{n}" for n, line in enumerate(text.splitlines(), 1) if MACHINE_PATH.search(line)]
    assert not named
