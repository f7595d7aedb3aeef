"""Which tiles of keys a program takes, where all programs take equally many.

Lines are (request, KV head, tile of rows), in this order, and a line of request i has count[i] tiles of keys.
All tiles of all lines stand in one row; program p takes the p-th of equal, contiguous shares of it, which may
begin and end within a line and may hold several. What a program finds of line n goes to slot p + n: going
through the row, each boundary of a program or of a line makes one of the two greater, so no slot is taken
twice, the slots of a line follow each other, and programs + lines slots are enough.

Source: Osama et al. 2023, Stream-K, arXiv:2301.03598, section 4; for attention: Sanovar et al. 2024, Lean
Attention, arXiv:2405.10480.
"""

import triton
import triton.language as tl

from effopt.backends.triton.attention_scores import seen_keys


@triton.jit(do_not_specialize=["t", "first", "stop"])
def extents_kernel(
    p_mask, p_query_ids, p_key_ids, p_extents, mask_strides, query_ids_stride, key_ids_stride, t, first, stop,
    MASK_OVER_KEYS: tl.constexpr, KEYS: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    """First tile of keys, and number of tiles, that ids and a mask over keys leave a request."""
    i_b = tl.program_id(0).to(tl.int64)
    o_t = tl.arange(0, QUERIES)
    b_query_ids = o_t
    if p_key_ids is not None:
        p_key_ids += i_b * key_ids_stride
        b_query_ids = tl.load(p_query_ids + i_b * query_ids_stride + o_t, mask=o_t < t, other=0).to(tl.int64)
    if p_mask is not None:
        p_mask += i_b * mask_strides[0]
    first, stop = seen_keys(
        first, stop, p_mask, b_query_ids, p_key_ids, o_t < t, mask_strides[3], MASK_OVER_KEYS
    )
    tl.store(p_extents + i_b, first // KEYS)
    count = tl.where(stop > first, tl.cdiv(stop, KEYS) - first // KEYS, 0)
    tl.store(p_extents + tl.num_programs(0) + i_b, count)


@triton.jit
def tiles_of_requests(p_extents, o_b, batch, first, count):
    """First tile, and number of tiles, of a line of each request `o_b`: as found, or the same for all."""
    if p_extents is not None:
        b_first = tl.load(p_extents + o_b, mask=o_b < batch, other=0)
        return b_first, tl.load(p_extents + batch + o_b, mask=o_b < batch, other=0)
    return o_b * 0 + first, tl.where(o_b < batch, count, 0)


@triton.jit
def share_of_tiles(b_count, lines, programs):
    """Tiles that a program takes, and how many there are."""
    total = tl.sum(b_count, axis=0) * lines
    return tl.maximum(tl.cdiv(total, programs), 1), total


@triton.jit
def place_of_tile(tile, o_b, b_count, lines):
    """Of a tile in the row: its request, its line in the request, its place in the line."""
    b_end = tl.cumsum(b_count, axis=0) * lines
    i_b = tl.sum((b_end <= tile).to(tl.int32), axis=0)
    begin = tl.sum(tl.where(o_b == i_b, b_end - b_count * lines, 0), axis=0)
    count = tl.maximum(tl.sum(tl.where(o_b == i_b, b_count, 0), axis=0), 1)
    return i_b, (tile - begin) // count, (tile - begin) % count


@triton.jit
def programs_of_line(i_b, i_line, o_b, b_count, lines, share):
    """First program that has tiles of a line, and how many programs have."""
    b_end = tl.cumsum(b_count, axis=0) * lines
    count = tl.sum(tl.where(o_b == i_b, b_count, 0), axis=0)
    begin = tl.sum(tl.where(o_b == i_b, b_end, 0), axis=0) - (lines - i_line) * count
    first = begin // share
    return first, tl.where(count > 0, (begin + count - 1) // share - first + 1, 0)
