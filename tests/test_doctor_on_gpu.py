"""The full examination of a real GPU, at the goals stated for it; about 5 minutes a GPU."""

import os

import pytest

from minference_green import doctor
from minference_green.meters.nvml import gpu_present, visible_gpus

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not gpu_present(), reason="no NVIDIA driver here"),
]


def test_a_real_gpu_meets_the_goals_of_the_full_examination() -> None:
    uuid = visible_gpus(os.environ)[0]
    with doctor.patients("auto", [uuid]) as [patient]:
        found = doctor.examine(patient, full=True)
    assert found.device == uuid
    assert not found.failing, [c for c in found.checks if c.outcome == "FAIL"]
    figures = {c.name: c.figures for c in found.checks}
    assert abs(figures["steady load"]["relative_difference"]) <= 0.01
    assert figures["repeatability"]["cov"] <= 0.003
    assert abs(figures["windows add up"]["relative_difference"]) <= 0.003
    assert abs(figures["observer effect"]["relative_seconds"]) <= 0.001
    assert abs(figures["observer effect"]["relative_joules"]) <= 0.002
