"""Inputs and comparisons for the Triton kernels, on a GPU or in Triton's interpreter.

Without a GPU the modules ``test_triton_*`` need ``TRITON_INTERPRET=1`` before Triton is first
imported. ``test_interpreter.py`` runs them so, in processes of their own; a plain collection
of this folder leaves them out, and nothing else in the test run is affected.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from minference_green.kernels import reference
from minference_green.kernels.index import NONE, BandIndex, BlockIndex

HAS_GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

collect_ignore_glob = [] if HAS_GPU or INTERPRETED else ["test_triton_*.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HAS_GPU and item.path.name.startswith("test_triton_"):
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda" if HAS_GPU else "cpu"


@pytest.fixture(params=[torch.bfloat16, torch.float16] if HAS_GPU else [torch.float32], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """What the machine computes in: the interpreter is silently wrong in bfloat16."""
    return request.param


@dataclass(frozen=True)
class Prompt:
    q: Tensor
    k: Tensor
    v: Tensor
    scale: float


@pytest.fixture(scope="session")
def make_prompt(device: str) -> Callable[..., Prompt]:
    def make(
        n_q: int,
        n_k: int | None = None,
        *,
        dtype: torch.dtype,
        batch: int = 1,
        heads: int = 2,
        kv_heads: int = 1,
        head_dim: int = 64,
        seed: int = 0,
        columns: Sequence[int] = (),
        offsets: Sequence[int] = (),
    ) -> Prompt:
        """Random tensors; given columns and diagonals stand out by a logit of about 8."""
        n_k = n_q if n_k is None else n_k
        g = torch.Generator().manual_seed(seed)
        q = torch.randn(batch, heads, n_q, head_dim, generator=g)
        k = torch.randn(batch, kv_heads, n_k, head_dim, generator=g)
        v = torch.randn(batch, kv_heads, n_k, head_dim, generator=g)
        direction = functional.normalize(torch.randn(head_dim, generator=g), dim=0) * head_dim**0.25
        for j in columns:
            k[:, :, j] += 4 * direction
        q += 2 * direction if len(columns) else 0
        keys = reference.expand_kv(k, heads)
        at = torch.arange(n_k - n_q, n_k)
        for o in offsets:
            q += 8 / head_dim**0.5 * torch.where((at >= o)[:, None], keys[:, :, at - o], 0.0)
        return Prompt(*(x.to(dtype).to(device) for x in (q, k, v)), head_dim**-0.5)

    return make


def _padded(rows: Sequence[Sequence[Sequence[int]]], device: str) -> Tensor:
    width = max(len(row) for of_batch in rows for row in of_batch)
    full = [[[*row, *[NONE] * (width - len(row))] for row in of_batch] for of_batch in rows]
    shape = (len(rows), len(rows[0]), width)
    return torch.tensor(full, dtype=torch.int32, device=device).reshape(shape)


@pytest.fixture(scope="session")
def padded(device: str) -> Callable[[Sequence[Sequence[Sequence[int]]]], Tensor]:
    """Rows of one index tensor, padded with NONE to one length."""
    return lambda rows: _padded(rows, device)


@pytest.fixture(scope="session")
def band_index(device: str) -> Callable[..., BandIndex]:
    def build(
        offsets: Sequence[Sequence[Sequence[int]]],
        columns: Sequence[Sequence[Sequence[int]]],
        n_k: int,
        heads: Sequence[int] | None = None,
    ) -> BandIndex:
        """From slashes and columns per batch and listed head."""
        pieces = [[reference.cut_pieces(sorted(set(o))) for o in row] for row in offsets]
        cols = [[sorted(set(c)) for c in row] for row in columns]
        listed = list(range(len(pieces[0]))) if heads is None else list(heads)
        return BandIndex(
            heads=torch.tensor(listed, dtype=torch.int32, device=device),
            pieces=_padded(pieces, device),
            columns=_padded(cols, device),
            n_k=n_k,
        )

    return build


@pytest.fixture(scope="session")
def block_index(device: str) -> Callable[..., BlockIndex]:
    def build(
        lists: Sequence[Sequence[Sequence[Sequence[int]]]],
        n_q: int,
        n_k: int,
        heads: Sequence[int] | None = None,
    ) -> BlockIndex:
        """From key tiles per batch, listed head and query tile; capacity as the longest row."""
        starts = [
            [[sum(map(len, tiles[:m])) for m in range(len(tiles) + 1)] for tiles in row]
            for row in lists
        ]
        flat = [[[n for tiles in head for n in tiles] for head in row] for row in lists]
        width = max(len(x) for row in flat for x in row)
        # Unused capacity holds whatever memory held: a kernel must not look at it.
        blocks = [[x + [12345] * (width - len(x)) for x in row] for row in flat]
        listed = list(range(len(lists[0]))) if heads is None else list(heads)
        return BlockIndex(
            *(torch.tensor(x, dtype=torch.int32, device=device) for x in (listed, starts, blocks)),
            n_q=n_q,
            n_k=n_k,
        )

    return build


def relative_rms(got: Tensor, want: Tensor) -> float:
    want = want.double()
    return float((got.double() - want).norm() / want.norm())


@pytest.fixture(scope="session")
def assert_attends() -> Callable[..., None]:
    def check(prompt: Prompt, index: BandIndex | BlockIndex, out: Tensor, lse: Tensor) -> None:
        """The listed heads are exact masked attention, as near as the dtype lets dense be."""
        q, k, v = (x.cpu() for x in (prompt.q, prompt.k, prompt.v))
        heads = index.heads.cpu().long()
        host = _to_cpu(index)
        mask = host.mask(q.shape[2], k.shape[2])
        k, v = (reference.expand_kv(x, q.shape[1])[:, heads] for x in (k, v))
        want, want_lse = reference.attention(q[:, heads], k, v, mask, scale=prompt.scale)
        got = out.cpu()[:, heads]
        assert torch.isfinite(got).all()
        if q.dtype == torch.float32:
            limit = 2e-6  # about sixteen roundings
        else:
            dense = functional.scaled_dot_product_attention(
                prompt.q[:, heads],
                k.to(prompt.q.device),
                v.to(prompt.q.device),
                attn_mask=mask.to(prompt.q.device),
                scale=prompt.scale,
            )
            # Ours rounds each probability once more than a float32 softmax; half as much again.
            limit = 1.5 * relative_rms(dense.cpu(), want) + 1e-4
        assert relative_rms(got, want) <= limit
        # Logits are fp32 sums whatever the dtype: their rounding grows with their size.
        assert ((lse.cpu().double() - want_lse).abs() <= 4e-6 * (1 + want_lse.abs().max())).all()

    return check


def _to_cpu(index: BandIndex | BlockIndex) -> BandIndex | BlockIndex:
    fields = {n: x.cpu() if isinstance(x, Tensor) else x for n, x in vars(index).items()}
    return type(index)(**fields)
