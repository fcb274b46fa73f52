"""Band attention against the oracle over the mask that the index itself states."""

import dataclasses
import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minference_green.kernels.index import NONE, BandIndex
from minference_green.kernels.tile import count_below
from minference_green.kernels.vertical_slash import _gather, band_attention

ON_GPU = torch.cuda.is_available()

# One row; a partial tile; one short of, exactly, one past a tile; partial last tiles.
SIZES = (1, 7, 63, 64, 65, 111, 300, 1000)
# A few, one KV tile apart, inside one tile, far, the farthest there is.
OFFSETS = (0, 1, 5, 64, 65, 130, 200, 201, 640, 999)
# A sink, some under the bands of many query tiles, the last but one column.
COLUMNS = (0, 1, 2, 3, 62, 64, 100, 130, 299, 511, 998)


def run(prompt, index):
    out = torch.full_like(prompt.q, float("nan"))
    return band_attention(
        prompt.q, prompt.k, prompt.v, index, scale=prompt.scale, out=out, return_lse=True,
        pairs=False,
    )  # fmt: skip


@pytest.mark.parametrize("n", SIZES)
def test_awkward_lengths_with_structure_match_the_oracle(
    n, dtype, make_prompt, band_index, assert_attends
):
    offsets = [o for o in OFFSETS if o < n]
    columns = [c for c in COLUMNS if c < n]
    prompt = make_prompt(n, dtype=dtype, columns=columns[:2], offsets=offsets[-2:])
    index = band_index([[offsets, offsets[:1]]], [[columns, columns[-1:]]], n)
    assert_attends(prompt, index, *run(prompt, index))


@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_every_head_dimension_matches_the_oracle(
    head_dim, dtype, make_prompt, band_index, assert_attends
):
    prompt = make_prompt(200, dtype=dtype, head_dim=head_dim, offsets=[70])
    index = band_index([[[0, 70], [100]]], [[[0, 5], [64]]], 200)
    assert_attends(prompt, index, *run(prompt, index))


def test_groups_batches_and_heads_read_their_own_index(
    dtype, make_prompt, band_index, assert_attends
):
    prompt = make_prompt(230, dtype=dtype, batch=2, heads=6, kv_heads=2)
    rng = random.Random(3)
    offsets = [[rng.sample(range(230), 4) for _ in range(6)] for _ in range(2)]
    columns = [[rng.sample(range(230), 9) for _ in range(6)] for _ in range(2)]
    index = band_index(offsets, columns, 230)
    assert_attends(prompt, index, *run(prompt, index))


def test_only_the_rows_of_listed_heads_are_written(dtype, make_prompt, band_index, assert_attends):
    prompt = make_prompt(130, dtype=dtype, heads=4, kv_heads=2)
    index = band_index([[[64], [3]]], [[[0], [1, 2]]], 130, heads=[3, 1])
    out, lse = run(prompt, index)
    assert_attends(prompt, index, out, lse)
    assert out[:, [0, 2]].isnan().all()
    assert lse.shape == (1, 2, 130)


@pytest.mark.parametrize(("n_q", "n_k"), [(1, 100), (64, 256), (70, 300), (129, 333), (65, 66)])
def test_queries_at_any_offset_of_the_keys_match_the_oracle(
    n_q, n_k, dtype, make_prompt, band_index, assert_attends
):
    prompt = make_prompt(n_q, n_k, dtype=dtype, offsets=[n_k - 5])
    last = n_k - 1
    index = band_index([[[0, 70, last], [last]]], [[[0, 3, 64, last], [1]]], n_k)
    assert_attends(prompt, index, *run(prompt, index))


@pytest.mark.parametrize(
    ("offsets", "columns"),
    [([], []), ([], [0, 80, 149]), ([0], []), (range(150), []), ([], range(150))],
    ids=["diagonal only", "columns only", "one slash", "all slashes", "all columns"],
)
def test_sets_from_empty_to_everything_match_the_oracle(
    offsets, columns, dtype, make_prompt, band_index, assert_attends
):
    prompt = make_prompt(150, dtype=dtype)
    index = band_index([[offsets, offsets]], [[columns, columns]], 150)
    assert_attends(prompt, index, *run(prompt, index))


def test_a_full_column_tile_partly_under_bands_counts_each_key_once(
    dtype, make_prompt, band_index, assert_attends
):
    """130 columns fill two tiles of the gathered buffer; bands cover some at each query tile."""
    prompt = make_prompt(520, dtype=dtype, columns=[64], offsets=[96])
    columns = list(range(40, 170))
    index = band_index([[[0, 32, 96, 97, 300], [250]]], [[columns, columns[::2]]], 520)
    assert_attends(prompt, index, *run(prompt, index))


def test_strided_inputs_and_outputs_give_the_same_bits(dtype, make_prompt, band_index):
    prompt = make_prompt(150, dtype=dtype, heads=4, kv_heads=2)
    index = band_index([[[64]] * 4], [[[0, 9]] * 4], 150)
    want, _ = run(prompt, index)
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in vars(prompt).values() if
               isinstance(x, torch.Tensor))  # fmt: skip
    wide = torch.full((1, 150, 4, 2 * q.shape[3]), float("nan"), dtype=dtype, device=q.device)
    out = wide[..., : q.shape[3]].transpose(1, 2)
    band_attention(q, k, v, index, scale=prompt.scale, out=out, pairs=False)
    assert torch.equal(out, want)
    assert wide[..., q.shape[3] :].isnan().all()
    allocated = band_attention(q, k, v, index, scale=prompt.scale, pairs=False)
    assert torch.equal(allocated, want)
    assert allocated.stride() == q.stride()


def test_infinities_and_nan_outside_what_a_tile_sees_never_reach_its_rows(
    dtype, make_prompt, band_index, assert_attends
):
    """Unseen keys, and seen columns before the tiles that may see them."""
    prompt = make_prompt(70, 300, dtype=dtype)
    columns = [4, 260]
    index = band_index([[[100], [100]]], [[columns, columns]], 300)
    clean, _ = run(prompt, index)
    seen = index.mask(70, 300).any(2)[0].any(0).cpu()
    unseen = (~seen).nonzero()[:, 0]
    assert len(unseen) > 50
    for poison in (float("nan"), float("inf")):
        k, v = prompt.k.clone(), prompt.v.clone()
        k[:, :, unseen], v[:, :, unseen] = poison, poison
        out, _ = run(dataclasses.replace(prompt, k=k, v=v), index)
        assert torch.equal(out, clean)
    # Column 298 lies in the second query tile: the first must not meet it.
    late = band_index([[[0], [0]]], [[[0, 298], [298]]], 300)
    clean, _ = run(prompt, late)
    k, v = prompt.k.clone(), prompt.v.clone()
    k[:, :, 298], v[:, :, 298] = float("nan"), float("nan")
    out, _ = run(dataclasses.replace(prompt, k=k, v=v), late)
    assert torch.equal(out[:, :, :64], clean[:, :, :64])
    assert out[:, :, -1].isnan().all()


@settings(max_examples=500 if ON_GPU else 12, deadline=None)
@given(seed=st.integers(0, 2**32), n_k=st.integers(1, 900 if ON_GPU else 400))
def test_any_index_matches_the_oracle(
    seed, n_k, make_prompt, band_index, assert_attends
):  # fmt: skip
    rng = random.Random(seed)
    n_q = rng.choice([n_k, rng.randint(1, n_k)])
    dtype = rng.choice([torch.bfloat16, torch.float16]) if ON_GPU else torch.float32
    kv_heads, group = rng.choice([(1, 1), (1, 3), (2, 2)])
    heads = kv_heads * group

    def some() -> list[int]:
        start = rng.randrange(n_k)
        run_of = range(start, min(n_k, start + rng.randint(0, 200)))
        return [*rng.sample(range(n_k), rng.randint(0, min(n_k, 90))), *run_of]

    prompt = make_prompt(
        n_q, n_k, dtype=dtype, heads=heads, kv_heads=kv_heads, seed=seed % 1000,
        head_dim=rng.choice([64, 128]), columns=[0][: rng.randint(0, 1)],
        offsets=[rng.randrange(n_k)],
    )  # fmt: skip
    index = band_index([[some() for _ in range(heads)]], [[some() for _ in range(heads)]], n_k)
    assert_attends(prompt, index, *run(prompt, index))


@pytest.mark.parametrize(("change", "message"), [
    (lambda p, i: {"q": p.q[0]}, r"q must be \[B, H, N, D\], got shape \(2, 70, 64\)"),
    (lambda p, i: {"k": p.k.double()}, "k must be bfloat16 or float16, got torch.float64"),
    (lambda p, i: {"v": p.v[:, :, :-1]}, r"k and v must have one shape"),
    (lambda p, i: {"q": p.q[..., :48].contiguous()}, r"head_dim of q must be one of .* got 48"),
    (lambda p, i: {"q": p.q.repeat(1, 2, 1, 1)[:, :3], "k": p.k.repeat(1, 2, 1, 1)},
     "query heads must be a multiple of KV heads, got 3 and 2"),
    (lambda p, i: {"q": p.q.repeat(1, 1, 2, 1)}, "queries are the last of the keys, got 140"),
    (lambda p, i: {"q": p.q.transpose(2, 3).contiguous().transpose(2, 3)},
     "q must have a contiguous last dimension"),
    (lambda p, i: {"index": dataclasses.replace(i, n_k=71)}, "index was built for n_k = 71"),
    (lambda p, i: {"index": dataclasses.replace(i, columns=i.columns.long())},
     "columns must be contiguous int32 .* got torch.int64"),
    (lambda p, i: {"index": dataclasses.replace(i, pieces=i.pieces[:, :1])},
     r"pieces must have shape \(1, 2, None\), got \(1, 1, 4\)"),
    (lambda p, i: {"scale": 0.0}, "scale must be positive, got 0.0"),
    (lambda p, i: {"scale": math.nan}, "scale must be positive, got nan"),
    (lambda p, i: {"index": dataclasses.replace(i, heads=i.heads[:1])},
     "index covers 1 of 2 query heads"),
    (lambda p, i: {"out": torch.empty_like(p.q)[:, :, 1:]}, "out must have the shape of q"),
])  # fmt: skip
def test_an_argument_that_does_not_fit_is_named_with_its_value(
    change, message, make_prompt, band_index
):
    prompt = make_prompt(70, dtype=torch.bfloat16 if ON_GPU else torch.float32)
    index = band_index([[[0], [1]]], [[[0], [1]]], 70)
    arguments = {"q": prompt.q, "k": prompt.k, "v": prompt.v, "index": index, "scale": prompt.scale}
    with pytest.raises(ValueError, match=message):
        band_attention(**{**arguments, **change(prompt, index)})


def test_an_index_whose_padding_is_longer_than_its_rows_changes_nothing(
    dtype, make_prompt, band_index
):
    prompt = make_prompt(200, dtype=dtype)
    index = band_index([[[64], [3]]], [[[0, 70], [1]]], 200)
    padding = torch.full((1, 2, 70), NONE, dtype=torch.int32, device=prompt.q.device)
    longer = BandIndex(
        heads=index.heads,
        pieces=torch.cat([index.pieces, padding], 2),
        columns=torch.cat([index.columns, padding], 2),
        n_k=200,
    )
    assert torch.equal(run(prompt, longer)[0], run(prompt, index)[0])


def test_a_value_that_is_not_finite_makes_nan_of_the_rows_that_see_its_column_only(
    dtype, make_prompt, band_index
):
    prompt = make_prompt(300, dtype=dtype)
    index = band_index([[[0], [0]]], [[[5, 20], [5, 20]]], 300)
    v = prompt.v.clone()
    v[:, :, 20, 3] = float("inf")
    out, _ = run(dataclasses.replace(prompt, v=v), index)
    assert torch.isnan(out[:, :, 64:]).all()
    assert torch.equal(out[:, :, 20:64, 3].isinf(), torch.ones_like(out[:, :, 20:64, 3]).bool())
    assert torch.isfinite(out[:, :, :64, :3]).all()


def test_gathered_values_are_finite_whatever_they_were(dtype, make_prompt, band_index):
    """A weight of 0 times infinity would be NaN."""
    prompt = make_prompt(100, dtype=dtype, kv_heads=2)
    prompt.v[:, 1, 7, 3] = float("inf")
    index = band_index([[[0], [0]]], [[[2, 7, 99], [7]]], 100)
    column_k, column_v = _gather(prompt.k, prompt.v, index.heads, index.columns, 1)
    assert torch.equal(column_k[0, 0], prompt.k[0, 0, [2, 7, 99]])
    assert torch.equal(column_v[0, 0], prompt.v[0, 0, [2, 7, 99]])
    assert column_k[0, 1, 0].isnan().all()
    assert (column_v[0, 1] == 0).all()


def test_rows_at_odd_addresses_give_the_same_attention(
    dtype, make_prompt, band_index, assert_attends
):
    prompt = make_prompt(130, dtype=dtype)
    odd = [torch.cat([x, x], -1)[..., 1:65] for x in (prompt.q, prompt.k, prompt.v)]
    index = band_index([[[0, 65], [43]]], [[[0, 129], [65]]], 130)
    prompt = dataclasses.replace(prompt, q=odd[0], k=odd[1], v=odd[2])
    assert_attends(prompt, index, *run(prompt, index))


@settings(max_examples=40, deadline=None)
@given(
    row=st.sets(st.integers(0, 600), max_size=80),
    first=st.integers(-70, 700),
    step=st.integers(1, 200),
)
def test_entries_below_each_limit_are_counted(row, first, step, padded):
    counts = count_below(padded([[sorted(row), []]]), first, step, 5)
    limits = [first + step * i for i in range(5)]
    assert counts.tolist() == [[[sum(x < limit for x in row) for limit in limits], [0] * 5]]
