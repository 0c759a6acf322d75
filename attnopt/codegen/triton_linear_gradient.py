"""T4's gradients in Triton, and what launches all kernels of a file; see `triton_linear_skeleton`.

`linear_dq` goes forward through the chunks with the same states as the forward kernel. `linear_dkv` goes backward,
with the states of the queries that come after: `linear_later` sums up each segment of them.
"""

from __future__ import annotations

GRADIENT = r'''
@triton.jit(do_not_specialize=['n_q', 'n_k', 'offset', 'low', 'span', 'segments', 'states'])
def linear_dq(
    k_ptr, v_ptr, by_key_ptr, by_query_ptr, rate_ptr, states_ptr, grad_ptr, dtotal_ptr, dq_ptr,
    n_q, n_k, offset, low, span, segments, states,
    k_stride0, k_stride1, k_stride2,
    v_stride0, v_stride1, v_stride2,
    by_key_stride0, by_key_stride1, by_key_stride2,
    by_query_stride0, by_query_stride1, by_query_stride2,
    rate_stride0, rate_stride1,
    grad_stride0, grad_stride1, grad_stride2,
    dq_stride0, dq_stride1, dq_stride2,
):
    """dQ of one segment of a head."""
    segment = tl.program_id(0) % segments
    h = tl.program_id(0) // segments % HEADS
    b = tl.program_id(0) // segments // HEADS
    rate = rate_of(rate_ptr, rate_stride0, rate_stride1, b, h)
    own = own_weights(rate)
    i = tl.arange(0, CHUNK)
    grad_base, dq_base = base(grad_ptr, grad_stride0, grad_stride1, b, h), base(dq_ptr, dq_stride0, dq_stride1, b, h)
    k_base = base(k_ptr, k_stride0, k_stride1, b, key_head(h))
    v_base = base(v_ptr, v_stride0, v_stride1, b, value_head(h))
    by_key_base = base(by_key_ptr, by_key_stride0, by_key_stride1, b, h)
    by_query_base = base(by_query_ptr, by_query_stride0, by_query_stride1, b, h)
    dtotal_base = dtotal_ptr + (tl.cast(b, tl.int64) * HEADS + h) * n_q
    state, sums = state_of(states_ptr, (b * HEADS + h) * states + (segment if CAUSAL else 0), states)
    first = low + segment * span * CHUNK
    for start in range(first, tl.minimum(first + span * CHUNK, n_q + offset), CHUNK):
        grad = rows_of(grad_base, grad_stride2, start - offset, n_q, D_V, BLOCK_DV)
        dtotal = numbers_of(dtotal_base, 1, start - offset, n_q)[:, None]
        dq = times_state(grad, tl.trans(state)) + dtotal * sums[None, :]
        dq = dq * tl.exp2((i[:, None] + 1) * (rate * LOG2E))
        if CAUSAL:
            keys = rows_of(k_base, k_stride2, start, n_k, D_QK, BLOCK_D)
            values = rows_of(v_base, v_stride2, start, n_k, D_V, BLOCK_DV)
            by_key = factor_of(by_key_base, by_key_stride2, start, n_k, BY_KEY)
            ds = (tl.dot(grad, tl.trans(values), input_precision=FP32) + dtotal) * own * by_key[None, :]
            dq += tl.dot(tl.cast(ds, ELEMENT), keys, input_precision=FP32)
            state, sums = taken_in(state, sums, keys, by_key, values, rate)
        dq = dq * factor_of(by_query_base, by_query_stride2, start - offset, n_q, BY_QUERY)[:, None]
        store_rows(dq, dq_base, dq_stride2, start - offset, n_q, D_QK, BLOCK_D)


@triton.jit
def later(state, total, queries, by_query, grad, dtotal, rate):
    """The state of queries as keys before them see it, with one chunk of queries more in front."""
    i = tl.arange(0, CHUNK)
    grown = tl.cast(queries, tl.float32) * (by_query * tl.exp2((i + 1) * (rate * LOG2E)))[:, None]
    old = tl.exp2(rate * LOG2E * CHUNK)
    state = state * old + tl.dot(tl.trans(tl.cast(grown, ELEMENT)), grad, input_precision=FP32)
    return state, total * old + tl.sum(grown * dtotal[:, None], 0)


@triton.jit(do_not_specialize=['n_q', 'offset', 'low', 'span', 'segments'])
def linear_later(
    q_ptr, by_query_ptr, rate_ptr, states_ptr, grad_ptr, dtotal_ptr,
    n_q, offset, low, span, segments,
    q_stride0, q_stride1, q_stride2,
    by_query_stride0, by_query_stride1, by_query_stride2,
    rate_stride0, rate_stride1,
    grad_stride0, grad_stride1, grad_stride2,
):
    """The state that one segment of queries leaves to the keys before it."""
    segment = tl.program_id(0) % segments
    h = tl.program_id(0) // segments % HEADS
    b = tl.program_id(0) // segments // HEADS
    rate = rate_of(rate_ptr, rate_stride0, rate_stride1, b, h)
    q_base, grad_base = base(q_ptr, q_stride0, q_stride1, b, h), base(grad_ptr, grad_stride0, grad_stride1, b, h)
    by_query_base = base(by_query_ptr, by_query_stride0, by_query_stride1, b, h)
    dtotal_base = dtotal_ptr + (tl.cast(b, tl.int64) * HEADS + h) * n_q
    state = tl.zeros([BLOCK_D, BLOCK_DV], tl.float32)
    total = tl.zeros([BLOCK_D], tl.float32)
    for step in range(0, span):
        row = low + (segment * span + span - 1 - step) * CHUNK - offset
        queries = rows_of(q_base, q_stride2, row, n_q, D_QK, BLOCK_D)
        grad = rows_of(grad_base, grad_stride2, row, n_q, D_V, BLOCK_DV)
        dtotal = numbers_of(dtotal_base, 1, row, n_q)
        by_query = factor_of(by_query_base, by_query_stride2, row, n_q, BY_QUERY)
        state, total = later(state, total, queries, by_query, grad, dtotal, rate)
    state_at, inside, total_at, in_width = state_places(states_ptr, tl.program_id(0), D_QK)
    tl.store(state_at, state, mask=inside)
    tl.store(total_at, total, mask=in_width)


@triton.jit(do_not_specialize=['n_q', 'n_k', 'offset', 'span', 'segments', 'states'])
def linear_dkv(
    q_ptr, k_ptr, v_ptr, by_key_ptr, by_query_ptr, rate_ptr, states_ptr, grad_ptr, dtotal_ptr, dk_ptr, dv_ptr,
    n_q, n_k, offset, span, segments, states,
    q_stride0, q_stride1, q_stride2,
    k_stride0, k_stride1, k_stride2,
    v_stride0, v_stride1, v_stride2,
    by_key_stride0, by_key_stride1, by_key_stride2,
    by_query_stride0, by_query_stride1, by_query_stride2,
    rate_stride0, rate_stride1,
    grad_stride0, grad_stride1, grad_stride2,
    dk_stride0, dk_stride1, dk_stride2,
    dv_stride0, dv_stride1, dv_stride2,
):
    """dK and dV of one segment of one query head's keys, from its last chunk to its first."""
    segment = tl.program_id(0) % segments
    h = tl.program_id(0) // segments % HEADS
    b = tl.program_id(0) // segments // HEADS
    rate = rate_of(rate_ptr, rate_stride0, rate_stride1, b, h)
    own = own_weights(rate)
    i = tl.arange(0, CHUNK)
    q_base, grad_base = base(q_ptr, q_stride0, q_stride1, b, h), base(grad_ptr, grad_stride0, grad_stride1, b, h)
    k_base = base(k_ptr, k_stride0, k_stride1, b, key_head(h))
    v_base = base(v_ptr, v_stride0, v_stride1, b, value_head(h))
    dk_base, dv_base = base(dk_ptr, dk_stride0, dk_stride1, b, h), base(dv_ptr, dv_stride0, dv_stride1, b, h)
    by_key_base = base(by_key_ptr, by_key_stride0, by_key_stride1, b, h)
    by_query_base = base(by_query_ptr, by_query_stride0, by_query_stride1, b, h)
    dtotal_base = dtotal_ptr + (tl.cast(b, tl.int64) * HEADS + h) * n_q
    state, sums = state_of(states_ptr, (b * HEADS + h) * states + (segment if CAUSAL else 0), states)
    for step in range(0, span):
        start = (segment * span + span - 1 - step) * CHUNK
        keys = rows_of(k_base, k_stride2, start, n_k, D_QK, BLOCK_D)
        values = rows_of(v_base, v_stride2, start, n_k, D_V, BLOCK_DV)
        fade = tl.exp2((-i[:, None] + (CHUNK - 1)) * (rate * LOG2E))
        by_key = factor_of(by_key_base, by_key_stride2, start, n_k, BY_KEY)[:, None]
        # dV is stored before dK is begun, so that one of them at a time is in registers.
        dv = state_times(tl.trans(state), keys) * fade
        if CAUSAL:
            row = start - offset
            queries = rows_of(q_base, q_stride2, row, n_q, D_QK, BLOCK_D)
            grad = rows_of(grad_base, grad_stride2, row, n_q, D_V, BLOCK_DV)
            by_query = factor_of(by_query_base, by_query_stride2, row, n_q, BY_QUERY)
            weights = own * by_query[:, None]
            s = tl.dot(queries, tl.trans(keys), input_precision=FP32) * weights
            dv += tl.dot(tl.trans(tl.cast(s, ELEMENT)), grad, input_precision=FP32)
        store_rows(dv * by_key, dv_base, dv_stride2, start, n_k, D_V, BLOCK_DV)
        dk = (state_times(state, values) + sums[None, :]) * fade
        if CAUSAL:
            dtotal = numbers_of(dtotal_base, 1, row, n_q)
            ds = (tl.dot(grad, tl.trans(values), input_precision=FP32) + dtotal[:, None]) * weights
            dk += tl.dot(tl.trans(tl.cast(ds, ELEMENT)), queries, input_precision=FP32)
            state, sums = later(state, sums, queries, by_query, grad, dtotal, rate)
        store_rows(dk * by_key, dk_base, dk_stride2, start, n_k, D_QK, BLOCK_D)
'''

LAUNCH = r'''
linear_sums = linear_forward  # with results in fp32
KERNELS = dict(
    linear_state=linear_state, linear_scan=linear_scan, linear_forward=linear_forward, linear_sums=linear_sums,
    linear_dq=linear_dq, linear_later=linear_later, linear_dkv=linear_dkv,
)


def run(name, programs, kernels, *arguments):
    """Launch a kernel of this file, or one that was compiled before."""
    if kernels is None:
        KERNELS[name][(programs, 1, 1)](*arguments, **OPTIONS)
    else:
        kernels[name][(programs, 1, 1)](*arguments)


def rows(*tensors):
    """The tensors, each with its last dimension contiguous."""
    return [t if t.stride(3) == 1 else t.contiguous() for t in tensors]


def strides(*tensors):
    """All strides of tensors but that of the last dimension, which is contiguous."""
    return [s for t in tensors for s in t.stride()[:3]]


def factor_strides(*factors):
    """Strides of tensors of factors `[B, H, n]`, none along what is broadcast."""
    return [s for t in factors for s in ([0] * 3 if t is None else [x * (n > 1) for n, x in zip(t.shape, t.stride())])]


def rate_strides(rate):
    """As `factor_strides`, of rates `[B, H]`."""
    return [0, 0] if rate is None else [x * (n > 1) for n, x in zip(rate.shape, rate.stride())]


def pointers(other, *factors):
    """The tensors of factors; any other one where there is none, which is not read."""
    return [other if t is None else t for t in factors]


def cut(places, heads, processors, segments):
    """How many chunks a segment has, and how many segments there are; `heads` are those of the whole batch."""
    chunks = triton.cdiv(max(places, 1), CHUNK.value)
    if segments is None:  # enough programs for every processor, and some chunks for each
        segments = 1 if heads >= processors else min(triton.cdiv(2 * processors, heads), max(1, chunks // 8))
    span = triton.cdiv(chunks, min(segments, chunks))
    return span, triton.cdiv(chunks, span)


def scanned(states, rate, heads, span, segments, backward, kernels):
    """The states of all segments before each one, or after it; of all together, if the attention is not causal."""
    size = D_QK.value * D_V.value + D_QK.value
    if segments > 1:
        programs = heads * triton.cdiv(size, SCANNED.value)
        run("linear_scan", programs, kernels, states, *pointers(states, rate), span, segments, backward,
            *rate_strides(rate))
    return states, segments


def states_of_keys(k, v, by_key, rate, low, places, processors, segments, kernels):
    """The states that the segments of queries begin with, how many a head has, and the cut into segments."""
    heads, size = k.shape[0] * HEADS.value, D_QK.value * D_V.value + D_QK.value
    span, count = cut(places, heads, processors, segments)
    if CAUSAL.value and count == 1:
        return k.new_empty(0, dtype=torch.float32), 0, span, count
    own, held = (span, count) if CAUSAL.value else cut(k.shape[2], heads, processors, segments)
    states = k.new_empty((heads * held, size), dtype=torch.float32)
    run("linear_state", heads * held, kernels, k, v, *pointers(states, by_key, rate), states,
        k.shape[2], low, own, held, *strides(k, v), *factor_strides(by_key), *rate_strides(rate))
    return *scanned(states, rate, heads, own, held, 0, kernels), span, count


def linear(q, k, v, by_key=None, by_query=None, gate=None, rate=None, offset=0, raw=False, processors=132,
           segments=None, kernels=None):
    """`(out [B, HEADS, n_q, D_V], total [B, HEADS, n_q])`: the attention, and in fp32 the sums of weights.

    Factors by key and by query and the gate are fp32 `[B, HEADS, n]`, rates fp32 `[B, HEADS]`, each with dimensions
    of 1 that are broadcast. `raw`: out is fp32, neither divided nor gated. `processors`: how many the chip has;
    `segments`: into how many a sequence is cut; `kernels`: by name, if they were compiled before.
    """
    q, k, v = rows(q, k, v)
    batch, heads, n_q, _ = q.shape
    out = q.new_empty((batch, n_q, heads, v.shape[3]), dtype=torch.float32 if raw else q.dtype).transpose(1, 2)
    total = q.new_empty((batch, heads, n_q), dtype=torch.float32)
    offset, low = (offset, min(offset, 0)) if CAUSAL.value else (0, 0)
    states, held, span, count = states_of_keys(
        k, v, by_key, rate, low, n_q + offset - low, processors, segments, kernels)
    run("linear_sums" if raw else "linear_forward", batch * heads * count, kernels, q, k, v,
        *pointers(total, by_key, by_query, gate, rate), states, out, total, n_q, k.shape[2], offset, low, span, count,
        held, int(raw), *strides(q, k, v), *factor_strides(by_key, by_query, gate), *rate_strides(rate),
        *strides(out))
    return out, total


def linear_backward(q, k, v, grad, dtotal, by_key=None, by_query=None, rate=None, offset=0, processors=132,
                    segments=None, kernels=None):
    """dQ, dK and dV in fp32, those of keys and values for each query head: add up over a group.

    `grad`, of q's dtype, and `dtotal`, fp32 and contiguous, are the gradients of what `linear` gives `raw`.
    """
    q, k, v, grad = rows(q, k, v, grad)
    batch, heads, n_q, _ = q.shape
    n_k, parts = k.shape[2], batch * heads
    dq, dk, dv = (
        q.new_empty((batch, heads, n, t.shape[3]), dtype=torch.float32) for n, t in ((n_q, q), (n_k, k), (n_k, v))
    )
    offset, low = (offset, min(offset, 0)) if CAUSAL.value else (0, 0)
    states, held, span, count = states_of_keys(
        k, v, by_key, rate, low, n_q + offset - low, processors, segments, kernels)
    by = pointers(dtotal, by_key, by_query, rate)
    run("linear_dq", parts * count, kernels, k, v, *by, states, grad, dtotal, dq, n_q, n_k, offset, low, span, count,
        held, *strides(k, v), *factor_strides(by_key, by_query), *rate_strides(rate), *strides(grad, dq))
    span, count = cut(max(n_k, n_q + offset) if CAUSAL.value else n_k, parts, processors, segments)
    own, held = (span, count) if CAUSAL.value else cut(n_q, parts, processors, segments)
    if CAUSAL.value and count == 1:
        held = 0
    else:
        states = q.new_empty((parts * held, D_QK.value * D_V.value + D_QK.value), dtype=torch.float32)
        run("linear_later", parts * held, kernels, q, *by[1:], states, grad, dtotal, n_q, offset, 0, own, held,
            *strides(q), *factor_strides(by_query), *rate_strides(rate), *strides(grad))
        states, held = scanned(states, rate, parts, own, held, 1, kernels)
    run("linear_dkv", parts * count, kernels, q, k, v, *by, states, grad, dtotal, dk, dv, n_q, n_k, offset, span,
        count, held, *strides(q, k, v), *factor_strides(by_key, by_query), *rate_strides(rate),
        *strides(grad, dk, dv))
    return dq, dk, dv
'''
