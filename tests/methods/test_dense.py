"""Dense attention by named backends, and the choice among them by time."""

import pytest
import torch
from torch import Tensor

from minference_green.errors import UsageError
from minference_green.kernels import reference
from minference_green.methods import dense
from minference_green.methods.dense import BackendTimings, Dense, time_backends
from minference_green.methods.method import ProfiledMethod

SCALE = 0.2


def inputs(n_q: int, n_k: int) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(n_k)
    return tuple(torch.randn(2, h, n, 64, generator=g) for h, n in ((4, n_q), (2, n_k), (2, n_k)))


# A whole prompt, one token of decode, a question, one token after one, a chunk past the tiles.
@pytest.mark.parametrize(
    ("n_q", "n_k"), [(1, 1), (65, 65), (1, 65), (7, 65), (1, 2), (64, 300), (299, 300)]
)
@pytest.mark.parametrize("backend", [None, "flash", "math"])
def test_queries_are_the_last_positions_whatever_the_backend(
    n_q: int, n_k: int, backend: str | None
) -> None:
    q, k, v = inputs(n_q, n_k)
    out = Dense(backend).attend(q, k, v, scale=SCALE, layer=0)
    mask = reference.causal_mask(n_q, n_k).expand(2, 4, -1, -1)
    want, _ = reference.attention(q, k, v, mask, scale=SCALE)
    torch.testing.assert_close(out.double(), want, rtol=0, atol=1e-5)


def test_dense_computes_every_pair_and_estimates_nothing() -> None:
    method = Dense("flash")
    assert isinstance(method, ProfiledMethod)
    profile = method.profile(*inputs(65, 65), scale=SCALE, layer=0)
    assert torch.equal(profile.density, torch.ones(4, dtype=torch.float64))
    assert (profile.estimate_seconds, profile.index_seconds) == (0.0, 0.0)
    assert 0 < profile.attend_seconds < 60
    assert (method.name, method.parameters) == ("dense", {"backend": "flash"})


def test_a_backend_that_does_not_exist_is_refused_with_those_that_do() -> None:
    valid = "cudnn, flash, efficient, math"
    with pytest.raises(UsageError, match=f"'flesh' is not a dense backend; choose from {valid}"):
        Dense("flesh")


def test_a_backend_that_refuses_the_inputs_is_an_error_and_no_other_runs() -> None:
    """There is no cuDNN on a CPU."""
    with pytest.raises(UsageError, match=r"cudnn refuses q \[2, 4, 65, 64\].* on this cpu device"):
        Dense("cudnn").attend(*inputs(65, 65), scale=SCALE, layer=0)


def test_every_backend_of_the_device_is_timed_and_the_fastest_is_the_least_time() -> None:
    timings = time_backends(*inputs(300, 300), scale=SCALE)
    assert list(timings.seconds) == ["flash", "math"]
    assert timings.reasons == {}
    assert all(seconds is not None and seconds > 0 for seconds in timings.seconds.values())
    assert timings.seconds[timings.fastest] == min(timings.seconds.values())


def test_the_fastest_is_chosen_by_time_and_never_by_name() -> None:
    timings = BackendTimings({"cudnn": None, "flash": 2.0, "math": 1.0}, {"cudnn": "no GPU"})
    assert timings.fastest == "math"


def test_a_backend_that_refuses_is_listed_with_its_reason() -> None:
    """On the CPU the fused kernel wants one head_dim for keys and values."""
    q, k, v = inputs(65, 65)
    timings = time_backends(q, k, v[..., :32], scale=SCALE)
    assert timings.seconds["flash"] is None
    assert timings.reasons["flash"]
    assert timings.fastest == "math"


def test_where_all_refuse_every_reason_is_told() -> None:
    timings = BackendTimings({"flash": None, "math": None}, {"flash": "fp8", "math": "too large"})
    with pytest.raises(UsageError, match="flash: fp8; math: too large"):
        _ = timings.fastest


def test_scores_that_would_not_fit_are_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """2 x 4 x 300 x 300 scores, three times in fp32, are 8.6 MB."""
    q, k, v = inputs(300, 300)
    needed = 3 * 2 * 4 * 300 * 300 * 4
    monkeypatch.setattr(dense, "free_bytes", lambda _: 2 * needed)
    assert time_backends(q, k, v, scale=SCALE).seconds["math"] is not None
    monkeypatch.setattr(dense, "free_bytes", lambda _: 2 * needed - 1)
    timings = time_backends(q, k, v, scale=SCALE)
    assert timings.seconds["math"] is None
    assert timings.reasons["math"] == "would hold 0.0 GiB of scores, 0.0 GiB are free"
