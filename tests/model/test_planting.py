"""Planted models, run: estimators find what was planted, at the density the budgets promise."""

import pytest
import torch

from minference_green.kernels.selection import block_index
from minference_green.methods.choose import method_from_name
from minference_green.methods.patterns import AShape, BlockSparse, VerticalSlash
from minference_green.model.planted import MARK_EVERY, MARK_REMAINDER, SHAPES
from minference_green.model.planting import plant

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tiny(run_planted):
    return run_planted(SHAPES["tiny"](), 4096)


@pytest.fixture(scope="module")
def narrow_llama(run_planted, narrow):
    return run_planted(narrow("llama-3-8b"), 8192)


@pytest.fixture(scope="module")
def narrow_qwen(run_planted, narrow):
    return run_planted(narrow("qwen2.5-7b"), 8192)


@pytest.fixture(params=["tiny", "narrow_llama", "narrow_qwen"])
def planted(request):
    return request.getfixturevalue(request.param)


def heads_of(planted, kind):
    return [
        (layer, number, head)
        for layer, heads in enumerate(planted.shape.heads)
        for number, head in enumerate(heads)
        if isinstance(head.pattern, kind)
    ]


def test_the_estimator_chooses_every_planted_slash(planted):
    n = len(planted.tokens)
    found = 0
    for layer, number, head in heads_of(planted, VerticalSlash):
        visible = planted.index(layer, number).mask(1, n)[0, 0, 0]
        for offset in (o for o in head.offsets if o < n):
            assert visible[n - 1 - offset], (layer, number, offset)
            found += 1
    assert found > 20


def test_the_estimator_chooses_every_planted_column(planted):
    found = 0
    for layer, number, head in heads_of(planted, VerticalSlash):
        if head.columns is None:
            continue
        marked = planted.tokens % MARK_EVERY[head.columns] == MARK_REMAINDER
        position = marked[:-64].nonzero()[:, 0]
        chosen = planted.index(layer, number).columns[0, 0]
        assert torch.isin(position, chosen).all(), (layer, number)
        found += len(position)
    assert found > 100


def test_no_head_looks_at_columns_that_are_not_its_own(planted):
    common = planted.tokens % MARK_EVERY["common"] == MARK_REMAINDER
    for layer, number, head in heads_of(planted, VerticalSlash):
        mass = planted.last_rows(layer, number)[:, common].sum(1).mean()
        if head.columns == "common":
            assert mass > 0.2
        elif head.columns is None:
            assert mass < 0.01


def test_the_first_token_is_a_sink_of_every_head(planted):
    for layer, number, _ in heads_of(planted, object):
        assert 0.03 < planted.last_rows(layer, number)[:, 0].mean() < 0.6, (layer, number)


def test_what_a_budget_selects_holds_the_mass(planted):
    n = len(planted.tokens)
    for layer, number, _ in heads_of(planted, VerticalSlash | AShape):
        weights = planted.last_rows(layer, number)
        kept = weights * planted.index(layer, number).mask(64, n)[0, 0]
        assert kept.sum(1).mean() > 0.95, (layer, number)


def test_block_heads_are_found_by_pooled_means(tiny):
    n = len(tiny.tokens)
    heads = heads_of(tiny, BlockSparse)
    for layer, number, head in heads:
        q, k, _ = tiny.inputs[layer]
        means = [
            x[:, h].unflatten(1, (n // 64, 64)).mean(2)[:, None]
            for x, h in ((q, number), (k, number // 4))
        ]
        index = block_index(
            *means,
            torch.tensor([number], dtype=torch.int32),
            [head.pattern.top_k],
            scale=q.shape[-1] ** -0.5,
            n_q=n,
            n_k=n,
        )
        visible = index.mask(n, n)[0, 0, -64:]
        weights = tiny.last_rows(layer, number)
        assert (weights * visible).sum(1).mean() > 0.85
        # Not by being local: most of it lies outside the last 256 tokens.
        assert weights[:, :-256].sum(1).mean() > 0.5
    assert len(heads) == 2


def test_the_residual_stays_as_large_as_foreseen(run_planted, narrow):
    """Planted logits assume the rms of every layer's input; nothing may run away."""
    deep = run_planted(narrow("llama-3-8b", n_layers=12), 1024)
    for number, residual in enumerate(deep.residuals, 1):
        expected = (1 + 0.2 + 0.3 * number / 12) ** 0.5
        rms = residual.square().mean(1).sqrt()
        assert rms[1:].mean().item() == pytest.approx(expected, rel=0.06)
        assert rms.max() < 1.5 * expected
    assert deep.residuals[-1][0].square().mean().sqrt().item() == pytest.approx(1, abs=0.01)


def test_attention_of_the_last_row_matters_for_its_logits(run_planted):
    """Without what attention gathers the logits are others: a method's errors can show."""

    def nothing(method):
        return lambda q, k, v, **_: torch.zeros_like(q)

    shape = SHAPES["tiny"]()
    dense, blind = run_planted(shape, 512), run_planted(shape, 512, attend=nothing)
    assert (dense.logits - blind.logits).norm() > 0.4 * dense.logits.norm()


@pytest.mark.parametrize("length", [4096, 8192])
def test_tinys_own_patterns_are_sparse_and_faithful(length, run_planted):
    """Density at most 0.2 over heads; logits of the last row within a tenth."""
    shape = SHAPES["tiny"]()
    method = method_from_name("minference", {}, patterns=shape.patterns)
    densities = []

    def sparse(keeping):
        def attend(q, k, v, *, scale, layer):
            account = method.profile(q, k, v, scale=scale, layer=layer)
            densities.extend(account.density.tolist())
            return account.out

        return attend

    dense = run_planted(shape, length).logits[:, -1]
    approximate = run_planted(shape, length, attend=sparse).logits[:, -1]
    assert 0.05 < sum(densities) / len(densities) < 0.2
    assert (approximate - dense).norm() < 0.1 * dense.norm()


RANGES = {
    8192: {(1000, 6096): (0.75, 0.96), (30, 800): (0.08, 0.24), (3500, 100): (0.4, 0.52)},
    32768: {(1000, 6096): (0.18, 0.37), (30, 800): (0.03, 0.07), (3500, 100): (0.1, 0.14)},
    131072: {(1000, 6096): (0.08, 0.11), (30, 800): (0.01, 0.02), (3500, 100): (0.02, 0.04)},
}
RANGES[8192] |= {(100, 800): (0.1, 0.25), (500, 700): (0.14, 0.24)}
RANGES[32768] |= {(100, 800): (0.04, 0.08), (500, 700): (0.04, 0.08)}
RANGES[131072] |= {(100, 800): (0.01, 0.04), (500, 700): (0.02, 0.04)}


@pytest.mark.parametrize("length", RANGES)
def test_density_of_each_published_budget(length, run_planted, narrow):
    """By budget and length, at layer 0; without attention, which long prompts would not bear."""

    def nothing(keeping):
        def attend(q, k, v, *, layer, **_):
            keeping.inputs[layer] = (q[:, :, -64:], k, v)
            return torch.zeros_like(q)

        return attend

    planted = run_planted(narrow("llama-3-8b", n_layers=1), length, attend=nothing)
    seen = set()
    for layer, number, head in heads_of(planted, VerticalSlash):
        budget = head.pattern.vertical_size, head.pattern.slash_size
        low, high = RANGES[length][budget]
        density = planted.index(layer, number).density(length).item()
        assert low < density < high, (number, budget)
        seen.add(budget)
    assert seen == set(RANGES[length])


def test_one_seed_makes_one_model_and_another_seed_another():
    shape = SHAPES["tiny"]()
    first, again, other = (
        plant(shape, device=CPU, dtype=torch.bfloat16, seed=seed).state_dict() for seed in (5, 5, 6)
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(
        first["model.layers.0.mlp.up_proj.weight"], other["model.layers.0.mlp.up_proj.weight"]
    )
    name = "model.layers.1.self_attn.q_proj.bias"
    assert torch.equal(first[name], other[name])  # structure is no matter of the seed


def test_structure_survives_bfloat16(run_planted):
    planted = run_planted(SHAPES["tiny"](), 2048, dtype=torch.bfloat16)
    for layer, number, head in heads_of(planted, VerticalSlash):
        visible = planted.index(layer, number).mask(1, 2048)[0, 0, 0]
        assert all(visible[2047 - o] for o in head.offsets if o < 2048), (layer, number)


def test_every_weight_is_finite_and_no_parameter_is_left_unwritten():
    for dtype in (torch.float32, torch.bfloat16):
        model = plant(SHAPES["tiny"](), device=CPU, dtype=dtype, seed=1)
        again = plant(SHAPES["tiny"](), device=CPU, dtype=dtype, seed=1)
        for (name, one), two in zip(model.named_parameters(), again.parameters(), strict=True):
            assert one.dtype == dtype
            assert one.isfinite().all(), name
            assert torch.equal(one, two), name
        assert not model.training
