"""`forward` for Hopper (compute capability 9.0), in Gluon: what Triton doesn't make of `kernels.forward`.

Of a block of 128 rows two groups of four warps, the consumers, take 64 each; a third group loads the tiles of keys and
values that both take, some tiles ahead. Loading needs few registers, so that the consumers get what it leaves.

A tile in which every token is real is copied by the tensor memory accelerator (TMA). Any other one (padding, the end of
the cache; seldom) is loaded as usual, with zeros for what isn't real: NaN may stand there, and 0 * NaN is NaN.

A consumer issues the product of its queries with a tile of keys and that of its probabilities of the tile before with
that one's values, and works on the first while the second runs. The two consumers issue in turns, so that one
multiplies while the other has its softmax.

Each slot of shared memory has a barrier for "full" and one for "empty". Keys of tile t are in slot 2 * (t % STAGES),
its values in the next one. Tiles that need a mask come first: `left` ones from `start` on, then those on the right.
"""

# Gluon reads these signatures as Triton does: constexpr is the only annotation that it knows.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from act_export.ops.cuda.kernels import (
    BOUNDS,
    INFINITY,
    _beta,
    _is_real,
    _log_gamma,
    _row_limits,
    _visible,
    _whole,
)

CONSUMERS = gl.constexpr(2)
LOADED_ROWS = gl.constexpr(16)  # of a tile that isn't regular, at a time
# Registers of a thread: what a block has is 168 of each of its 384.
CONSUMER_REGISTERS = gl.constexpr(232)
LOADER_REGISTERS = gl.constexpr(40)


@gluon.jit
def _masked_column(tile, start, left, right_start, COLUMNS: gl.constexpr):
    """The first column of a tile that needs a mask; those on the right count from `right_start` on."""
    return gl.where(tile < left, start, right_start) + tile * COLUMNS


@gluon.jit
def _load_real_rows(pointer, real_before, column, total, slot, D: gl.constexpr, COLUMNS: gl.constexpr):
    """Fills a slot with the rows from `column` on, and zeros where a token isn't real."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    elements = gl.arange(0, D, gl.SliceLayout(0, layout))
    for first in gl.static_range(0, COLUMNS, LOADED_ROWS):
        j = column + first + gl.arange(0, LOADED_ROWS, gl.SliceLayout(1, layout))
        real = _is_real(real_before, j, j < total)
        rows = gl.load(pointer + j[:, None] * D + elements[None, :], mask=real[:, None], other=0.0)
        slot.slice(first, LOADED_ROWS).store(rows)


@gluon.jit
def _load_tile(
    map, pointer, real_before, cache_row, column, total, is_regular, slot, full, empty, phase, D: gl.constexpr,
    COLUMNS: gl.constexpr,
):  # fmt: skip
    """Fills a slot once it is empty, and lets its consumers know."""
    mbarrier.wait(empty, phase)
    if is_regular:
        mbarrier.expect(full, map.nbytes_per_cta)
        tma.async_load(map, [cache_row + column, 0], full, slot)
    else:
        _load_real_rows(pointer, real_before, column, total, slot, D, COLUMNS)
        fence_async_shared()
        mbarrier.arrive(full, count=1)


@gluon.jit
def _load(
    key_map, value_map, key, value, real_before, initial, end, has_holes, cache_row, total, start, left, right_start,
    full_start, masked, tiles, slots, full, empty, D: gl.constexpr, COLUMNS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The third group of warps: all tiles in order."""
    for tile in range(tiles):
        column = full_start + (tile - masked) * COLUMNS
        if tile < masked:
            column = _masked_column(tile, start, left, right_start, COLUMNS)
        is_regular = (column >= initial) & (column + COLUMNS <= end)
        if has_holes:
            before = gl.load(real_before + column, mask=is_regular, other=0)
            is_regular = gl.load(real_before + column + COLUMNS, mask=is_regular, other=0) - before == COLUMNS
        slot = tile % STAGES * 2
        phase = tile // STAGES % 2 ^ 1
        _load_tile(
            key_map, key, real_before, cache_row, column, total, is_regular, slots.index(slot), full.index(slot),
            empty.index(slot), phase, D, COLUMNS,
        )  # fmt: skip
        _load_tile(
            value_map, value, real_before, cache_row, column, total, is_regular, slots.index(slot + 1),
            full.index(slot + 1), empty.index(slot + 1), phase, D, COLUMNS,
        )  # fmt: skip


@gluon.jit
def _anew(number):
    """The same number, but the compiler doesn't know: what is made of it later is in no register until then."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [number], gl.int32, False, 1)


@gluon.jit
def _mask(x, column, positions, real_before, initial, end, has_holes, raised, window):
    """Products x of the tile that begins at `column`, -infinity where a row doesn't see the token.

    The initial token's have `raised` more: its gamma, of which the scale makes the logarithm.
    """
    columns = column + gl.arange(0, x.shape[1], gl.SliceLayout(0, x.type.layout))
    bounded = (columns >= initial) & (columns < end)
    x = gl.where(_visible(positions, columns, window) & bounded[None, :], x, -INFINITY)
    if has_holes:
        x = gl.where(_is_real(real_before, columns, bounded)[None, :], x, -INFINITY)
    return gl.where((columns == initial)[None, :], x + raised, x)


@gluon.jit
def _softmax(x, maxima, sums, scale, is_whole, OPERAND: gl.constexpr, TYPE: gl.constexpr):
    """Rounded probabilities of a tile from products x, new maxima and sums, and what earlier ones shrink by.

    Probabilities have the bits that `kernels.correct` finds for the later sinks: see `kernels._exponents`.
    """
    found = gl.max(x, 1) * scale
    highest = gl.maximum(maxima, gl.where(is_whole, _whole(found, TYPE), found))
    finite = gl.where(highest == -INFINITY, 0.0, highest)
    p = gl.exp2(gl.fma(x, scale, -finite[:, None]))
    shrink = gl.exp2(maxima - finite)
    sums = sums * shrink + gl.sum(p, 1)
    return gl.convert_layout(p.to(TYPE), OPERAND), highest, sums, shrink


@gluon.jit
def _attend_tile(
    attended, p, maxima, sums, tile, tiles, own, slots, full, empty, turns, start, left, right_start, positions,
    real_before, initial, end, has_holes, raised, window, scale, is_whole, zeros, CONSUMER: gl.constexpr,
    STAGES: gl.constexpr, IS_MASKED: gl.constexpr, OPERAND: gl.constexpr,
):  # fmt: skip
    """The products of a tile's keys, which have arrived, and of the values before it, side by side with its softmax."""
    keys = tile % STAGES * 2
    values = (tile - 1) % STAGES * 2 + 1
    mbarrier.wait(full.index(values), (tile - 1) // STAGES % 2)
    mbarrier.wait(turns.index(CONSUMER), (tile + CONSUMER) % 2)
    x = warpgroup_mma(own, slots.index(keys).permute((1, 0)), zeros, use_acc=False, is_async=True)
    attended = warpgroup_mma(p, slots.index(values), attended, is_async=True)
    mbarrier.arrive(turns.index(1 - CONSUMER), count=1)
    x = warpgroup_mma_wait(1, deps=(x,))
    mbarrier.arrive(empty.index(keys), count=1)
    if IS_MASKED:  # which takes the registers of p: nothing runs beside it
        attended, p = warpgroup_mma_wait(0, deps=(attended, p))
        column = _masked_column(tile, start, left, right_start, x.shape[1])
        x = _mask(x, column, positions, real_before, initial, end, has_holes, raised, window)
    next_p, maxima, sums, shrink = _softmax(x, maxima, sums, scale, is_whole, OPERAND, own.dtype)
    # Here, for its branch: the compiler would move the softmax behind the wait for the second product.
    next = tile + 1
    mbarrier.wait(full.index(next % STAGES * 2), next // STAGES % 2, pred=next < tiles)
    if not IS_MASKED:
        attended, p, next_p = warpgroup_mma_wait(0, deps=(attended, p, next_p))
    mbarrier.arrive(empty.index(values), count=1)
    attended = attended * gl.convert_layout(shrink, gl.SliceLayout(1, attended.type.layout))[:, None]
    return attended, next_p, maxima, sums


@gluon.jit
def _places(row, row_stride, sequence, ROWS: gl.constexpr, D: gl.constexpr, LAYOUT: gl.constexpr):
    """Of rows from `row` on, `row_stride` elements apart: where their elements are, and whether they are there."""
    rows = row + gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
    places = rows[:, None] * row_stride + gl.arange(0, D, gl.SliceLayout(0, LAYOUT))[None, :]
    return places, (rows < sequence)[:, None]


@gluon.jit
def _store(pointer, values, row, row_stride, sequence):
    places, inside = _places(row, row_stride, sequence, values.shape[0], values.shape[1], values.type.layout)
    gl.store(pointer + places, values, mask=inside)


@gluon.jit
def _attend(
    query, real_before, calibrated_index, output, row_lse, row_maxima, row_inverse, rows_output, row, sequence, total,
    num_heads, calibrated_count, window, scale, sink, is_whole, initial, end, has_holes, log_gamma, start, left,
    right_start, masked, tiles, queries, slots, full, empty, turns, CONSUMER: gl.constexpr, D: gl.constexpr,
    COLUMNS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A consumer: its rows of the block that begins at `row`."""
    ROWS: gl.constexpr = queries.shape[1]
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, OUTPUT, 2)
    VECTORS: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    PAIRS: gl.constexpr = gl.BlockedLayout([2, 8], [256 // D, D // 8], [4, 1], [1, 0])  # addresses that nothing keeps
    own = queries.index(CONSUMER)
    row += CONSUMER * ROWS
    b = gl.program_id(2).to(gl.int64)
    head = gl.program_id(1)
    places, inside = _places(row, num_heads * D, sequence, ROWS, D, PAIRS)
    own.store(gl.load(query + (b * sequence * num_heads + head) * D + places, mask=inside, other=0.0))
    fence_async_shared()

    positions = total - sequence + row + gl.arange(0, ROWS, gl.SliceLayout(1, LOGITS))
    before = gl.where(is_whole, _whole(sink, own.dtype), sink)
    maxima = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, LOGITS)) + before
    finite = gl.where(sink > -INFINITY, before, 0.0)
    sums = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, LOGITS)) + gl.exp2(sink - finite)
    attended = gl.zeros([ROWS, D], gl.float32, OUTPUT)
    zeros = gl.zeros([ROWS, COLUMNS], gl.float32, LOGITS)
    raised = log_gamma / scale

    mbarrier.wait(full.index(0), 0)
    x = warpgroup_mma(own, slots.index(0).permute((1, 0)), zeros, use_acc=False, is_async=True)
    x = warpgroup_mma_wait(0, deps=(x,))
    mbarrier.arrive(empty.index(0), count=1)
    column = _masked_column(0, start, left, right_start, COLUMNS)
    x = _mask(x, column, positions, real_before, initial, end, has_holes, raised, window)
    p, maxima, sums, _ = _softmax(x, maxima, sums, scale, is_whole, OPERAND, own.dtype)
    mbarrier.wait(full.index(2), 0, pred=tiles > 1)
    first_full = gl.maximum(masked, 1)
    for tile in range(1, first_full):
        attended, p, maxima, sums = _attend_tile(
            attended, p, maxima, sums, tile, tiles, own, slots, full, empty, turns, start, left, right_start, positions,
            real_before, initial, end, has_holes, raised, window, scale, is_whole, zeros, CONSUMER, STAGES, True,
            OPERAND,
        )  # fmt: skip
    for tile in range(first_full, tiles):
        attended, p, maxima, sums = _attend_tile(
            attended, p, maxima, sums, tile, tiles, own, slots, full, empty, turns, start, left, right_start, positions,
            real_before, initial, end, has_holes, raised, window, scale, is_whole, zeros, CONSUMER, STAGES, False,
            OPERAND,
        )  # fmt: skip
    values = (tiles - 1) % STAGES * 2 + 1
    mbarrier.wait(full.index(values), (tiles - 1) // STAGES % 2)
    attended = warpgroup_mma(p, slots.index(values), attended, is_async=True)
    attended, p = warpgroup_mma_wait(0, deps=(attended, p))

    row = _anew(row)
    head = _anew(gl.program_id(1))
    b = _anew(gl.program_id(2)).to(gl.int64)
    divisors = gl.convert_layout(gl.where(sums > 0, sums, 1.0), gl.SliceLayout(1, OUTPUT))
    attended = attended / divisors[:, None]
    if is_whole:
        rows = row + gl.arange(0, ROWS, gl.SliceLayout(1, LOGITS))
        within = rows < sequence
        counts = _is_real(real_before, total - sequence + rows, within) & (sums > 0)
        safe = gl.where(counts, sums, 1.0)
        state = (b * calibrated_count + gl.load(calibrated_index + head)) * sequence
        states = state + rows
        gl.store(row_lse + states, gl.where(counts, maxima + gl.log2(safe), INFINITY), mask=within)
        gl.store(row_maxima + states, gl.where(counts, maxima, INFINITY), mask=within)
        gl.store(row_inverse + states, gl.where(counts, 1.0 / safe, 0.0), mask=within)
        _store(rows_output + state * D, attended, row, D, sequence)
    else:
        # Through the memory of the queries, so that threads store vectors.
        own.store(attended.to(own.dtype))
        _store(
            output + (b * sequence * num_heads + head) * D, own.load(VECTORS), row, num_heads * D, sequence
        )  # fmt: skip


@gluon.jit
def forward(
    key_map, value_map, query, key, value, real_before, bounds, calibrated_index, calibration, sink_logits, output,
    row_lse, row_maxima, row_inverse, rows_output,
    sequence, total, capacity, num_heads, kv_num_heads, calibrated_count, calibration_stride, size, value_size, window,
    scale, softcap,
    D: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """As `kernels.forward` where EXACT and not GENERAL, in 16 bits.

    key_map, value_map: TMA's maps of the caches as (batch * kv_num_heads * capacity, D), in boxes of COLUMNS rows.
    """
    row = (gl.num_programs(0) - 1 - gl.program_id(0)) * ROWS
    head = gl.program_id(1)
    b = gl.program_id(2).to(gl.int64)
    calibrated = gl.load(calibrated_index + head)
    is_whole = _beta(calibration, calibration_stride, b, calibrated) != 1.0
    log_gamma = _log_gamma(calibration, calibration_stride, b, calibrated)
    sink = gl.load(sink_logits + head)
    kv_row = b * kv_num_heads + head // (num_heads // kv_num_heads)
    tokens = real_before + b * (total + 1)
    cache_row = (kv_row * capacity).to(gl.int32)
    key += kv_row * capacity * D
    value += kv_row * capacity * D

    past_length = total - sequence
    start, full_start, full_stop, stop = _row_limits(bounds, b, past_length, sequence, window, row, ROWS, COLUMNS)
    initial = gl.load(bounds + b * BOUNDS)
    end = gl.load(bounds + b * BOUNDS + 1)
    has_holes = end - initial != gl.load(bounds + b * BOUNDS + 2)
    stop = gl.maximum(stop, start + COLUMNS)  # one tile at least, in which rows may see nothing
    if log_gamma != 0.0:
        full_start = gl.minimum(gl.maximum(full_start, initial // COLUMNS * COLUMNS + COLUMNS), stop)
        full_stop = gl.maximum(full_stop, full_start)
    # The first tile is one that needs a mask, though the mask may hide nothing.
    full_stop = gl.where((full_start == start) & (full_stop == stop), full_stop - COLUMNS, full_stop)
    left = (full_start - start) // COLUMNS
    right_start = full_stop - left * COLUMNS
    masked = left + (stop - full_stop) // COLUMNS
    tiles = (stop - start) // COLUMNS

    queries = gl.allocate_shared_memory(query.dtype.element_ty, [CONSUMERS, ROWS // CONSUMERS, D], key_map.layout)
    slots = gl.allocate_shared_memory(query.dtype.element_ty, [2 * STAGES, COLUMNS, D], key_map.layout)
    full = gl.allocate_shared_memory(gl.int64, [2 * STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [2 * STAGES, 1], mbarrier.MBarrierLayout())
    turns = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(2 * STAGES):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=CONSUMERS)
    for consumer in gl.static_range(CONSUMERS):
        mbarrier.init(turns.index(consumer), count=1)
    fence_async_shared()

    gl.warp_specialize(
        [
            (
                _attend,
                (
                    query, tokens, calibrated_index, output, row_lse, row_maxima, row_inverse, rows_output, row,
                    sequence, total, num_heads, calibrated_count, window, scale, sink, is_whole, initial, end,
                    has_holes, log_gamma, start, left, right_start, masked, tiles, queries, slots, full, empty, turns,
                    0, D, COLUMNS, STAGES,
                ),
            ),
            (
                _attend,
                (
                    query, tokens, calibrated_index, output, row_lse, row_maxima, row_inverse, rows_output, row,
                    sequence, total, num_heads, calibrated_count, window, scale, sink, is_whole, initial, end,
                    has_holes, log_gamma, start, left, right_start, masked, tiles, queries, slots, full, empty, turns,
                    1, D, COLUMNS, STAGES,
                ),
            ),
            (
                _load,
                (
                    key_map, value_map, key, value, tokens, initial, end, has_holes, cache_row, total, start, left,
                    right_start, full_start, masked, tiles, slots, full, empty, D, COLUMNS, STAGES,
                ),
            ),
        ],
        [4, 4],
        [CONSUMER_REGISTERS, LOADER_REGISTERS],
    )  # fmt: skip
