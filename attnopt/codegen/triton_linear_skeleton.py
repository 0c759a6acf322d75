"""T4: chunked linear attention in Triton, forward and backward; constants stand at the top of the generated file.

One program goes through a head chunk by chunk with the state in registers, as Lightning Attention-2 does (Qin et al.,
2024). `weight[i, j] = exp(rate (i - j)) q_i . k_j` for `j <= i`, or for all j without CAUSAL; the results are
`sum_j weight v_j` and, as `total`, `sum_j weight`. The gradients are those of both. `dq` goes forward through the
chunks with the same state, `dk` and `dv` go backward with the state of the later queries.
"""

from __future__ import annotations

LINEAR = r'''
@triton.jit
def powers(rate, gap):
    """exp(rate * gap), and 0 where the gap is negative."""
    return tl.where(gap >= 0, tl.exp2(tl.maximum(gap, 0) * (rate * LOG2E)), 0.0)


@triton.jit
def rows_of(ptr, stride0, stride1, stride2, b, h, start, n, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """A chunk of rows [CHUNK, BLOCK] from place `start` on; zeros past the end and beyond WIDTH."""
    row = start + tl.arange(0, CHUNK)[:, None]
    d = tl.arange(0, BLOCK)[None, :]
    at = ptr + tl.cast(b, tl.int64) * stride0 + tl.cast(h, tl.int64) * stride1 + tl.cast(row, tl.int64) * stride2 + d
    return tl.load(at, mask=(row < n) & (d < WIDTH), other=0.0)


@triton.jit
def store_rows(x, ptr, stride0, stride1, stride2, b, h, start, n, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """The rows of a chunk, where they are."""
    row = start + tl.arange(0, CHUNK)[:, None]
    d = tl.arange(0, BLOCK)[None, :]
    at = ptr + tl.cast(b, tl.int64) * stride0 + tl.cast(h, tl.int64) * stride1 + tl.cast(row, tl.int64) * stride2 + d
    tl.store(at, x, mask=(row < n) & (d < WIDTH))


@triton.jit
def own_weights(rate):
    """What the products of a chunk's queries and keys are multiplied by."""
    i = tl.arange(0, CHUNK)
    gap = i[:, None] - i[None, :]
    return powers(rate, gap) if CAUSAL else gap * 0.0


@triton.jit
def taken_in(state, keys_sum, keys, values, rate):
    """The state after one chunk of keys more: what it held has faded, and so have the chunk's first keys."""
    i = tl.arange(0, CHUNK)[:, None]
    faded = tl.cast(keys, tl.float32) * powers(rate, -i + (CHUNK - 1))
    old = tl.exp2(rate * LOG2E * CHUNK)
    state = state * old + tl.dot(tl.trans(tl.cast(faded, ELEMENT)), values, input_precision=FP32)
    return state, keys_sum * old + tl.sum(faded, 0)


@triton.jit(do_not_specialize=['n_q', 'n_k'])
def linear_forward(
    q_ptr, k_ptr, v_ptr, rate_ptr, out_ptr, total_ptr,
    n_q, n_k,
    q_stride0, q_stride1, q_stride2,
    k_stride0, k_stride1, k_stride2,
    v_stride0, v_stride1, v_stride2,
    out_stride0, out_stride1, out_stride2,
):
    """All queries of one head."""
    h = tl.program_id(0) % HEADS
    b = tl.program_id(0) // HEADS
    rate = tl.load(rate_ptr + h)
    own = own_weights(rate)
    i = tl.arange(0, CHUNK)
    state = tl.zeros([BLOCK_D, BLOCK_DV], tl.float32)
    keys_sum = tl.zeros([BLOCK_D], tl.float32)
    if not CAUSAL:
        for start in range(0, n_k, CHUNK):
            keys = rows_of(k_ptr, k_stride0, k_stride1, k_stride2, b, h // GROUP, start, n_k, D_QK, BLOCK_D)
            values = rows_of(v_ptr, v_stride0, v_stride1, v_stride2, b, h // GROUP, start, n_k, D_V, BLOCK_DV)
            state, keys_sum = taken_in(state, keys_sum, keys, values, rate)
    for start in range(0, n_q, CHUNK):
        queries = rows_of(q_ptr, q_stride0, q_stride1, q_stride2, b, h, start, n_q, D_QK, BLOCK_D)
        grown = tl.cast(queries, tl.float32) * tl.exp2((i[:, None] + 1) * (rate * LOG2E))
        result = tl.dot(tl.cast(grown, ELEMENT), tl.cast(state, ELEMENT), input_precision=FP32)
        total = tl.sum(grown * keys_sum[None, :], 1)
        if CAUSAL:
            keys = rows_of(k_ptr, k_stride0, k_stride1, k_stride2, b, h // GROUP, start, n_k, D_QK, BLOCK_D)
            values = rows_of(v_ptr, v_stride0, v_stride1, v_stride2, b, h // GROUP, start, n_k, D_V, BLOCK_DV)
            s = tl.dot(queries, tl.trans(keys), input_precision=FP32) * own
            result += tl.dot(tl.cast(s, ELEMENT), values, input_precision=FP32)
            total += tl.sum(s, 1)
            state, keys_sum = taken_in(state, keys_sum, keys, values, rate)
        store_rows(result, out_ptr, out_stride0, out_stride1, out_stride2, b, h, start, n_q, D_V, BLOCK_DV)
        tl.store(total_ptr + tl.cast(tl.program_id(0), tl.int64) * n_q + start + i, total, mask=start + i < n_q)


@triton.jit(do_not_specialize=['n_q', 'n_k'])
def linear_dq(
    k_ptr, v_ptr, rate_ptr, grad_ptr, dtotal_ptr, dq_ptr,
    n_q, n_k,
    k_stride0, k_stride1, k_stride2,
    v_stride0, v_stride1, v_stride2,
    grad_stride0, grad_stride1, grad_stride2,
    dq_stride0, dq_stride1, dq_stride2,
):
    """dQ of one head."""
    h = tl.program_id(0) % HEADS
    b = tl.program_id(0) // HEADS
    rate = tl.load(rate_ptr + h)
    own = own_weights(rate)
    i = tl.arange(0, CHUNK)
    state = tl.zeros([BLOCK_D, BLOCK_DV], tl.float32)
    keys_sum = tl.zeros([BLOCK_D], tl.float32)
    if not CAUSAL:
        for start in range(0, n_k, CHUNK):
            keys = rows_of(k_ptr, k_stride0, k_stride1, k_stride2, b, h // GROUP, start, n_k, D_QK, BLOCK_D)
            values = rows_of(v_ptr, v_stride0, v_stride1, v_stride2, b, h // GROUP, start, n_k, D_V, BLOCK_DV)
            state, keys_sum = taken_in(state, keys_sum, keys, values, rate)
    for start in range(0, n_q, CHUNK):
        grad = rows_of(grad_ptr, grad_stride0, grad_stride1, grad_stride2, b, h, start, n_q, D_V, BLOCK_DV)
        row = tl.cast(tl.program_id(0), tl.int64) * n_q + start + i
        dtotal = tl.load(dtotal_ptr + row, mask=start + i < n_q, other=0.0)[:, None]
        grow = tl.exp2((i[:, None] + 1) * (rate * LOG2E))
        dq = tl.dot(grad, tl.trans(tl.cast(state, ELEMENT)), input_precision=FP32)
        dq = (dq + dtotal * keys_sum[None, :]) * grow
        if CAUSAL:
            keys = rows_of(k_ptr, k_stride0, k_stride1, k_stride2, b, h // GROUP, start, n_k, D_QK, BLOCK_D)
            values = rows_of(v_ptr, v_stride0, v_stride1, v_stride2, b, h // GROUP, start, n_k, D_V, BLOCK_DV)
            ds = (tl.dot(grad, tl.trans(values), input_precision=FP32) + dtotal) * own
            dq += tl.dot(tl.cast(ds, ELEMENT), keys, input_precision=FP32)
            state, keys_sum = taken_in(state, keys_sum, keys, values, rate)
        store_rows(dq, dq_ptr, dq_stride0, dq_stride1, dq_stride2, b, h, start, n_q, D_QK, BLOCK_D)


@triton.jit
def later(state, queries_sum, queries, grad, dtotal, rate):
    """The state of queries as keys before them see it, with one chunk of queries more in front."""
    i = tl.arange(0, CHUNK)[:, None]
    grown = tl.cast(queries, tl.float32) * tl.exp2((i + 1) * (rate * LOG2E))
    old = tl.exp2(rate * LOG2E * CHUNK)
    state = state * old + tl.dot(tl.trans(tl.cast(grown, ELEMENT)), grad, input_precision=FP32)
    return state, queries_sum * old + tl.sum(grown * dtotal, 0)


@triton.jit(do_not_specialize=['n_q', 'n_k'])
def linear_dkv(
    q_ptr, k_ptr, v_ptr, rate_ptr, grad_ptr, dtotal_ptr, dk_ptr, dv_ptr,
    n_q, n_k,
    q_stride0, q_stride1, q_stride2,
    k_stride0, k_stride1, k_stride2,
    v_stride0, v_stride1, v_stride2,
    grad_stride0, grad_stride1, grad_stride2,
    dk_stride0, dk_stride1, dk_stride2,
    dv_stride0, dv_stride1, dv_stride2,
):
    """dK and dV of one query head's keys, from the last chunk to the first."""
    h = tl.program_id(0) % HEADS
    b = tl.program_id(0) // HEADS
    rate = tl.load(rate_ptr + h)
    own = own_weights(rate)
    i = tl.arange(0, CHUNK)
    state = tl.zeros([BLOCK_D, BLOCK_DV], tl.float32)
    queries_sum = tl.zeros([BLOCK_D], tl.float32)
    row0 = tl.cast(tl.program_id(0), tl.int64) * n_q
    if not CAUSAL:
        for start in range(0, n_q, CHUNK):
            queries = rows_of(q_ptr, q_stride0, q_stride1, q_stride2, b, h, start, n_q, D_QK, BLOCK_D)
            grad = rows_of(grad_ptr, grad_stride0, grad_stride1, grad_stride2, b, h, start, n_q, D_V, BLOCK_DV)
            dtotal = tl.load(dtotal_ptr + row0 + start + i, mask=start + i < n_q, other=0.0)[:, None]
            state, queries_sum = later(state, queries_sum, queries, grad, dtotal, rate)
    chunks = tl.cdiv(n_k, CHUNK)
    for step in range(0, chunks):
        start = (chunks - 1 - step) * CHUNK
        keys = rows_of(k_ptr, k_stride0, k_stride1, k_stride2, b, h // GROUP, start, n_k, D_QK, BLOCK_D)
        values = rows_of(v_ptr, v_stride0, v_stride1, v_stride2, b, h // GROUP, start, n_k, D_V, BLOCK_DV)
        fade = tl.exp2((-i[:, None] + (CHUNK - 1)) * (rate * LOG2E))
        dk = tl.dot(values, tl.trans(tl.cast(state, ELEMENT)), input_precision=FP32)
        dk = (dk + queries_sum[None, :]) * fade
        dv = tl.dot(keys, tl.cast(state, ELEMENT), input_precision=FP32) * fade
        if CAUSAL:
            queries = rows_of(q_ptr, q_stride0, q_stride1, q_stride2, b, h, start, n_q, D_QK, BLOCK_D)
            grad = rows_of(grad_ptr, grad_stride0, grad_stride1, grad_stride2, b, h, start, n_q, D_V, BLOCK_DV)
            dtotal = tl.load(dtotal_ptr + row0 + start + i, mask=start + i < n_q, other=0.0)[:, None]
            s = tl.dot(queries, tl.trans(keys), input_precision=FP32) * own
            ds = (tl.dot(grad, tl.trans(values), input_precision=FP32) + dtotal) * own
            dk += tl.dot(tl.trans(tl.cast(ds, ELEMENT)), queries, input_precision=FP32)
            dv += tl.dot(tl.trans(tl.cast(s, ELEMENT)), grad, input_precision=FP32)
            state, queries_sum = later(state, queries_sum, queries, grad, dtotal, rate)
        store_rows(dk, dk_ptr, dk_stride0, dk_stride1, dk_stride2, b, h, start, n_k, D_QK, BLOCK_D)
        store_rows(dv, dv_ptr, dv_stride0, dv_stride1, dv_stride2, b, h, start, n_k, D_V, BLOCK_DV)
'''

LAUNCH = r'''
def strides(*tensors):
    """The first three strides of each; the last dimension is contiguous."""
    return [s for t in tensors for s in t.stride()[:3]]


def linear(q, k, v, rate, out=None):
    """`(sums [B, HEADS, n_q, D_V], total [B, HEADS, n_q])` in fp32; `rate`: fp32 `[HEADS]`, zeros for no decay."""
    q, k, v = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k, v))
    batch, heads, n_q, _ = q.shape
    out = q.new_empty((batch, heads, n_q, v.shape[3]), dtype=torch.float32)
    total = q.new_empty((batch, heads, n_q), dtype=torch.float32)
    linear_forward[(batch * heads, 1, 1)](
        q, k, v, rate, out, total, n_q, k.shape[2], *strides(q, k, v, out), **OPTIONS)
    return out, total


def linear_backward(q, k, v, rate, grad, dtotal):
    """dQ, dK and dV in fp32, those of keys and values for each query head: add up over a group. `grad` as q."""
    q, k, v, grad = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k, v, grad))
    batch, heads, n_q, _ = q.shape
    n_k, grid = k.shape[2], (batch * heads, 1, 1)
    dq, dk, dv = (
        q.new_empty((batch, heads, n, t.shape[3]), dtype=torch.float32) for n, t in ((n_q, q), (n_k, k), (n_k, v))
    )
    linear_dq[grid](k, v, rate, grad, dtotal, dq, n_q, n_k, *strides(k, v, grad, dq), **OPTIONS)
    linear_dkv[grid](
        q, k, v, rate, grad, dtotal, dk, dv, n_q, n_k, *strides(q, k, v, grad, dk, dv), **OPTIONS)
    return dq, dk, dv
'''
