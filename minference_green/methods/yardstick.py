"""Yardsticks: what the best and what a blind choice of a given density keep. Not products.

An oracle reads the whole attention matrix to choose what of it to compute, so its time and
joules say nothing. Beside a method of the same density it tells how much of a loss the budget
explains and how much the choice; the random choice is the floor.
"""

import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from minference_green.errors import UsageError
from minference_green.kernels.index import NONE, TILE, BlockIndex, causal_pairs
from minference_green.kernels.selection import to_device, top_positions
from minference_green.methods.backend import Kernels, kernels_for, timed
from minference_green.methods.method import LayerProfile, ProfiledMethod

Densities = float | tuple[tuple[float, ...], ...]
"""Visible over causal pairs of every head, or one per layer and query head."""

YARDSTICKS = ("oracle", "oracle-keys", "random")

MOST_KEY_TOKENS = 16384
"""Tokens up to which ``oracle-keys`` chooses key by key."""

_SCORES = 2**25
"""Scores held at once, 128 MiB in fp32."""

_GOLDEN = -0x61C8864680B583EB
"""Splitmix64's step, 2**64 by the golden ratio, as a signed number."""


def yardstick(name: str, density: Densities, seed: int = 0) -> ProfiledMethod:
    """The yardstick called ``name``, one of ``YARDSTICKS``, at a density.

    For a comparison at equal density, ``density`` is what profiles of the other method told,
    one per layer and query head. ``seed`` draws the tiles of ``random``.
    Raises ``UsageError`` on another name or a density outside (0, 1].
    """
    match name:
        case "oracle" | "random":
            return TileYardstick(name, density, seed)
        case "oracle-keys":
            return KeyOracle(density)
    raise UsageError(f"{name!r} is not a yardstick; choose from {', '.join(YARDSTICKS)}")


@dataclass(frozen=True)
class TileYardstick:
    """Key tiles chosen per query tile by exact attention mass (``oracle``) or blindly (``random``).

    The diagonal and tile 0 are always kept, whatever the density, and every query tile keeps
    equally many. Attention runs in the block-sparse kernel of the device.
    """

    name: Literal["oracle", "random"]
    density: Densities
    seed: int = 0

    def __post_init__(self) -> None:
        _check_densities(self.name, self.density)

    @property
    def parameters(self) -> Mapping[str, Any]:
        """The densities asked for, and what drew the tiles."""
        drawn = {"seed": self.seed} if self.name == "random" else {}
        return {"density": self.density, **drawn}

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, layer: int) -> Tensor:
        """Attention over the kept tiles; shapes as :meth:`PrefillMethod.attend`.

        Raises ``UsageError`` if shapes, dtype, device or densities do not fit.
        """
        return self.profile(q, k, v, scale=scale, layer=layer).out

    def profile(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, layer: int) -> LayerProfile:
        """As :meth:`attend`, with its account."""
        _check_whole(self.name, q, k)
        n, densities = q.shape[2], _of_layer(self.name, self.density, layer, q.shape[1])
        kernels = kernels_for(q.device)

        def choose() -> list[Tensor]:
            return [
                best_tiles(self._scores(kernels, q, k, scale, (layer, b, h)), n, densities[h])
                for b, h in itertools.product(range(q.shape[0]), range(q.shape[1]))
            ]

        try:
            kept, estimate_seconds = timed(q.device, choose)
            index, index_seconds = timed(q.device, lambda: _block_index(kept, q.shape[0], n))
            (out, lse), attend_seconds = timed(
                q.device,
                lambda: kernels.block_attention(q, k, v, index, scale=scale, return_lse=True),
            )
        except ValueError as error:
            raise UsageError(f"{self.name} cannot run on this model: {error}") from error
        density = index.density(n).mean(0).cpu()
        seconds = (estimate_seconds, index_seconds, attend_seconds)
        return LayerProfile(out, density, *seconds, lse, (index,))

    def _scores(
        self, kernels: Kernels, q: Tensor, k: Tensor, scale: float, at: tuple[int, int, int]
    ) -> Tensor:
        """``[tiles, tiles]`` of one head; ``at`` is its layer, prompt and number."""
        _, prompt, head = at
        if self.name == "oracle":
            one = slice(prompt, prompt + 1)
            return tile_mass(q[one], k[one], head, scale=scale, tile_shares=kernels.tile_shares)
        return drawn(-(-q.shape[2] // TILE), (self.seed, *at), q.device)


@dataclass(frozen=True)
class KeyOracle:
    """The keys of largest weight for every single query, as many for each: the best there is.

    No kernel computes such an index at a gain. Up to ``MOST_KEY_TOKENS`` tokens.
    """

    density: Densities
    name = "oracle-keys"

    def __post_init__(self) -> None:
        _check_densities(self.name, self.density)

    @property
    def parameters(self) -> Mapping[str, Any]:
        """The densities asked for."""
        return {"density": self.density}

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, layer: int) -> Tensor:
        """Attention of each query to its best keys, its own always among them.

        Shapes as :meth:`PrefillMethod.attend`. Raises ``UsageError`` on a longer prompt, or if
        shapes or densities do not fit.
        """
        return self.profile(q, k, v, scale=scale, layer=layer).out

    def profile(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, layer: int) -> LayerProfile:
        """As :meth:`attend`, with its account; choosing and attending are one step."""
        _check_whole(self.name, q, k)
        n = q.shape[2]
        check_tokens(self.name, n)
        counts = [
            keys_per_row(n, density)
            for density in _of_layer(self.name, self.density, layer, q.shape[1])
        ]
        out = torch.empty_like(q)
        lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
        group = q.shape[1] // k.shape[1]

        def attend() -> None:
            for (b, head), q_head, k_head in _heads(q, k):
                values = v[b, head // group].float()
                for begin, end, scores in _scores(q_head, k_head, scale):
                    scores.masked_fill_(~best_keys(scores, begin, counts[head]), -torch.inf)
                    out[b, head, begin:end] = (torch.softmax(scores, -1) @ values[:end]).to(q.dtype)
                    lse[b, head, begin:end] = torch.logsumexp(scores, -1)

        _, seconds = timed(q.device, attend)
        pairs = torch.tensor([_pairs(n, count) for count in counts], dtype=torch.float64)
        return LayerProfile(out, pairs / causal_pairs(n, n), 0.0, 0.0, seconds, lse)


def check_tokens(name: str, n: int) -> None:
    """Raise ``UsageError`` if the yardstick of this name does not choose among ``n`` keys."""
    if name == KeyOracle.name and n > MOST_KEY_TOKENS:
        raise UsageError(
            f"{name} chooses key by key up to {MOST_KEY_TOKENS} tokens, got {n}; "
            "use the method oracle, which chooses tiles"
        )


def tile_mass(
    q: Tensor, k: Tensor, head: int, *, scale: float, tile_shares: Callable[..., Tensor]
) -> Tensor:
    """Causal softmax mass of one head by query tile and key tile.

    Shapes: ``q [1, Hq, N, D]``, ``k [1, Hkv, N, D]``, ``head`` a query head; returns fp32
    ``[tiles, tiles]``, whose rows sum to their tile's number of queries. ``tile_shares`` is the
    device's kernel of that name, run for some query tiles at a time.
    """
    tiles = -(-q.shape[2] // TILE)
    mass = torch.zeros(tiles, tiles, dtype=torch.float32, device=q.device)
    heads = to_device([head], q.device)
    step = max(1, _SCORES // (tiles * TILE))
    # From the last, which reaches the most keys: what it held is memory enough for all others.
    for begin in reversed(range(0, tiles, step)):
        end = min(begin + step, tiles)
        shares = tile_shares(q, k, heads, TILE, begin, end, scale=scale, summed=True)
        mass[begin:end, : shares.shape[-1]] = shares[0, 0]
    return mass


def drawn(tiles: int, key: tuple[int, ...], device: torch.device) -> Tensor:
    """Numbers in [0, 1) drawn by a key, fp32 ``[tiles, tiles]``: the same on every device.

    Each is a hash of the key and its place (splitmix64: Steele, Lea, Flood, OOPSLA 2014).
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    x = torch.arange(tiles * tiles, device=device).view(tiles, tiles)
    x.mul_(_GOLDEN).add_(int.from_bytes(digest, signed=True))
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        # Shifted right with zeros, as of an unsigned number.
        x.bitwise_xor_((x >> shift).bitwise_and_((1 << (64 - shift)) - 1)).mul_(factor)
    # Of the upper bits, 24 are exact in fp32.
    return (x >> 40).bitwise_and_(0xFFFFFF).float().mul_(2**-24)


def best_tiles(scores: Tensor, n: int, density: float) -> Tensor:
    """Which key tiles each query tile keeps of ``n`` tokens: bool ``[tiles, tiles]``.

    The diagonal, tile 0, then by falling ``scores [tiles, tiles]``, ties to the smaller tile.
    Every query tile keeps the same number left of its diagonal, or all it has; what the
    density leaves over goes, a tile each, where the next one scores most.
    """
    left, over = left_tiles(n, density)
    tile = torch.arange(len(scores), device=scores.device)
    ranked = scores.masked_fill(tile >= tile[:, None], -torch.inf)
    ranked[:, 0] = torch.inf
    ranked, order = ranked.sort(descending=True, stable=True)
    counts = tile.clamp(max=left)
    following = ranked[:, min(left, len(tile) - 1)].masked_fill(tile <= left, -torch.inf)
    counts[following.sort(descending=True, stable=True).indices[:over]] += 1
    kept = torch.zeros_like(ranked, dtype=torch.bool)
    kept.scatter_(1, order, tile < counts[:, None])
    kept[tile, tile] = True
    return kept


def left_tiles(n: int, density: float) -> tuple[int, int]:
    """Tiles left of the diagonal for every query tile, and how many more in all."""
    tiles = -(-n // TILE)
    diagonal = (n // TILE) * TILE * (TILE + 1) // 2 + (n % TILE) * (n % TILE + 1) // 2
    free = density * causal_pairs(n, n) - diagonal
    left, spent = 0, 0
    # The next tile costs every query beyond the first left + 1 tiles TILE pairs.
    while left < tiles - 1 and (left == 0 or spent + (n - (left + 1) * TILE) * TILE <= free):
        spent += (n - (left + 1) * TILE) * TILE
        left += 1
    over = int((free - spent) // TILE**2)
    return left, min(max(over, 0), tiles - 1 - left)


def best_keys(scores: Tensor, begin: int, count: int) -> Tensor:
    """The ``count`` keys of largest score for each row, its own first: bool, as ``scores``.

    Shapes: ``scores [R, end]`` of the rows from ``begin``, -inf beyond each row's own key.
    """
    rows = torch.arange(len(scores), device=scores.device)
    forced = scores.clone()
    forced[rows, begin + rows] = torch.inf
    best = top_positions(forced[None], [count] * len(rows), 0)[0]
    kept = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, best.long(), True)
    return kept & (scores > -torch.inf)


def keys_per_row(n: int, density: float) -> int:
    """The most keys each query may keep so that ``n`` of them stay within the density."""
    allowed = density * causal_pairs(n, n)
    return max(1, next((k - 1 for k in range(1, n + 1) if _pairs(n, k) > allowed), n))


def _pairs(n: int, count: int) -> int:
    """Pairs of ``n`` queries that keep ``count`` keys each, or all they see."""
    return count * n - count * (count - 1) // 2


def _scores(q: Tensor, k: Tensor, scale: float) -> Iterator[tuple[int, int, Tensor]]:
    """Causal scores of one head, whole query tiles at a time: ``begin, end, [R, end]`` fp32."""
    n = q.shape[0]
    q, k = q.float() * scale, k.float()
    step = max(1, _SCORES // (n * TILE)) * TILE
    for begin in range(0, n, step):
        end = min(begin + step, n)
        scores = q[begin:end] @ k[:end].T
        future = torch.ones(end - begin, end - begin, dtype=torch.bool, device=q.device).triu(1)
        scores[:, begin:].masked_fill_(future, -torch.inf)
        yield begin, end, scores


def _heads(q: Tensor, k: Tensor) -> Iterator[tuple[tuple[int, int], Tensor, Tensor]]:
    """Prompt and number of every query head, its queries and its keys."""
    group = q.shape[1] // k.shape[1]
    for b in range(q.shape[0]):
        for head in range(q.shape[1]):
            yield (b, head), q[b, head], k[b, head // group]


def _block_index(kept: list[Tensor], batch: int, n: int) -> BlockIndex:
    """The index of ``batch`` x heads maps of kept tiles."""
    device, tiles = kept[0].device, len(kept[0])
    n_heads = len(kept) // batch
    lists = [of_head.nonzero()[:, 1].int() for of_head in kept]
    blocks = torch.full((len(kept), max(map(len, lists))), NONE, dtype=torch.int32, device=device)
    for row, listed in zip(blocks, lists, strict=True):
        row[: len(listed)] = listed
    ends = torch.stack([of_head.sum(1).cumsum(0) for of_head in kept])
    return BlockIndex(
        heads=torch.arange(n_heads, dtype=torch.int32, device=device),
        starts=pad(ends, (1, 0)).int().view(batch, n_heads, tiles + 1),
        blocks=blocks.view(batch, n_heads, -1),
        n_q=n,
        n_k=n,
    )


def _of_layer(name: str, density: Densities, layer: int, n_heads: int) -> tuple[float, ...]:
    if not isinstance(density, tuple):
        return (density,) * n_heads
    if layer >= len(density) or len(density[layer]) != n_heads:
        heads = len(density[layer]) if layer < len(density) else "none"
        raise UsageError(
            f"{name} has densities for {len(density)} layers and for {heads} heads of layer "
            f"{layer}, where the model has {n_heads}; measure them on this model"
        )
    return density[layer]


def _check_densities(name: str, density: Densities) -> None:
    rows = density if isinstance(density, tuple) else ((density,),)
    for wrong in (x for row in rows for x in row if not 0 < x <= 1):
        raise UsageError(f"{name}: density must be above 0 and at most 1, got {wrong}")


def _check_whole(name: str, q: Tensor, k: Tensor) -> None:
    if q.shape[2] != k.shape[2]:
        raise UsageError(
            f"{name} prefills whole prompts, got {q.shape[2]} queries for {k.shape[2]} keys; "
            "run a continuation dense"
        )
