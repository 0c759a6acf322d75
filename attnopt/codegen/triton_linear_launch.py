"""What launches the kernels of a linear attention: the end of every generated file; see `triton_linear`."""

from __future__ import annotations

LAUNCH = r'''
linear_sums = linear_forward  # with results in fp32
KERNELS = dict(
    linear_state=linear_state, linear_scan=linear_scan, linear_forward=linear_forward, linear_sums=linear_sums,
    linear_dq=linear_dq, linear_later=linear_later, linear_dkv=linear_dkv, linear_drate=linear_drate,
)
STATE = D_QK.value * D_V.value + D_QK.value  # a state and its sum


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


def lines_of(other, line):
    """The tensors of a line, and their strides; any other tensor where there is none."""
    given = (None, None, None) if line is None else line
    return pointers(other, *given), [factor_strides(t) for t in given]


def scanned(states, rate, floor, heads, n_k, low, span, segments, backward, kernels):
    """The states of all segments before each one, or after it; of all together, if the attention is not causal."""
    if segments > 1:
        run("linear_scan", heads * STATE_PARTS.value, kernels, states, *pointers(states, rate, floor), n_k, low, span,
            segments, backward, *rate_strides(rate), *factor_strides(floor))
    return states, segments


def states_of_keys(k, v, by_key, rate, line, low, places, processors, segments, kernels):
    """The states that the segments of queries begin with, how many a head has, and the cut into segments."""
    heads = k.shape[0] * HEADS.value
    span, count = cut(places, heads, processors, segments)
    if CAUSAL.value and count == 1:
        return k.new_empty(0, dtype=torch.float32), 0, span, count
    own, held = (span, count) if CAUSAL.value else cut(k.shape[2], heads, processors, segments)
    states = k.new_empty((heads * held, STATE), dtype=torch.float32)
    (_, line_k, floor), (_, by_line, by_floor) = lines_of(states, line)
    run("linear_state", heads * held, kernels, k, v, *pointers(states, by_key, rate), line_k, floor, states,
        k.shape[2], low, own, held, *strides(k, v), *factor_strides(by_key), *rate_strides(rate), *by_line, *by_floor)
    floor = None if line is None else line[2]
    return *scanned(states, rate, floor, heads, k.shape[2], low, own, held, 0, kernels), span, count


def states_of_queries(q, grad, dtotal, by_query, rate, line, n_k, offset, cut_own, processors, segments, kernels):
    """The states of the queries after each segment of keys, and how many a head has."""
    parts, (own, held) = q.shape[0] * q.shape[1], cut_own
    if CAUSAL.value and held == 1:
        return q.new_empty(0, dtype=torch.float32), 0
    if not CAUSAL.value:
        own, held = cut(q.shape[2], parts, processors, segments)
    states = q.new_empty((parts * held, STATE), dtype=torch.float32)
    (line_q, _, floor), (by_line, _, by_floor) = lines_of(states, line)
    run("linear_later", parts * held, kernels, q, *pointers(states, by_query, rate), line_q, floor, states, grad,
        dtotal, q.shape[2], n_k, offset, 0, own, held, *strides(q), *factor_strides(by_query), *rate_strides(rate),
        *by_line, *by_floor, *strides(grad))
    floor = None if line is None else line[2]
    return scanned(states, rate, floor, parts, n_k, 0, own, held, 1, kernels)


def linear(q, k, v, by_key=None, by_query=None, gate=None, rate=None, line=None, offset=0, raw=False, processors=132,
           segments=None, kernels=None):
    """`(out [B, HEADS, n_q, D_V], total [B, HEADS, n_q])`: the attention, and in fp32 the sums of weights.

    Factors by key and by query and the gate are fp32 `[B, HEADS, n]`, rates fp32 `[B, HEADS]`, each with dimensions
    of 1 that are broadcast; `line` is `(line_q, line_k, floor)`, like factors. `raw`: out is fp32, neither divided nor
    gated. `processors`: how many the chip has; `segments`: into how many a sequence is cut; `kernels`: by name, if they
    were compiled before.
    """
    q, k, v = rows(q, k, v)
    batch, heads, n_q, _ = q.shape
    out = q.new_empty((batch, n_q, heads, v.shape[3]), dtype=torch.float32 if raw else q.dtype).transpose(1, 2)
    total = q.new_empty((batch, heads, n_q), dtype=torch.float32)
    offset, low = (offset, min(offset, 0)) if CAUSAL.value else (0, 0)
    states, held, span, count = states_of_keys(
        k, v, by_key, rate, line, low, n_q + offset - low, processors, segments, kernels)
    lines, by_lines = lines_of(total, line)
    run("linear_sums" if raw else "linear_forward", batch * heads * count, kernels, q, k, v,
        *pointers(total, by_key, by_query, gate, rate), *lines, states, out, total, n_q, k.shape[2], offset, low, span,
        count, held, int(raw), *strides(q, k, v), *factor_strides(by_key, by_query, gate), *rate_strides(rate),
        *sum(by_lines, []), *strides(out))
    return out, total


def linear_backward(q, k, v, grad, dtotal, by_key=None, by_query=None, rate=None, line=None, offset=0, own_key=None,
                    processors=132, segments=None, kernels=None):
    """dQ, dK and dV in fp32, those of keys and values for each query head: add up over a group.

    `grad`, of q's dtype, and `dtotal`, fp32 and contiguous, are the gradients of what `linear` gives `raw`. `own_key`
    stands for a key's own factor in its dK and dV, where that is not `by_key`.
    """
    q, k, v, grad = rows(q, k, v, grad)
    batch, heads, n_q, _ = q.shape
    n_k, parts = k.shape[2], batch * heads
    dq, dk, dv = (
        q.new_empty((batch, heads, n, t.shape[3]), dtype=torch.float32) for n, t in ((n_q, q), (n_k, k), (n_k, v))
    )
    offset, low = (offset, min(offset, 0)) if CAUSAL.value else (0, 0)
    states, held, span, count = states_of_keys(
        k, v, by_key, rate, line, low, n_q + offset - low, processors, segments, kernels)
    lines, by_lines = lines_of(dtotal, line)
    by_lines = sum(by_lines, [])
    run("linear_dq", parts * count, kernels, k, v, *pointers(dtotal, by_key, by_query, rate), *lines, states, grad,
        dtotal, dq, n_q, n_k, offset, low, span, count, held, *strides(k, v), *factor_strides(by_key, by_query),
        *rate_strides(rate), *by_lines, *strides(grad, dq))
    span, count = cut(max(n_k, n_q + offset) if CAUSAL.value else n_k, parts, processors, segments)
    states, held = states_of_queries(
        q, grad, dtotal, by_query, rate, line, n_k, offset, (span, count), processors, segments, kernels)
    by_key = by_key if own_key is None else own_key
    run("linear_dkv", parts * count, kernels, q, k, v, *pointers(dtotal, by_key, by_query, rate), *lines, states, grad,
        dtotal, dk, dv, n_q, n_k, offset, span, count, held, *strides(q, k, v), *factor_strides(by_key, by_query),
        *rate_strides(rate), *by_lines, *strides(grad, dk, dv))
    return dq, dk, dv


def linear_backward_rate(q, k, v, grad, dtotal, by_key=None, by_query=None, rate=None, offset=0, processors=132,
                         segments=None, kernels=None):
    """The gradient of each head's rate, fp32 `[B, HEADS]`; arguments as for `linear_backward`."""
    q, k, v, grad = rows(q, k, v, grad)
    batch, heads, n_q, _ = q.shape
    places, n_k = n_q + offset, k.shape[2]
    if places <= 0 or n_k == 0:
        return q.new_zeros((batch, heads), dtype=torch.float32)
    states, held, span, count = states_of_keys(k, v, by_key, rate, None, 0, places, processors, segments, kernels)
    after, _ = states_of_queries(
        q, grad, dtotal, by_query, rate, None, n_k, offset, (span, count), processors, segments, kernels)
    found = q.new_empty((batch, heads, count * VALUE_PARTS.value), dtype=torch.float32)
    run("linear_drate", found.numel(), kernels, q, k, v, *pointers(dtotal, by_key, by_query, rate), states, after,
        grad, dtotal, found, n_q, n_k, offset, span, count, held, *strides(q, k, v), *factor_strides(by_key, by_query),
        *rate_strides(rate), *strides(grad))
    return found.sum(2)
'''
