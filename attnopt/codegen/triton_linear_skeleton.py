"""T4: chunked linear attention in Triton; constants and `divisor` stand at the top of the generated file.

The form of Lightning Attention-2 (Qin et al., 2024), with the sequence cut into segments so that few heads fill a
chip too: `linear_state` sums up each segment, `linear_scan` the segments before each one, and one program goes through
a segment chunk by chunk with the state in registers. Places are those of keys: query i stands at `i + offset` and sees
the keys up to there, or all of them without CAUSAL.

    weight[i, j] = by_query[i] by_key[j] exp(rate (place(i) - j)) q_i . k_j

With LINE the decay is data, one number for each place, and `exp(line_q[i] - line_k[j])` stands for it. A state is kept
relative to `floor`, the least `line_k` so far: then a key never grows in it, however the line runs, and a query grows
no more than its greatest weight does.

`linear_forward` makes `sum_j weight v_j` and, as `total`, `sum_j weight`. `triton_linear_gradient` has the gradients
of both.
"""

from __future__ import annotations

from attnopt.codegen.triton_linear_parts import kernel

_HELPERS = r'''
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
def bounded(gap):
    """exp(gap), finite: where there is nothing to multiply, the product is to be zero."""
    return tl.exp2(tl.minimum(gap * LOG2E, 127.0))


@triton.jit
def mark(ptr, stride, place, n):
    """The floor of the line at a key, or at the nearest one."""
    key = tl.maximum(tl.minimum(place, n - 1), 0)
    return tl.load(ptr + tl.cast(key, tl.int64) * stride, mask=n > 0, other=0.0)


@triton.jit
def line_weights(line_q, line_k):
    """`own_weights` of a line."""
    i = tl.arange(0, CHUNK)
    return tl.where(i[:, None] >= i[None, :], bounded(line_q[:, None] - line_k[None, :]), 0.0)


@triton.jit
def grown_by(rate, line_q, before, start):
    """What a chunk's queries multiply the state before it by, [CHUNK]."""
    i = tl.arange(0, CHUNK)
    if LINE:
        return tl.where(start + i >= 0, bounded(line_q - before), 0.0)
    else:
        return tl.exp2((i + 1) * (rate * LOG2E))


@triton.jit
def faded_by(rate, line_k, end):
    """What the keys of a chunk are multiplied by in the state after it, [CHUNK]."""
    if LINE:
        return bounded(end - line_k)
    else:
        return powers(rate, -tl.arange(0, CHUNK) + (CHUNK - 1))


@triton.jit
def lasting(rate, before, end, places):
    """How much of a state is left after so many places."""
    if LINE:
        return bounded(end - before)
    else:
        return tl.exp2(rate * LOG2E * places)


@triton.jit
def line_of(ptr, stride, start, n):
    """The line at the places of a chunk; zeros where the decay is none, or the same everywhere."""
    if LINE:
        return numbers_of(ptr, stride, start, n)
    else:
        return tl.zeros([CHUNK], tl.float32)


@triton.jit
def ends_of(ptr, stride, start, places, n):
    """The floor of the line before `start`, and after so many places more."""
    if LINE:
        return mark(ptr, stride, start - 1, n), mark(ptr, stride, start + places - 1, n)
    else:
        return tl.cast(0.0, tl.float32), tl.cast(0.0, tl.float32)


@triton.jit
def base(ptr, stride0, stride1, b, h):
    """Where a head of a batch entry begins."""
    return ptr + tl.cast(b, tl.int64) * stride0 + tl.cast(h, tl.int64) * stride1


@triton.jit
def rows_of(ptr, stride, start, n, width, BLOCK: tl.constexpr):
    """A chunk of rows [CHUNK, BLOCK] from row `start` on; zeros for rows that are not there and beyond width."""
    row = start + tl.arange(0, CHUNK)[:, None]
    d = tl.arange(0, BLOCK)[None, :]
    return tl.load(ptr + tl.cast(row, tl.int64) * stride + d, mask=(row >= 0) & (row < n) & (d < width), other=0.0)


@triton.jit
def store_rows(x, ptr, stride, start, n, width, BLOCK: tl.constexpr):
    """The rows of a chunk, where they are."""
    row = start + tl.arange(0, CHUNK)[:, None]
    d = tl.arange(0, BLOCK)[None, :]
    tl.store(ptr + tl.cast(row, tl.int64) * stride + d, x, mask=(row >= 0) & (row < n) & (d < width))


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
def taken_in(state, total, keys, by_key, values, fade, old):
    """The state after one chunk of keys more: what it held has faded, and so have the chunk's first keys."""
    faded = tl.cast(keys, tl.float32) * (by_key * fade)[:, None]
    state = state * old + tl.dot(tl.trans(tl.cast(faded, ELEMENT)), values, input_precision=FP32)
    return state, total * old + tl.sum(faded, 0)


@triton.jit
def state_places(ptr, place, width, column, BLOCK: tl.constexpr):
    """Where some columns of a segment's state [BLOCK_D, BLOCK] and its sum [BLOCK_D] stand, and which are there."""
    at = ptr + tl.cast(place, tl.int64) * (D_QK * D_V + D_QK)
    d, dv = tl.arange(0, BLOCK_D), column + tl.arange(0, BLOCK)
    inside = (d[:, None] < width) & (dv[None, :] < D_V)
    return at + d[:, None] * D_V + dv[None, :], inside, at + D_QK * D_V + d, d < width


@triton.jit
def state_of(ptr, place, states, column, BLOCK: tl.constexpr):
    """The state and the sum of a segment; zeros if there are no `states`."""
    state_at, inside, total_at, in_width = state_places(ptr, place, tl.where(states > 0, D_QK, 0), column, BLOCK)
    state = tl.load(state_at, mask=inside, other=0.0)
    return state, tl.load(total_at, mask=in_width, other=0.0)
'''

_STATE = kernel(
    "linear_state", "The state that one segment of keys leaves: `span` chunks of one query head's keys.",
    "k v by_key rate line_k floor states", "n_k low span segments", r"""
    state = tl.zeros([BLOCK_D, BLOCK_DV], tl.float32)
    total = tl.zeros([BLOCK_D], tl.float32)
    first = low + segment * span * CHUNK
    for start in range(first, first + span * CHUNK, CHUNK):
        keys = rows_of(k_base, k_stride2, start, n_k, D_QK, BLOCK_D)
        values = rows_of(v_base, v_stride2, start, n_k, D_V, BLOCK_DV)
        by_key = factor_of(by_key_base, by_key_stride2, start, n_k, BY_KEY)
        before, end = ends_of(floor_base, floor_stride2, start, CHUNK, n_k)
        fade = faded_by(rate, line_of(line_k_base, line_k_stride2, start, n_k), end)
        state, total = taken_in(state, total, keys, by_key, values, fade, lasting(rate, before, end, CHUNK))
    state_at, inside, total_at, in_width = state_places(states_ptr, tl.program_id(0), D_QK, 0, BLOCK_DV)
    tl.store(state_at, state, mask=inside)
    tl.store(total_at, total, mask=in_width)
""",
)  # fmt: skip

_SCAN = kernel(
    "linear_scan",
    "For each segment the state of all before it, or after it if `backward`; without CAUSAL that of all, once.",
    "states rate floor", "n_k low span segments backward", r"""
    place = part * SCANNED + tl.arange(0, SCANNED)
    inside = place < D_QK * D_V + D_QK
    head_at = states_ptr + (tl.cast(b, tl.int64) * HEADS + h) * segments * (D_QK * D_V + D_QK) + place
    running = tl.zeros([SCANNED], tl.float32)
    for turn in range(0, segments):
        segment = tl.where(backward != 0, segments - 1 - turn, turn)
        at = head_at + tl.cast(segment, tl.int64) * (D_QK * D_V + D_QK)
        own = tl.load(at, mask=inside, other=0.0)
        if CAUSAL:
            tl.store(at, running, mask=inside)
        places = span * CHUNK
        before, end = ends_of(floor_base, floor_stride2, low + segment * places, places, n_k)
        running = running * lasting(rate, before, end, places) + own
    if not CAUSAL:
        tl.store(head_at, running, mask=inside)
""",
    (("part", "STATE_PARTS"),),
)  # fmt: skip

_FORWARD = kernel(
    "linear_forward", "The queries of one segment of a head; `raw`: neither divided nor gated.",
    "q k v by_key by_query gate rate line_q line_k floor states out total",
    "n_q n_k offset low span segments states raw", r"""
    own = own_weights(rate)
    state, sums = state_of(states_ptr, (b * HEADS + h) * states + (segment if CAUSAL else 0), states, 0, BLOCK_DV)
    first = low + segment * span * CHUNK
    for start in range(first, tl.minimum(first + span * CHUNK, n_q + offset), CHUNK):
        queries = rows_of(q_base, q_stride2, start - offset, n_q, D_QK, BLOCK_D)
        line_q = line_of(line_q_base, line_q_stride2, start - offset, n_q)
        before, end = ends_of(floor_base, floor_stride2, start, CHUNK, n_k)
        grown = tl.cast(queries, tl.float32) * grown_by(rate, line_q, before, start)[:, None]
        result = times_state(grown, state)
        total = tl.sum(grown * sums[None, :], 1)
        if CAUSAL:
            keys = rows_of(k_base, k_stride2, start, n_k, D_QK, BLOCK_D)
            values = rows_of(v_base, v_stride2, start, n_k, D_V, BLOCK_DV)
            by_key = factor_of(by_key_base, by_key_stride2, start, n_k, BY_KEY)
            line_k = line_of(line_k_base, line_k_stride2, start, n_k)
            if LINE:
                own = line_weights(line_q, line_k)
            s = tl.dot(queries, tl.trans(keys), input_precision=FP32) * own * by_key[None, :]
            result += tl.dot(tl.cast(s, ELEMENT), values, input_precision=FP32)
            total += tl.sum(s, 1)
            state, sums = taken_in(state, sums, keys, by_key, values, faded_by(rate, line_k, end),
                                   lasting(rate, before, end, CHUNK))
        by_query = factor_of(by_query_base, by_query_stride2, start - offset, n_q, BY_QUERY)
        result, total = result * by_query[:, None], total * by_query
        gate = factor_of(gate_base, gate_stride2, start - offset, n_q, GATED)
        q = start - offset + tl.arange(0, CHUNK)
        done = tl.where(raw != 0, result, result / divisor(total, b, h, q, n_q, n_k)[:, None] * gate[:, None])
        store_rows(done, out_base, out_stride2, start - offset, n_q, D_V, BLOCK_DV)
        tl.store(total_base + q, total, mask=(q >= 0) & (q < n_q))
""",
)  # fmt: skip

LINEAR = "\n\n".join((_HELPERS, _STATE, _SCAN, _FORWARD))
