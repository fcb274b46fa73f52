"""The architecture as a test: imports go down, and one outside library has one door."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import minference_green

ROOT = Path(minference_green.__file__).resolve().parent

FLOORS = {
    "kernels": 0,
    "errors": 0,
    "workload": 1,
    "journal": 1,
    "results": 1,
    "grams": 1,
    "channel": 1,
    "corpus": 1,
    "fingerprint": 1,
    "validity": 2,
    "comparable": 2,
    "stats": 2,
    "retention": 2,
    "verdict": 2,
    "baseline": 2,
    "calibration": 2,
    "config": 2,
    "verify": 3,
    "pytest_plugin": 6,
    "check": 5,
    "render": 2,
    "methods": 3,
    "meters": 3,
    "carbon": 3,
    "model": 4,
    "command": 5,
    "diagnosis": 2,
    "projection": 2,
    "doctor": 5,
    "load": 5,
    "load_worker": 5,
    "bench": 5,
    "parent": 5,
    "auditing": 5,
    "ledger": 1,
    "findings": 2,
    "answers": 2,
    "groups": 2,
    "clustered": 2,
    "counts": 2,
    "detectable": 2,
    "permutation": 2,
    "faithfulness": 3,
    "worker": 5,
    "task": 5,
    "cell": 5,
    "decide": 5,
    "observe": 5,
    "breakdown": 5,
    "torch_device": 5,
    "api": 6,
    "cli": 6,
}

DOORS = {
    "pynvml": {"meters/nvml.py"},
    "codecarbon": {"carbon.py", "meters/modelled.py"},
    "transformers": {"model/"},
    "typer": {"cli/"},
    "pytest": {"pytest_plugin.py"},
    "scipy": {"stats.py", "clustered.py", "counts.py", "detectable.py"},
    "triton": {"kernels/"},
    "rich": {"cli/", "render/"},
}

FILES = sorted(p for p in ROOT.rglob("*.py") if "__pycache__" not in p.parts)
assert any("kernels" in p.parts for p in FILES) or (ROOT / "kernels").is_dir()


@cache
def sources() -> list[tuple[str, ast.Module]]:
    paths = [*FILES, *(ROOT / "kernels").glob("*.py")]
    found = {str(p.relative_to(ROOT)): ast.parse(p.read_text()) for p in paths}
    return sorted(found.items())


def imported(tree: ast.Module) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def floor_of(relative: str) -> int | None:
    return FLOORS.get(Path(relative).parts[0].removesuffix(".py"))


@pytest.mark.parametrize(
    ("relative", "tree"), sources(), ids=lambda v: v if isinstance(v, str) else ""
)
def test_a_module_imports_only_from_its_own_floor_or_below(relative: str, tree: ast.Module) -> None:
    if relative == "__init__.py":
        return  # exports lazily from the top floor
    own = floor_of(relative)
    assert own is not None, f"{relative} stands on no floor: add it to the map"
    for name in imported(tree):
        parts = name.split(".")
        if parts[0] != "minference_green" or len(parts) < 2 or parts[1] not in FLOORS:
            continue
        assert FLOORS[parts[1]] <= own, f"{relative} (floor {own}) imports {name}"
        if own == 0 and relative.startswith("kernels"):
            assert parts[1] == "kernels", f"{relative} imports {name}: kernels know nothing above"


@pytest.mark.parametrize("library", sorted(DOORS))
def test_an_outside_library_is_imported_only_behind_its_door(library: str) -> None:
    for relative, tree in sources():
        if library in {name.split(".")[0] for name in imported(tree)}:
            allowed = any(relative.startswith(door) for door in DOORS[library])
            assert allowed, f"{relative} imports {library}; its door is {DOORS[library]}"


def modules_after(code: str) -> set[str]:
    script = f"import sys\n{code}\nprint('\\n'.join(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-P", "-c", script], capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "code",
    [
        "import minference_green",
        "import minference_green.cli.app",
        "import minference_green.bench, minference_green.meters.choose, minference_green.carbon",
        "import minference_green.stats, minference_green.verdict",
        "from minference_green.cli.report import report",
    ],
)
def test_what_does_not_run_a_model_does_not_load_torch(code: str) -> None:
    loaded = modules_after(code)
    assert not loaded & {"torch", "transformers", "triton", "pandas"}


def test_the_command_line_alone_loads_neither_scipy_nor_pydantic() -> None:
    assert not modules_after("import minference_green.cli.app") & {"scipy", "pydantic", "numpy"}


@pytest.mark.parametrize("module", ["minference_green", "minference_green.model.loading"])
def test_import_prints_nothing_and_starts_no_cuda(module: str) -> None:
    code = (
        f"import {module}, sys\nt = sys.modules.get('torch')\n"
        "assert t is None or not t.cuda.is_initialized()"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout == ""
