"""What rows attend to by key tile, against its oracle."""

import itertools

import pytest
import torch

from minference_green.kernels import probe, reference
from minference_green.kernels.probe import tile_masses
from minference_green.kernels.selection import probed_index

SIZES = (1, 7, 63, 64, 65, 111, 300, 1000)


def spread_rows(n, rows):
    """``rows`` rows of every tile from its first to its last, as probing lists them."""
    lanes = [part * 63 // max(1, rows - 1) for part in range(rows)]
    return [min(first + lane, n - 1) for first in range(0, n, 64) for lane in lanes]


def assert_masses(prompt, heads, rows, got):
    q, k = prompt.q.cpu(), prompt.k.cpu()
    want = reference.tile_masses(q, k, rows, scale=prompt.scale)[:, heads.cpu().long()]
    assert got.shape == want.shape
    # Logits of about 8 in fp32, summed in fp32.
    torch.testing.assert_close(got.cpu().double(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("n", SIZES)
def test_masses_of_awkward_lengths_match_the_oracle(n, parts, dtype, make_prompt):
    prompt = make_prompt(n, dtype=dtype, columns=[0, n // 3], offsets=[n // 2])
    heads = torch.tensor([1, 0], dtype=torch.int32, device=prompt.q.device)
    rows = spread_rows(n, parts)
    got = tile_masses(prompt.q, prompt.k, heads, rows, scale=prompt.scale)
    assert_masses(prompt, heads, rows, got)


@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_masses_of_groups_batches_and_listed_heads_match_the_oracle(head_dim, dtype, make_prompt):
    prompt = make_prompt(130, 200, dtype=dtype, batch=2, heads=6, kv_heads=2, head_dim=head_dim)
    heads = torch.tensor([4, 0, 3], dtype=torch.int32, device=prompt.q.device)
    rows = [70, 71, 150, 199, 199]
    got = tile_masses(prompt.q, prompt.k, heads, rows, scale=prompt.scale)
    assert_masses(prompt, heads, rows, got)


def test_key_tiles_of_several_programs_are_all_there(dtype, make_prompt, monkeypatch):
    """300 keys are five tiles: chunks of two, the last of one; rows of two programs."""
    monkeypatch.setattr(probe, "CHUNK_TILES", 2)
    prompt = make_prompt(300, dtype=dtype)
    heads = torch.tensor([0, 1], dtype=torch.int32, device=prompt.q.device)
    rows = spread_rows(300, 16)
    assert len(rows) > 64
    got = tile_masses(prompt.q, prompt.k, heads, rows, scale=prompt.scale)
    assert_masses(prompt, heads, rows, got)


def test_strided_inputs_give_the_same_masses(dtype, make_prompt):
    """As a model lays them out, and as a slice of a longer prompt."""
    prompt = make_prompt(500, dtype=dtype)
    heads = torch.tensor([0, 1], dtype=torch.int32, device=prompt.q.device)
    q, k = prompt.q[:, :, :300], prompt.k[:, :, :300]
    rows = spread_rows(300, 4)
    want = tile_masses(q.contiguous(), k.contiguous(), heads, rows, scale=prompt.scale)
    interleaved = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k)]
    for inputs in ([q, k], interleaved):
        assert torch.equal(tile_masses(*inputs, heads, rows, scale=prompt.scale), want)


def test_the_index_made_of_them_is_the_oracles(dtype, make_prompt):
    prompt = make_prompt(700, dtype=dtype, columns=[130], offsets=[300])
    heads = torch.tensor([1, 0], dtype=torch.int32, device=prompt.q.device)
    index = probed_index(
        prompt.q, prompt.k, heads, [1, 1], 4, scale=prompt.scale, tile_masses=tile_masses
    )
    want = reference.probed_lists(
        prompt.q.cpu(), prompt.k.cpu(), scale=prompt.scale, top_k=1, rows=4
    )
    for n, head in enumerate((1, 0)):
        starts = index.starts[0, n].tolist()
        got = [index.blocks[0, n, a:b].tolist() for a, b in itertools.pairwise(starts)]
        assert got == want[0][head]


@pytest.mark.parametrize(("change", "message"), [
    ({"rows": []}, "rows must name at least one position, got none"),
    ({"rows": [9, 5]}, "rows must not descend"),
    ({"rows": [4, 69]}, "rows must be positions of queries, 5 to 69, got 4 to 69"),
    ({"scale": 0.0}, "scale must be positive, got 0.0"),
    ({"heads": torch.tensor([0])}, "heads must be contiguous int32 .* got torch.int64"),
])  # fmt: skip
def test_a_setting_that_does_not_fit_is_named_with_its_value(change, message, dtype, make_prompt):
    prompt = make_prompt(65, 70, dtype=dtype)
    heads = torch.tensor([0], dtype=torch.int32, device=prompt.q.device)
    settings = {"heads": heads, "rows": [69], "scale": 1.0, **change}
    with pytest.raises(ValueError, match=message):
        tile_masses(prompt.q, prompt.k, **settings)
