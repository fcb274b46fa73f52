"""Sparse prefill on a real GPU: never waits for the device, and agrees with the CPU path."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from minference_green.methods.estimator import LAST_ROWS, Estimator
from minference_green.methods.patterns import AShape, BlockSparse, Probed, VerticalSlash
from minference_green.methods.sparse import SparsePrefill, uniform
from minference_green.methods.yardstick import yardstick

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

PATTERNS = ((VerticalSlash(60, 300), AShape(40, 200), BlockSparse(6), VerticalSlash(200, 120)),)

ESTIMATORS = {
    "last rows": LAST_ROWS,
    "spread": Estimator(rows=64, last=8, skip_forced=True),
    "parts": Estimator(rows=64, last=8, segments=3, normalise="tile", skip_forced=True),
}


@pytest.fixture(params=ESTIMATORS)
def mixed(request: pytest.FixtureRequest) -> SparsePrefill:
    return SparsePrefill("mixed", PATTERNS, {}, ESTIMATORS[request.param])


def layer_inputs(n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A sink, a column and a diagonal stand out of noise."""
    g = torch.Generator().manual_seed(n)
    q, k, v = (torch.randn(1, h, n, 64, generator=g) for h in (4, 2, 2))
    k[:, :, 0] *= 3
    q[:, :, 700:] += k.repeat_interleave(2, 1)[:, :, : n - 700]
    return q, k, v


@contextmanager
def waiting_refused() -> Iterator[None]:
    """Whatever makes the host wait for the device raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_between_estimate_and_attend_nothing_waits_for_the_device(mixed: SparsePrefill) -> None:
    q, k, v = (x.cuda().bfloat16() for x in layer_inputs(3001))
    mixed.attend(q, k, v, scale=0.125, layer=0)  # compiles
    with waiting_refused():
        out = mixed.attend(q, k, v, scale=0.125, layer=0)
    assert out.isfinite().all()


def test_probing_does_not_wait_for_the_device_and_repeats_its_bits() -> None:
    q, k, v = (x.cuda().bfloat16() for x in layer_inputs(3001))
    method = uniform("probe", Probed(top_k=6, rows=8))
    first = method.attend(q, k, v, scale=0.125, layer=0)  # compiles
    with waiting_refused():
        again = method.attend(q, k, v, scale=0.125, layer=0)
    assert torch.equal(first, again)


@pytest.mark.parametrize("n", [1000, 3001])
def test_probing_in_8_bits_keeps_as_much_attention_as_by_what_it_rounds(n: int) -> None:
    """Lists may differ where key tiles are alike; the attention they keep may not."""
    q, k, v = (x[:, :, :n].half() for x in layer_inputs(3001))
    method = uniform("probe", Probed(top_k=6, rows=8))
    on_cpu = method.profile(q.float(), k.float(), v.float(), scale=0.125, layer=0)
    on_gpu = method.profile(q.cuda(), k.cuda(), v.cuda(), scale=0.125, layer=0)
    assert on_cpu.lse is not None and on_gpu.lse is not None
    kept = (on_gpu.lse.cpu() - on_cpu.lse).mean(-1)
    assert kept.abs().max() < 0.05


@pytest.mark.parametrize("n", [65, 1000, 3001])
def test_the_gpu_computes_what_the_cpu_path_computes(n: int, mixed: SparsePrefill) -> None:
    q, k, v = (x.half() for x in layer_inputs(max(n, 701)))
    q, k, v = q[:, :, :n], k[:, :, :n], v[:, :, :n]
    on_cpu = mixed.profile(q.float(), k.float(), v.float(), scale=0.125, layer=0)
    on_gpu = mixed.profile(q.cuda(), k.cuda(), v.cuda(), scale=0.125, layer=0)
    error = (on_gpu.out.cpu().float() - on_cpu.out).norm() / on_cpu.out.norm()
    # The last chosen columns and slashes are near ties and may differ by rounding.
    assert error < 0.02
    assert torch.allclose(on_gpu.density, on_cpu.density, atol=0.02)


def test_repeated_runs_give_the_same_bits(mixed: SparsePrefill) -> None:
    q, k, v = (x.cuda().bfloat16() for x in layer_inputs(3001))
    first = mixed.attend(q, k, v, scale=0.125, layer=0)
    for _ in range(3):
        assert torch.equal(mixed.attend(q, k, v, scale=0.125, layer=0), first)


@pytest.mark.parametrize("name", ["oracle", "random"])
def test_a_yardstick_computes_what_it_computes_on_the_cpu(name: str) -> None:
    q, k, v = (x.half() for x in layer_inputs(1500))
    method = yardstick(name, 0.4)
    on_cpu = method.profile(q.float(), k.float(), v.float(), scale=0.125, layer=0)
    on_gpu = method.profile(q.cuda(), k.cuda(), v.cuda(), scale=0.125, layer=0)
    (ours,), (theirs,) = on_gpu.indices, on_cpu.indices
    different = ours.mask(1500, 1500).cpu() != theirs.mask(1500, 1500)
    # Chance is a hash in whole numbers; equal masses may fall either way by rounding.
    assert different.double().mean() <= (0 if name == "random" else 1e-2)
    if not different.any():
        assert (on_gpu.out.cpu().float() - on_cpu.out).norm() < 2e-3 * on_cpu.out.norm()
    assert torch.allclose(on_gpu.density, on_cpu.density, atol=1e-2)
