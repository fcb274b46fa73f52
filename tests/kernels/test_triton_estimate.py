"""Estimators against their oracles."""

import pytest
import torch

from minference_green.kernels import estimate, reference
from minference_green.kernels.estimate import UNITS, block_means, row_scores

SIZES = (1, 7, 63, 64, 65, 111, 300, 1000)


def last(n, count=64):
    return list(range(max(0, n - count), n))


def spread(n, count=64):
    """One row in the middle of each of ``count`` equal parts, and the last."""
    return sorted({*((2 * r + 1) * n // (2 * count) for r in range(count - 1)), n - 1})


def assert_masses(prompt, heads, rows, scores, **skips):
    q, k = prompt.q.cpu(), prompt.k.cpu()
    columns, slashes = reference.row_scores(q, k, rows, scale=prompt.scale, **skips)
    listed = heads.cpu().long()
    # Sums of at most 64 fp32 probabilities, whose exponents were rounded once; slashes may be
    # rounded to units as well, each probability by half a unit at most.
    for got, wanted, atol in zip(
        scores, (columns, slashes), (1e-6, 1e-6 + 0.5 * len(rows) / UNITS), strict=True
    ):
        torch.testing.assert_close(got.cpu().double(), wanted[:, listed], rtol=2e-4, atol=atol)


def both_heads(prompt):
    return torch.tensor([0, 1], dtype=torch.int32, device=prompt.q.device)


@pytest.mark.parametrize("choose", [last, spread])
@pytest.mark.parametrize("n", SIZES)
def test_masses_of_awkward_lengths_match_the_oracle(n, choose, dtype, make_prompt):
    prompt = make_prompt(n, dtype=dtype, columns=[0, n // 3], offsets=[n // 2])
    heads, rows = both_heads(prompt), choose(n)
    scores = row_scores(prompt.q, prompt.k, heads, rows, scale=prompt.scale)
    assert_masses(prompt, heads, rows, scores)


@pytest.mark.parametrize("rows", [1, 13, 63, 64])
@pytest.mark.parametrize(("n_q", "n_k"), [(10, 200), (150, 150), (65, 2300)])
def test_masses_of_any_number_of_last_rows_match_the_oracle(rows, n_q, n_k, dtype, make_prompt):
    """2300 keys are more than one program's share."""
    prompt = make_prompt(n_q, n_k, dtype=dtype, offsets=[n_k // 2])
    heads = torch.tensor([1], dtype=torch.int32, device=prompt.q.device)
    listed = last(n_k, min(rows, n_q))
    scores = row_scores(prompt.q, prompt.k, heads, listed, scale=prompt.scale)
    assert_masses(prompt, heads, listed, scores)


@pytest.mark.parametrize(("n_q", "n_k", "rows"), [
    (200, 200, [0]),  # a first row alone sees one key
    (200, 200, [199]),  # one row is the last row
    (200, 200, [3, 4, 5, 6]),  # neighbours, but not the last ones: they share diagonals
    (1100, 1100, [0, 63, 64, 65, 500, 1000, 1090, 1091, 1092, 1099]),
    (70, 1100, [1030, 1031, 1060, 1098]),  # the last row need not be listed
])  # fmt: skip
def test_masses_of_any_list_of_rows_match_the_oracle(n_q, n_k, rows, dtype, make_prompt):
    prompt = make_prompt(n_q, n_k, dtype=dtype, columns=[1], offsets=[n_k // 3])
    heads = both_heads(prompt)
    scores = row_scores(prompt.q, prompt.k, heads, rows, scale=prompt.scale)
    assert_masses(prompt, heads, rows, scores)


# 1 and 3: programs shorter than what they compute again; 1300 keys: more partial sums than are
# loaded at once.
@pytest.mark.parametrize("least", [1, 3])
@pytest.mark.parametrize("choose", [last, spread])
def test_masses_do_not_depend_on_how_many_programs_share_the_keys(
    least, choose, dtype, make_prompt, monkeypatch
):
    prompt = make_prompt(1300, dtype=dtype, heads=3, columns=[700], offsets=[64, 900])
    heads = torch.tensor([0, 1, 2], dtype=torch.int32, device=prompt.q.device)
    rows = choose(1300)
    monkeypatch.setattr(estimate, "LEAST_TILES", least)
    scores = row_scores(prompt.q, prompt.k, heads, rows, scale=prompt.scale)
    assert_masses(prompt, heads, rows, scores)


@pytest.mark.parametrize("choose", [last, spread])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 1), (6, 2)])
def test_heads_beside_each_other_need_not_share_their_keys(
    heads, kv_heads, choose, dtype, make_prompt
):
    """In any order and any number, also where every head has keys of its own."""
    prompt = make_prompt(190, dtype=dtype, heads=heads, kv_heads=kv_heads, columns=[9])
    whole = torch.arange(heads, dtype=torch.int32, device=prompt.q.device)
    want = row_scores(prompt.q, prompt.k, whole, choose(190), scale=prompt.scale)
    for listed in ([3], [3, 0], [0, 3, 1], [2, 1, 3, 0]):
        some = torch.tensor(listed, dtype=torch.int32, device=prompt.q.device)
        got = row_scores(prompt.q, prompt.k, some, choose(190), scale=prompt.scale)
        assert_masses(prompt, some, choose(190), got)
        if prompt.q.is_cuda:  # NumPy's products round a row by where it stands, on some CPUs
            assert all(torch.equal(a, b[:, listed]) for a, b in zip(got, want, strict=True))
    assert_masses(prompt, whole, choose(190), want)


@pytest.mark.parametrize("choose", [last, spread])
@pytest.mark.parametrize(("n_q", "n_k"), [(20, 20), (300, 300), (150, 1000)])
@pytest.mark.parametrize("skips", [
    {"skip_offsets": 100, "skip_columns": 30},
    {"skip_offsets": 1, "skip_columns": 0},
    {"skip_offsets": 0, "skip_columns": 65},
])  # fmt: skip
def test_skipped_offsets_give_columns_nothing_and_skipped_columns_offsets(
    choose, n_q, n_k, skips, dtype, make_prompt
):
    prompt = make_prompt(n_q, n_k, dtype=dtype, columns=[0], offsets=[3])
    heads = both_heads(prompt)
    rows = [row + n_k - n_q for row in choose(n_q)]
    scores = row_scores(prompt.q, prompt.k, heads, rows, scale=prompt.scale, **skips)
    assert_masses(prompt, heads, rows, scores, **skips)


@pytest.mark.parametrize("choose", [last, spread])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_masses_of_groups_batches_and_listed_heads_match_the_oracle(
    head_dim, choose, dtype, make_prompt
):  # fmt: skip
    prompt = make_prompt(
        130, dtype=dtype, batch=2, heads=6, kv_heads=2, head_dim=head_dim, columns=[5]
    )
    heads = torch.tensor([4, 0, 3], dtype=torch.int32, device=prompt.q.device)
    scores = row_scores(prompt.q, prompt.k, heads, choose(130), scale=prompt.scale)
    assert_masses(prompt, heads, choose(130), scores)


def test_strided_inputs_give_the_same_masses(dtype, make_prompt):
    """As a model lays them out, and as a slice of a longer prompt."""
    prompt = make_prompt(500, dtype=dtype, columns=[5])
    heads, rows = both_heads(prompt), spread(300)
    q, k = prompt.q[:, :, :300], prompt.k[:, :, :300]
    want = row_scores(q.contiguous(), k.contiguous(), heads, rows, scale=prompt.scale)
    interleaved = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k)]
    for inputs in ([q, k], interleaved):
        got = row_scores(*inputs, heads, rows, scale=prompt.scale)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("choose", [last, spread])
def test_the_masses_of_a_row_add_up_to_one_both_ways(choose, dtype, make_prompt):
    prompt = make_prompt(700, dtype=dtype)
    heads = both_heads(prompt)
    for scores in row_scores(prompt.q, prompt.k, heads, choose(700, 40), scale=prompt.scale):
        total = scores.double().sum(-1).cpu()
        torch.testing.assert_close(total, torch.full_like(total, 40.0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("choose", [last, spread])
def test_the_same_input_gives_the_same_bits(choose, dtype, make_prompt):
    prompt = make_prompt(2000, dtype=dtype)
    first, second = (
        row_scores(prompt.q, prompt.k, both_heads(prompt), choose(2000), scale=prompt.scale)
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_rows_that_agree_on_one_key_or_one_distance_do_not_overflow(dtype, make_prompt):
    """All 64 rows put their whole mass on distance 0: the largest sum there is."""
    prompt = make_prompt(640, dtype=dtype, offsets=[])
    heads, rows = both_heads(prompt), spread(640)
    keys = reference.expand_kv(prompt.k, 2)
    _, slashes = row_scores(keys * 30, prompt.k, heads, rows, scale=1.0)
    # Exponents near 3000 are rounded by half a 4096th, and again where product and sum are fused.
    want = torch.full((1, 2), float(len(rows)))
    torch.testing.assert_close(slashes[..., 0].cpu(), want, rtol=3e-4, atol=0)


@pytest.mark.parametrize("n", SIZES)
def test_block_means_count_real_tokens_only(n, dtype, make_prompt):
    prompt = make_prompt(n, dtype=dtype, batch=2, kv_heads=2, head_dim=96)
    strided = prompt.k.transpose(1, 2).contiguous().transpose(1, 2)
    for x in (prompt.k, strided):
        want = reference.block_means(x.cpu())
        torch.testing.assert_close(block_means(x).cpu().double(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("change", "message"), [
    ({"rows": []}, "rows must be 1 to 64 positions, got 0"),
    ({"rows": range(5, 70)}, "rows must be 1 to 64 positions, got 65"),
    ({"rows": [3, 3, 5]}, r"rows must ascend, each once, got \[3, 3, 5\]"),
    ({"rows": [9, 5]}, r"rows must ascend, each once, got \[9, 5\]"),
    ({"rows": [4, 69]}, "rows must be positions of queries, 5 to 69, got 4 to 69"),
    ({"rows": [5, 70]}, "rows must be positions of queries, 5 to 69, got 5 to 70"),
    ({"scale": 0.0}, "scale must be positive, got 0.0"),
    ({"heads": torch.tensor([0])}, "heads must be contiguous int32 .* got torch.int64"),
])  # fmt: skip
def test_a_setting_that_does_not_fit_is_named_with_its_value(change, message, dtype, make_prompt):
    prompt = make_prompt(65, 70, dtype=dtype)
    heads = torch.tensor([0], dtype=torch.int32, device=prompt.q.device)
    settings = {"heads": heads, "rows": [69], "scale": 1.0, **change}
    with pytest.raises(ValueError, match=message):
        row_scores(prompt.q, prompt.k, **settings)


def test_block_means_of_an_unknown_head_dimension_are_refused():
    with pytest.raises(
        ValueError, match=r"head_dim of x must be one of .* got 80|must be on one CUDA"
    ):
        block_means(torch.zeros(1, 1, 5, 80))
