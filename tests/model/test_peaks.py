"""Logits of bare biases under RoPE, computed as a model would."""

import pytest
import torch

from minference_green.kernels.index import PIECE
from minference_green.kernels.reference import cut_pieces
from minference_green.model.peaks import PEAK, SLOW_PAIRS, peak, query_bias

KEY_BIAS = 6.0


def logits(bias, theta, query, keys):
    """Logits of keys at positions ``keys`` for a query at ``query``, rotated by hand."""

    def rotated(first, second, position):
        angle = position[:, None] * theta
        return torch.cat(
            [
                first * angle.cos() - second * angle.sin(),
                second * angle.cos() + first * angle.sin(),
            ],
            dim=1,
        )

    q = rotated(bias[0], bias[1], torch.tensor([float(query)], dtype=torch.float64))
    k = rotated(torch.full_like(theta, KEY_BIAS), torch.zeros_like(theta), keys.double())
    return (q @ k.T)[0]


@pytest.mark.parametrize(
    ("rope_theta", "head_dim", "width", "offset"),
    [
        (3580165449.0, 128, 240.0, 5000),
        (3580165449.0, 128, 1830.0, 700),
        (1e6, 128, 240.0, 20000),
        (1e6, 64, 48.0, 1000),
    ],
)
def test_two_peaks_are_as_high_as_planned_and_where_planned(rope_theta, head_dim, width, offset):
    shape = peak(rope_theta, head_dim, width, 1.2)
    bias = query_bias(shape, (0, offset), key_bias=KEY_BIAS)
    n = 32768
    at_distance = logits(bias, shape.theta, n - 1, torch.arange(n)).flip(0)
    assert at_distance[0].item() == pytest.approx(PEAK, rel=1e-9)
    assert at_distance[offset].item() == pytest.approx(PEAK, rel=1e-9)
    assert at_distance.max() < PEAK + 1  # ripple of one peak never towers over the other


@pytest.mark.parametrize("offset", [700, 5000, 20000])
def test_a_budget_of_a_few_widths_holds_the_mass_in_few_clusters(offset):
    budget = 800
    shape = peak(3580165449.0, 128, 0.3 * budget, 1.2)
    bias = query_bias(shape, (0, offset), key_bias=KEY_BIAS)
    at_distance = logits(bias, shape.theta, 32767, torch.arange(32768)).flip(0)
    best = at_distance.topk(budget).indices
    assert torch.softmax(at_distance, 0)[best].sum() > 0.95
    pieces = cut_pieces(best.sort().values.tolist())
    assert len(pieces) * PIECE <= 2 * budget  # scattered, they would be 800 times TILE


def test_one_peak_is_local_decay():
    shape = peak(1e6, 64, 48.0, 1.2)
    bias = query_bias(shape, (0,), key_bias=KEY_BIAS)
    at_distance = logits(bias, shape.theta, 999, torch.arange(1000)).flip(0)
    assert at_distance.argmax() == 0
    mass = torch.exp(at_distance[: 8 * 48] - PEAK).sum()
    assert mass.item() == pytest.approx(shape.mass, rel=1e-9)


def test_a_narrow_bell_flattens_the_top():
    flat, sharp = peak(1e6, 64, 256.0, 0.8), peak(1e6, 64, 256.0, 1.6)
    assert flat.squares / flat.mass**2 < sharp.squares / sharp.mass**2


def test_slow_pairs_are_left_free():
    shape = peak(1e6, 64, 20000.0, 1.2)
    assert not shape.amplitude[-SLOW_PAIRS:].any()
    assert shape.amplitude[-SLOW_PAIRS - 1] > 0


@pytest.mark.parametrize("offsets", [(), (0, 10, 20)])
def test_more_or_fewer_than_two_peaks_are_refused(offsets):
    with pytest.raises(ValueError, match=r"one or two peaks, got offsets \("):
        query_bias(peak(1e6, 64, 48.0, 1.2), offsets, key_bias=KEY_BIAS)
