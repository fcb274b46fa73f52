"""The best and the blind choice of a given density, by brute force where that is possible."""

import hashlib
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from minference_green.errors import UsageError
from minference_green.kernels import cpu, reference
from minference_green.kernels.index import TILE, causal_pairs
from minference_green.methods import yardstick as module
from minference_green.methods.patterns import AShape, VerticalSlash
from minference_green.methods.sparse import uniform
from minference_green.methods.yardstick import (
    YARDSTICKS,
    best_keys,
    best_tiles,
    drawn,
    keys_per_row,
    left_tiles,
    tile_mass,
    yardstick,
)

SCALE = 0.125
SIZES = [1, 7, 63, 64, 65, 300, 1000]


def inputs(n: int, heads: int = 4, batch: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Random, with a block that later rows look for."""
    g = torch.Generator().manual_seed(n)
    q = torch.randn(batch, heads, n, 64, generator=g)
    k, v = (torch.randn(batch, 2, n, 64, generator=g) for _ in range(2))
    wanted = torch.randn(64, generator=g)
    k[:, :, n // 5 : n // 4] += wanted
    q[:, :, n // 2 :] += wanted
    return q, k, v


def weights(q: Tensor, k: Tensor) -> Tensor:
    n = q.shape[2]
    logits = q.double() @ reference.expand_kv(k, q.shape[1]).double().mT * SCALE
    return torch.softmax(logits.masked_fill(~reference.causal_mask(n, n), -torch.inf), -1)


def test_tile_mass_begins_where_the_most_keys_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that grew from part to part could not be used again."""
    monkeypatch.setattr(module, "_SCORES", 2 * 5 * TILE)
    asked = []

    def tile_shares(*arguments: Any, **settings: Any) -> Tensor:
        asked.append(arguments[4:6])
        return cpu.tile_shares(*arguments, **settings)

    q, k, _ = inputs(300)
    tile_mass(q, k, 0, scale=SCALE, tile_shares=tile_shares)
    assert asked == [(4, 5), (2, 4), (0, 2)]


@pytest.mark.parametrize("held", [1, 2**14, 2**25])
@pytest.mark.parametrize("n", SIZES)
def test_tile_mass_is_the_softmax_summed_by_tiles(
    n: int, held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where only some query tiles' scores are held at once."""
    monkeypatch.setattr(module, "_SCORES", held)
    q, k, _ = inputs(n)
    exact = weights(q, k)[0, 3]
    mass = tile_mass(q, k, 3, scale=SCALE, tile_shares=cpu.tile_shares)
    for m, t in itertools.product(range(len(mass)), repeat=2):
        want = exact[m * TILE : (m + 1) * TILE, t * TILE : (t + 1) * TILE].sum()
        assert mass[m, t].item() == pytest.approx(float(want), abs=1e-4)


@pytest.mark.parametrize("n", [300, 960, 1000])
@pytest.mark.parametrize("density", [0.0001, 0.3, 0.5, 0.77, 1.0])
def test_a_choice_of_tiles_has_the_density_within_a_tile(n: int, density: float) -> None:
    """Below what is always kept it keeps just that."""
    g = torch.Generator().manual_seed(0)
    tiles = -(-n // TILE)
    kept = best_tiles(torch.rand(tiles, tiles, generator=g), n, density)
    tile = torch.arange(n) // TILE
    pairs = int((kept[tile][:, tile] & reference.causal_mask(n, n)).sum())
    always = torch.eye(tiles, dtype=torch.bool)
    always[:, 0] = True
    least = int((always[tile][:, tile] & reference.causal_mask(n, n)).sum())
    allowed = max(density * causal_pairs(n, n), least)
    # A ragged last query tile may hold what the last whole tile would have cost.
    assert allowed - 2 * TILE**2 < pairs <= allowed
    assert kept[always].all()
    assert not kept.triu(1).any()


def test_every_query_tile_keeps_equally_many_and_no_others_would_hold_more() -> None:
    q, k, _ = inputs(640)
    mass = tile_mass(q, k, 0, scale=SCALE, tile_shares=cpu.tile_shares)
    kept = best_tiles(mass, 640, 0.65)
    left, over = left_tiles(640, 0.65)
    counts = kept.tril(-1).sum(1)
    extra = counts - torch.arange(10).clamp(max=left)
    assert set(extra.tolist()) <= {0, 1}
    assert extra.sum() == over > 0
    for m in range(1, 10):
        others = itertools.combinations(range(1, m), int(counts[m]) - 1)
        best = max(float(mass[m, [0, *tiles, m]].sum()) for tiles in others)
        assert float(mass[m][kept[m]].sum()) == pytest.approx(best)
    # A tile more went where it holds most.
    following = [mass[m][:m][~kept[m][:m]].max() for m in range(left + 1, 10) if not extra[m]]
    given = [mass[m][:m][kept[m][:m]][1:].min() for m in range(left + 1, 10) if extra[m]]
    assert min(given) >= max(following)


def test_ties_go_to_the_smaller_tile() -> None:
    kept = best_tiles(torch.zeros(8, 8), 512, 0.5)
    left, over = left_tiles(512, 0.5)
    assert (left, over) == (1, 4)
    for m in range(8):
        want = min(m, left + (left < m <= left + over))
        assert kept[m].tolist() == [t < want or t == m for t in range(8)]


@pytest.mark.parametrize("name", ["oracle", "random"])
@pytest.mark.parametrize("n", SIZES)
def test_tiles_are_attended_to_as_the_index_shows(name: str, n: int) -> None:
    q, k, v = inputs(n, batch=2)
    profile = yardstick(name, 0.5).profile(q, k, v, scale=SCALE, layer=0)
    (index,) = profile.indices
    mask = index.mask(n, n)
    assert mask.diagonal(dim1=2, dim2=3).all()
    want, lse = reference.attention(q, k, v, mask, scale=SCALE)
    torch.testing.assert_close(profile.out.double(), want, rtol=0, atol=1e-5)
    assert profile.lse is not None
    torch.testing.assert_close(profile.lse.double(), lse, rtol=0, atol=1e-5)
    shares = mask.sum((2, 3)).double() / causal_pairs(n, n)
    torch.testing.assert_close(profile.density, shares.mean(0))
    assert torch.equal(profile.out, yardstick(name, 0.5).attend(q, k, v, scale=SCALE, layer=0))


def recall(profile: object, exact: Tensor) -> Tensor:
    return torch.exp(profile.lse.double() - exact)  # type: ignore[attr-defined]


def test_at_the_density_of_a_method_the_oracle_keeps_more_and_chance_less() -> None:
    """Density by layer and head, as profiles of the other method tell it."""
    q, k, v = inputs(1000)
    n = 1000
    mask = reference.causal_mask(n, n).expand(1, 4, n, n)
    _, dense = reference.attention(q, k, v, mask, scale=SCALE)
    profile = uniform("vertical-slash", VerticalSlash(100, 100)).profile(
        q, k, v, scale=SCALE, layer=1
    )
    densities = ((0.5,) * 4, tuple(profile.density.tolist()))
    kept = {"method": recall(profile, dense).mean().item()}
    for name in YARDSTICKS:
        other = yardstick(name, densities).profile(q, k, v, scale=SCALE, layer=1)
        assert (other.density <= profile.density + 1e-9).all()
        assert (other.density >= profile.density - 2 * TILE**2 / causal_pairs(n, n)).all()
        kept[name] = recall(other, dense).mean().item()
    assert kept["oracle-keys"] > kept["oracle"] > kept["method"] > kept["random"]


def test_chance_is_the_same_for_one_seed_and_differs_by_seed_layer_head_and_prompt() -> None:
    q, k, v = (torch.zeros(2, h, 640, 64) for h in (4, 2, 2))

    def listed(layer: int = 0, seed: int = 0) -> Tensor:
        (index,) = yardstick("random", 0.5, seed).profile(q, k, v, scale=SCALE, layer=layer).indices
        return index.mask(640, 640)

    first = listed()
    assert torch.equal(first, listed())
    for other in (listed(layer=1), listed(seed=1), first.roll(1, 0), first.roll(1, 1)):
        assert not torch.equal(first, other)


def test_what_is_drawn_is_uniform_and_without_ties_of_neighbours() -> None:
    """Mean, variance and the correlation of neighbours, at five standard errors."""
    tiles = 512
    x = drawn(tiles, (0, 1, 0, 3), torch.device("cpu")).double()
    assert 0 <= float(x.min()) < float(x.max()) < 1
    n = tiles * tiles
    assert abs(float(x.mean()) - 0.5) < 5 * (1 / 12 / n) ** 0.5
    assert abs(float(x.var()) - 1 / 12) < 5 * (1 / 180 / n) ** 0.5
    pairs = [(x[1:], x[:-1]), (x[:, 1:], x[:, :-1])]
    pairs.append((x, drawn(tiles, (1, 1, 0, 3), torch.device("cpu")).double()))
    for one, other in pairs:
        together = torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1]
        assert abs(float(together)) < 5 / one.numel() ** 0.5


def test_what_is_drawn_is_splitmix64_of_the_key_and_the_place() -> None:
    """In whole numbers without a sign, as it was published: no device may differ by rounding."""
    x = drawn(3, (7, 0, 1, 2), torch.device("cpu"))
    key = int.from_bytes(hashlib.blake2b(b"(7, 0, 1, 2)", digest_size=8).digest())
    for place, got in enumerate(x.flatten().tolist()):
        z = (key + place * 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        assert got == ((z ^ (z >> 31)) >> 40) / 2**24


@pytest.mark.parametrize("n", [1, 7, 64, 111, 200])
def test_every_query_attends_to_its_best_keys(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SCORES", 1)
    q, k, v = inputs(n)
    count = keys_per_row(n, 0.3)
    exact = weights(q, k)
    mask = torch.zeros(1, 4, n, n, dtype=torch.bool)
    for head, i in itertools.product(range(4), range(n)):
        ranked = sorted(range(i + 1), key=lambda j: (j != i, -exact[0, head, i, j], j))
        mask[0, head, i, ranked[:count]] = True
    profile = yardstick("oracle-keys", 0.3).profile(q, k, v, scale=SCALE, layer=0)
    want, lse = reference.attention(q, k, v, mask, scale=SCALE)
    torch.testing.assert_close(profile.out.double(), want, rtol=0, atol=1e-5)
    torch.testing.assert_close(profile.lse.double(), lse, rtol=0, atol=1e-5)
    assert profile.density[0].item() == mask[0, 0].sum().item() / causal_pairs(n, n)


def test_ties_among_keys_go_to_the_smaller_and_each_query_keeps_its_own() -> None:
    scores = torch.zeros(3, 5).masked_fill(~reference.causal_mask(3, 5), -torch.inf)
    want = [[1, 0, 1, 0, 0], [1, 0, 0, 1, 0], [1, 0, 0, 0, 1]]
    assert best_keys(scores, 2, 2).int().tolist() == want
    everything = best_keys(scores, 2, 5)
    assert torch.equal(everything, reference.causal_mask(3, 5))


@pytest.mark.parametrize("n", [1, 10, 333])
@pytest.mark.parametrize("density", [0.001, 0.3, 1.0])
def test_keys_per_row_are_the_most_within_the_density(n: int, density: float) -> None:
    def pairs(count: int) -> int:
        return sum(min(count, i + 1) for i in range(n))

    count = keys_per_row(n, density)
    assert count == 1 or pairs(count) <= density * causal_pairs(n, n)
    assert count == n or pairs(count + 1) > density * causal_pairs(n, n)


@pytest.mark.parametrize("name", YARDSTICKS)
def test_everything_is_dense_attention(name: str) -> None:
    q, k, v = inputs(300)
    profile = yardstick(name, 1.0).profile(q, k, v, scale=SCALE, layer=0)
    dense = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=SCALE, enable_gqa=True
    )
    torch.testing.assert_close(profile.out, dense)
    assert profile.density.tolist() == [1.0] * 4


@pytest.mark.parametrize("name", YARDSTICKS)
def test_what_a_yardstick_cannot_do_is_refused_with_the_value(name: str) -> None:
    q, k, v = inputs(64)
    with pytest.raises(UsageError, match="whole prompts, got 1 queries for 64 keys"):
        yardstick(name, 0.5).attend(q[:, :, -1:], k, v, scale=SCALE, layer=0)
    for wrong in (0.0, -0.5, 1.01, float("nan")):
        with pytest.raises(UsageError, match=f"above 0 and at most 1, got {wrong}"):
            yardstick(name, ((0.5, wrong),))
    table = ((0.5,) * 3,)
    with pytest.raises(UsageError, match=r"1 layers and for 3 heads of layer 0, where .* has 4"):
        yardstick(name, table).attend(q, k, v, scale=SCALE, layer=0)
    with pytest.raises(UsageError, match="1 layers and for none heads of layer 1"):
        yardstick(name, table).attend(q, k, v, scale=SCALE, layer=1)


def test_a_prompt_too_long_to_choose_key_by_key_is_refused() -> None:
    q = torch.zeros(1, 1, 16385, 1)
    with pytest.raises(UsageError, match="up to 16384 tokens, got 16385; use the method oracle"):
        yardstick("oracle-keys", 0.5).attend(q, q, q, scale=SCALE, layer=0)


def test_an_unknown_yardstick_is_told_the_known_ones() -> None:
    with pytest.raises(UsageError, match="'best' is not a yardstick; choose from oracle, oracle-k"):
        yardstick("best", 0.5)


def test_what_the_kernel_refuses_is_the_users_to_resolve() -> None:
    q, k, v = inputs(64)
    with pytest.raises(UsageError, match=r"oracle cannot run on this model: .*one floating dtype"):
        yardstick("oracle", 0.5).attend(q, k, v.half(), scale=SCALE, layer=0)


def test_the_density_of_an_a_shape_can_be_taken_over() -> None:
    """A window is less than whole tiles: what is always kept may be more than the budget."""
    q, k, v = inputs(300)
    profile = uniform("a-shape", AShape(1, 1)).profile(q, k, v, scale=SCALE, layer=0)
    densities = (tuple(profile.density.tolist()),)
    other = yardstick("oracle", densities).profile(q, k, v, scale=SCALE, layer=0)
    (index,) = other.indices
    assert index.starts[0, 0].tolist() == [0, 1, 3, 5, 7, 9]
