"""Without a GPU, each Triton test module runs in Triton's interpreter, in its own process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

MODULES = sorted(Path(__file__).parent.glob("test_triton_*.py"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the modules run on the GPU directly")
@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.stem)
def test_every_claim_of_a_kernel_module_holds_in_the_interpreter(module: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", str(module), "-q", "-p", "no:cacheprovider"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
