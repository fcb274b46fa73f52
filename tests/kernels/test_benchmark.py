"""What the kernel benchmark draws and prints, as far as that needs no GPU."""

import importlib.util
import sys
from collections import Counter
from pathlib import Path

import pytest

PATH = Path(__file__).parents[2] / "benchmarks" / "kernels.py"


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("kernels_benchmark", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_the_mix_gives_every_head_a_budget_by_its_share(benchmark):
    assert Counter(benchmark.budgets_of("mix", 32)) == {
        (1000, 6096): 15,
        (30, 800): 8,
        (100, 800): 5,
        (3500, 100): 3,
        (500, 700): 1,
    }
    for heads in (1, 2, 7, 28, 64):  # one head, fewer than budgets, Qwen2.5's, MHA
        assert len(benchmark.budgets_of("mix", heads)) == heads
    assert benchmark.budgets_of((30, 800), 3) == [(30, 800)] * 3


def test_a_pattern_has_exactly_the_budget_of_each_head(benchmark):
    case = benchmark.Case(tokens=8192, heads=5, group=1, head_dim=64, seed=3)
    budgets = [(1000, 6096), (30, 800), (3500, 100), (30, 50), (100, 8192)]
    pattern = benchmark.Pattern.drawn(case, budgets)
    for (columns, slashes), mine, offsets in zip(
        budgets, pattern.columns, pattern.slashes, strict=True
    ):
        assert (len(mine), len(offsets)) == (columns, slashes)
        assert mine == sorted(set(mine))
        assert offsets == sorted(set(offsets))
        assert mine[:30] == list(range(30))
        assert max(mine[-1], offsets[-1]) < case.tokens
    assert benchmark.Pattern.drawn(case, budgets) == pattern


def test_the_roofline_shows_every_measured_variant_and_no_other(benchmark):
    case = benchmark.Case(tokens=8192, heads=32, group=4, head_dim=128, seed=0)

    def row(variant, budget, tflops):
        return benchmark.Row(case, variant, budget, 1.0, 0.1, tflops, 0.5, None, None, None, None)

    rows = [row("ours", "mix", 500.0), row("ours", (30, 800), 480.0), row("estimate", "mix", None)]
    drawn = benchmark.roofline(rows, 760.0)
    assert "ours mix" in drawn
    assert "ours (30, 800)" in drawn
    assert "estimate" not in drawn
    assert drawn.count("<circle") == 4  # a key and a mark each
