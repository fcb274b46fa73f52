"""The search for head patterns: what a candidate costs, and who gets what."""

import torch

from minference_green.methods.patterns import AShape, BlockSparse, Probed
from training.patterns import BANDS, PROBED, choose, probing


def test_probing_costs_a_share_of_half_of_dense_attention() -> None:
    """All 64 rows would be all products of queries and keys, which are half the work."""
    assert [probing(Probed(3, rows)) for rows in (64, 16, 4)] == [0.5, 0.125, 0.03125]
    assert probing(BlockSparse(3)) == probing(AShape()) == 0


def test_only_the_search_for_probe_tries_probed_heads() -> None:
    assert not any(isinstance(pattern, Probed) for pattern in BANDS)
    assert any(isinstance(pattern, Probed) for pattern in PROBED)


def test_budget_goes_to_the_heads_that_gain_most_by_it() -> None:
    """Three heads, a cheap and a dear candidate each; there is enough for one dear one."""
    error = torch.tensor([[0.1, 0.05], [0.9, 0.1], [0.3, 0.2]])
    cost = torch.tensor([[0.1, 0.4]] * 3)
    assert choose(error, cost, 0.2).tolist() == [0, 1, 0]
    assert choose(error, cost, 0.1).tolist() == [0, 0, 0]
    assert choose(error, cost, 0.4).tolist() == [1, 1, 1]
