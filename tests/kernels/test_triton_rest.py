"""The small steps of a layer against float64, for sizes that fill no program evenly."""

import pytest
import torch

from minference_green.kernels import reference, rest

EPS = 1e-5


def drawn(shape, dtype, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device=device, dtype=dtype)


def assert_near(got, want, roundings):
    """Within so many roundings of the dtype, relative to the size of the whole."""
    assert torch.isfinite(got).all()
    error = (got.double().cpu() - want).norm() / want.norm()
    assert error <= roundings * torch.finfo(got.dtype).eps


# One row of one element; a head's width, many to a program; a ragged width; 4096 as in an 8B model.
@pytest.mark.parametrize("shape", [(1, 1), (7, 3, 128), (2, 13, 111), (5, 4096)])
def test_a_norm_is_the_formula_of_every_row(shape, dtype, device):
    x, weight = drawn(shape, dtype, device), drawn(shape[-1:], dtype, device, 1)
    got = rest.rms_norm(x, weight, EPS)
    assert_near(got, reference.rms_norm(x.cpu(), weight.cpu(), EPS), 1.5)
    assert got.shape == x.shape


def test_a_row_of_zeros_stays_zero(dtype, device):
    x = torch.zeros(3, 64, dtype=dtype, device=device)
    assert not rest.rms_norm(x, torch.ones_like(x[0]), EPS).any()


@pytest.mark.parametrize("shape", [(1, 1), (3, 1000), (2, 63, 111)])
def test_a_gate_is_written_over_its_own_input(shape, dtype, device):
    gate, up = drawn(shape, dtype, device), drawn(shape, dtype, device, 1)
    want = reference.gated_silu(gate.cpu(), up.cpu())
    got = rest.gated_silu(gate, up)
    assert got is gate
    assert_near(got, want, 1.0)


def test_large_gates_neither_overflow_nor_lose_their_sign(dtype, device):
    gate = torch.tensor([-200.0, -30.0, 0.0, 30.0, 200.0], dtype=dtype, device=device)
    got = rest.gated_silu(gate.clone(), torch.ones_like(gate))
    assert got.tolist()[2:] == [0.0, 30.0, 200.0]
    assert all(-1e-10 <= x <= 0 for x in got.tolist()[:2])


@pytest.mark.parametrize("head_dim", [64, 96, 128])
@pytest.mark.parametrize("n", [1, 7, 111])
def test_queries_are_turned_in_the_layout_they_came_in(head_dim, n, dtype, device):
    # As a projection leaves them: heads side by side in a token's row.
    x = drawn((2, n, 3, head_dim), dtype, device).transpose(1, 2)
    angle = torch.rand(2, n, head_dim // 2, generator=torch.Generator().manual_seed(2)) * 6
    cos, sin = (
        f(torch.cat([angle, angle], -1)).to(device=device, dtype=dtype)
        for f in (torch.cos, torch.sin)
    )
    got = rest.rotate(x, cos, sin)
    assert got.stride() == x.stride()
    assert_near(got, reference.rotate(x.cpu(), cos.cpu(), sin.cpu()), 1.0)


def test_one_row_of_angles_serves_every_prompt_of_a_batch(dtype, device):
    x = drawn((3, 2, 5, 64), dtype, device)
    cos, sin = drawn((1, 5, 64), dtype, device, 1), drawn((1, 5, 64), dtype, device, 2)
    got = rest.rotate(x, cos, sin)
    assert_near(got, reference.rotate(x.cpu(), cos.cpu(), sin.cpu()), 1.0)


def test_what_does_not_fit_is_refused_with_its_value(dtype, device):
    x = drawn((2, 3, 64), dtype, device)
    with pytest.raises(ValueError, match=r"weight must have shape \(64,\), got \(32,\)"):
        rest.rms_norm(x, x[0, 0, :32].contiguous(), EPS)
    with pytest.raises(ValueError, match=r"weight must be bfloat16 or float16, got torch\.float64"):
        rest.rms_norm(x, x[0, 0].double(), EPS)
    other = torch.float16 if dtype != torch.float16 else torch.bfloat16
    with pytest.raises(ValueError, match=f"up must have the dtype of gate, got {other}"):
        rest.gated_silu(x, x.to(other))
    with pytest.raises(ValueError, match="x must be contiguous and not empty"):
        rest.rms_norm(x.transpose(0, 1), x[0, 0].contiguous(), EPS)
    with pytest.raises(ValueError, match="x must be contiguous and not empty"):
        rest.rms_norm(x[:0], x[0, 0].contiguous(), EPS)
    with pytest.raises(ValueError, match=r"gate and up must agree, got \(2, 3, 64\) and \(3, 64\)"):
        rest.gated_silu(x, x[0].contiguous())
    with pytest.raises(ValueError, match=r"cos must be .* got .*\(2, 3, 32\)"):
        rest.rotate(x[:, None], x[..., :32], x)
    with pytest.raises(ValueError, match=r"head_dim of x must be one of .*, got 32"):
        rest.rotate(x[:, None, :, :32], x[..., :32], x[..., :32])
