"""Band attention on Hopper: two neighbouring query tiles share the key tiles they both visit.

At 64 rows a query tile copies 32 KiB of keys and values for 512 tensor-core cycles, more than
the L2 cache delivers, and most of its neighbour's keys are the same. With ``e`` counted from the
first query tile of a pair, a run of pieces from a to b is a to b for the first and a - 64 to b - 64
for the second. They share a to b - 64; what is left is one tile for each::

    first tile of the pair               a ---------------- b
    second tile          a - 64 --------------- b - 64
                         |   its own   | shared |  its own  |

(Before a run at 0, the second's own tile is the first's diagonal, shared as well.) A run of the
least length shares nothing. Shared pieces of whatever runs fill tiles, four to one. One walk
serves both: the two diagonals, shared tiles, gathered columns, then each one's own tiles in
turn. Two producer warps copy it into rings in shared memory, one the keys and one the values,
piece by piece where pieces do not follow each other; two groups of four warps consume it, one per
query tile. Programs stay resident and take pair after pair, so that the next pair's copies run
while this one's output is written. With long walks they would drift apart and neighbours no
longer meet in the L2 cache, so there each pair is a program. A ring slot is free after two
arrivals, one from each group or both from the owner of a tile of its own. Within a group the
logits of a tile are computed beside the weighted values of the tile before; its softmax then
hides under those.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from minference_green.kernels.index import NONE, PIECE, TILE
from minference_green.kernels.tile import LN_2, LOG2_E, count_below, padded

NO_PIECE = gl.constexpr(NONE)

SLACK = gl.constexpr(8.0)
"""How many bits above a row's old maximum a logit lies before it becomes the new one."""

RING = 6
"""Key tiles in shared memory, as many as fit."""

REGISTERS = 168
"""At the start, for all twelve warps; the consumers then take those the producers give up."""

LONG_WALK = 2048
"""Band tiles that a query tile may have from which every pair gets a program of its own."""

SWIZZLE = 64
"""Elements of a row that shared memory keeps together, the most that one box copies."""

# The copy has another name after Triton 3.6.
copy_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
# So has the other view of some shared memory.
RENAMED = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))


@gluon.jit
def _place(w, n_pairs, n_heads):
    """Pair, listed head and batch of a piece of work; pairs with the most work first."""
    return n_pairs - 1 - w % n_pairs, w // n_pairs % n_heads, w // n_pairs // n_heads


@gluon.jit
def _boxes(slots, piece_desc, RING: gl.constexpr, DIM: gl.constexpr,
           TILE: gl.constexpr, PIECE: gl.constexpr, SWIZZLE: gl.constexpr):  # fmt: skip
    """A ring's memory as what one copy of a piece fills.

    A tile lies there by columns of ``SWIZZLE`` elements, each row after row.
    """
    n_boxes: gl.constexpr = RING * TILE * DIM // (PIECE * SWIZZLE)
    shape: gl.constexpr = [n_boxes, 1, 1, PIECE, SWIZZLE]
    if RENAMED:
        return slots.reinterpret(slots.dtype, shape, piece_desc.layout)
    else:  # noqa: RET505
        return slots._reinterpret(slots.dtype, shape, piece_desc.layout)  # noqa: SLF001


@gluon.jit
def _claim(full, empty, t, RING: gl.constexpr):
    """Wait until the slot of item ``t`` is free; which it is."""
    s = t % RING
    mbarrier.wait(empty.index(s), ((t // RING) & 1) ^ 1)
    # A group waits for every item or every other, so for item t only once t - 2 is under way.
    # Then t - RING, the last in that slot, must have arrived: one bit cannot tell it from t.
    before = t + 2 - RING
    mbarrier.wait(full.index(before % RING), (before // RING) & 1, pred=before >= 0)
    return s


@gluon.jit
def _fill(desc, slots, full, s, b, h, row):
    """Start copying a tile's rows into slot ``s``."""
    mbarrier.expect(full.index(s), desc.block_type.nbytes)
    copy_tile(desc, [b, h, row, 0], full.index(s), slots.index(s))


@gluon.jit
def _fill_by_piece(desc, piece_desc, slots, full, s, b, h, r0, lists_ptr, first, n_pieces,
                   DIM: gl.constexpr, TILE: gl.constexpr, PIECE: gl.constexpr,
                   SWIZZLE: gl.constexpr, RING: gl.constexpr):  # fmt: skip
    """Start copying the pieces from ``first`` of a list on into slot ``s``."""
    mbarrier.expect(full.index(s), desc.block_type.nbytes)
    boxes = _boxes(slots, piece_desc, RING, DIM, TILE, PIECE, SWIZZLE)
    for part in gl.static_range(TILE // PIECE):
        # What is missing of the last tile lies before the first key: zeros.
        start = gl.load(lists_ptr + first + part, first + part < n_pieces, r0)
        for wide in gl.static_range(DIM // SWIZZLE):
            box = boxes.index((s * (DIM // SWIZZLE) + wide) * (TILE // PIECE) + part)
            at = [b, h, r0 - PIECE - start, wide * SWIZZLE]
            copy_tile(piece_desc, at, full.index(s), box)


@gluon.jit
def _produce(
    q_desc, desc, piece_desc, column_desc, queries, slots, full, empty, heads_ptr, lists_ptr,
    counts, n_q, n_k, n_pieces, list_stride, group, n_pairs, n_heads, n_work,
    HAS_QUERIES: gl.constexpr, DIM: gl.constexpr, TILE: gl.constexpr, PIECE: gl.constexpr,
    SWIZZLE: gl.constexpr, RING: gl.constexpr,
):  # fmt: skip
    """A warp that copies every tile of the walk, keys or values, in its order; one also queries."""
    qs, q_full, q_empty = queries
    shared_ptr, first_ptr, second_ptr, _, second_left_ptr = counts
    PARTS: gl.constexpr = TILE // PIECE
    t = 0
    phase = 0
    for w in range(gl.program_id(0), n_work, gl.num_programs(0)):
        pair, h, b = _place(w, n_pairs, n_heads)
        listed = (b * n_heads + h).to(gl.int64)
        head = gl.load(heads_ptr + h)
        kv_head = head // group
        r0 = n_k - n_q + pair * 2 * TILE
        at = listed * n_pairs + pair
        n_columns = gl.load(second_left_ptr + at)
        n_shared = gl.load(shared_ptr + at)
        n_first = gl.load(first_ptr + at)
        n_second = gl.load(second_ptr + at)
        own_shared = lists_ptr + listed * n_pieces
        own_first = own_shared + list_stride
        own_second = own_first + list_stride
        if HAS_QUERIES:
            for side in gl.static_range(2):
                mbarrier.wait(q_empty.index(side), phase ^ 1)
                q_row = (2 * pair + side) * TILE
                _fill(q_desc, qs, q_full, side, b, head, q_row)
            phase ^= 1
        for i in range(2):
            _fill(desc, slots, full, _claim(full, empty, t, RING), b, kv_head, r0 + TILE - i * TILE)
            t += 1
        for i in range(0, n_shared, PARTS):
            start = gl.load(own_shared + i)
            end = gl.load(own_shared + i + PARTS - 1, i + PARTS <= n_shared, -1)
            s = _claim(full, empty, t, RING)
            # The masks of a tile that reaches past column 0 count on one order of pieces.
            if (end - start == TILE - PIECE) & (end + PIECE <= r0):
                _fill(desc, slots, full, s, b, kv_head, r0 - TILE - start)
            else:
                _fill_by_piece(
                    desc, piece_desc, slots, full, s, b, kv_head, r0, own_shared, i, n_shared,
                    DIM, TILE, PIECE, SWIZZLE, RING,
                )  # fmt: skip
            t += 1
        for i in range(0, n_columns, TILE):
            _fill(column_desc, slots, full, _claim(full, empty, t, RING), b, h, i)
            t += 1
        first = gl.load(own_first, n_first > 0, 0)
        second = gl.load(own_second, n_second > 0, 0)
        for i in range(gl.maximum(n_first, n_second)):
            # The next places are on their way while these wait for their slots.
            next_first = gl.load(own_first + i + 1, i + 1 < n_first, 0)
            next_second = gl.load(own_second + i + 1, i + 1 < n_second, 0)
            s = _claim(full, empty, t, RING)
            if i < n_first:
                _fill(desc, slots, full, s, b, kv_head, r0 - TILE - first)
            else:
                mbarrier.arrive(full.index(s), count=1)
            s = _claim(full, empty, t + 1, RING)
            if i < n_second:
                _fill(desc, slots, full, s, b, kv_head, r0 - second)
            else:
                mbarrier.arrive(full.index(s), count=1)
            first = next_first
            second = next_second
            t += 2


@gluon.jit
def _packed(p, dtype: gl.constexpr):
    """Neighbouring columns as one 32-bit number: halves of registers are costly to carry."""
    even, odd = gl.split(p.reshape([p.shape[0], p.shape[1] // 2, 2]))
    bfloat16: gl.constexpr = dtype == gl.bfloat16
    asm: gl.constexpr = (
        "cvt.rn.bf16x2.f32 $0, $2, $1;" if bfloat16 else "cvt.rn.f16x2.f32 $0, $2, $1;"
    )
    return gl.inline_asm_elementwise(asm, "=r,f,f", [even, odd], gl.int32, False, 1)


@gluon.jit
def _unpacked(words, dtype: gl.constexpr, OUT: gl.constexpr):
    """What :func:`_packed` made, as the left operand of a product; moves nothing."""
    low = words.to(gl.int16).to(dtype, bitcast=True)
    high = (words >> 16).to(gl.int16).to(dtype, bitcast=True)
    both = gl.join(low, high).reshape([words.shape[0], words.shape[1] * 2])
    return gl.convert_layout(both, gl.DotOperandLayout(0, OUT, 2), assert_trivial=True)


@gluon.jit
def _partial_sum(p):
    """Sums over the columns a thread holds."""
    quads = p.reshape([p.shape[0], p.shape[1] // 8, 4, 2])
    return gl.sum(gl.sum(quads, 3), 1)


@gluon.constexpr_function
def _shrink_asm(n):
    """Multiply a thread's ``n`` numbers if any row of its warp has a new maximum.

    Two numbers of its upper row and two of its lower come in turn, so do their factors.
    """
    upper, lower = 2 * n, 2 * n + 2
    products = (f"mul.f32 ${i}, ${i}, ${(upper, lower)[i // 2 % 2]};" for i in range(n))
    return f"""{{
        .reg .pred any, other;
        setp.neu.f32 any, ${upper}, 0f3F800000;
        setp.neu.f32 other, ${lower}, 0f3F800000;
        or.pred any, any, other;
        vote.sync.any.pred any, any, 0xffffffff;
        @!any bra.uni KEPT;
        {" ".join(products)}
        KEPT:
    }}"""


@gluon.constexpr_function
def _shrink_operands(n):
    """Numbers multiplied in place, and as many factors."""
    return ",".join(["=f"] * n + [str(i) for i in range(n)] + ["f"] * n)


@gluon.jit
def _shrunk(acc, shrink, DIM: gl.constexpr):
    """The accumulator times each row's factor; by a branch, as most factors of most tiles are 1."""
    factors, acc = gl.broadcast(gl.expand_dims(shrink, 1), acc)
    n: gl.constexpr = DIM // 2
    asm: gl.constexpr = _shrink_asm(n)
    operands: gl.constexpr = _shrink_operands(n)
    return gl.inline_asm_elementwise(asm, operands, [acc, factors], gl.float32, False, n)


@gluon.jit
def _logits(q, ring, t, LOGITS: gl.constexpr, TILE: gl.constexpr, DIM: gl.constexpr,
            RING: gl.constexpr):  # fmt: skip
    """Start the product of the queries with key tile ``t``."""
    ks, _, k_full, _, _, _ = ring
    mbarrier.wait(k_full.index(t % RING), (t // RING) & 1)
    zero = gl.zeros([TILE, TILE], gl.float32, LOGITS)
    k = ks.index(t % RING).reshape([TILE, DIM]).permute((1, 0))
    return warpgroup_mma(q, k, zero, use_acc=False, is_async=True)


@gluon.jit
def _add_values(acc, weights, ring, u, OUT: gl.constexpr, TILE: gl.constexpr, DIM: gl.constexpr,
                RING: gl.constexpr):  # fmt: skip
    """Start adding the weighted values of tile ``u``, which are there."""
    _, vs, _, _, _, _ = ring
    v = vs.index(u % RING).reshape([TILE, DIM])
    return warpgroup_mma(_unpacked(weights, v.dtype, OUT), v, acc, is_async=True)


@gluon.jit
def _free_values(ring, u, is_private, RING: gl.constexpr):
    _, _, _, _, _, v_empty = ring
    mbarrier.arrive(v_empty.index(u % RING), count=1)
    mbarrier.arrive(v_empty.index(u % RING), count=1, pred=is_private)


@gluon.jit
def _pass_over(ring, t, COUNT: gl.constexpr, RING: gl.constexpr):
    """Free a slot unread; only once it is full, or the arrival would count for its last use."""
    _, _, k_full, k_empty, v_full, v_empty = ring
    mbarrier.wait(k_full.index(t % RING), (t // RING) & 1)
    mbarrier.arrive(k_empty.index(t % RING), count=COUNT)
    mbarrier.wait(v_full.index(t % RING), (t // RING) & 1)
    mbarrier.arrive(v_empty.index(t % RING), count=COUNT)


@gluon.jit
def _step(
    t, state, q, ring, qk_scale, seen,
    LOGITS: gl.constexpr, OUT: gl.constexpr, TILE: gl.constexpr, DIM: gl.constexpr,
    RING: gl.constexpr, PRIVATE: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """Logits of key tile ``t`` beside the weighted values of the tile before, then its softmax.

    The state: accumulator, weights of the tile before, row maxima, each thread's part of the
    row sums, that tile and whether it is private. ``seen``: infinity where seen, else minus that.
    """
    acc, weights, row_max, row_sum, u, u_private = state
    ks, _, _, k_empty, v_full, _ = ring
    logits = _logits(q, ring, t, LOGITS, TILE, DIM, RING)
    acc = _add_values(acc, weights, ring, u, OUT, TILE, DIM, RING)
    logits = warpgroup_mma_wait(1, deps=[logits])
    mbarrier.arrive(k_empty.index(t % RING), count=2 if PRIVATE else 1)
    if MASKED:
        # Unlike a sum or a product, a minimum hides a NaN.
        logits = gl.minimum(logits, gl.expand_dims(seen, 0))
    new_max = gl.max(logits, 1) * qk_scale
    new_max = gl.where(new_max > row_max + SLACK, new_max, row_max)
    p = gl.exp2(logits * qk_scale - gl.expand_dims(new_max, 1))
    shrink = gl.exp2(row_max - new_max)
    part = _partial_sum(p)
    shrink_sum = gl.convert_layout(shrink, gl.SliceLayout(1, part.type.layout))
    row_sum = row_sum * gl.expand_dims(shrink_sum, 1) + part
    # This wait also keeps the compiler from moving the softmax behind the next one.
    mbarrier.wait(v_full.index(t % RING), (t // RING) & 1)
    acc = warpgroup_mma_wait(0, deps=[acc])
    # Not before: the product that was waited for reads the same registers.
    weights = _packed(p, ks.dtype)
    _free_values(ring, u, u_private, RING)
    acc = _shrunk(acc, gl.convert_layout(shrink, gl.SliceLayout(1, OUT)), DIM)
    return acc, weights, new_max, row_sum, t, PRIVATE


@gluon.jit
def _consume(
    queries, ring, heads_ptr, pieces_ptr, lists_ptr, counts, columns_ptr, bits_ptr,
    out_ptr, lse_ptr, out_batch, out_head, out_row,
    n_q, n_k, n_pieces, list_stride, n_columns, n_words, n_pairs, n_heads, n_work, qk_scale,
    SIDE: gl.constexpr, HEAD_DIM: gl.constexpr, DIM: gl.constexpr, TILE: gl.constexpr,
    PIECE: gl.constexpr, HAS_LSE: gl.constexpr, RING: gl.constexpr,
):  # fmt: skip
    """The four warps that attend for one query tile of each pair, its first or its second."""
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    KEYS: gl.constexpr = gl.SliceLayout(0, LOGITS)
    # Each warp holds the mask of a column tile, two columns a lane.
    LANES: gl.constexpr = gl.BlockedLayout([2], [32], [4], [0])
    qs, q_full, q_empty = queries
    _, _, _, k_empty, v_full, _ = ring
    shared_ptr, first_ptr, second_ptr, first_left_ptr, second_left_ptr = counts
    rows = gl.arange(0, TILE, gl.SliceLayout(1, LOGITS))
    keys = gl.arange(0, TILE, KEYS)
    lanes = gl.arange(0, TILE, LANES)
    t = 0
    phase = 0
    for w in range(gl.program_id(0), n_work, gl.num_programs(0)):
        pair, h, b = _place(w, n_pairs, n_heads)
        listed = (b * n_heads + h).to(gl.int64)
        head = gl.load(heads_ptr + h).to(gl.int64)
        r0 = n_k - n_q + pair * 2 * TILE
        own_r0 = r0 + SIDE * TILE
        at = listed * n_pairs + pair
        n_shared = gl.load(shared_ptr + at)
        n_first = gl.load(first_ptr + at)
        n_second = gl.load(second_ptr + at)
        n_private = n_first if SIDE == 0 else n_second
        n_left = gl.load((first_left_ptr if SIDE == 0 else second_left_ptr) + at)
        n_column_tiles = (gl.load(second_left_ptr + at) + TILE - 1) // TILE
        own_shared = lists_ptr + listed * n_pieces
        own_private = own_shared + (1 + SIDE) * list_stride
        own_columns = columns_ptr + listed * n_columns
        own_bits = bits_ptr + listed * n_words
        mbarrier.wait(q_full.index(SIDE), phase)
        q = qs.index(SIDE).reshape([TILE, DIM]).load(gl.DotOperandLayout(0, LOGITS, 2))

        # Passed over, not left alone: see _claim.
        if SIDE == 0:
            _pass_over(ring, t, 1, RING)
        # The diagonal: item 0 is the second tile's alone, item 1 the first tile's. Every row
        # sees itself there, so its maximum is finite from here on.
        diagonal = t + 1 - SIDE
        logits = _logits(q, ring, diagonal, LOGITS, TILE, DIM, RING)
        logits = warpgroup_mma_wait(0, deps=[logits])
        # Not before: a group's barrier does not wait for its loads, which may queue behind the
        # last tile's stores. The fence orders them before the copy of the next queries.
        fence_async_shared()
        mbarrier.arrive(q_empty.index(SIDE), count=1)
        mbarrier.arrive(k_empty.index(diagonal % RING), count=1)
        causal = gl.expand_dims(keys, 0) <= gl.expand_dims(rows, 1)
        logits = gl.where(causal, logits, float("-inf"))
        row_max = gl.max(logits, 1) * qk_scale
        p = gl.exp2(logits * qk_scale - gl.expand_dims(row_max, 1))
        row_sum = _partial_sum(p)
        weights = _packed(p, qs.dtype)
        mbarrier.wait(v_full.index(diagonal % RING), (diagonal // RING) & 1)
        acc = gl.zeros([TILE, DIM], gl.float32, OUT)
        state = (acc, weights, row_max, row_sum, diagonal, False)

        # The second tile sees the first's diagonal tile whole if its band starts at e = 0.
        begin = t + 2
        if SIDE == 1:
            if gl.load(pieces_ptr + listed * n_pieces, n_pieces > 0, NO_PIECE) == 0:
                begin = t + 1
            else:
                _pass_over(ring, t + 1, 1, RING)
        # Only the last tile may lack pieces, and only the last piece may reach past column 0.
        n_whole = n_shared * PIECE // TILE
        farthest = gl.load(own_shared + n_shared - 1, n_shared > 0, -PIECE)
        n_whole -= ((n_shared * PIECE % TILE == 0) & (farthest + PIECE > r0)).to(gl.int32)
        n_edge = (n_shared * PIECE + TILE - 1) // TILE - n_whole
        t += 2 + n_whole
        for j in range(begin, t):
            state = _step(
                j, state, q, ring, qk_scale, 0, LOGITS, OUT, TILE, DIM, RING, False, False
            )  # fmt: skip

        at_edge = n_whole * (TILE // PIECE) + lanes // PIECE
        edge = gl.load(own_shared + at_edge, at_edge < n_shared, NO_PIECE)
        # The keys of a piece ascend, so its first is the farthest.
        edge = edge <= r0 - PIECE + lanes % PIECE
        column = lanes - n_edge * TILE
        left = (column >= 0) & (column < n_left)
        e = own_r0 - 1 - gl.load(own_columns + column, left, 0)
        word = gl.load(own_bits + (e >> 5), left, 0)
        column += TILE
        position = gl.load(own_columns + column, column < n_left, 0)
        for i in range(n_edge + n_column_tiles):
            seen = left & (((word >> (e & 31)) & 1) == 0)
            seen = seen | ((i < n_edge) & edge)
            seen = gl.convert_layout(gl.where(seen, float("inf"), float("-inf")), KEYS)
            # The next tile's mask is on its way while this tile is computed.
            left = column < n_left
            e = own_r0 - 1 - position
            word = gl.load(own_bits + (e >> 5), left, 0)
            column += TILE
            position = gl.load(own_columns + column, column < n_left, 0)
            state = _step(
                t + i, state, q, ring, qk_scale, seen, LOGITS, OUT, TILE, DIM, RING, False, True
            )  # fmt: skip
        t += n_edge + n_column_tiles

        farthest = gl.load(own_private + n_private - 1, n_private > 0, 0)
        past = gl.where(n_private > 0, farthest + TILE - own_r0, 0)
        n_inside = n_private - (past > 0).to(gl.int32)
        for i in range(n_inside):
            state = _step(
                t + 2 * i + SIDE, state, q, ring, qk_scale, 0,
                LOGITS, OUT, TILE, DIM, RING, True, False,
            )  # fmt: skip
        for i in range(n_inside, n_private):
            state = _step(
                t + 2 * i + SIDE, state, q, ring, qk_scale,
                gl.where(keys >= past, float("inf"), float("-inf")),
                LOGITS, OUT, TILE, DIM, RING, True, True,
            )  # fmt: skip

        acc, weights, row_max, row_sum, u, u_private = state
        acc = _add_values(acc, weights, ring, u, OUT, TILE, DIM, RING)
        acc = warpgroup_mma_wait(0, deps=[acc])
        _free_values(ring, u, u_private, RING)
        n_turns = gl.maximum(n_first, n_second)
        for i in range(n_private, n_turns):
            _pass_over(ring, t + 2 * i + SIDE, 2, RING)
        t += 2 * n_turns
        phase ^= 1

        row_sum = gl.convert_layout(gl.sum(row_sum, 1), gl.SliceLayout(1, LOGITS))
        out = acc / gl.expand_dims(gl.convert_layout(row_sum, gl.SliceLayout(1, OUT)), 1)
        m0 = (2 * pair + SIDE) * TILE
        out_rows = m0 + gl.arange(0, TILE, gl.SliceLayout(1, OUT))
        dims = gl.arange(0, DIM, gl.SliceLayout(0, OUT))
        out_at = b.to(gl.int64) * out_batch + head * out_head
        out_at += gl.expand_dims(out_rows.to(gl.int64) * out_row, 1) + gl.expand_dims(dims, 0)
        kept = gl.expand_dims(out_rows < n_q, 1) & gl.expand_dims(dims < HEAD_DIM, 0)
        gl.store(out_ptr + out_at, out.to(out_ptr.dtype.element_ty), kept)
        if HAS_LSE:
            lse = (row_max + gl.log2(row_sum)) * LN_2
            gl.store(lse_ptr + listed * n_q + m0 + rows, lse, m0 + rows < n_q)


@gluon.jit(
    do_not_specialize=(
        "n_q", "n_k", "n_pieces", "list_stride", "n_columns", "n_words", "group", "n_pairs",
        "n_heads", "n_work",
    )
)  # fmt: skip
def _pair_kernel(
    q_desc, k_desc, v_desc, piece_k_desc, piece_v_desc, column_k_desc, column_v_desc,
    out_ptr, lse_ptr, heads_ptr, pieces_ptr, lists_ptr, shared_ptr, first_ptr, second_ptr,
    first_left_ptr, second_left_ptr, columns_ptr, bits_ptr,
    out_batch: gl.int64, out_head: gl.int64, out_row: gl.int64,
    n_q, n_k, n_pieces, list_stride, n_columns, n_words, group, n_pairs, n_heads, n_work, qk_scale,
    HEAD_DIM: gl.constexpr, DIM: gl.constexpr, TILE: gl.constexpr, PIECE: gl.constexpr,
    SWIZZLE: gl.constexpr, HAS_LSE: gl.constexpr, RING: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = k_desc.dtype
    qs = gl.allocate_shared_memory(dtype, [2, 1, 1, TILE, DIM], q_desc.layout)
    ks = gl.allocate_shared_memory(dtype, [RING, 1, 1, TILE, DIM], k_desc.layout)
    vs = gl.allocate_shared_memory(dtype, [RING, 1, 1, TILE, DIM], v_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [RING, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [RING, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [RING, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [RING, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(2):
        mbarrier.init(q_full.index(s), count=1)
        mbarrier.init(q_empty.index(s), count=1)
    for s in gl.static_range(RING):
        mbarrier.init(k_full.index(s), count=1)
        mbarrier.init(k_empty.index(s), count=2)
        mbarrier.init(v_full.index(s), count=1)
        mbarrier.init(v_empty.index(s), count=2)
    fence_async_shared()
    queries = (qs, q_full, q_empty)
    ring = (ks, vs, k_full, k_empty, v_full, v_empty)
    counts = (shared_ptr, first_ptr, second_ptr, first_left_ptr, second_left_ptr)
    gl.warp_specialize([
        (_consume, (
            queries, ring, heads_ptr, pieces_ptr, lists_ptr, counts, columns_ptr, bits_ptr,
            out_ptr, lse_ptr, out_batch, out_head, out_row, n_q, n_k, n_pieces, list_stride,
            n_columns, n_words, n_pairs, n_heads, n_work, qk_scale,
            0, HEAD_DIM, DIM, TILE, PIECE, HAS_LSE, RING,
        )),
        (_consume, (
            queries, ring, heads_ptr, pieces_ptr, lists_ptr, counts, columns_ptr, bits_ptr,
            out_ptr, lse_ptr, out_batch, out_head, out_row, n_q, n_k, n_pieces, list_stride,
            n_columns, n_words, n_pairs, n_heads, n_work, qk_scale,
            1, HEAD_DIM, DIM, TILE, PIECE, HAS_LSE, RING,
        )),
        (_produce, (
            q_desc, k_desc, piece_k_desc, column_k_desc, queries, ks, k_full, k_empty, heads_ptr,
            lists_ptr, counts, n_q, n_k, n_pieces, list_stride, group, n_pairs, n_heads, n_work,
            True, DIM, TILE, PIECE, SWIZZLE, RING,
        )),
        (_produce, (
            q_desc, v_desc, piece_v_desc, column_v_desc, queries, vs, v_full, v_empty, heads_ptr,
            lists_ptr, counts, n_q, n_k, n_pieces, list_stride, group, n_pairs, n_heads, n_work,
            False, DIM, TILE, PIECE, SWIZZLE, RING,
        )),
    ], [4, 1, 1], [240, 24, 24])  # fmt: skip


@triton.jit(do_not_specialize=("n_pieces", "list_stride"))
def _split_kernel(
    pieces_ptr, lists_ptr, n_pieces, list_stride,
    TILE: tl.constexpr, PIECE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One head's pieces as three ascending lists: shared, first's own, second's own."""
    row = tl.program_id(0).to(tl.int64) * n_pieces
    pieces_ptr += row
    lists_ptr += row
    PARTS: tl.constexpr = TILE // PIECE
    n_shared = 0
    n_first = 0
    n_second = 0
    for begin in range(0, n_pieces, BLOCK):
        i = begin + tl.arange(0, BLOCK)
        piece = tl.load(pieces_ptr + i, i < n_pieces, NO_PIECE)
        before = tl.load(pieces_ptr + i - 1, (i > 0) & (i < n_pieces), -PIECE)
        after = tl.load(pieces_ptr + i + 1, i + 1 < n_pieces, NO_PIECE)
        across = tl.load(pieces_ptr + i + PARTS, i + PARTS < n_pieces, NO_PIECE)
        real = piece != NO_PIECE
        shared = (real & (across - piece == TILE)).to(tl.int32)
        ends = (real & (after - piece != PIECE)).to(tl.int32)
        # The second's tile before a run at 0 would be the first's diagonal: shared as well.
        begins = (real & (piece - before != PIECE)).to(tl.int32)
        tl.store(lists_ptr + n_shared + tl.cumsum(shared, 0) - 1, piece, shared != 0)
        own = lists_ptr + list_stride + n_first + tl.cumsum(ends, 0) - 1
        tl.store(own, piece + PIECE - TILE, ends != 0)
        own = lists_ptr + 2 * list_stride + n_second + tl.cumsum(begins, 0) - 1
        tl.store(own, piece, begins != 0)
        n_shared += tl.sum(shared)
        n_first += tl.sum(ends)
        n_second += tl.sum(begins)


def split_pieces(pieces: Tensor) -> Tensor:
    """Pieces as int32 ``[3, B, H, P]``, each list ascending and padded with ``NONE``.

    Pieces that both query tiles of a pair visit; the first's own tiles, by their start, one at
    the end of each run; the second's, by their start counted from the second: where a run begins,
    other than at 0.
    """
    lists = torch.full((3, *pieces.shape), NONE, dtype=torch.int32, device=pieces.device)
    batch, n_heads, n_pieces = pieces.shape
    if n_pieces:
        _split_kernel[(batch * n_heads,)](
            pieces, lists, n_pieces, lists.stride(0),
            TILE=TILE, PIECE=PIECE, BLOCK=1024, num_warps=8,
        )  # fmt: skip
    return lists


def _describe(x: Tensor, rows: int, width: int) -> TensorDescriptor:
    """Descriptor of ``[B, H, N, D]`` that copies ``rows`` rows of one head, zeros outside."""
    # A dimension of one is never stepped over, so its stride may be anything: make it legal.
    step = x.element_size() * 16
    strides = [step if x.shape[d] == 1 else x.stride(d) for d in range(3)]
    block = [1, 1, rows, width]
    dtype = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}[x.dtype]
    layout = gl.NVMMASharedLayout.get_default_for(block, dtype)
    return TensorDescriptor(x, list(x.shape), [*strides, 1], block, layout)


def programs(n_pairs: int, n_pieces: int, n_k: int, processors: int) -> int:
    """Programs for so many pairs of all heads, with room for ``n_pieces`` pieces a head."""
    long = min(n_pieces * PIECE, n_k) // TILE >= LONG_WALK
    return n_pairs if long else min(n_pairs, processors)


def attend_pairs(
    q: Tensor, k: Tensor, v: Tensor, column_k: Tensor, column_v: Tensor, out: Tensor, lse: Tensor,
    heads: Tensor, pieces: Tensor, columns: Tensor, bits: Tensor, *, scale: float,
    has_lse: bool,
) -> None:  # fmt: skip
    """Launch; arguments as :func:`vertical_slash.band_attention` checked and prepared them."""
    batch, _, n_q, head_dim = q.shape
    n_k, n_heads = k.shape[2], len(heads)
    n_pairs = triton.cdiv(n_q, 2 * TILE)
    r0 = n_k - n_q
    lists = split_pieces(pieces)
    counts = (
        count_below(lists[0], r0, 2 * TILE, n_pairs),
        count_below(lists[1], r0, 2 * TILE, n_pairs),
        count_below(lists[2], r0 + TILE, 2 * TILE, n_pairs),
        count_below(columns, r0, 2 * TILE, n_pairs),
        count_below(columns, r0 + TILE, 2 * TILE, n_pairs),
    )
    n_work = n_pairs * n_heads * batch
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count
    dim = padded(head_dim)
    _pair_kernel[(programs(n_work, pieces.shape[2], n_k, processors),)](
        *(_describe(x, TILE, dim) for x in (q, k, v)),
        *(_describe(x, PIECE, SWIZZLE) for x in (k, v)),
        *(_describe(x, TILE, dim) for x in (column_k, column_v)), out, lse,
        heads, pieces, lists, *counts, columns, bits, *out.stride()[:3],
        n_q, n_k, pieces.shape[2], lists.stride(0), columns.shape[2], bits.shape[2],
        q.shape[1] // k.shape[1], n_pairs, n_heads, n_work, scale * LOG2_E,
        HEAD_DIM=head_dim, DIM=dim, TILE=TILE, PIECE=PIECE, SWIZZLE=SWIZZLE, HAS_LSE=has_lse,
        RING=RING,
        num_warps=4, maxnreg=REGISTERS,
    )  # fmt: skip
