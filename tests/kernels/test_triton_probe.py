"""What probing rows attend to by key tile, against the CPU path, whose oracle is float64."""

import itertools

import pytest
import torch
from torch.nn import functional

from minference_green.kernels import best_blocks, cpu, probe, reference
from minference_green.kernels.index import TILE
from minference_green.kernels.probe import round_keys, shares_of, tile_shares
from minference_green.kernels.selection import probed_index, probing_rows

# Of one query tile and of many; with a last tile of one row and of nearly all.
SIZES = (1, 7, 63, 64, 65, 111, 300, 1000)


def listed(prompt, *heads):
    return torch.tensor(heads, dtype=torch.int32, device=prompt.q.device)


def rounded(x, along):
    """In whole numbers of -127 to 127, of units that are the largest of some of them over 127."""
    largest = x.abs().amax(along, keepdim=True)
    unit = torch.where(largest > 0, largest, 1.0) / 127
    return torch.floor(x / unit + 0.5), unit


def shares_of_rounded(q, k, heads, rows, begin, end, scale):
    """The definition of the kernel in fp32: keys and rows in 8 bits."""
    n_q, n_k, group = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    row = probing_rows(rows, begin, end, n_q, n_k)
    tiles = int(row.max()) // TILE + 1
    some = k[:, :, torch.arange(64) * n_k // 64]
    k = k - some.where(some.isfinite(), 0.0).mean(2, keepdim=True)
    k = functional.pad(k, (0, 0, 0, -n_k % TILE))[:, :, : tiles * TILE]
    numbers, units = rounded(k.unflatten(2, (tiles, -1)), (3, 4))
    queries, unit = rounded(q[:, :, row.flatten() - (n_k - n_q)], (3,))
    heads = heads.long()
    logits = queries[:, heads] @ numbers[:, heads // group].flatten(2, 3).transpose(2, 3)
    unseen = torch.arange(tiles * TILE) > row.view(-1, 1)
    logits = logits.masked_fill(unseen, -torch.inf).unflatten(3, (tiles, -1))
    mass = (
        logits.amax(4)
        * unit[:, heads]
        * units[:, heads // group].view(*k.shape[:1], len(heads), 1, -1)
    )
    mass = mass * scale
    share = mass - mass.logsumexp(-1, keepdim=True)
    return share.unflatten(2, (end - begin, rows)).amax(3)


def assert_shares(prompt, heads, got, *settings, summed=False):
    q, k, heads = prompt.q.cpu().float(), prompt.k.cpu().float(), heads.cpu()
    exact = cpu.tile_shares(q, k, heads, *settings, scale=prompt.scale, summed=summed)
    assert got.shape == exact.shape
    if summed:
        # Logits of about 8 in fp32, summed in fp32.
        torch.testing.assert_close(got.cpu(), exact, rtol=1e-4, atol=1e-4)
        return
    want = shares_of_rounded(q, k, heads, *settings, prompt.scale)
    got = got.cpu()
    assert torch.equal(got == -torch.inf, want == -torch.inf)
    off = torch.where(got == want, 0.0, got - want).abs()
    # A number at a half may be rounded either way: one unit of a key, at most 0.05 of a logit.
    assert off.max() < 0.05
    assert (off > 1e-4).float().mean() < 0.01


@pytest.fixture(autouse=True)
def memory_of_nan(monkeypatch):
    """What is read without having been written shows."""

    def empty(shape, *, dtype, device):
        rubbish = torch.nan if dtype.is_floating_point else 123
        return torch.full(shape, rubbish, dtype=dtype, device=device)

    monkeypatch.setattr(probe.torch, "empty", empty)


@pytest.mark.parametrize("summed", [False, True])
@pytest.mark.parametrize("rows", [1, 7, 64])
@pytest.mark.parametrize("n", SIZES)
def test_shares_of_awkward_lengths_match_the_oracle(n, rows, summed, dtype, make_prompt):
    prompt = make_prompt(n, dtype=dtype, columns=[0, n // 3], offsets=[n // 2])
    heads, tiles = listed(prompt, 1, 0), -(-n // 64)
    for begin, end in {(0, tiles), (tiles // 2, tiles // 2 + 1)}:
        settings = (rows, begin, end)
        got = tile_shares(prompt.q, prompt.k, heads, *settings, scale=prompt.scale, summed=summed)
        assert_shares(prompt, heads, got, *settings, summed=summed)


def test_keys_rounded_once_give_the_same_shares(dtype, make_prompt):
    """Those of the second KV head and the third, where heads of no other are asked for."""
    prompt = make_prompt(200, dtype=dtype, batch=2, heads=8, kv_heads=4)
    heads = listed(prompt, 5, 2, 4)
    settings = (heads, 4, 0, 4)
    rated = shares_of(prompt.k, range(1, 3))
    got = rated(prompt.q, prompt.k, *settings, scale=prompt.scale)
    assert torch.equal(got, tile_shares(prompt.q, prompt.k, *settings, scale=prompt.scale))


def test_a_vector_added_to_all_keys_changes_no_share(dtype, make_prompt):
    """It adds one number to all logits of a row, however large; else 8 bits would go to it."""
    prompt = make_prompt(300, dtype=torch.float32, columns=[70])
    heads = listed(prompt, 0, 1)
    k = prompt.k.to(dtype)
    moved = (k.float() + 64 * torch.arange(64, device=k.device)).to(dtype)
    k = (moved.float() - 64 * torch.arange(64, device=k.device)).to(dtype)
    q = prompt.q.to(dtype)
    want, got = (tile_shares(q, x, heads, 8, 0, 5, scale=prompt.scale) for x in (k, moved))
    torch.testing.assert_close(got, want, rtol=0, atol=0.05)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_key_that_is_not_finite_spoils_no_row_before_it(bad, dtype, make_prompt):
    """Even if it is one of those that the mean is taken of."""
    prompt = make_prompt(300, dtype=dtype)
    heads, k = listed(prompt, 0, 1), prompt.k.clone()
    assert 295 in torch.arange(64) * 300 // 64
    k[:, :, 295, 3] = 0
    want = tile_shares(prompt.q, k, heads, 8, 0, 4, scale=prompt.scale)
    k[:, :, 295, 3] = bad
    assert torch.equal(tile_shares(prompt.q, k, heads, 8, 0, 4, scale=prompt.scale), want)


def test_keys_rounded_of_another_prompt_are_refused(dtype, make_prompt):
    short, long = (make_prompt(n, dtype=dtype) for n in (200, 300))
    rated = shares_of(short.k, range(1))
    message = r"rounded of batch, tokens, head_dim \(1, 200, 64\), got \(1, 300, 64\)"
    with pytest.raises(ValueError, match=message):
        rated(long.q, long.k, listed(long, 0), 4, 0, 5, scale=1.0)


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
    options = {"QUERIES": 128, "num_warps": 4}
    monkeypatch.setattr(probe, "options", lambda *_, summed: options)
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
    """No two key tiles of this prompt are so alike that 8 bits would let them change places."""
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


@pytest.mark.parametrize("kv_heads", [range(0), range(1, 3), range(0, 2, 2)])
def test_keys_of_kv_heads_that_are_not_there_are_refused(kv_heads, dtype, make_prompt):
    prompt = make_prompt(65, dtype=dtype, heads=2, kv_heads=2)
    with pytest.raises(ValueError, match="KV heads must be some of 0 to 2, next to each other"):
        round_keys(prompt.k, kv_heads)


def test_more_numbers_at_once_than_are_addressed_are_refused(device, dtype):
    q = torch.zeros(1, 1, 1, 64, dtype=dtype, device=device).expand(1, 1, 2**20, 64)
    heads = torch.zeros(1, dtype=torch.int32, device=device)
    message = "16384 query tiles of 8 rows over 16384 key tiles are too many at once"
    with pytest.raises(ValueError, match=message):
        tile_shares(q, q, heads, 8, 0, 2**14, scale=1.0)
