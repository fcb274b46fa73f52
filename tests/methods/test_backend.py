"""Which kernels a device gets, and what is said where there are none."""

import importlib.util
import inspect
import subprocess
import sys
from dataclasses import fields

import pytest
import torch

from minference_green.errors import UsageError
from minference_green.kernels import cpu, selection
from minference_green.methods import backend
from minference_green.methods.backend import Kernels, kernels_for

FIELDS = [field.name for field in fields(Kernels)]


def test_a_cpu_gets_the_cpu_path() -> None:
    kernels = kernels_for(torch.device("cpu"))
    for field in FIELDS:
        module = selection if field in ("chosen_bands", "listed_index") else cpu
        assert getattr(kernels, field) is getattr(module, field)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_a_cuda_device_gets_triton_kernels_that_are_called_alike() -> None:
    """The same arguments in the same order; what more a kernel takes has a default."""
    kernels = kernels_for(torch.device("cuda"))
    twins = kernels_for(torch.device("cpu"))
    for field in FIELDS:
        ours, theirs = getattr(twins, field), getattr(kernels, field)
        assert theirs is not ours
        shared = _shape(ours)
        assert _shape(theirs)[: len(shared)] == shared, field
        assert not any(required for _, _, required in _shape(theirs)[len(shared) :]), field


def _shape(function: object) -> list[tuple[str, object, bool]]:
    parameters = inspect.signature(function).parameters.values()
    return [(p.name, p.kind, p.default is p.empty) for p in parameters]


def test_a_cuda_device_without_triton_is_told_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UsageError, match="pip install triton"):
        kernels_for(torch.device("cuda"))


def test_another_device_is_refused_by_name() -> None:
    with pytest.raises(UsageError, match="no sparse kernels for device 'meta'; use a cuda or cpu"):
        kernels_for(torch.device("meta"))


def test_a_cpu_run_does_not_import_triton() -> None:
    code = (
        "import sys, torch\n"
        "from minference_green.methods.choose import method_from_name\n"
        "x = torch.zeros(1, 1, 8, 64)\n"
        "method = method_from_name('minference', {})\n"
        "method.attend(x, x, x, scale=1.0, layer=0)\n"
        "assert 'triton' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
