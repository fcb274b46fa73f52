"""What scoring rows holds at a million tokens, by the sizes that it really allocates."""

from collections.abc import Iterator

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minference_green.kernels import estimate
from minference_green.kernels.estimate import row_scores

TOKENS, HEADS = 2**20, 32


class Held(TorchDispatchMode):
    """Bytes of the storages that calls of torch have made and that are still there; the peak."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {
            x.untyped_storage()._cdata
            for x in tree_leaves((args, kwargs))
            if isinstance(x, torch.Tensor)
        }
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in given:
                storage = x.untyped_storage()
                self.made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.made = {at: made for at, made in self.made.items() if not made[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.made.values()))
        return out


class Unlaunched:
    """A kernel that is asked for and never runs."""

    def __getitem__(self, grid: tuple[int, ...]):
        assert min(grid) >= 1
        return lambda *_, **__: None


@pytest.fixture
def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("_row_mass_kernel", "_mass_kernel"):
        monkeypatch.setattr(estimate, name, Unlaunched())
    yield


@pytest.mark.parametrize("rows", [range(TOKENS - 64, TOKENS), range(63, TOKENS, TOKENS // 64)])
def test_scores_of_a_million_tokens_and_32_heads_hold_at_most_300_mb(rows, nothing_runs, device):
    """Of the last rows, and of rows spread over the prompt, whose slashes are whole numbers."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    q = torch.zeros(1, 1, 1, 128, dtype=dtype, device=device).expand(1, HEADS, TOKENS, 128)
    heads = torch.arange(HEADS, dtype=torch.int32, device=device)
    with Held() as held:
        columns, slashes = row_scores(q, q[:, :8], heads, list(rows), scale=0.1)
    assert columns.dtype == slashes.dtype == torch.float32
    # The results alone are 268 MB.
    assert 4 * HEADS * TOKENS * 2 <= held.peak <= 300e6


def test_the_count_sees_what_is_gone_again_while_it_is_there(device):
    with Held() as held:
        kept = torch.zeros(1000, dtype=torch.int32, device=device)
        kept.float().mul_(2)
        kept.view(torch.float32).mul_(2)
        assert sum(size for _, size in held.made.values()) == 4000
    assert held.peak == 8000
