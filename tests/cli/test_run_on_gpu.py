"""The main job on a real GPU: Triton kernels, NVML's counter, checked by sampled power."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from minference_green.results import Backends, Observation, load

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def test_a_gpu_run_reads_the_counter_and_names_the_dense_kernel(
    green_bench: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    # Shared: the tests' own process may have a context on the GPU, from kernels it tested before.
    done = green_bench(
        "run", "--model", "planted:tiny", "--context", "16k", "--window", "3s", "--warmup", "5s",
        "--blocks", "1", "--dtype", "bfloat16", "--allow-shared", "--output", tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (directory,) = tmp_path.iterdir()
    run = load(directory)
    assert run.header.fingerprint.devices[0].kind == "gpu"
    chosen = next(run.of(Backends))
    assert chosen.seconds[chosen.chosen] == min(s for s in chosen.seconds.values() if s)
    for window in run.windows:
        (reading,) = [r for r in window.readings if r.headline]
        assert reading.obtained == "counter"
        assert reading.joules is not None
        assert reading.check_joules == pytest.approx(reading.joules, rel=0.05)
        limit = run.header.fingerprint.devices[0].power_limit_watts
        assert limit is not None
        assert 0.05 * limit < reading.joules / window.seconds < 1.3 * limit
        assert window.device_seconds == pytest.approx(window.seconds, rel=0.005, abs=0.001)
    sparse = next(o for o in run.of(Observation) if o.method == "minference")
    assert 0 < sparse.density < 0.3
