"""Estimators against their oracles."""

import pytest
import torch

from minference_green.kernels import reference
from minference_green.kernels.estimate import block_means, last_rows_scores

SIZES = (1, 7, 63, 64, 65, 111, 300, 1000)


def assert_masses(prompt, heads, rows, columns, slashes):
    q, k = prompt.q.cpu(), prompt.k.cpu()
    want = reference.last_rows_scores(q, k, scale=prompt.scale, rows=rows)
    for got, wanted in zip((columns, slashes), want, strict=True):
        # Sums of at most 64 fp32 probabilities, whose exponents were rounded once.
        torch.testing.assert_close(
            got.cpu().double(), wanted[:, heads.cpu().long()], rtol=2e-4, atol=1e-6
        )


@pytest.mark.parametrize("n", SIZES)
def test_masses_of_awkward_lengths_match_the_oracle(n, dtype, make_prompt):
    prompt = make_prompt(n, dtype=dtype, columns=[0, n // 3], offsets=[n // 2])
    heads = torch.tensor([0, 1], dtype=torch.int32, device=prompt.q.device)
    scores = last_rows_scores(prompt.q, prompt.k, heads, scale=prompt.scale)
    assert_masses(prompt, heads, 64, *scores)


@pytest.mark.parametrize("rows", [1, 13, 63, 64])
@pytest.mark.parametrize(("n_q", "n_k"), [(10, 200), (150, 150), (65, 1100)])
def test_masses_of_any_number_of_rows_match_the_oracle(rows, n_q, n_k, dtype, make_prompt):
    """1100 keys are more than one program's share."""
    prompt = make_prompt(n_q, n_k, dtype=dtype, offsets=[n_k // 2])
    heads = torch.tensor([1], dtype=torch.int32, device=prompt.q.device)
    scores = last_rows_scores(prompt.q, prompt.k, heads, scale=prompt.scale, rows=rows)
    assert_masses(prompt, heads, rows, *scores)


@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_masses_of_groups_batches_and_listed_heads_match_the_oracle(
    head_dim, dtype, make_prompt
):  # fmt: skip
    prompt = make_prompt(
        130, dtype=dtype, batch=2, heads=6, kv_heads=2, head_dim=head_dim, columns=[5]
    )
    heads = torch.tensor([4, 0, 3], dtype=torch.int32, device=prompt.q.device)
    scores = last_rows_scores(prompt.q, prompt.k, heads, scale=prompt.scale)
    assert_masses(prompt, heads, 64, *scores)


def test_the_masses_of_a_row_add_up_to_one_both_ways(dtype, make_prompt):
    prompt = make_prompt(700, dtype=dtype)
    heads = torch.tensor([0, 1], dtype=torch.int32, device=prompt.q.device)
    for scores in last_rows_scores(prompt.q, prompt.k, heads, scale=prompt.scale, rows=40):
        total = scores.double().sum(-1).cpu()
        torch.testing.assert_close(total, torch.full_like(total, 40.0), rtol=1e-5, atol=0)


def test_the_same_input_gives_the_same_bits(dtype, make_prompt):
    prompt = make_prompt(2000, dtype=dtype)
    heads = torch.tensor([0, 1], dtype=torch.int32, device=prompt.q.device)
    first, second = (
        last_rows_scores(prompt.q, prompt.k, heads, scale=prompt.scale) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("n", SIZES)
def test_block_means_count_real_tokens_only(n, dtype, make_prompt):
    prompt = make_prompt(n, dtype=dtype, batch=2, kv_heads=2, head_dim=96)
    strided = prompt.k.transpose(1, 2).contiguous().transpose(1, 2)
    for x in (prompt.k, strided):
        want = reference.block_means(x.cpu())
        torch.testing.assert_close(block_means(x).cpu().double(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("change", "message"), [
    ({"rows": 0}, "rows must be between 1 and 64, got 0"),
    ({"rows": 65}, "rows must be between 1 and 64, got 65"),
    ({"scale": 0.0}, "scale must be positive, got 0.0"),
    ({"heads": torch.tensor([0])}, "heads must be contiguous int32 .* got torch.int64"),
])  # fmt: skip
def test_a_setting_that_does_not_fit_is_named_with_its_value(change, message, dtype, make_prompt):
    prompt = make_prompt(70, dtype=dtype)
    heads = torch.tensor([0], dtype=torch.int32, device=prompt.q.device)
    settings = {"heads": heads, "scale": 1.0, **change}
    with pytest.raises(ValueError, match=message):
        last_rows_scores(prompt.q, prompt.k, **settings)


def test_block_means_of_an_unknown_head_dimension_are_refused():
    with pytest.raises(
        ValueError, match=r"head_dim of x must be one of .* got 80|must be on one CUDA"
    ):
        block_means(torch.zeros(1, 1, 5, 80))
