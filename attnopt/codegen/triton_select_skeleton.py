"""T5: block scores and the choice of blocks in Triton, on the device from end to end; see `attnopt.select`.

`select_means` pools keys and queries, `select_scores` makes the scores of tiles by blocks, `select_choose` picks the
blocks of one tile, and `select_list` writes what a forward kernel that goes by lists visits. There is never an entry
for a pair of query and key.

The best of a row are found without sorting it: scores become integers in the same order, and the last one that is
kept is found bit by bit from the weight (one each for `topk`, the softmax for `mass`) of all that are no less.
"""

from __future__ import annotations

SELECT = r'''
@triton.jit(do_not_specialize=['n', 'heads', 'size', 'parts'])
def select_means(
    x_ptr, kept_ptr, means_ptr, counts_ptr,
    n, heads, size, parts,
    x_stride0, x_stride1, x_stride2, x_stride3,
    kept_stride0, kept_stride1,
):
    """The mean of one part of `size` rows of a head over those that are kept, and how many they are."""
    part = tl.program_id(0) % parts
    h = tl.program_id(0) // parts % heads
    b = tl.program_id(0) // parts // heads
    d = tl.arange(0, BLOCK_D)
    x_base = x_ptr + tl.cast(b, tl.int64) * x_stride0 + tl.cast(h, tl.int64) * x_stride1
    end = tl.minimum(part * size + size, n)
    total = tl.zeros([BLOCK_D], tl.float32)
    counted = tl.zeros([ROWS], tl.float32)
    for first in range(part * size, end, ROWS):
        row = first + tl.arange(0, ROWS)
        kept_at = kept_ptr + tl.cast(b, tl.int64) * kept_stride0 + row * kept_stride1
        kept = tl.load(kept_at, mask=row < end, other=0) != 0
        at = x_base + tl.cast(row, tl.int64)[:, None] * x_stride2 + d[None, :] * x_stride3
        x = tl.load(at, mask=kept[:, None] & (d[None, :] < D), other=0.0)
        total += tl.sum(tl.cast(x, tl.float32), 0)
        counted += tl.where(kept, 1.0, 0.0)
    count = tl.sum(counted, 0)
    tl.store(means_ptr + tl.cast(tl.program_id(0), tl.int64) * D + d, total / tl.maximum(count, 1.0), mask=d < D)
    tl.store(counts_ptr + b * parts + part, count)


@triton.jit(do_not_specialize=['tiles', 'blocks'])
def select_scores(
    queries_ptr, keys_ptr, scores_ptr,
    tiles, blocks,
):
    """Scores of [SIDE, SIDE] tiles by blocks; heads of a group that choose together have their mean query."""
    across, down = tl.cdiv(blocks, SIDE), tl.cdiv(tiles, SIDE)
    part = tl.program_id(0) // across // down
    h = part % CHOOSERS
    b = part // CHOOSERS
    tile = tl.program_id(0) // across % down * SIDE + tl.arange(0, SIDE)
    block = tl.program_id(0) % across * SIDE + tl.arange(0, SIDE)
    d = tl.arange(0, BLOCK_D)
    mean = tl.zeros([SIDE, BLOCK_D], tl.float32)
    for member in range(0, SHARED):
        at = (tl.cast(b * HEADS + h * SHARED + member, tl.int64) * tiles + tile)[:, None] * D + d[None, :]
        mean += tl.load(queries_ptr + at, mask=(tile < tiles)[:, None] & (d < D)[None, :], other=0.0)
    at = (tl.cast(b * KEYS + key_head(h), tl.int64) * blocks + block)[:, None] * D + d[None, :]
    keys = tl.load(keys_ptr + at, mask=(block < blocks)[:, None] & (d < D)[None, :], other=0.0)
    scores = tl.dot(mean / SHARED, tl.trans(keys), input_precision=FP32) * SCALE
    at = (tl.cast(part, tl.int64) * tiles + tile)[:, None] * blocks + block[None, :]
    tl.store(scores_ptr + at, scores, mask=(tile < tiles)[:, None] & (block < blocks)[None, :])


@triton.jit
def ordered(x):
    """Positive integers below 2^32 in the order of numbers; NaN is the largest number, -inf the least finite one."""
    x = tl.where(x == x, x, float("inf"))
    x = tl.where(x < -3.4028234663852886e38, -3.4028234663852886e38, tl.where(x == 0.0, 0.0, x))
    bits = tl.cast(x, tl.int32, bitcast=True)
    return tl.cast(bits ^ ((bits >> 31) & 0x7FFFFFFF), tl.int64) + 2147483648


@triton.jit
def logits_of(scores_ptr, counts_ptr, j, inside):
    """The scores of blocks; with MASS of as many keys as they count."""
    s = tl.load(scores_ptr + j, mask=inside, other=0.0)
    if MASS:
        s += tl.log(tl.load(counts_ptr + j, mask=inside, other=1.0))
    return s


@triton.jit(do_not_specialize=['tiles', 'blocks'])
def select_choose(
    scores_ptr, counts_ptr, classes_ptr, own_ptr, amounts_ptr, ranks_ptr, chosen_ptr,
    tiles, blocks,
    classes_stride0, classes_stride1, classes_stride2, classes_stride3,
    own_stride0, own_stride1,
    amounts_stride0,
):
    """The blocks of one tile: 1 for those that are chosen. What stood among the scores is lost."""
    tile = tl.program_id(0) % tiles
    h = tl.program_id(0) // tiles % CHOOSERS
    b = tl.program_id(0) // tiles // CHOOSERS
    row = tl.cast(tl.program_id(0), tl.int64) * blocks
    scores_ptr, ranks_ptr, chosen_ptr = scores_ptr + row, ranks_ptr + row, chosen_ptr + row
    counts_ptr += b * blocks
    classes_ptr += tl.cast(b, tl.int64) * classes_stride0 + h * classes_stride1
    classes_ptr += tl.cast(tile, tl.int64) * classes_stride2
    own_low = tl.load(own_ptr + b * own_stride0 + tile * own_stride1)
    own_high = tl.load(own_ptr + b * own_stride0 + tile * own_stride1 + 1)
    amount = tl.load(amounts_ptr + h * amounts_stride0)
    tops = tl.full([CHUNK], float("-inf"), tl.float32)
    if MASS:
        for first in range(0, blocks, CHUNK):
            j = first + tl.arange(0, CHUNK)
            possible = tl.load(classes_ptr + j * classes_stride3, mask=j < blocks, other=0) != 0
            allowed = possible & (tl.load(counts_ptr + j, mask=j < blocks, other=0.0) > 0)
            tops = tl.where(allowed, tl.maximum(tops, logits_of(scores_ptr, counts_ptr, j, allowed)), tops)
    top = tl.max(tops, 0)
    seen = tl.zeros([CHUNK], tl.int32)
    totals = tl.zeros([CHUNK], tl.float32)
    for first in range(0, blocks, CHUNK):
        j = first + tl.arange(0, CHUNK)
        possible = tl.load(classes_ptr + j * classes_stride3, mask=j < blocks, other=0) != 0
        allowed = possible & (tl.load(counts_ptr + j, mask=j < blocks, other=0.0) > 0)
        number = tl.cast(allowed, tl.int32)
        forced = allowed & ((seen + tl.cumsum(number, 0) <= FIRST) | ((j >= own_low) & (j <= own_high)))
        seen += tl.sum(number, 0)
        s = logits_of(scores_ptr, counts_ptr, j, allowed)
        weight = tl.where(allowed, tl.exp(s - top) if MASS else 1.0, 0.0)
        totals += weight
        rank = tl.where(allowed, ordered(tl.where(forced, float("inf"), s)), 0)
        tl.store(scores_ptr + j, weight, mask=j < blocks)
        tl.store(ranks_ptr + j, rank, mask=j < blocks)
        tl.store(chosen_ptr + j, tl.cast(forced, tl.uint8), mask=j < blocks)
    total = tl.zeros([CHUNK], tl.float32) + (tl.sum(totals, 0) if MASS else 1.0)
    tl.debug_barrier()
    limit = tl.zeros([CHUNK], tl.int64)  # the largest rank from which on there is `amount` of the weight
    for step in range(0, 32):
        trial = limit + (tl.full([CHUNK], 1, tl.int64) << (31 - step))
        held = tl.zeros([CHUNK], tl.float32)
        for first in range(0, blocks, CHUNK):
            j = first + tl.arange(0, CHUNK)
            weight = tl.load(scores_ptr + j, mask=j < blocks, other=0.0)
            held += tl.where(tl.load(ranks_ptr + j, mask=j < blocks, other=0) >= trial, weight, 0.0)
        limit = tl.where(tl.sum(held, 0) / total >= amount, trial, limit)
    held = tl.zeros([CHUNK], tl.float32)
    for first in range(0, blocks, CHUNK):
        j = first + tl.arange(0, CHUNK)
        weight = tl.load(scores_ptr + j, mask=j < blocks, other=0.0)
        held += tl.where(tl.load(ranks_ptr + j, mask=j < blocks, other=0) > limit, weight, 0.0)
    reached = tl.zeros([CHUNK], tl.float32) + tl.sum(held, 0)
    for first in range(0, blocks, CHUNK):
        j = first + tl.arange(0, CHUNK)
        rank = tl.load(ranks_ptr + j, mask=j < blocks, other=0)
        weight = tl.load(scores_ptr + j, mask=j < blocks, other=0.0)
        equal = tl.where(rank == limit, weight, 0.0)
        before = reached + tl.cumsum(equal, 0) - equal
        picked = (rank > limit) | ((rank == limit) & (before / total < amount))
        picked = picked & (rank > 0) & (total == total)
        picked = picked | (tl.load(chosen_ptr + j, mask=j < blocks, other=0) != 0)
        tl.store(chosen_ptr + j, tl.cast(picked, tl.uint8), mask=j < blocks)
        reached += tl.sum(equal, 0)


@triton.jit
def class_of(chosen_ptr, classes_ptr, chosen_stride2, chosen_stride3, classes_stride3, tile, j, rows, keys,
             tiles, blocks, listed, n_k):
    """0, 1 or 2 for blocks of `keys` keys that a tile of `rows` queries keeps none, some or all pairs of."""
    known = tl.load(classes_ptr + j * classes_stride3, mask=j < listed, other=0)
    least = tl.full([CHUNK], 1, tl.int32)
    most = tl.zeros([CHUNK], tl.int32)
    first_row, last_row = tile * rows // TILE, tl.minimum((tile * rows + rows - 1) // TILE, tiles - 1)
    for row in range(first_row, last_row + 1):
        for step in range(0, tl.cdiv(keys, BLOCK)):
            block = tl.minimum(j * keys // BLOCK + step, blocks - 1)
            one = tl.load(chosen_ptr + row * chosen_stride2 + block * chosen_stride3, mask=j < listed, other=0) != 0
            least, most = tl.minimum(least, tl.cast(one, tl.int32)), tl.maximum(most, tl.cast(one, tl.int32))
    found = tl.minimum(tl.cast(known, tl.int32), least + most)
    return tl.where((j + 1) * keys > n_k, tl.minimum(found, 1), found)


@triton.jit(do_not_specialize=['rows', 'keys', 'listings', 'listed', 'tiles', 'blocks', 'n_k'])
def select_list(
    chosen_ptr, classes_ptr, visited_ptr,
    rows, keys, listings, listed, tiles, blocks, n_k,
    chosen_stride0, chosen_stride1, chosen_stride2, chosen_stride3,
    classes_stride0, classes_stride1, classes_stride2, classes_stride3,
):
    """The blocks of keys that one tile of a forward kernel visits: how many whole, how many, and which, whole first."""
    tile = tl.program_id(0) % listings
    h = tl.program_id(0) // listings % HEADS
    b = tl.program_id(0) // listings // HEADS
    chosen_ptr += tl.cast(b, tl.int64) * chosen_stride0 + tl.cast(h, tl.int64) * chosen_stride1
    classes_ptr += tl.cast(b, tl.int64) * classes_stride0 + h * classes_stride1
    classes_ptr += tl.cast(tile, tl.int64) * classes_stride2
    visited_ptr += tl.cast(tl.program_id(0), tl.int64) * (2 + listed)
    whole = tl.zeros([CHUNK], tl.int32)
    some = tl.zeros([CHUNK], tl.int32)
    for first in range(0, listed, CHUNK):
        j = first + tl.arange(0, CHUNK)
        found = class_of(chosen_ptr, classes_ptr, chosen_stride2, chosen_stride3, classes_stride3, tile, j, rows, keys,
                         tiles, blocks, listed, n_k)
        whole += tl.where(found == 2, 1, 0)
        some += tl.where(found == 1, 1, 0)
    count, rest = tl.sum(whole, 0), tl.sum(some, 0)
    tl.store(visited_ptr, count)
    tl.store(visited_ptr + 1, count + rest)
    whole_at = tl.zeros([CHUNK], tl.int32) + 2
    some_at = tl.zeros([CHUNK], tl.int32) + 2 + count
    for first in range(0, listed, CHUNK):
        j = first + tl.arange(0, CHUNK)
        found = class_of(chosen_ptr, classes_ptr, chosen_stride2, chosen_stride3, classes_stride3, tile, j, rows, keys,
                         tiles, blocks, listed, n_k)
        full, part = tl.where(found == 2, 1, 0), tl.where(found == 1, 1, 0)
        place = tl.where(found == 2, whole_at + tl.cumsum(full, 0), some_at + tl.cumsum(part, 0)) - 1
        tl.store(visited_ptr + place, j, mask=found > 0)
        whole_at += tl.sum(full, 0)
        some_at += tl.sum(part, 0)
'''

LAUNCH = r'''
def broadcast(tensor, dims):
    """The first strides of a tensor, none along dimensions of size 1."""
    return [x * (n > 1) for n, x in zip(tensor.shape[:dims], tensor.stride()[:dims])]


def means(x, kept, size):
    """Means of parts of `size` rows, fp32 `[B, H, parts, D]`, and how many rows count in them, `[B, parts]`."""
    batch, heads, n, _ = x.shape
    parts = triton.cdiv(n, size)
    found = x.new_empty((batch, heads, parts, D.value), dtype=torch.float32)
    counts = x.new_empty((batch, parts), dtype=torch.float32)
    select_means[(batch * heads * parts, 1, 1)](
        x, kept, found, counts, n, heads, size, parts, *x.stride(), *broadcast(kept, 2), **OPTIONS)
    return found, counts


def choose(q, k, kept, classes, own, amounts):
    """uint8 `[B, CHOOSERS, tiles, blocks]`: 1 for the blocks that tiles choose.

    `kept` uint8 `[B, n_k]`: the keys that count; `classes` int8 `[B, H, tiles, blocks]`: 0 where no pair of query and
    key is kept; `own` int32 `[B, tiles, 2]`: first and last of the blocks that are always chosen; `amounts` fp32
    `[CHOOSERS]`. Dimensions of size 1 are broadcast.
    """
    queries, _ = means(q, torch.ones((1, 1), dtype=torch.uint8, device=q.device), TILE.value)
    keys, counts = means(k, kept, BLOCK.value)
    batch, tiles, blocks = q.shape[0], queries.shape[2], keys.shape[2]
    shape = (batch, CHOOSERS.value, tiles, blocks)
    scores = q.new_empty(shape, dtype=torch.float32)
    ranks, chosen = (torch.empty(shape, dtype=t, device=q.device) for t in (torch.int64, torch.uint8))
    programs = batch * CHOOSERS.value * triton.cdiv(tiles, SIDE.value) * triton.cdiv(blocks, SIDE.value)
    select_scores[(programs, 1, 1)](queries, keys, scores, tiles, blocks, **OPTIONS)
    select_choose[(batch * CHOOSERS.value * tiles, 1, 1)](
        scores, counts, classes, own, amounts, ranks, chosen, tiles, blocks, *broadcast(classes, 3),
        classes.stride(3), *broadcast(own, 2), *broadcast(amounts, 1), **OPTIONS)
    return chosen


def visits(chosen, classes, rows, keys, n_k):
    """int32 `[B, HEADS, tiles of rows, 2 + blocks of keys]`, as forward kernels that go by lists take it.

    `chosen` uint8 `[B, HEADS, tiles, blocks]`; `classes` int8 `[B, H, tiles of rows, blocks of keys]`: 0, 1 or 2 where
    the rest of the mask keeps none, some or all pairs.
    """
    batch, heads, tiles, blocks = chosen.shape
    listings, listed = classes.shape[2:]
    visited = torch.empty((batch, heads, listings, 2 + listed), dtype=torch.int32, device=chosen.device)
    select_list[(batch * heads * listings, 1, 1)](
        chosen, classes, visited, rows, keys, listings, listed, tiles, blocks, n_k, *chosen.stride(),
        *broadcast(classes, 3), classes.stride(3), **OPTIONS)
    return visited
'''
