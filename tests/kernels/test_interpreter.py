"""Without a GPU, the Triton test modules run in Triton's interpreter, in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

MODULES = sorted(Path(__file__).parent.glob("test_triton_*.py"))
# A few modules a process: each start loads torch and Triton.
GROUPS = [MODULES[i::3] for i in range(3)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the modules run on the GPU directly")
@pytest.mark.parametrize(
    "modules",
    GROUPS,
    ids=lambda paths: " ".join(p.stem.removeprefix("test_triton_") for p in paths),
)
def test_every_claim_of_the_kernel_modules_holds_in_the_interpreter(modules: list[Path]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *map(str, modules), "-q", "-p", "no:cacheprovider"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
