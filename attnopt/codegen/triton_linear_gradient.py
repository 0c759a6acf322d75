"""T4's gradients in Triton; see `triton_linear_skeleton`.

`linear_dq` goes forward through the chunks with the same states as the forward kernel. `linear_dkv` goes backward,
with the states of the queries that come after: `linear_later` sums up each segment of them.

`linear_drate` sums `weight (place(i) - j) dweight` over all pairs: the gradient of a head's rate. Beside the state
`sum_j exp(rate (place - j)) k_j v_j` it keeps the same sum with each term times its age, so that ages are added up and
never taken apart into places, whose sums would cancel. Two states are too many registers; a program has a few columns.
"""

from __future__ import annotations

from attnopt.codegen.triton_linear_parts import kernel

_DQ = kernel(
    "linear_dq", "dQ of one segment of a head.",
    "k v by_key by_query rate line_q line_k floor states grad dtotal dq",
    "n_q n_k offset low span segments states", r"""
    own = own_weights(rate)
    state, sums = state_of(states_ptr, (b * HEADS + h) * states + (segment if CAUSAL else 0), states, 0, BLOCK_DV)
    first = low + segment * span * CHUNK
    for start in range(first, tl.minimum(first + span * CHUNK, n_q + offset), CHUNK):
        grad = rows_of(grad_base, grad_stride2, start - offset, n_q, D_V, BLOCK_DV)
        dtotal = numbers_of(dtotal_base, 1, start - offset, n_q)[:, None]
        line_q = line_of(line_q_base, line_q_stride2, start - offset, n_q)
        before, end = ends_of(floor_base, floor_stride2, start, CHUNK, n_k)
        dq = times_state(grad, tl.trans(state)) + dtotal * sums[None, :]
        dq = dq * grown_by(rate, line_q, before, start)[:, None]
        if CAUSAL:
            keys = rows_of(k_base, k_stride2, start, n_k, D_QK, BLOCK_D)
            values = rows_of(v_base, v_stride2, start, n_k, D_V, BLOCK_DV)
            by_key = factor_of(by_key_base, by_key_stride2, start, n_k, BY_KEY)
            line_k = line_of(line_k_base, line_k_stride2, start, n_k)
            if LINE:
                own = line_weights(line_q, line_k)
            ds = (tl.dot(grad, tl.trans(values), input_precision=FP32) + dtotal) * own * by_key[None, :]
            dq += tl.dot(tl.cast(ds, ELEMENT), keys, input_precision=FP32)
            state, sums = taken_in(state, sums, keys, by_key, values, faded_by(rate, line_k, end),
                                   lasting(rate, before, end, CHUNK))
        dq = dq * factor_of(by_query_base, by_query_stride2, start - offset, n_q, BY_QUERY)[:, None]
        store_rows(dq, dq_base, dq_stride2, start - offset, n_q, D_QK, BLOCK_D)
""",
)  # fmt: skip

_TAKEN = r'''
@triton.jit
def later(state, total, queries, factor, grad, dtotal, old):
    """The state of queries as keys before them see it, with one chunk of queries more in front."""
    grown = tl.cast(queries, tl.float32) * factor[:, None]
    state = state * old + tl.dot(tl.trans(tl.cast(grown, ELEMENT)), grad, input_precision=FP32)
    return state, total * old + tl.sum(grown * dtotal[:, None], 0)
'''

_LATER = kernel(
    "linear_later", "The state that one segment of queries leaves to the keys before it.",
    "q by_query rate line_q floor states grad dtotal", "n_q n_k offset low span segments", r"""
    state = tl.zeros([BLOCK_D, BLOCK_DV], tl.float32)
    total = tl.zeros([BLOCK_D], tl.float32)
    for step in range(0, span):
        start = low + (segment * span + span - 1 - step) * CHUNK
        row = start - offset
        queries = rows_of(q_base, q_stride2, row, n_q, D_QK, BLOCK_D)
        grad = rows_of(grad_base, grad_stride2, row, n_q, D_V, BLOCK_DV)
        dtotal = numbers_of(dtotal_base, 1, row, n_q)
        by_query = factor_of(by_query_base, by_query_stride2, row, n_q, BY_QUERY)
        before, end = ends_of(floor_base, floor_stride2, start, CHUNK, n_k)
        grow = grown_by(rate, line_of(line_q_base, line_q_stride2, row, n_q), before, start)
        state, total = later(state, total, queries, by_query * grow, grad, dtotal, lasting(rate, before, end, CHUNK))
    state_at, inside, total_at, in_width = state_places(states_ptr, tl.program_id(0), D_QK, 0, BLOCK_DV)
    tl.store(state_at, state, mask=inside)
    tl.store(total_at, total, mask=in_width)
""",
)  # fmt: skip

_DKV = kernel(
    "linear_dkv", "dK and dV of one segment of one query head's keys, from its last chunk to its first.",
    "q k v by_key by_query rate line_q line_k floor states grad dtotal dk dv",
    "n_q n_k offset span segments states", r"""
    own = own_weights(rate)
    state, sums = state_of(states_ptr, (b * HEADS + h) * states + (segment if CAUSAL else 0), states, 0, BLOCK_DV)
    for step in range(0, span):
        start = (segment * span + span - 1 - step) * CHUNK
        keys = rows_of(k_base, k_stride2, start, n_k, D_QK, BLOCK_D)
        values = rows_of(v_base, v_stride2, start, n_k, D_V, BLOCK_DV)
        line_k = line_of(line_k_base, line_k_stride2, start, n_k)
        before, end = ends_of(floor_base, floor_stride2, start, CHUNK, n_k)
        fade = faded_by(rate, line_k, end)[:, None]
        by_key = factor_of(by_key_base, by_key_stride2, start, n_k, BY_KEY)[:, None]
        # dV is stored before dK is begun, so that one of them at a time is in registers.
        dv = state_times(tl.trans(state), keys) * fade
        if CAUSAL:
            row = start - offset
            queries = rows_of(q_base, q_stride2, row, n_q, D_QK, BLOCK_D)
            grad = rows_of(grad_base, grad_stride2, row, n_q, D_V, BLOCK_DV)
            by_query = factor_of(by_query_base, by_query_stride2, row, n_q, BY_QUERY)
            line_q = line_of(line_q_base, line_q_stride2, row, n_q)
            if LINE:
                own = line_weights(line_q, line_k)
            weights = own * by_query[:, None]
            s = tl.dot(queries, tl.trans(keys), input_precision=FP32) * weights
            dv += tl.dot(tl.trans(tl.cast(s, ELEMENT)), grad, input_precision=FP32)
        store_rows(dv * by_key, dv_base, dv_stride2, start, n_k, D_V, BLOCK_DV)
        dk = (state_times(state, values) + sums[None, :]) * fade
        if CAUSAL:
            dtotal = numbers_of(dtotal_base, 1, row, n_q)
            ds = (tl.dot(grad, tl.trans(values), input_precision=FP32) + dtotal[:, None]) * weights
            dk += tl.dot(tl.trans(tl.cast(ds, ELEMENT)), queries, input_precision=FP32)
            grow = by_query * grown_by(rate, line_q, before, start)
            state, sums = later(state, sums, queries, grow, grad, dtotal, lasting(rate, before, end, CHUNK))
        store_rows(dk * by_key, dk_base, dk_stride2, start, n_k, D_QK, BLOCK_D)
""",
)  # fmt: skip

_DRATE = kernel(
    "linear_drate", "What the pairs of one segment add to the gradient of the rate, by NARROW columns of values.",
    "q k v by_key by_query rate states later grad dtotal drate", "n_q n_k offset span segments states", r"""
    column = part * NARROW
    place = (b * HEADS + h) * states + segment
    i = tl.arange(0, CHUNK)
    old = tl.exp2(rate * LOG2E * CHUNK)
    state, sums = state_of(states_ptr, place, states, column, NARROW)
    aged, aged_sums = tl.zeros([BLOCK_D, NARROW], tl.float32), tl.zeros([BLOCK_D], tl.float32)
    found = tl.zeros([CHUNK], tl.float32)
    first = segment * span * CHUNK
    for start in range(first, tl.minimum(first + span * CHUNK, n_q + offset), CHUNK):
        row = start - offset
        queries = rows_of(q_base, q_stride2, row, n_q, D_QK, BLOCK_D)
        grad = rows_of(grad_base + column, grad_stride2, row, n_q, D_V - column, NARROW)
        dtotal = tl.where(part == 0, numbers_of(dtotal_base, 1, row, n_q), 0.0)
        # Keys before the chunk: how far a query is beyond it, and their ages there.
        grow = tl.exp2((i + 1) * (rate * LOG2E))
        young = tl.sum(times_state(queries, state) * grad, 1)
        young += dtotal * tl.sum(tl.cast(queries, tl.float32) * sums[None, :], 1)
        past = tl.sum(times_state(queries, aged) * grad, 1)
        past += dtotal * tl.sum(tl.cast(queries, tl.float32) * aged_sums[None, :], 1)
        # Keys of the chunk.
        keys = rows_of(k_base, k_stride2, start, n_k, D_QK, BLOCK_D)
        s = tl.dot(queries, tl.trans(keys), input_precision=FP32) * own_weights(rate) * (i[:, None] - i[None, :])
        by_key = factor_of(by_key_base, by_key_stride2, start, n_k, BY_KEY)
        values = rows_of(v_base + column, v_stride2, start, n_k, D_V - column, NARROW)
        ds = tl.dot(grad, tl.trans(values), input_precision=FP32) + dtotal[:, None]
        own = tl.sum(s * by_key[None, :] * ds, 1)
        by_query = factor_of(by_query_base, by_query_stride2, row, n_q, BY_QUERY)
        found += by_query * ((young * (i + 1) + past) * grow + own)
        # Ages as parts of a chunk, so that those of fp16 keys stay in their range.
        fade = powers(rate, -i + (CHUNK - 1))
        age = (-i + (CHUNK - 1)) * (1.0 / CHUNK)
        aged, aged_sums = taken_in(aged * (1.0 / CHUNK) + state, aged_sums * (1.0 / CHUNK) + sums, keys, by_key, values,
                                   fade * age, old)
        aged, aged_sums = aged * CHUNK, aged_sums * CHUNK
        state, sums = taken_in(state, sums, keys, by_key, values, fade, old)
    # What the queries of later segments add for the keys of this one and before, up to its end.
    after, after_sums = state_of(later_ptr, place, states, column, NARROW)
    rest = tl.sum(aged * after, 0)
    total = tl.sum(found, 0) + tl.sum(rest, 0) + tl.where(part == 0, tl.sum(aged_sums * after_sums, 0), 0.0)
    tl.store(drate_ptr + tl.program_id(0), total)
""",
    (("part", "VALUE_PARTS"), ("segment", "segments")),
)  # fmt: skip

GRADIENT = "\n\n".join((_DQ, _TAKEN, _LATER, _DKV, _DRATE))
