"""Attention that peaks at chosen distances, from biases and RoPE alone.

Write ``theta_f`` for the angle by which rotary pair ``f`` turns per token. With a key bias
``(w, 0)`` on the two halves of every pair and a query bias
``a_f / w * (cos(o theta_f), -sin(o theta_f))``, the logit of key ``j`` for query ``i`` is
``sum_f a_f cos((i - j - o) theta_f)``: it peaks at distance ``i - j = o``.

Amplitudes ``a_f`` follow a bell over ``log theta_f`` around a width ``W``. The peak then falls
off within ``W`` tokens; what ripple rises far away is lower and as wide. A budget of a few ``W``
distances therefore holds nearly all mass in a few clusters. One head can have two peaks,
equally high; with more, each would stand on the others' ripple at a height of its own.
"""

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

PEAK = 18.0
"""Logit of a peak over that of far keys: e^18 is 500 times the keys of a 128k prompt."""

SLOW_PAIRS = 5
"""Slowest rotary pairs, which peaks leave to marks that must be seen from any distance."""


@dataclass(frozen=True)
class Peak:
    """A shape of peak, its logit at distance 0 being ``PEAK`` over the background."""

    theta: Tensor
    """Radians per token of every rotary pair, float64 ``[pairs]``."""
    amplitude: Tensor
    """Share of the logit that each pair carries, float64 ``[pairs]``, sum 1."""
    mass: float
    """Sum over one flank, the top included, of ``exp(logit - PEAK)``."""
    squares: float
    """Sum of the squares of the same."""


@cache
def peak(rope_theta: float, head_dim: int, width: float, spread: float) -> Peak:
    """The peak of ``width`` tokens; a bell of small ``spread`` flattens the top and rings farther.

    ``spread`` is the bell's standard deviation in natural logarithms of the wavelength.
    """
    theta = rope_theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    amplitude = torch.exp(-(torch.log(theta * width) ** 2) / (2 * spread**2))
    # A pair that hardly turns within the peak's reach would only lift the background.
    amplitude[theta * width < 1 / 30] = 0
    amplitude[-SLOW_PAIRS:] = 0
    amplitude /= amplitude.sum()
    flank = torch.exp(PEAK * (_waves(theta, amplitude, range(math.ceil(8 * width))) - 1))
    return Peak(theta, amplitude, float(flank.sum()), float(flank.square().sum()))


def query_bias(shape: Peak, offsets: tuple[int, ...], *, key_bias: float) -> Tensor:
    """Bias of the two halves of every pair, float64 ``[2, pairs]``, that peaks at ``offsets``.

    For a key bias of ``key_bias`` on first halves; in units of the logit before the division
    by the square root of the head's width. Raises ``ValueError`` unless one or two offsets.
    """
    if not 1 <= len(offsets) <= 2:
        raise ValueError(f"a head can have one or two peaks, got offsets {offsets}")
    # Each of two peaks stands on the other's ripple, which is the same at both.
    height = _waves(shape.theta, shape.amplitude, [o - offsets[0] for o in offsets]).sum()
    turned = torch.tensor(offsets, dtype=torch.float64)[:, None] * shape.theta
    directions = torch.stack([turned.cos().sum(0), -turned.sin().sum(0)])
    return directions * shape.amplitude * (PEAK / height / key_bias)


def _waves(theta: Tensor, amplitude: Tensor, distances: range | list[int]) -> Tensor:
    """``sum_f a_f cos(distance theta_f)`` for every distance."""
    return (torch.tensor(distances, dtype=torch.float64)[:, None] * theta).cos() @ amplitude
