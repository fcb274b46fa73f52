"""The Hopper kernel that shares key tiles between two query tiles: same claims, same oracle.

Its list building runs anywhere; the kernel itself needs Hopper.
"""

import dataclasses
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minference_green.kernels import reference
from minference_green.kernels.band_pair import LONG_WALK, programs, split_pieces
from minference_green.kernels.index import NONE, PIECE, TILE
from minference_green.kernels.vertical_slash import _band_bits, band_attention

ON_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
needs_hopper = pytest.mark.skipif(not ON_HOPPER, reason="needs a Hopper GPU")

# One row; one tile; an odd and an even number of query tiles, whole and partial.
SIZES = (1, 63, 64, 65, 128, 129, 192, 300, 1000)


def run(prompt, index):
    out = torch.full_like(prompt.q, float("nan"))
    return band_attention(
        prompt.q, prompt.k, prompt.v, index, scale=prompt.scale, out=out, return_lse=True,
        pairs=True,
    )  # fmt: skip


def keys_of(starts, size):
    return {e for start in starts for e in range(start, start + size)}


@settings(max_examples=40, deadline=None)
@given(offsets=st.sets(st.integers(0, 900), max_size=300))
def test_pieces_split_into_what_two_query_tiles_share_and_what_each_visits_alone(offsets, padded):
    """Counted from the first tile of a pair, the second visits every key 64 earlier."""
    pieces = reference.cut_pieces(sorted(offsets))
    shared, first, second = split_pieces(padded([[pieces]]))[:, 0, 0].tolist()
    shared, first, second = ([x for x in row if x != NONE] for row in (shared, first, second))
    assert [shared, first, second] == [sorted(x) for x in (shared, first, second)]
    visits, both = keys_of(pieces, PIECE), keys_of(shared, PIECE)
    first, second = keys_of(first, TILE), keys_of(second, TILE)
    assert both | first == visits
    assert len(both) + len(first) == len(visits)
    # The second's own tile before a run at 0 is the first's diagonal.
    second |= set(range(TILE)) if 0 in visits else set()
    later = {e + TILE for e in both}
    assert later | second == visits
    assert len(later) + len(second) == len(visits)


def test_more_pieces_than_one_block_of_the_split_keep_their_neighbours(padded):
    near, far = range(0, PIECE * 1700, PIECE), range(80_000, 80_000 + PIECE * 1500, PIECE)
    shared, first, second = split_pieces(padded([[[*near, *far]]]))[:, 0, 0].tolist()
    assert [x for x in first if x != NONE] == [near[-4], far[-4]]
    assert [x for x in second if x != NONE] == [80_000]
    assert [x for x in shared if x != NONE] == [*near[:-4], *far[:-4]]


@pytest.mark.parametrize("n", SIZES)
def test_a_tile_past_the_last_query_finds_a_bit_for_every_distance_it_asks_for(n, padded):
    """A pair's second tile may begin 63 rows past the last query, which is its whole length."""
    bits = _band_bits(padded([[[0]]]), n)
    assert 32 * bits.shape[2] > n + 62


@pytest.mark.skipif(ON_HOPPER, reason="is about other devices")
def test_another_device_is_refused_rather_than_given_another_kernel(dtype, make_prompt, band_index):
    prompt = make_prompt(70, dtype=dtype)
    index = band_index([[[0], [1]]], [[[0], [1]]], 70)
    with pytest.raises(ValueError, match=r"pairs needs a Hopper GPU \(capability 9.0\), q is on"):
        run(prompt, index)


@needs_hopper
@pytest.mark.parametrize("head_dim", [64, 96, 128])
@pytest.mark.parametrize("n", SIZES)
def test_awkward_lengths_with_structure_match_the_oracle(
    n, head_dim, dtype, make_prompt, band_index, assert_attends
):
    offsets = [o for o in (0, 1, 5, 64, 65, 130, 200, 201, 640, 999) if o < n]
    columns = [c for c in (0, 1, 2, 3, 62, 64, 100, 130, 299, 511, 998) if c < n]
    prompt = make_prompt(
        n, dtype=dtype, batch=2, heads=4, kv_heads=2, head_dim=head_dim, columns=columns[:2]
    )
    per_head = [offsets, offsets[1:2], [], range(n)], [columns, [], columns[-1:], range(n)]
    index = band_index([per_head[0]] * 2, [per_head[1]] * 2, n)
    assert_attends(prompt, index, *run(prompt, index))


@needs_hopper
@pytest.mark.parametrize(("n_q", "n_k"), [(1, 100), (64, 256), (70, 300), (129, 333), (193, 900)])
def test_queries_at_any_offset_of_the_keys_match_the_oracle(
    n_q, n_k, dtype, make_prompt, band_index, assert_attends
):
    prompt = make_prompt(n_q, n_k, dtype=dtype, offsets=[n_k - 5])
    last = n_k - 1
    index = band_index([[[0, 70, last], [last]]], [[[0, 3, 64, last], [1]]], n_k)
    assert_attends(prompt, index, *run(prompt, index))


@needs_hopper
def test_rows_whose_maximum_grows_from_tile_to_tile_match_the_oracle(
    dtype, make_prompt, band_index, assert_attends
):
    """The farther a key, the larger its logit, by some 17 bits a tile; and the other way round."""
    n = 400
    index = band_index([[[0, 130, 200, 330], range(n)]], [[range(40), [70]]], n)
    prompt = make_prompt(n, dtype=dtype)
    direction = torch.ones(prompt.q.shape[3], dtype=dtype, device=prompt.q.device)
    for size in (torch.arange(n, 0, -1), torch.arange(1, n + 1)):
        height = (size / n * 9).to(dtype).to(prompt.k.device)[:, None]
        steep = dataclasses.replace(prompt, q=prompt.q + direction, k=prompt.k + height * direction)
        assert_attends(steep, index, *run(steep, index))


@needs_hopper
def test_a_program_that_takes_many_pairs_keeps_its_ring_in_step(
    dtype, make_prompt, band_index, assert_attends
):
    """More pieces of work than multiprocessors, with lists of different lengths in each head."""
    prompt = make_prompt(2500, dtype=dtype, heads=12, kv_heads=4)
    rng = random.Random(5)
    offsets = [[rng.sample(range(2500), 20 * h) for h in range(12)]]
    columns = [[rng.sample(range(2500), 30 * (12 - h)) for h in range(12)]]
    index = band_index(offsets, columns, 2500)
    assert_attends(prompt, index, *run(prompt, index))


def test_only_long_walks_get_a_program_for_every_pair():
    long, pieces = LONG_WALK * TILE, LONG_WALK * TILE // PIECE
    assert programs(1000, pieces, long, 132) == 1000
    assert programs(1000, pieces - 1, long, 132) == 132  # room for few pieces
    assert programs(1000, 2 * pieces, long - 1, 132) == 132  # few keys
    assert programs(7, 1, 300, 132) == 7


@needs_hopper
def test_a_program_for_every_pair_computes_what_resident_ones_do(dtype, make_prompt, band_index):
    """Room for long walks alone changes how pairs are handed out, not what is in them."""
    n_k = LONG_WALK * TILE + 33
    prompt = make_prompt(1500, n_k, dtype=dtype, heads=12, kv_heads=4)
    rng = random.Random(6)
    offsets = [[rng.sample(range(n_k), 20 * h) for h in range(12)]]
    columns = [[rng.sample(range(n_k), 30 * (12 - h)) for h in range(12)]]
    index = band_index(offsets, columns, n_k)
    room = LONG_WALK * TILE // PIECE - index.pieces.shape[2]
    wide = torch.nn.functional.pad(index.pieces, (0, room), value=NONE)
    for got, want in zip(
        run(prompt, dataclasses.replace(index, pieces=wide)), run(prompt, index), strict=True
    ):
        assert torch.equal(got, want)


@needs_hopper
@pytest.mark.parametrize(("n", "most", "columns"), [(300, 4, 40), (700, 4, 70), (1500, 3, 1)])
def test_short_walks_after_one_another_are_right_each_time(
    n, most, columns, dtype, make_prompt, band_index
):
    """What may go wrong is an order of events, hence the launches; the portable kernel is right."""
    rng = random.Random(n)
    for case in range(12):
        n_k = n - rng.randrange(100)
        prompt = make_prompt(rng.randint(1, n_k), n_k, dtype=dtype, heads=64, kv_heads=8, seed=case)
        starts = [[rng.sample(range(n_k), rng.randint(0, most)) for _ in range(64)]]
        some = [[rng.sample(range(n_k), rng.randint(0, columns)) for _ in range(64)]]
        index = band_index(starts, some, n_k)
        right, right_lse = band_attention(
            prompt.q, prompt.k, prompt.v, index, scale=prompt.scale, return_lse=True, pairs=False
        )
        for _ in range(8):
            out, lse = run(prompt, index)
            torch.testing.assert_close(lse, right_lse, rtol=0, atol=1e-3)
            torch.testing.assert_close(out, right, rtol=2e-2, atol=2e-2)


@needs_hopper
@settings(max_examples=500, deadline=None)
@given(seed=st.integers(0, 2**32), n_k=st.integers(1, 900))
def test_any_index_matches_the_oracle(seed, n_k, make_prompt, band_index, assert_attends):
    rng = random.Random(seed)
    n_q = rng.choice([n_k, rng.randint(1, n_k)])
    heads = rng.choice([1, 3])

    def some() -> list[int]:
        start = rng.randrange(n_k)
        run_of = range(start, min(n_k, start + rng.randint(0, 200)))
        return [*rng.sample(range(n_k), rng.randint(0, min(n_k, 90))), *run_of]

    prompt = make_prompt(
        n_q, n_k, dtype=rng.choice([torch.bfloat16, torch.float16]), heads=heads,
        head_dim=rng.choice([64, 128]), seed=seed % 1000, offsets=[rng.randrange(n_k)],
    )  # fmt: skip
    index = band_index([[some() for _ in range(heads)]], [[some() for _ in range(heads)]], n_k)
    assert_attends(prompt, index, *run(prompt, index))


@needs_hopper
def test_rows_at_odd_addresses_are_refused(dtype, make_prompt, band_index):
    prompt = make_prompt(70, dtype=dtype)
    odd = torch.cat([prompt.q, prompt.q], -1)[..., 1:65]
    index = band_index([[[0], [1]]], [[[0], [1]]], 70)
    with pytest.raises(ValueError, match="rows of q that start at multiples of 16 bytes"):
        run(dataclasses.replace(prompt, q=odd), index)


@needs_hopper
def test_hopper_takes_the_pair_kernel_unless_it_does_not_fit(dtype, make_prompt, band_index):
    index = band_index([[[0, 70, 200], [1]]], [[[0, 90], [1]]], 300)
    narrow = make_prompt(300, dtype=dtype)
    by_default = band_attention(narrow.q, narrow.k, narrow.v, index, scale=narrow.scale)
    assert torch.equal(by_default, run(narrow, index)[0])
    wide = make_prompt(300, dtype=dtype, head_dim=256)
    assert band_attention(wide.q, wide.k, wide.v, index, scale=wide.scale).isfinite().all()
    with pytest.raises(ValueError, match="needs head_dim up to 128, got 256"):
        run(wide, index)
