"""T4: chunked linear attention in Triton; constants and `divisor` stand at the top of the generated file.

The form of Lightning Attention-2 (Qin et al., 2024), with the sequence cut into segments so that few heads fill a
chip too: `linear_state` sums up each segment, `linear_scan` the segments before each one, and one program goes through
a segment chunk by chunk with the state in registers. Places are those of keys: query i stands at `i + offset` and sees
the keys up to there, or all of them without CAUSAL.

    weight[i, j] = by_query[i] by_key[j] exp(rate (place(i) - j)) q_i . k_j

`linear_forward` makes `sum_j weight v_j` and, as `total`, `sum_j weight`. `triton_linear_gradient` has the gradients
of both.
"""

from __future__ import annotations

LINEAR = r'''
@triton.jit
def powers(rate, gap):
    """exp(rate * gap), and 0 where the gap is negative."""
    return tl.where(gap >= 0, tl.exp2(tl.maximum(gap, 0) * (rate * LOG2E)), 0.0)


@triton.jit
def own_weights(rate):
    """What the products of a chunk's queries and keys are multiplied by, [CHUNK, CHUNK]."""
    i = tl.arange(0, CHUNK)
    gap = i[:, None] - i[None, :]
    return powers(rate, gap) if CAUSAL else gap * 0.0


@triton.jit
def base(ptr, stride0, stride1, b, h):
    """Where a head of a batch entry begins."""
    return ptr + tl.cast(b, tl.int64) * stride0 + tl.cast(h, tl.int64) * stride1


@triton.jit
def rows_of(ptr, stride, start, n, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """A chunk of rows [CHUNK, BLOCK] from row `start` on; zeros for rows that are not there and beyond WIDTH."""
    row = start + tl.arange(0, CHUNK)[:, None]
    d = tl.arange(0, BLOCK)[None, :]
    return tl.load(ptr + tl.cast(row, tl.int64) * stride + d, mask=(row >= 0) & (row < n) & (d < WIDTH), other=0.0)


@triton.jit
def store_rows(x, ptr, stride, start, n, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """The rows of a chunk, where they are."""
    row = start + tl.arange(0, CHUNK)[:, None]
    d = tl.arange(0, BLOCK)[None, :]
    tl.store(ptr + tl.cast(row, tl.int64) * stride + d, x, mask=(row >= 0) & (row < n) & (d < WIDTH))


@triton.jit
def numbers_of(ptr, stride, start, n):
    """One number for each place of a chunk, [CHUNK]; zeros for those that are not there."""
    row = start + tl.arange(0, CHUNK)
    return tl.load(ptr + tl.cast(row, tl.int64) * stride, mask=(row >= 0) & (row < n), other=0.0)


@triton.jit
def factor_of(ptr, stride, start, n, GIVEN: tl.constexpr):
    """Factors of a chunk; ones where the spec has none."""
    if GIVEN:
        return numbers_of(ptr, stride, start, n)
    else:
        return tl.full([CHUNK], 1.0, tl.float32)


@triton.jit
def rate_of(ptr, stride0, stride1, b, h):
    """The rate of decay of a head."""
    if DECAY:
        return tl.load(base(ptr, stride0, stride1, b, h))
    else:
        return tl.cast(0.0, tl.float32)


@triton.jit
def narrowed(state):
    """The state as elements, and their factor; sums may leave the range of fp16, and are brought to its middle."""
    if ELEMENT == tl.float16:
        top = tl.max(tl.max(tl.abs(state), 1), 0)
        scale = tl.exp2(-tl.floor(tl.log2(tl.where(top > 0, top, 1.0))))
        return tl.cast(state * scale, ELEMENT), 1.0 / scale
    else:
        return tl.cast(state, ELEMENT), 1.0


@triton.jit
def times_state(x, state):
    """`x @ state`."""
    held, factor = narrowed(state)
    return tl.dot(tl.cast(x, ELEMENT), held, input_precision=FP32) * factor


@triton.jit
def state_times(state, x):
    """`x @ state^T`, with the state first in the product: its rows are many, and fewer registers hold the tile."""
    held, factor = narrowed(state)
    return tl.trans(tl.dot(held, tl.trans(tl.cast(x, ELEMENT)), input_precision=FP32)) * factor


@triton.jit
def taken_in(state, total, keys, by_key, values, rate):
    """The state after one chunk of keys more: what it held has faded, and so have the chunk's first keys."""
    i = tl.arange(0, CHUNK)
    faded = tl.cast(keys, tl.float32) * (by_key * powers(rate, -i + (CHUNK - 1)))[:, None]
    old = tl.exp2(rate * LOG2E * CHUNK)
    state = state * old + tl.dot(tl.trans(tl.cast(faded, ELEMENT)), values, input_precision=FP32)
    return state, total * old + tl.sum(faded, 0)


@triton.jit
def state_places(ptr, place, width):
    """Where the state [BLOCK_D, BLOCK_DV] and the sum [BLOCK_D] of a segment stand, and which of them are there."""
    at = ptr + tl.cast(place, tl.int64) * (D_QK * D_V + D_QK)
    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    inside = (d[:, None] < width) & (dv[None, :] < D_V)
    return at + d[:, None] * D_V + dv[None, :], inside, at + D_QK * D_V + d, d < width


@triton.jit
def state_of(ptr, place, states):
    """The state and the sum of a segment; zeros if there are no `states`."""
    state_at, inside, total_at, in_width = state_places(ptr, place, tl.where(states > 0, D_QK, 0))
    state = tl.load(state_at, mask=inside, other=0.0)
    return state, tl.load(total_at, mask=in_width, other=0.0)


@triton.jit(do_not_specialize=['n_k', 'low', 'span', 'segments'])
def linear_state(
    k_ptr, v_ptr, by_key_ptr, rate_ptr, states_ptr,
    n_k, low, span, segments,
    k_stride0, k_stride1, k_stride2,
    v_stride0, v_stride1, v_stride2,
    by_key_stride0, by_key_stride1, by_key_stride2,
    rate_stride0, rate_stride1,
):
    """The state that one segment of keys leaves: `span` chunks of one query head's keys."""
    segment = tl.program_id(0) % segments
    h = tl.program_id(0) // segments % HEADS
    b = tl.program_id(0) // segments // HEADS
    rate = rate_of(rate_ptr, rate_stride0, rate_stride1, b, h)
    k_base = base(k_ptr, k_stride0, k_stride1, b, key_head(h))
    v_base = base(v_ptr, v_stride0, v_stride1, b, value_head(h))
    by_key_base = base(by_key_ptr, by_key_stride0, by_key_stride1, b, h)
    state = tl.zeros([BLOCK_D, BLOCK_DV], tl.float32)
    total = tl.zeros([BLOCK_D], tl.float32)
    first = low + segment * span * CHUNK
    for start in range(first, first + span * CHUNK, CHUNK):
        keys = rows_of(k_base, k_stride2, start, n_k, D_QK, BLOCK_D)
        values = rows_of(v_base, v_stride2, start, n_k, D_V, BLOCK_DV)
        by_key = factor_of(by_key_base, by_key_stride2, start, n_k, BY_KEY)
        state, total = taken_in(state, total, keys, by_key, values, rate)
    state_at, inside, total_at, in_width = state_places(states_ptr, tl.program_id(0), D_QK)
    tl.store(state_at, state, mask=inside)
    tl.store(total_at, total, mask=in_width)


@triton.jit(do_not_specialize=['span', 'segments', 'backward'])
def linear_scan(
    states_ptr, rate_ptr,
    span, segments, backward,
    rate_stride0, rate_stride1,
):
    """For each segment the state of all before it, or after it if `backward`; without CAUSAL that of all, once."""
    parts = tl.cdiv(D_QK * D_V + D_QK, SCANNED)
    h = tl.program_id(0) // parts % HEADS
    b = tl.program_id(0) // parts // HEADS
    old = tl.exp2(rate_of(rate_ptr, rate_stride0, rate_stride1, b, h) * LOG2E * CHUNK * span)
    place = tl.program_id(0) % parts * SCANNED + tl.arange(0, SCANNED)
    inside = place < D_QK * D_V + D_QK
    head_at = states_ptr + tl.cast(tl.program_id(0) // parts, tl.int64) * segments * (D_QK * D_V + D_QK) + place
    running = tl.zeros([SCANNED], tl.float32)
    for turn in range(0, segments):
        segment = tl.where(backward != 0, segments - 1 - turn, turn)
        at = head_at + tl.cast(segment, tl.int64) * (D_QK * D_V + D_QK)
        own = tl.load(at, mask=inside, other=0.0)
        if CAUSAL:
            tl.store(at, running, mask=inside)
        running = running * old + own
    if not CAUSAL:
        tl.store(head_at, running, mask=inside)


@triton.jit(do_not_specialize=['n_q', 'n_k', 'offset', 'low', 'span', 'segments', 'states', 'raw'])
def linear_forward(
    q_ptr, k_ptr, v_ptr, by_key_ptr, by_query_ptr, gate_ptr, rate_ptr, states_ptr, out_ptr, total_ptr,
    n_q, n_k, offset, low, span, segments, states, raw,
    q_stride0, q_stride1, q_stride2,
    k_stride0, k_stride1, k_stride2,
    v_stride0, v_stride1, v_stride2,
    by_key_stride0, by_key_stride1, by_key_stride2,
    by_query_stride0, by_query_stride1, by_query_stride2,
    gate_stride0, gate_stride1, gate_stride2,
    rate_stride0, rate_stride1,
    out_stride0, out_stride1, out_stride2,
):
    """The queries of one segment of a head; `raw`: neither divided nor gated."""
    segment = tl.program_id(0) % segments
    h = tl.program_id(0) // segments % HEADS
    b = tl.program_id(0) // segments // HEADS
    rate = rate_of(rate_ptr, rate_stride0, rate_stride1, b, h)
    own = own_weights(rate)
    i = tl.arange(0, CHUNK)
    q_base, out_base = base(q_ptr, q_stride0, q_stride1, b, h), base(out_ptr, out_stride0, out_stride1, b, h)
    k_base = base(k_ptr, k_stride0, k_stride1, b, key_head(h))
    v_base = base(v_ptr, v_stride0, v_stride1, b, value_head(h))
    by_key_base = base(by_key_ptr, by_key_stride0, by_key_stride1, b, h)
    by_query_base = base(by_query_ptr, by_query_stride0, by_query_stride1, b, h)
    gate_base = base(gate_ptr, gate_stride0, gate_stride1, b, h)
    total_base = total_ptr + (tl.cast(b, tl.int64) * HEADS + h) * n_q
    state, sums = state_of(states_ptr, (b * HEADS + h) * states + (segment if CAUSAL else 0), states)
    first = low + segment * span * CHUNK
    for start in range(first, tl.minimum(first + span * CHUNK, n_q + offset), CHUNK):
        queries = rows_of(q_base, q_stride2, start - offset, n_q, D_QK, BLOCK_D)
        grown = tl.cast(queries, tl.float32) * tl.exp2((i[:, None] + 1) * (rate * LOG2E))
        result = times_state(grown, state)
        total = tl.sum(grown * sums[None, :], 1)
        if CAUSAL:
            keys = rows_of(k_base, k_stride2, start, n_k, D_QK, BLOCK_D)
            values = rows_of(v_base, v_stride2, start, n_k, D_V, BLOCK_DV)
            by_key = factor_of(by_key_base, by_key_stride2, start, n_k, BY_KEY)
            s = tl.dot(queries, tl.trans(keys), input_precision=FP32) * own * by_key[None, :]
            result += tl.dot(tl.cast(s, ELEMENT), values, input_precision=FP32)
            total += tl.sum(s, 1)
            state, sums = taken_in(state, sums, keys, by_key, values, rate)
        by_query = factor_of(by_query_base, by_query_stride2, start - offset, n_q, BY_QUERY)
        result, total = result * by_query[:, None], total * by_query
        gate = factor_of(gate_base, gate_stride2, start - offset, n_q, GATED)
        q = start - offset + i
        done = tl.where(raw != 0, result, result / divisor(total, b, h, q, n_q, n_k)[:, None] * gate[:, None])
        store_rows(done, out_base, out_stride2, start - offset, n_q, D_V, BLOCK_DV)
        tl.store(total_base + q, total, mask=(q >= 0) & (q < n_q))
'''
