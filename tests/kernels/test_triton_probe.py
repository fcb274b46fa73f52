"""What probing rows attend to by key tile, against the CPU path, whose oracle is float64."""

import itertools

import pytest
import torch

from minference_green.kernels import best_blocks, cpu, probe, reference
from minference_green.kernels.probe import tile_shares
from minference_green.kernels.selection import probed_index

# Of one query tile and of many; with a last tile of one row and of nearly all.
SIZES = (1, 7, 63, 64, 65, 111, 300, 1000)


def listed(prompt, *heads):
    return torch.tensor(heads, dtype=torch.int32, device=prompt.q.device)


def assert_shares(prompt, heads, got, *settings, summed=False):
    q, k = prompt.q.cpu().float(), prompt.k.cpu().float()
    want = cpu.tile_shares(q, k, heads.cpu(), *settings, scale=prompt.scale, summed=summed)
    assert got.shape == want.shape
    # Logits of about 8 in fp32, summed in fp32.
    torch.testing.assert_close(got.cpu(), want, rtol=1e-4, atol=1e-4)


@pytest.fixture(autouse=True)
def memory_of_nan(monkeypatch):
    """What is read without having been written shows."""

    def empty(shape, *, dtype, device):
        rubbish = torch.nan if dtype.is_floating_point else 12345
        return torch.full(shape, rubbish, dtype=dtype, device=device)

    monkeypatch.setattr(probe.torch, "empty", empty)


@pytest.mark.parametrize("summed", [False, True])
@pytest.mark.parametrize("rows", [1, 4, 7, 64])
@pytest.mark.parametrize("n", SIZES)
def test_shares_of_awkward_lengths_match_the_oracle(n, rows, summed, dtype, make_prompt):
    prompt = make_prompt(n, dtype=dtype, columns=[0, n // 3], offsets=[n // 2])
    heads, tiles = listed(prompt, 1, 0), -(-n // 64)
    for begin, end in {(0, tiles), (tiles // 2, tiles // 2 + 1)}:
        settings = (rows, begin, end)
        got = tile_shares(prompt.q, prompt.k, heads, *settings, scale=prompt.scale, summed=summed)
        assert_shares(prompt, heads, got, *settings, summed=summed)


@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_shares_of_groups_batches_and_listed_heads_match_the_oracle(head_dim, dtype, make_prompt):
    """Queries that begin in the middle of a key tile."""
    prompt = make_prompt(130, 200, dtype=dtype, batch=2, heads=6, kv_heads=2, head_dim=head_dim)
    heads = listed(prompt, 4, 0, 3)
    got = tile_shares(prompt.q, prompt.k, heads, 8, 0, 3, scale=prompt.scale)
    assert_shares(prompt, heads, got, 8, 0, 3)


@pytest.mark.parametrize("held", [128, 2048])
def test_key_tiles_of_several_programs_are_all_there(held, dtype, make_prompt, monkeypatch):
    """700 keys are eleven tiles: chunks of two, the last of one; rows of two programs."""
    monkeypatch.setattr(probe, "CHUNK_TILES", 2)
    monkeypatch.setattr(probe, "_HELD", held)
    prompt = make_prompt(700, dtype=dtype, columns=[5])
    heads = listed(prompt, 0, 1)
    monkeypatch.setattr(probe, "options", lambda _: {"QUERIES": 128, "num_warps": 4})
    assert 11 * 16 > 128
    got = tile_shares(prompt.q, prompt.k, heads, 16, 0, 11, scale=prompt.scale)
    assert_shares(prompt, heads, got, 16, 0, 11)


def test_strided_inputs_give_the_same_shares(dtype, make_prompt):
    """As a model lays them out, and as a slice of a longer prompt."""
    prompt = make_prompt(500, dtype=dtype)
    heads = listed(prompt, 0, 1)
    q, k = prompt.q[:, :, :300], prompt.k[:, :, :300]
    want = tile_shares(q.contiguous(), k.contiguous(), heads, 4, 0, 5, scale=prompt.scale)
    interleaved = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k)]
    for inputs in ([q, k], interleaved):
        assert torch.equal(tile_shares(*inputs, heads, 4, 0, 5, scale=prompt.scale), want)


def test_the_index_made_of_them_is_the_oracles(dtype, make_prompt):
    prompt = make_prompt(700, dtype=dtype, columns=[130], offsets=[300])
    index = probed_index(
        prompt.q, prompt.k, listed(prompt, 1, 0), [1, 2], 4,
        scale=prompt.scale, tile_shares=tile_shares, build=best_blocks.listed_index,
    )  # fmt: skip
    for n, (head, top_k) in enumerate(((1, 1), (0, 2))):
        want = reference.probed_lists(
            prompt.q.cpu(), prompt.k.cpu(), scale=prompt.scale, top_k=top_k, rows=4
        )
        starts = index.starts[0, n].tolist()
        got = [index.blocks[0, n, a:b].tolist() for a, b in itertools.pairwise(starts)]
        assert got == want[0][head]


@pytest.mark.parametrize(("change", "message"), [
    ({"rows": 0}, "rows must be between 1 and 64, got 0"),
    ({"end": 3}, "query tiles must be some of 0 to 2, got 0 to 3"),
    ({"scale": 0.0}, "scale must be positive, got 0.0"),
    ({"heads": torch.tensor([0])}, "heads must be contiguous int32 .* got torch.int64"),
])  # fmt: skip
def test_a_setting_that_does_not_fit_is_named_with_its_value(change, message, dtype, make_prompt):
    prompt = make_prompt(65, 70, dtype=dtype)
    settings = {"heads": listed(prompt, 0), "rows": 4, "begin": 0, "end": 2, "scale": 1.0}
    with pytest.raises(ValueError, match=message):
        tile_shares(prompt.q, prompt.k, **settings | change)
