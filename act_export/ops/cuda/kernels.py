"""The GPU kernels of the operators, in Triton: they compile ahead of time without a GPU, and run in its interpreter.

The definition is in `act_export.calibration.reference`; shapes are those of the operator's table. `B` sequences, `S`
new tokens behind `P` cached ones, `T = P + S`; row i sits at position P + i. Logits are in base 2, so that `exp2` does:
an attention map is `exp2(logit - lse)` with the row's log-sum-exp `lse`.

Prompts: `prepare`, `forward` (flash attention; for calibrated heads it keeps the log-sum-exp and the output in
float32), `columns` (column sums: a stationary tile of keys, the map recomputed from the log-sum-exp), `select` (the
later sinks), `correct` (their part of each row, and the identity o' = f_sinks * oK + f_rest * (o - oK)).

A few tokens: `prepare`, `decode_split` (a section of the cache; logits of calibrated heads are kept), `decode_finish`
(column sums, later sinks and their part, by section; the last program of a head combines them). Calibration costs no
launch.

`calibration` holds beta, gamma and threshold of each calibrated head, for all sequences (`calibration_stride` 0) or for
each (the elements between two). A head with beta 1 is done by `forward`, or `decode_split` and `decode_finish`, as a
plain one is: the other kernels leave it at once, with 0 for the column sums of its new tokens. gamma is log2(gamma) in
the initial token's logits, or a factor on its probabilities, where maximum and sum have it; no later sink has any.

Nothing of size S x T is written for prompts, and no host decision depends on device memory.

Learned sinks: `sink_logits` (num_heads), float32, in base 2, are one more key of every row, without a value; -infinity
where a head has none. They are in a row's maximum and sum, so that what the keys draw sums to less than 1.

Names: `D` is the size of a head's block in registers, a power of two; `size` and `value_size` are the head sizes, equal
to D where `EXACT`. `GENERAL` kernels have soft capping and take any scale; others a positive one. `WIDE` is float32.
Padding tokens' queries, keys and values may be anything, NaN included, for all but their own rows.
"""

# Triton reads these signatures: constexpr is the only annotation that it knows.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

INFINITY = tl.constexpr(float("inf"))
SMALLEST_REST = tl.constexpr(1e-6)
LEAST_DIFFERENCE = tl.constexpr(1e-5)  # of two sums of probabilities: a smaller one may be rounding
# Parts of a row's mass: where less lies outside the later sinks, `correct` doesn't subtract (float32, half types).
LEAST_REST_WIDE = tl.constexpr(0.125)
LEAST_REST_HALF = tl.constexpr(2.0**-10)
BOUNDS = tl.constexpr(4)  # int32 values of a sequence in `bounds`: first real token, end of the real ones, their number
STRENGTHS = tl.constexpr(3)  # values of a head in `calibration`


@triton.jit
def _dot(x, y, WIDE: tl.constexpr):
    """x @ y; float32 keeps its digits in three products of tensor cores."""
    if WIDE:
        return tl.dot(x, y, input_precision="tf32x3")
    return tl.dot(x, y)


@triton.jit
def _dot_full(p, v, WIDE: tl.constexpr):
    """p @ v with p in float32: for half types in two parts, so that no digits of p are lost."""
    if WIDE:
        return tl.dot(p, v, input_precision="tf32x3")
    high = p.to(v.dtype)
    low = (p - high.to(tl.float32)).to(v.dtype)
    return tl.dot(low, v, tl.dot(high, v))


@triton.jit
def _cap(x, softcap, GENERAL: tl.constexpr):
    """Soft-capped logits, in base 2: `softcap` is the cap times log2(e), 0 for none."""
    if GENERAL:
        if softcap > 0:
            # tanh(y) = 1 - 2 / (1 + e^(2 y)), and e^(2 y) = 2^(2 log2(e) y)
            x = softcap * (1.0 - 2.0 / (1.0 + tl.exp2(x / softcap * 2.885390081777927)))
    return x


@triton.jit
def _exponents(products, scale, softcap, plus, GENERAL: tl.constexpr):
    """Logits in base 2 from products of queries and keys, and `plus`, which are added in one rounding.

    `correct` takes away what `forward` added up: both have the same bits, and round probabilities alike.
    """
    if GENERAL:
        return _cap(products * scale, softcap, GENERAL) + plus
    return tl.fma(products, scale, plus)


@triton.jit
def _whole(x, dtype: tl.constexpr):
    """Integers that stand for maxima x: a change of one is a power of two, which loses no digit of a probability.

    float16 has few small numbers, so that there probabilities, without their row's sum, go up to 2^14.
    """
    whole = tl.ceil(x)
    if dtype == tl.float16:
        whole -= 14.0
    return whole


@triton.jit
def _load_rows(pointer, rows, stride, valid, size, D: tl.constexpr, EXACT: tl.constexpr):
    """A tile (rows, D) of a matrix whose rows are `stride` elements apart; zeros where not `valid`."""
    columns = tl.arange(0, D)
    mask = valid[:, None]
    if not EXACT:
        mask = mask & (columns < size)[None, :]
    return tl.load(pointer + rows[:, None] * stride + columns[None, :], mask=mask, other=0.0)


@triton.jit
def _load_all_rows(pointer, rows, stride, size, D: tl.constexpr, EXACT: tl.constexpr):
    """As `_load_rows` where every row is valid."""
    columns = tl.arange(0, D)
    where = pointer + rows[:, None] * stride + columns[None, :]
    if EXACT:
        return tl.load(where)
    return tl.load(where, mask=(columns < size)[None, :], other=0.0)


@triton.jit
def _store_rows(pointer, rows, stride, valid, values, size, D: tl.constexpr, EXACT: tl.constexpr):
    columns = tl.arange(0, D)
    mask = valid[:, None]
    if not EXACT:
        mask = mask & (columns < size)[None, :]
    tl.store(pointer + rows[:, None] * stride + columns[None, :], values.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _is_real(real_before, j, valid):
    """Whether positions j are real tokens, from the running count of real tokens before each."""
    before = tl.load(real_before + j, mask=valid, other=0)
    return valid & (tl.load(real_before + j + 1, mask=valid, other=0) > before)


@triton.jit
def _visible(positions, columns, window):
    """(rows, columns): causal, and within the window where there is one."""
    visible = columns[None, :] <= positions[:, None]
    return visible & ((window < 0) | (columns[None, :] > positions[:, None] - window))


@triton.jit
def _strength(
    calibration, stride, b, calibrated, place: tl.constexpr, plain: tl.constexpr, least: tl.constexpr,
    most: tl.constexpr,
):  # fmt: skip
    """A value of the calibrated heads `calibrated` in sequence b; `plain` for -1, which is a head that isn't.

    The host doesn't see device memory, so that nobody refuses what is out of range, as csrc/attention.h has it: the
    nearest value in range stands for it, and `plain` for NaN.
    """
    given = tl.load(calibration + b * stride + calibrated * STRENGTHS + place, mask=calibrated >= 0, other=plain)
    return tl.where(given == given, tl.minimum(tl.maximum(given, least), most), plain)


@triton.jit
def _beta(calibration, stride, b, calibrated):
    return _strength(calibration, stride, b, calibrated, 0, 1.0, 0.0, 2.0)


@triton.jit
def _gamma(calibration, stride, b, calibrated):
    return _strength(calibration, stride, b, calibrated, 1, 1.0, 0.0625, 16.0)


@triton.jit
def _log_gamma(calibration, stride, b, calibrated):
    """What the initial token's logits have more, in base 2: exactly 0 where gamma is 1."""
    gamma = _gamma(calibration, stride, b, calibrated)
    return tl.where(gamma == 1.0, 0.0, tl.log2(gamma))


@triton.jit
def _threshold(calibration, stride, b, calibrated):
    return _strength(calibration, stride, b, calibrated, 2, 0.0, 0.0, INFINITY)


@triton.jit
def _is_sink(sums, real_before, j, total, window, threshold, relative):
    """Whether positions j are later sinks, by their running column sums."""
    inside = j < total
    before = tl.load(real_before + j, mask=inside, other=0)
    end = total
    reach = j + 1
    if window > 0:
        reach = tl.minimum(j + window, end)
    else:
        reach = tl.zeros_like(j) + end
    rows = tl.load(real_before + reach, mask=inside, other=1) - before
    if relative:
        threshold = tl.div_rn(threshold, tl.maximum(tl.load(real_before + total), 1).to(tl.float32))
    scores = tl.div_rn(sums, tl.maximum(rows, 1).to(tl.float32))
    # The initial token is the real one with none before it.
    return (scores > threshold) & _is_real(real_before, j, inside) & (before > 0)


@triton.jit
def _factors(beta, sinks, rest):
    """Factors on a row's later sinks and on its rest, from its mass on either."""
    moved = (1.0 - beta) * sinks
    negative = -moved > rest
    on_sinks = tl.where(negative, 1.0 + rest / tl.where(sinks > 0, sinks, 1.0), beta)
    on_rest = tl.where(negative, 0.0, 1.0 + moved / tl.where(rest > 0, rest, 1.0))
    keep = rest <= SMALLEST_REST
    return tl.where(keep, 1.0, on_sinks), tl.where(keep, 1.0, on_rest)


@triton.jit
def _copy_positions(
    past, new, present, row, positions, past_length, total, past_capacity, present_capacity, kv_num_heads, width,
    in_place, D: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Rows `positions` of the present cache of one (sequence, head), from the past one and from this call's tokens."""
    sequence = total - past_length
    is_new = (positions >= past_length) & (positions < total)
    source = new + (row // kv_num_heads * sequence * kv_num_heads + row % kv_num_heads) * width
    target = present + row * present_capacity * width
    tile = _load_rows(source, positions - past_length, kv_num_heads * width, is_new, width, D, EXACT)
    _store_rows(target, positions, width, is_new, tile, width, D, EXACT)
    if in_place == 0:
        is_old = (positions < past_capacity) & (is_new == 0)
        tile = _load_rows(past + row * past_capacity * width, positions, width, is_old, width, D, EXACT)
        _store_rows(target, positions, width, is_old, tile, width, D, EXACT)


@triton.jit
def _count_tokens(
    mask, real_before, bounds, total, chunk, is_last, CHUNK: tl.constexpr, STEP: tl.constexpr
):  # fmt: skip
    """`real_before` of one chunk of a sequence, each chunk counting those before it; the last one writes `bounds`."""
    steps = tl.arange(0, STEP)
    counts = tl.zeros([STEP], tl.int32)
    first = tl.zeros([STEP], tl.int32) + total
    end = tl.zeros([STEP], tl.int32)
    for start in range(0, chunk * CHUNK, STEP):
        i = start + steps
        earlier = tl.load(mask + i, mask=i < chunk * CHUNK, other=0) != 0
        counts += earlier.to(tl.int32)
        first = tl.where(earlier, tl.minimum(first, i), first)
        end = tl.where(earlier, i + 1, end)
    j = chunk * CHUNK + tl.arange(0, CHUNK)
    real = tl.load(mask + j, mask=j < total, other=0) != 0
    before = tl.sum(counts)
    own = real.to(tl.int32)
    tl.store(real_before + j, before + tl.cumsum(own, 0) - own, mask=j < total)
    if is_last:
        count = before + tl.sum(own)
        tl.store(real_before + total, count)
        tl.store(bounds, tl.minimum(tl.min(first), tl.min(tl.where(real, j, total))))
        tl.store(bounds + 1, tl.maximum(tl.max(end), tl.max(tl.where(real, j + 1, 0))))
        tl.store(bounds + 2, count)


@triton.jit
def _copy_sums(past_sums, present_sums, past_length, total, past_capacity, block, POSITIONS: tl.constexpr):
    """Column sums of one head of earlier calls, and what lies beyond this call's tokens."""
    j = block * POSITIONS + tl.arange(0, POSITIONS)
    is_old = (j < past_capacity) & ((j < past_length) | (j >= total))
    tl.store(present_sums + j, tl.load(past_sums + j, mask=is_old), mask=is_old)


@triton.jit
def prepare(
    past_key, past_value, past_sums, key, value, mask, present_key, present_value, present_sums, real_before, bounds,
    batch, past_length, total, past_capacity, present_capacity, kv_num_heads, size, value_size, in_place, copy_blocks,
    mask_blocks, D: tl.constexpr, EXACT: tl.constexpr, POSITIONS: tl.constexpr, CHUNK: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    """Extends the caches and counts real tokens.

    real_before (batch, total + 1): real tokens before each position. bounds (batch, 4): see `BOUNDS`. A past that is
    not `in_place` is copied: its keys, values and column sums. Grid: copy_blocks * batch * kv_num_heads programs for
    the cache, mask_blocks * batch for the mask, copy_blocks * batch * calibrated heads for column sums that are not in
    place.
    """
    program = tl.program_id(0)
    cache_programs = copy_blocks * batch * kv_num_heads
    mask_programs = mask_blocks * batch
    if EXACT:
        size = D
        value_size = D
    if program < cache_programs:
        row = (program // copy_blocks).to(tl.int64)
        positions = past_length * in_place + (program % copy_blocks) * POSITIONS + tl.arange(0, POSITIONS)
        _copy_positions(
            past_key, key, present_key, row, positions, past_length, total, past_capacity, present_capacity,
            kv_num_heads, size, in_place, D, EXACT,
        )  # fmt: skip
        _copy_positions(
            past_value, value, present_value, row, positions, past_length, total, past_capacity, present_capacity,
            kv_num_heads, value_size, in_place, D, EXACT,
        )  # fmt: skip
    elif program < cache_programs + mask_programs:
        chunk = (program - cache_programs) % mask_blocks
        b = ((program - cache_programs) // mask_blocks).to(tl.int64)
        _count_tokens(
            mask + b * total, real_before + b * (total + 1), bounds + b * BOUNDS, total, chunk,
            chunk == mask_blocks - 1, CHUNK, STEP,
        )  # fmt: skip
    else:
        index = program - cache_programs - mask_programs
        row = (index // copy_blocks).to(tl.int64)
        _copy_sums(
            past_sums + row * past_capacity, present_sums + row * present_capacity, past_length, total, past_capacity,
            index % copy_blocks, POSITIONS,
        )  # fmt: skip


@triton.jit
def _row_limits(bounds, b, past_length, sequence, window, row, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Tiles of columns for a block of rows: (first tile, end of the left masked ones, end of the full ones, end).

    Full tiles are seen whole by every row. All are multiples of COLUMNS.
    """
    first = tl.load(bounds + b * BOUNDS)
    end = tl.load(bounds + b * BOUNDS + 1)
    count = tl.load(bounds + b * BOUNDS + 2)
    top = past_length + row
    bottom = past_length + tl.minimum(row + ROWS, sequence) - 1
    start = first
    full_start = first
    if window > 0:
        start = tl.maximum(first, top - window + 1)
        full_start = tl.maximum(first, past_length + row + ROWS - window)
    stop = tl.minimum(bottom + 1, end)
    full_stop = tl.minimum(top + 1, end)
    start = start // COLUMNS * COLUMNS
    stop = tl.maximum((stop + COLUMNS - 1) // COLUMNS * COLUMNS, start)
    full_start = tl.minimum((full_start + COLUMNS - 1) // COLUMNS * COLUMNS, stop)
    full_stop = tl.maximum(full_stop // COLUMNS * COLUMNS, full_start)
    if end - first != count:  # padding among the real tokens: every tile is masked
        full_start = stop
        full_stop = stop
    return start, full_start, full_stop, stop


@triton.jit
def forward(
    query, key, value, real_before, bounds, calibrated_index, calibration, sink_logits, output, row_lse, row_maxima,
    row_inverse, rows_output,
    sequence, total, capacity, num_heads, kv_num_heads, calibrated_count, calibration_stride, size, value_size, window,
    scale, softcap,
    D: tl.constexpr, EXACT: tl.constexpr, GENERAL: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Flash attention over the present cache.

    Heads whose later sinks stay as they are write output (batch, sequence, num_heads, value_size); others rows_output
    (batch, calibrated, sequence, value_size) in float32 and (batch, calibrated, sequence) each of row_lse, the
    softmax's maximum and the inverse of its sum; rows of padding get infinity, infinity and 0. Grid: (blocks of rows,
    num_heads, batch).
    """
    # The longest rows first: the last blocks to finish are short.
    row = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS
    head = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    if EXACT:
        size = D
        value_size = D
    calibrated = tl.load(calibrated_index + head)
    beta = _beta(calibration, calibration_stride, b, calibrated)
    log_gamma = _log_gamma(calibration, calibration_stride, b, calibrated)
    past_length = total - sequence
    rows = row + tl.arange(0, ROWS)
    positions = past_length + rows
    inside = rows < sequence
    q = _load_rows(query + (b * sequence * num_heads + head) * size, rows, num_heads * size, inside, size, D, EXACT)
    kv_row = b * kv_num_heads + head // (num_heads // kv_num_heads)
    key += kv_row * capacity * size
    value += kv_row * capacity * value_size
    real_before += b * (total + 1)
    start, full_start, full_stop, stop = _row_limits(bounds, b, past_length, sequence, window, row, ROWS, COLUMNS)
    initial = tl.load(bounds + b * BOUNDS)
    if log_gamma != 0.0:  # full tiles have no time for it
        full_start = tl.minimum(tl.maximum(full_start, initial // COLUMNS * COLUMNS + COLUMNS), stop)
        full_stop = tl.maximum(full_stop, full_start)

    sink = tl.load(sink_logits + head)
    is_whole = beta != 1.0
    before = tl.where(is_whole, _whole(sink, q.dtype), sink)
    maxima = tl.zeros([ROWS], tl.float32) + before
    sums = tl.zeros([ROWS], tl.float32) + tl.exp2(sink - tl.where(sink > -INFINITY, before, 0.0))
    attended = tl.zeros([ROWS, D], tl.float32)
    for column in range(full_start, full_stop, COLUMNS):
        columns = column + tl.arange(0, COLUMNS)
        k = _load_all_rows(key, columns, size, size, D, EXACT)
        x = _dot(q, tl.trans(k), WIDE)
        if GENERAL:
            found = tl.max(_exponents(x, scale, softcap, 0.0, GENERAL), 1)
        else:
            found = tl.max(x, 1) * scale
        highest = tl.maximum(maxima, tl.where(is_whole, _whole(found, q.dtype), found))
        p = tl.exp2(_exponents(x, scale, softcap, -highest[:, None], GENERAL))
        shrink = tl.exp2(maxima - highest)
        sums = sums * shrink + tl.sum(p, 1)
        v = _load_all_rows(value, columns, value_size, value_size, D, EXACT)
        attended = attended * shrink[:, None] + _dot(p.to(v.dtype), v, WIDE)
        maxima = highest
    left = (full_start - start) // COLUMNS
    right = (stop - full_stop) // COLUMNS
    for tile in range(0, left + right):
        column = tl.where(tile < left, start + tile * COLUMNS, full_stop + (tile - left) * COLUMNS)
        columns = column + tl.arange(0, COLUMNS)
        real = _is_real(real_before, columns, columns < total)
        k = _load_rows(key, columns, size, columns < total, size, D, EXACT)
        x = _dot(q, tl.trans(k), WIDE)
        visible = _visible(positions, columns, window) & real[None, :]
        plus = tl.where(columns == initial, log_gamma, 0.0)[None, :]
        found = tl.max(tl.where(visible, _exponents(x, scale, softcap, plus, GENERAL), -INFINITY), 1)
        highest = tl.maximum(maxima, tl.where(is_whole, _whole(found, q.dtype), found))
        finite = tl.where(highest == -INFINITY, 0.0, highest)
        p = tl.exp2(_exponents(x, scale, softcap, plus - finite[:, None], GENERAL))
        p = tl.where(visible, p, 0.0)
        shrink = tl.exp2(maxima - finite)
        sums = sums * shrink + tl.sum(p, 1)
        v = _load_rows(value, columns, value_size, real, value_size, D, EXACT)
        attended = attended * shrink[:, None] + _dot(p.to(v.dtype), v, WIDE)
        maxima = highest

    attended = attended / tl.where(sums > 0, sums, 1.0)[:, None]
    if beta == 1.0:
        output += (b * sequence * num_heads + head) * value_size
        _store_rows(output, rows, num_heads * value_size, inside, attended, value_size, D, EXACT)
    else:
        state = (b * calibrated_count + calibrated) * sequence
        counts = _is_real(real_before, positions, inside) & (sums > 0)
        safe = tl.where(counts, sums, 1.0)
        tl.store(row_lse + state + rows, tl.where(counts, maxima + tl.log2(safe), INFINITY), mask=inside)
        tl.store(row_maxima + state + rows, tl.where(counts, maxima, INFINITY), mask=inside)
        tl.store(row_inverse + state + rows, tl.where(counts, 1.0 / safe, 0.0), mask=inside)
        _store_rows(rows_output + state * value_size, rows, value_size, inside, attended, value_size, D, EXACT)


@triton.jit
def columns(
    query, key, real_before, bounds, calibrated_heads, calibration, row_lse, present_sums,
    sequence, total, capacity, num_heads, kv_num_heads, calibrated_count, calibration_stride, size, window, scale,
    softcap,
    D: tl.constexpr, EXACT: tl.constexpr, GENERAL: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Adds this call's column sums of calibrated heads to present_sums (batch, calibrated, capacity).

    Columns of earlier calls hold their running sums already. Grid: (blocks of columns, calibrated heads, batch).
    """
    column = tl.program_id(0) * COLUMNS
    calibrated = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    if EXACT:
        size = D
    past_length = total - sequence
    j = column + tl.arange(0, COLUMNS)
    inside = j < total
    state = b * calibrated_count + calibrated
    own_sums = present_sums + state * capacity + j
    head = tl.load(calibrated_heads + calibrated)
    kv_row = b * kv_num_heads + head // (num_heads // kv_num_heads)
    k = _load_rows(key + kv_row * capacity * size, j, size, inside, size, D, EXACT)
    query += (b * sequence * num_heads + head) * size
    row_lse += state * sequence

    # Rows that see any of these columns, and those among them that see all.
    first = tl.maximum(column - past_length, 0) // ROWS * ROWS
    full_first = (tl.maximum(column + COLUMNS - 1 - past_length, 0) + ROWS - 1) // ROWS * ROWS
    end = sequence
    full_end = sequence
    if window > 0:
        end = tl.minimum(sequence, column + COLUMNS - 1 + window - past_length)
        full_end = tl.minimum(sequence, column + window - past_length)
    end = tl.maximum((end + ROWS - 1) // ROWS * ROWS, first)
    if _beta(calibration, calibration_stride, b, calibrated) == 1.0:  # none; `return` would cost the others registers
        end = first
    full_first = tl.minimum(full_first, end)
    full_end = tl.maximum(tl.minimum(full_end // ROWS * ROWS, end), full_first)

    sums = tl.zeros([COLUMNS], tl.float32)
    for row in range(full_first, full_end, ROWS):
        rows = row + tl.arange(0, ROWS)
        q = _load_all_rows(query, rows, num_heads * size, size, D, EXACT)
        lse = tl.load(row_lse + rows)
        x = _cap(_dot(k, tl.trans(q), WIDE) * scale, softcap, GENERAL)
        # Selected, not multiplied away: a padding token's logits may be NaN.
        sums += tl.sum(tl.where(lse[None, :] < INFINITY, tl.exp2(x - lse[None, :]), 0.0), 1)
    before = (full_first - first) // ROWS
    after = (end - full_end) // ROWS
    for tile in range(0, before + after):
        row = tl.where(tile < before, first + tile * ROWS, full_end + (tile - before) * ROWS)
        rows = row + tl.arange(0, ROWS)
        q = _load_rows(query, rows, num_heads * size, rows < sequence, size, D, EXACT)
        lse = tl.load(row_lse + rows, mask=rows < sequence, other=INFINITY)
        x = _cap(_dot(k, tl.trans(q), WIDE) * scale, softcap, GENERAL)
        visible = tl.trans(_visible(past_length + rows, j, window)) & (lse[None, :] < INFINITY)
        sums += tl.sum(tl.where(visible, tl.exp2(x - lse[None, :]), 0.0), 1)

    # A row's log-sum-exp has the initial token's gamma in it, its logit above hasn't.
    gamma = _gamma(calibration, calibration_stride, b, calibrated)
    sums = tl.where(j == tl.load(bounds + b * BOUNDS), sums * gamma, sums)
    sums = tl.where(_is_real(real_before + b * (total + 1), j, inside), sums, 0.0)
    earlier = tl.load(own_sums, mask=j < past_length, other=0.0)
    tl.store(own_sums, earlier + sums, mask=inside)


@triton.jit
def select(
    present_sums, real_before, calibration, sinks, sinks_before, total, capacity, calibrated_count, calibration_stride,
    window, relative, BLOCK: tl.constexpr,
):  # fmt: skip
    """Lists the later sinks of each calibrated head.

    sinks (batch, calibrated, total): their positions, ascending. sinks_before (batch, calibrated, total + 1): how many
    lie before each position. Grid: (calibrated heads, batch).
    """
    calibrated = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    if _beta(calibration, calibration_stride, b, calibrated) == 1.0:
        return
    threshold = _threshold(calibration, calibration_stride, b, calibrated)
    state = b * calibrated_count + calibrated
    present_sums += state * capacity
    real_before += b * (total + 1)
    sinks += state * total
    sinks_before += state * (total + 1)
    count = 0
    for start in range(0, total, BLOCK):
        j = start + tl.arange(0, BLOCK)
        sums = tl.load(present_sums + j, mask=j < total, other=0.0)
        is_sink = _is_sink(sums, real_before, j, total, window, threshold, relative)
        own = is_sink.to(tl.int32)
        before = count + tl.cumsum(own, 0) - own
        tl.store(sinks_before + j, before, mask=j < total)
        tl.store(sinks + before, j, mask=is_sink)
        count += tl.sum(own)
    tl.store(sinks_before + total, count)


@triton.jit
def _rest(
    q, key, value, real_before, sinks_before, maxima, inverse, positions, start, stop, total, initial, gamma, size,
    value_size, window, scale, softcap, D: tl.constexpr, EXACT: tl.constexpr, GENERAL: tl.constexpr,
    WIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Mass and output of a block of rows from all columns but the later sinks: the work of `forward` once more."""
    mass = tl.zeros([ROWS], tl.float32)
    rounded_mass = tl.zeros([ROWS], tl.float32)
    attended = tl.zeros([ROWS, D], tl.float32)
    for column in tl.range(start, stop, COLUMNS, num_stages=1):  # rarely needed: no shared memory for tiles ahead
        columns = column + tl.arange(0, COLUMNS)
        within = columns < total
        before = tl.load(sinks_before + columns, mask=within, other=0)
        counts = _is_real(real_before, columns, within)
        counts = counts & (tl.load(sinks_before + columns + 1, mask=within, other=1) == before)
        k = _load_rows(key, columns, size, within, size, D, EXACT)
        x = _cap(_dot(q, tl.trans(k), WIDE) * scale, softcap, GENERAL)
        visible = _visible(positions, columns, window) & counts[None, :]
        p = tl.where(visible, tl.exp2(x - maxima[:, None]) * inverse[:, None], 0.0)
        p *= tl.where(columns == initial, gamma, 1.0)[None, :]
        mass += tl.sum(p, 1)
        v = _load_rows(value, columns, value_size, counts, value_size, D, EXACT)
        # All of them may be tiny, and float16 has no small numbers.
        rounded = (p * 16384.0).to(v.dtype)
        rounded_mass += tl.sum(rounded.to(tl.float32), 1)
        attended += _dot(rounded, v, WIDE)
    # A mean weighted by rounded probabilities, times their exact sum: one key's value keeps all its digits.
    return mass, attended * (mass / tl.where(rounded_mass > 0, rounded_mass, 1.0))[:, None]


@triton.jit
def correct(
    query, key, value, real_before, bounds, calibrated_heads, calibration, sink_logits, row_maxima, row_inverse,
    rows_output, sinks, sinks_before, output,
    sequence, total, capacity, num_heads, kv_num_heads, calibrated_count, calibration_stride, size, value_size, window,
    scale, softcap,
    D: tl.constexpr, EXACT: tl.constexpr, GENERAL: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """Calibrated attention of calibrated heads, from the plain one.

    Probabilities come from maximum and sum, not from the log-sum-exp, whose rounding is that of the largest logit. Rows
    whose rest is too small for o - oK to keep its digits are computed again from every other column. Grid: (blocks of
    rows, calibrated heads, batch).
    """
    row = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS
    calibrated = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    beta = _beta(calibration, calibration_stride, b, calibrated)
    if beta == 1.0:
        return
    if EXACT:
        size = D
        value_size = D
    past_length = total - sequence
    head = tl.load(calibrated_heads + calibrated)
    rows = row + tl.arange(0, ROWS)
    positions = past_length + rows
    inside = rows < sequence
    q = _load_rows(query + (b * sequence * num_heads + head) * size, rows, num_heads * size, inside, size, D, EXACT)
    kv_row = b * kv_num_heads + head // (num_heads // kv_num_heads)
    key += kv_row * capacity * size
    value += kv_row * capacity * value_size
    real_before += b * (total + 1)
    state = b * calibrated_count + calibrated
    maxima = tl.load(row_maxima + state * sequence + rows, mask=inside, other=INFINITY)
    inverse = tl.load(row_inverse + state * sequence + rows, mask=inside, other=0.0)
    sinks += state * total
    sinks_before += state * (total + 1)

    # Sinks that any of these rows sees.
    top = 0
    if window > 0:
        top = tl.maximum(past_length + row - window + 1, 0)
    first = tl.load(sinks_before + top)
    end = tl.load(sinks_before + past_length + tl.minimum(row + ROWS, sequence))
    sink_mass = tl.zeros([ROWS], tl.float32)
    from_sinks = tl.zeros([ROWS, D], tl.float32)
    for begin in range(first, end, SINKS):
        listed = begin + tl.arange(0, SINKS)
        valid = listed < end
        j = tl.load(sinks + listed, mask=valid, other=0)
        k = _load_rows(key, j, size, valid, size, D, EXACT)
        p = tl.exp2(_exponents(_dot(q, tl.trans(k), WIDE), scale, softcap, -maxima[:, None], GENERAL))
        p = tl.where(_visible(positions, j, window) & valid[None, :], p, 0.0)
        sink_mass += tl.sum(p, 1)
        v = _load_rows(value, j, value_size, valid, value_size, D, EXACT)
        from_sinks += _dot(p.to(v.dtype), v, WIDE)
    sink_mass *= inverse
    from_sinks *= inverse[:, None]

    row_sum = 1.0 - tl.exp2(tl.load(sink_logits + head) - maxima) * inverse
    rest_mass = row_sum - sink_mass
    rows_output += state * sequence * value_size
    from_rest = _load_rows(rows_output, rows, value_size, inside, value_size, D, EXACT) - from_sinks
    least = LEAST_REST_WIDE if WIDE else LEAST_REST_HALF
    loses_digits = (sink_mass > 0) & (rest_mass < tl.maximum(least * row_sum, LEAST_DIFFERENCE))
    if tl.max(loses_digits.to(tl.int32), 0) > 0:
        start, _, _, stop = _row_limits(bounds, b, past_length, sequence, window, row, ROWS, COLUMNS)
        gamma = _gamma(calibration, calibration_stride, b, calibrated)
        rest_mass, from_rest = _rest(
            q, key, value, real_before, sinks_before, maxima, inverse, positions, start, stop, total,
            tl.load(bounds + b * BOUNDS), gamma, size, value_size, window, scale, softcap, D, EXACT, GENERAL, WIDE,
            ROWS, COLUMNS,
        )  # fmt: skip

    on_sinks, on_rest = _factors(beta, sink_mass, rest_mass)
    result = on_sinks[:, None] * from_sinks + on_rest[:, None] * from_rest
    output += (b * sequence * num_heads + head) * value_size
    _store_rows(output, rows, num_heads * value_size, inside, result, value_size, D, EXACT)


@triton.jit
def decode_split(
    query, key, value, real_before, bounds, calibrated_index, calibration, logits, part_maxima, part_sums, part_output,
    arrived,
    sequence, total, capacity, num_heads, kv_num_heads, calibrated_count, calibration_stride, size, value_size, window,
    first_column, section, scale, softcap, D: tl.constexpr, EXACT: tl.constexpr, GENERAL: tl.constexpr,
    WIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Attention of a few tokens over one section of the cache, for all query heads of a key-value head together.

    Rows are token * group + head of the group. part_* (batch, kv_num_heads, sections, ROWS[, value_size]), float32.
    logits (batch, calibrated, sequence, total), float32, of heads whose later sinks change. arrived (batch, calibrated)
    becomes 0. Grid: (sections, kv_num_heads, batch).
    """
    part = tl.program_id(0)
    kv_head = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    if EXACT:
        size = D
        value_size = D
    past_length = total - sequence
    group = num_heads // kv_num_heads
    r = tl.arange(0, ROWS)
    token = r // group
    head = kv_head * group + r % group
    inside = token < sequence
    calibrated = tl.load(calibrated_index + head, mask=inside, other=-1)
    first_of = tl.where(part == 0, calibrated, -1)
    tl.store(arrived + b * calibrated_count + first_of, tl.zeros_like(r), mask=first_of >= 0)
    positions = past_length + token
    query_rows = (b * sequence + token) * num_heads + head
    q = _load_rows(query, query_rows, size, inside, size, D, EXACT)
    kv_row = b * kv_num_heads + kv_head
    key += kv_row * capacity * size
    value += kv_row * capacity * value_size
    real_before += b * (total + 1)
    logit_rows = ((b * calibrated_count + calibrated) * sequence + token) * total
    keeps_logits = _beta(calibration, calibration_stride, b, calibrated) != 1.0
    log_gamma = _log_gamma(calibration, calibration_stride, b, calibrated)
    initial = tl.load(bounds + b * BOUNDS)

    # Tiles of this section that every token sees whole, without padding or a gamma: they have no time for a mask, and
    # without one are loaded several ahead.
    start = first_column + part * section
    stop = tl.minimum(start + section, total)
    real_end = tl.load(bounds + b * BOUNDS + 1)
    full_start = tl.maximum(start, initial)
    full_stop = tl.minimum(tl.minimum(stop, past_length + 1), real_end)
    if window > 0:
        full_start = tl.maximum(full_start, total - window)
    if tl.max(tl.abs(log_gamma), 0) > 0:
        full_start = tl.maximum(full_start, initial + 1)
    stop = tl.maximum((stop + COLUMNS - 1) // COLUMNS * COLUMNS, start)
    full_start = tl.minimum((full_start + COLUMNS - 1) // COLUMNS * COLUMNS, stop)
    full_stop = tl.maximum(full_stop // COLUMNS * COLUMNS, full_start)
    if real_end - initial != tl.load(bounds + b * BOUNDS + 2):  # padding among the real tokens: every tile is masked
        full_start = stop
        full_stop = stop

    maxima = tl.full([ROWS], -INFINITY, tl.float32)
    sums = tl.zeros([ROWS], tl.float32)
    attended = tl.zeros([ROWS, D], tl.float32)
    for column in range(full_start, full_stop, COLUMNS):
        columns = column + tl.arange(0, COLUMNS)
        k = _load_all_rows(key, columns, size, size, D, EXACT)
        x = _cap(_dot(q, tl.trans(k), WIDE) * scale, softcap, GENERAL)
        tl.store(logits + logit_rows[:, None] + columns[None, :], x, mask=keeps_logits[:, None])
        highest = tl.maximum(maxima, tl.max(x, 1))
        p = tl.exp2(x - highest[:, None])
        shrink = tl.exp2(maxima - highest)
        sums = sums * shrink + tl.sum(p, 1)
        v = _load_all_rows(value, columns, value_size, value_size, D, EXACT)
        attended = attended * shrink[:, None] + _dot_full(p, v, WIDE)
        maxima = highest
    left = (full_start - start) // COLUMNS
    right = (stop - full_stop) // COLUMNS
    for tile in tl.range(0, left + right, num_stages=1):
        column = tl.where(tile < left, start + tile * COLUMNS, full_stop + (tile - left) * COLUMNS)
        columns = column + tl.arange(0, COLUMNS)
        within = columns < total
        real = _is_real(real_before, columns, within)
        k = _load_rows(key, columns, size, within, size, D, EXACT)
        x = _cap(_dot(q, tl.trans(k), WIDE) * scale, softcap, GENERAL)
        x += tl.where((columns == initial)[None, :], log_gamma[:, None], 0.0)
        x = tl.where(_visible(positions, columns, window) & real[None, :], x, -INFINITY)
        tl.store(logits + logit_rows[:, None] + columns[None, :], x, mask=keeps_logits[:, None] & within[None, :])
        highest = tl.maximum(maxima, tl.max(x, 1))
        finite = tl.where(highest == -INFINITY, 0.0, highest)
        p = tl.exp2(x - finite[:, None])
        shrink = tl.exp2(maxima - finite)
        sums = sums * shrink + tl.sum(p, 1)
        v = _load_rows(value, columns, value_size, real, value_size, D, EXACT)
        attended = attended * shrink[:, None] + _dot_full(p, v, WIDE)
        maxima = highest
    parts = (kv_row * tl.num_programs(0) + part) * ROWS
    tl.store(part_maxima + parts + r, maxima)
    tl.store(part_sums + parts + r, sums)
    _store_rows(part_output + parts * value_size, r, value_size, inside, attended, value_size, D, EXACT)


@triton.jit
def _softmax_of_parts(part_maxima, part_sums, sink, rows, stride, sections, valid, SECTIONS: tl.constexpr):
    """Each row's maximum, and the inverse of its sum, from its sections `stride` apart and a learned sink.

    Infinity and 0 where there is nothing, or where the row isn't valid.
    """
    part = tl.arange(0, SECTIONS)
    where = rows[:, None] + part[None, :] * stride
    mask = valid[:, None] & (part < sections)[None, :]
    maxima = tl.load(part_maxima + where, mask=mask, other=-INFINITY)
    sums = tl.load(part_sums + where, mask=mask, other=0.0)
    highest = tl.maximum(tl.max(maxima, 1), sink)
    finite = tl.where(highest == -INFINITY, 0.0, highest)
    total = tl.sum(sums * tl.exp2(maxima - finite[:, None]), 1) + tl.exp2(sink - finite)
    counts = valid & (total > 0)
    return tl.where(counts, finite, INFINITY), tl.where(counts, 1.0 / tl.where(counts, total, 1.0), 0.0)


@triton.jit
def decode_finish(
    value, real_before, calibrated_index, calibration, sink_logits, logits, part_maxima, part_sums, part_output,
    present_sums, sink_mass, sink_output, arrived, output,
    sequence, total, capacity, num_heads, kv_num_heads, calibrated_count, calibration_stride, value_size, sections,
    window, first_column, section, relative, D: tl.constexpr, EXACT: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr, SECTIONS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Output rows from their sections; of calibrated heads first column sums, later sinks and their part of each row.

    Each program of a calibrated head does one section, and counts itself in arrived (batch, calibrated); the last one
    combines all. A plain head has a program for each token. sink_mass (batch, calibrated, sections, TOKENS),
    sink_output the same with value_size. Grid: (the larger of sections and sequence, num_heads, batch).
    """
    part = tl.program_id(0)
    head = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    if EXACT:
        value_size = D
    past_length = total - sequence
    group = num_heads // kv_num_heads
    kv_row = b * kv_num_heads + head // group
    first_row = kv_row * sections * ROWS + head % group
    calibrated = tl.load(calibrated_index + head)
    beta = _beta(calibration, calibration_stride, b, calibrated)
    threshold = _threshold(calibration, calibration_stride, b, calibrated)
    sink = tl.load(sink_logits + head)
    state = b * calibrated_count + calibrated
    real_before += b * (total + 1)
    present_sums += state * capacity
    logits += state * sequence * total
    value += kv_row * capacity * value_size
    tokens = tl.arange(0, TOKENS)

    first_token = part
    end_token = tl.minimum(part + 1, sequence)
    if beta == 1.0:
        count = tl.where(tl.where(part == 0, calibrated, -1) >= 0, sequence, 0)
        tl.store(present_sums + past_length + tokens, tl.zeros([TOKENS], tl.float32), mask=tokens < count)
    else:
        first_token = part * 0
        end_token = part * 0
        if part < sections:
            inside = tokens < sequence
            counts = _is_real(real_before, past_length + tokens, inside)
            rows = first_row + tokens * group
            maxima, inverse = _softmax_of_parts(part_maxima, part_sums, sink, rows, ROWS, sections, counts, SECTIONS)
            mass = tl.zeros([TOKENS], tl.float32)
            from_sinks = tl.zeros([TOKENS, D], tl.float32)
            begin = first_column + part * section
            for column in range(begin, tl.minimum(begin + section, total), COLUMNS):
                j = column + tl.arange(0, COLUMNS)
                within = j < total
                x = tl.load(
                    logits + tokens[:, None] * total + j[None, :],
                    mask=inside[:, None] & within[None, :],
                    other=-INFINITY,
                )
                p = tl.where(inverse[:, None] > 0, tl.exp2(x - maxima[:, None]) * inverse[:, None], 0.0)
                # Each column is read and written by this program alone; the sum over rows lies between, with its
                # barrier.
                sums = tl.load(present_sums + j, mask=j < past_length, other=0.0) + tl.sum(p, 0)
                tl.store(present_sums + j, sums, mask=within)
                is_sink = _is_sink(sums, real_before, j, total, window, threshold, relative)
                if tl.max(is_sink.to(tl.int32), 0) > 0:
                    p = tl.where(is_sink[None, :], p, 0.0)
                    mass += tl.sum(p, 1)
                    v = _load_rows(value, j, value_size, is_sink, value_size, D, EXACT)
                    from_sinks += _dot_full(p, v, WIDE)
            parts = (state * sections + part) * TOKENS
            tl.store(sink_mass + parts + tokens, mass)
            _store_rows(sink_output + parts * value_size, tokens, value_size, inside, from_sinks, value_size, D, EXACT)
            # All threads have stored; who comes last sees what every program of this head did.
            tl.debug_barrier()
            earlier = tl.atomic_add(arrived + state, 1, sem="acq_rel", scope="gpu")
            end_token = tl.where(earlier == sections - 1, sequence, 0)

    columns_v = tl.arange(0, D)
    one = tl.zeros([1], tl.int32)
    for token in range(first_token, end_token):
        row = first_row + token * group
        maximum, inverse = _softmax_of_parts(
            part_maxima, part_sums, sink, row + one, ROWS, sections, one == 0, SECTIONS
        )
        attended = tl.zeros([D], tl.float32)
        for start in range(0, sections, STEP):
            each = start + tl.arange(0, STEP)
            valid = each < sections
            maxima = tl.load(part_maxima + row + each * ROWS, mask=valid, other=-INFINITY)
            weight = tl.exp2(maxima - maximum) * inverse
            tile = _load_rows(part_output + row * value_size, each * ROWS, value_size, valid, value_size, D, EXACT)
            attended += tl.sum(tile * weight[:, None], 0)

        position = past_length + token
        real = tl.load(real_before + position + 1) > tl.load(real_before + position)
        if (beta != 1.0) & real:
            mass = 0.0
            from_sinks = tl.zeros([D], tl.float32)
            for start in range(0, sections, STEP):
                each = start + tl.arange(0, STEP)
                valid = each < sections
                where = (state * sections + each) * TOKENS + token
                mass += tl.sum(tl.load(sink_mass + where, mask=valid, other=0.0))
                from_sinks += tl.sum(_load_rows(sink_output, where, value_size, valid, value_size, D, EXACT), 0)
            row_sum = 1.0 - tl.sum(tl.exp2(sink - maximum) * inverse)
            rest = row_sum - mass
            from_rest = attended - from_sinks
            least = 0.00390625  # half types keep about 17 digits of each probability until here
            if WIDE:
                least = 0.125
            # o - oK would lose digits: from every other column.
            if (mass > 0) & (rest < tl.maximum(least * row_sum, LEAST_DIFFERENCE)):
                masses = tl.zeros([COLUMNS], tl.float32)
                from_rest = tl.zeros([D], tl.float32)
                for column in range(first_column, total, COLUMNS):
                    j = column + tl.arange(0, COLUMNS)
                    within = j < total
                    sums = tl.load(present_sums + j, mask=within, other=0.0)
                    counts = _is_real(real_before, j, within)
                    counts = counts & (_is_sink(sums, real_before, j, total, window, threshold, relative) == 0)
                    p = tl.exp2(tl.load(logits + token * total + j, mask=counts, other=-INFINITY) - maximum) * inverse
                    masses += p
                    v = _load_rows(value, j, value_size, counts, value_size, D, EXACT)
                    from_rest += tl.sum(p[:, None] * v.to(tl.float32), 0)
                rest = tl.sum(masses)
            on_sinks, on_rest = _factors(beta, mass, rest)
            attended = on_sinks * from_sinks + on_rest * from_rest
        own = output + ((b * sequence + token) * num_heads + head) * value_size
        tl.store(own + columns_v, attended.to(output.dtype.element_ty), mask=columns_v < value_size)
