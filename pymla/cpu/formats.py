"""What a ggml type is to a kernel: how to dot a row, how to unpack a row for a panel, how to read and write numbers.

Adding a type means a branch in `dot_row`, `unpack_row` and `dequantise_row`, and its sizes in `panel_bits`: nothing
anywhere else. A branch is taken once per row or for 8 blocks.

Weights of a block are ``w = d * code + m`` with codes of at most 8 bits. Activations are ``x = scale * a``. So
``w · x = Σ_blocks scale * (d * Σ code * a + m * Σ a)``.

All addresses are int64; the functions run inside kernels.
"""

import numpy as np

from pymla import ggml
from pymla.cpu.compiling import inline
from pymla.cpu.simd import (
    LANES,
    absolute,
    add,
    add_times,
    bit_or,
    bits_2,
    dot_i8,
    dot_i16,
    dot_u6,
    dot_u7,
    fma,
    gather_f16,
    gather_i8,
    high_nibbles,
    larger,
    largest,
    load_bf16,
    load_bf16x8,
    load_columns,
    load_f16,
    load_f16x8,
    load_f32,
    load_f32x4,
    load_f32x4_twice,
    load_f32x8,
    load_i8_as_f32,
    load_i8_as_f32x8,
    load_i8_as_i16,
    load_i8x16,
    load_i8x32,
    load_i16x16,
    load_nibbles,
    load_pair,
    load_scales,
    load_scales_4,
    low_nibbles,
    mul,
    panel_codes8,
    prefetch_row,
    round_away,
    round_even,
    splat_f32,
    store_as_i8,
    store_bf16,
    store_f16,
    store_f32,
    store_f32x8,
    store_i8x32,
    store_i16,
    store_start4,
    subtract_i8,
    subtract_i32,
    sum_blocks,
    sum_blocks_i32,
    sum_i8x16,
    times_32,
    to_f32,
    total,
    zero_i32x8,
    zero_sums,
)

# Kernels see module globals as constants.
F32, F16, BF16 = ggml.F32, ggml.F16, ggml.BF16
Q4_0, Q4_1, Q8_0, Q6_K = ggml.Q4_0, ggml.Q4_1, ggml.Q8_0, ggml.Q6_K


@inline
def is_float(qtype):
    """Whether products with this type are taken in float32."""
    return qtype in (F32, F16, BF16)


@inline
def float_bytes(qtype):
    """Bytes of a number of a float type."""
    return 4 if qtype == F32 else 2


@inline
def dot_row(qtype, row, x, codes, scale, sums, sum16, columns):
    """A row of weights times one activation vector, float32.

    Parameters
    ----------
    qtype : int
    row : int
        Address of the row's first block.
    x, codes, scale, sums, sum16 : int
        Addresses of the parts of a `quant.Input` in the order of rows. Float types read the first, quantised types the
        others.
    columns : int
    """
    if qtype == Q4_0:
        return _dot_4_bits(18, row, codes, scale, sums, columns)
    if qtype == Q8_0:
        return _dot_q8_0(row, codes, scale, columns)
    if qtype == Q6_K:
        return _dot_q6_k(row, codes, scale, sum16, columns)
    if qtype == Q4_1:
        return _dot_4_bits(20, row, codes, scale, sums, columns)
    return dot_float(qtype, row, x, columns)


@inline
def _dot_4_bits(size, row, codes, scale, sums, columns):
    """Q4_0, whose blocks have 18 bytes, or Q4_1, with 20.

    Codes stay unsigned, which saves instructions: Q4_0's zero point of 8 comes off by the sums, like a minimum.
    """
    header = size - 16
    zero = zero_sums()
    acc = splat_f32(np.float32(0))
    shift = splat_f32(np.float32(-8))
    for _ in range(columns // 256):
        prefetch_row(row, 144)
        d, at = load_scales(row, size), row + header
        a = _dot_pair(zero, load_pair(at, at + 4 * size), codes)
        b = _dot_pair(zero, load_pair(at + size, at + 5 * size), codes + 64)
        c = _dot_pair(zero, load_pair(at + 2 * size, at + 6 * size), codes + 128)
        e = _dot_pair(zero, load_pair(at + 3 * size, at + 7 * size), codes + 192)
        m = mul(d, shift) if size == 18 else load_scales(row + 2, size)
        acc = fma(m, load_f32x8(sums), acc)
        acc = fma(to_f32(sum_blocks(a, b, c, e)), mul(d, load_f32x8(scale)), acc)
        row, codes, scale, sums = row + 8 * size, codes + 256, scale + 32, sums + 32
    rest = columns % 256 // 32
    if rest >= 4:
        d, at = load_scales_4(row, size), row + header
        a = dot_u6(zero, load_nibbles(at), load_i8x32(codes))
        b = dot_u6(zero, load_nibbles(at + size), load_i8x32(codes + 32))
        c = dot_u6(zero, load_nibbles(at + 2 * size), load_i8x32(codes + 64))
        e = dot_u6(zero, load_nibbles(at + 3 * size), load_i8x32(codes + 96))
        m = mul(d, shift) if size == 18 else load_scales_4(row + 2, size)
        acc = fma(m, load_f32x4(sums), acc)
        acc = fma(to_f32(sum_blocks(a, b, c, e)), mul(d, load_f32x4_twice(scale)), acc)
        row, codes, scale, sums = row + 4 * size, codes + 128, scale + 16, sums + 16
    minima = np.float32(0)
    for _ in range(rest % 4):
        d = load_f16(row)
        products = dot_u7(zero_i32x8(), load_nibbles(row + header), load_i8x32(codes))
        acc = fma(to_f32(products), splat_f32(d * load_f32(scale)), acc)
        minima += (np.float32(-8) * d if size == 18 else load_f16(row + 2)) * load_f32(sums)
        row, codes, scale, sums = row + size, codes + 32, scale + 4, sums + 4
    return total(acc) + minima


@inline
def _dot_pair(zero, packed, codes):
    """Products of two blocks' nibbles with their 64 activations."""
    low = dot_u6(zero, low_nibbles(packed), load_i8x32(codes))
    return dot_u6(low, high_nibbles(packed), load_i8x32(codes + 32))


@inline
def _dot_q8_0(row, codes, scale, columns):
    acc = splat_f32(np.float32(0))
    for _ in range(columns // 256):
        prefetch_row(row, 272)
        a = _dot_pair_q8_0(row + 2, codes)
        b = _dot_pair_q8_0(row + 36, codes + 64)
        c = _dot_pair_q8_0(row + 70, codes + 128)
        e = _dot_pair_q8_0(row + 104, codes + 192)
        factor = mul(load_scales(row, 34), load_f32x8(scale))
        acc = fma(to_f32(sum_blocks_i32(a, b, c, e)), factor, acc)
        row, codes, scale = row + 272, codes + 256, scale + 32
    for _ in range(columns % 256 // 32):
        products = dot_i8(zero_i32x8(), load_i8x32(row + 2), load_i8x32(codes))
        acc = fma(to_f32(products), splat_f32(load_f16(row) * load_f32(scale)), acc)
        row, codes, scale = row + 34, codes + 32, scale + 4
    return total(acc)


@inline
def _dot_pair_q8_0(weights, codes):
    """Products of two blocks of Q8_0, four blocks apart, with their 64 activations."""
    low = dot_i8(zero_i32x8(), load_pair(weights, weights + 136), load_i8x32(codes))
    return dot_i8(low, load_pair(weights + 16, weights + 152), load_i8x32(codes + 32))


@inline
def _dot_q6_k(row, codes, scale, sum16, columns):
    """Codes stay unsigned, from 0 to 63, and a block's products meet the two scales of its sixteens as integers."""
    acc = splat_f32(np.float32(0))
    zero = zero_i32x8()
    for _ in range(columns // 256):
        prefetch_row(row, 210)
        # Register n of a half's 64 bytes has weights 16 n to 16 n + 15 in its low nibbles, 64 further ones in its high.
        n0, n1 = load_pair(row, row + 64), load_pair(row + 16, row + 80)
        n2, n3 = load_pair(row + 32, row + 96), load_pair(row + 48, row + 112)
        high0, high1 = load_pair(row + 128, row + 160), load_pair(row + 144, row + 176)
        s = load_i8_as_i16(row + 192)
        a = add_times(zero, _dot_q6(low_nibbles(n0), high0, 0, codes), s, 0)
        a = add_times(a, _dot_q6(low_nibbles(n1), high1, 0, codes + 32), s, 1)
        b = add_times(zero, _dot_q6(low_nibbles(n2), high0, 2, codes + 64), s, 2)
        b = add_times(b, _dot_q6(low_nibbles(n3), high1, 2, codes + 96), s, 3)
        c = add_times(zero, _dot_q6(high_nibbles(n0), high0, 4, codes + 128), s, 4)
        c = add_times(c, _dot_q6(high_nibbles(n1), high1, 4, codes + 160), s, 5)
        e = add_times(zero, _dot_q6(high_nibbles(n2), high0, 6, codes + 192), s, 6)
        e = add_times(e, _dot_q6(high_nibbles(n3), high1, 6, codes + 224), s, 7)
        offset = times_32(dot_i16(s, load_i16x16(sum16)))
        products = subtract_i32(sum_blocks_i32(a, b, c, e), offset)
        factor = mul(splat_f32(load_f16(row + 208)), load_f32x8(scale))
        acc = fma(to_f32(products), factor, acc)
        row, codes, scale, sum16 = row + 210, codes + 256, scale + 32, sum16 + 32
    return total(acc)


@inline
def _dot_q6(nibbles, high, shift, codes):
    """Products of sixteen weights of two blocks, of which `high` has the two upper bits at `shift`."""
    return dot_u6(zero_sums(), bit_or(nibbles, bits_2(high, shift)), load_i8x32(codes))


@inline
def _q6_k_codes(block, group):
    """Codes of the `group`-th 32 weights of a Q6_K block, from -32 to 31.

    A half of 128 weights has 64 bytes of low nibbles and 32 bytes that each hold the two high bits of four weights.
    """
    nibbles = load_i8x32(block + 64 * (group // 4) + 32 * (group % 2))
    nibbles = low_nibbles(nibbles) if group % 4 < 2 else high_nibbles(nibbles)
    return _code_6(nibbles, load_i8x32(block + 128 + 32 * (group // 4)), 2 * (group % 4))


@inline
def _q6_k_scales(block, group):
    """Scales of the two sixteens of a group, each in all lanes."""
    d = load_f16(block + 208)
    scales = block + 192 + 2 * group
    return splat_f32(d * load_i8_as_f32(scales)), splat_f32(d * load_i8_as_f32(scales + 1))


@inline
def dot_float(qtype, row, x, columns):
    """`dot_row` of a float type: F32, F16 or BF16."""
    a = splat_f32(np.float32(0))
    b = splat_f32(np.float32(0))
    size = float_bytes(qtype)
    for _ in range(columns // 16):
        a = fma(load_f8(qtype, row), load_f32x8(x), a)
        b = fma(load_f8(qtype, row + 8 * size), load_f32x8(x + 32), b)
        row += 16 * size
        x += 64
    rest = np.float32(0)
    for _ in range(columns % 16):
        rest += load_float(qtype, row) * load_f32(x)
        row += size
        x += 4
    return total(a) + total(b) + rest


@inline
def load_f8(qtype, address):
    """Eight numbers of a float type as float32."""
    if qtype == F32:
        return load_f32x8(address)
    if qtype == F16:
        return load_f16x8(address)
    return load_bf16x8(address)


@inline
def load_float(qtype, address):
    """A number of a float type as float32."""
    if qtype == F32:
        return load_f32(address)
    if qtype == F16:
        return load_f16(address)
    return load_bf16(address)


@inline
def panel_bits(qtype):
    """Bits of the codes of a type in a panel: 4 or 8; 0 for float types."""
    if is_float(qtype):
        return 0
    return 4 if qtype in (Q4_0, Q4_1) else 8


@inline
def bytes_256(qtype):
    """Bytes of 256 weights of a quantised type."""
    if qtype == Q4_0:
        return 144
    if qtype == Q8_0:
        return 272
    return 210 if qtype == Q6_K else 160


@inline
def has_minimum(qtype):
    """Whether blocks have a minimum beside their scale."""
    return qtype == Q4_1


@inline
def unpack_rows(qtype, rows, first, count, codes, scales, minima):
    """Blocks of 32 weights of eight rows of a quantised type, in the form that panels are made of.

    Parameters
    ----------
    qtype : int
    rows : tuple of 8 int
        Addresses of the rows.
    first, count : int
        The first block, a multiple of 8, and the number of blocks.
    codes : int
        Address for 8 registers a block, `LANES` words apart: four columns' codes of each row, from 0 to 15 or as
        `simd.panel_codes8` wants them.
    scales : int
        Address for float32 of the eight rows, `LANES` apart: a scale for each block of a type of 4 bits, one for 16
        weights of a type of 8 bits.
    minima : int
        Address for a minimum for each block, likewise, written where the type has them.
    """
    if qtype == Q4_0:
        _unpack_4_bits(18, rows, first, count, codes, scales, minima)
    elif qtype == Q8_0:
        for block in range(first, first + count):
            at = 34 * block
            _store_codes8(codes, load_columns(rows, at + 2))
            _store_codes8(codes + 16 * LANES, load_columns(rows, at + 18))
            d = gather_f16(rows, at)
            store_f32x8(scales, d)
            store_f32x8(scales + 4 * LANES, d)
            codes, scales = codes + 32 * LANES, scales + 8 * LANES
    elif qtype == Q6_K:
        for block in range(first // 8, (first + count) // 8):
            _unpack_q6_k(rows, 210 * block, codes, scales)
            codes, scales = codes + 256 * LANES, scales + 64 * LANES
    else:
        _unpack_4_bits(20, rows, first, count, codes, scales, minima)


@inline
def _unpack_4_bits(size, rows, first, count, codes, scales, minima):
    for block in range(first, first + count):
        at = size * block
        a, b, c, d = load_columns(rows, at + size - 16)
        _store_codes(codes, low_nibbles(a), low_nibbles(b), low_nibbles(c), low_nibbles(d))
        _store_codes(codes + 16 * LANES, high_nibbles(a), high_nibbles(b), high_nibbles(c), high_nibbles(d))
        store_f32x8(scales, gather_f16(rows, at))
        if size == 20:
            store_f32x8(minima, gather_f16(rows, at + 2))
        codes, scales, minima = codes + 32 * LANES, scales + 4 * LANES, minima + 4 * LANES


@inline
def _unpack_q6_k(rows, at, codes, scales):
    d = gather_f16(rows, at + 208)
    for i in range(16):
        store_f32x8(scales + 4 * LANES * i, mul(d, gather_i8(rows, at + 192 + i)))
    # A half of 128 weights has four times 16 bytes with a nibble of two weights each, and twice 16 bytes with two bits
    # of four weights each.
    for half in range(2):
        for i in range(4):
            a, b, c, d = load_columns(rows, at + 64 * half + 16 * i)
            e, f, g, h = load_columns(rows, at + 128 + 32 * half + 16 * (i % 2))
            target, shift = codes + 16 * LANES * (8 * half + i), i // 2 * 2
            _store_codes8(
                target,
                (
                    _code_6(low_nibbles(a), e, shift),
                    _code_6(low_nibbles(b), f, shift),
                    _code_6(low_nibbles(c), g, shift),
                    _code_6(low_nibbles(d), h, shift),
                ),
            )
            _store_codes8(
                target + 64 * LANES,
                (
                    _code_6(high_nibbles(a), e, shift + 4),
                    _code_6(high_nibbles(b), f, shift + 4),
                    _code_6(high_nibbles(c), g, shift + 4),
                    _code_6(high_nibbles(d), h, shift + 4),
                ),
            )


@inline
def _code_6(nibbles, high, shift):
    """Codes from -32 to 31 of nibbles and the two bits of `high` at `shift`."""
    return subtract_i8(bit_or(nibbles, bits_2(high, shift)), 32)


@inline
def _store_codes8(out, codes):
    a, b, c, d = codes
    _store_codes(out, panel_codes8(a), panel_codes8(b), panel_codes8(c), panel_codes8(d))


@inline
def _store_codes(out, a, b, c, d):
    """Sixteen columns of eight rows to a panel."""
    store_i8x32(out, a)
    store_i8x32(out + 4 * LANES, b)
    store_i8x32(out + 8 * LANES, c)
    store_i8x32(out + 12 * LANES, d)


@inline
def dequantise_row(qtype, row, out, columns):
    """A row of any type, of weights or of the cache, as float32 at `out`; all three are addresses or sizes."""
    if is_float(qtype):
        size = float_bytes(qtype)
        whole = columns // 8 * 8
        for i in range(0, whole, 8):
            store_f32x8(out + 4 * i, load_f8(qtype, row + size * i))
        for i in range(whole, columns):
            store_f32(out + 4 * i, load_float(qtype, row + size * i))
        return
    minimum = splat_f32(np.float32(0))
    for block in range(columns // 32):
        if qtype == Q8_0:
            codes = row + 34 * block + 2
            low = high = splat_f32(load_f16(row + 34 * block))
        else:
            # The codes lie in the last bytes of their own results until they are converted.
            codes = out + 96
            if qtype == Q6_K:
                start, group = row + block // 8 * 210, block % 8
                store_i8x32(codes, _q6_k_codes(start, group))
                low, high = _q6_k_scales(start, group)
            elif qtype == Q4_0:
                start = row + 18 * block
                store_i8x32(codes, subtract_i8(load_nibbles(start + 2), 8))
                low = high = splat_f32(load_f16(start))
            else:
                start = row + 20 * block
                store_i8x32(codes, load_nibbles(start + 4))
                low = high = splat_f32(load_f16(start))
                minimum = splat_f32(load_f16(start + 2))
        for i in range(2):
            store_f32x8(out + 32 * i, fma(load_i8_as_f32x8(codes + 8 * i), low, minimum))
        for i in range(2, 4):
            store_f32x8(out + 32 * i, fma(load_i8_as_f32x8(codes + 8 * i), high, minimum))
        out += 128


@inline
def write_row(qtype, x, row, columns):
    """Float32 values at `x` as a row of a cache type: F32, F16, BF16 or Q8_0. The bytes of
    ``reference.quant.quantise``."""
    if qtype == Q8_0:
        for block in range(columns // 32):
            _write_q8_0(x + 128 * block, row + 34 * block)
    elif qtype == F32:
        for i in range(columns):
            store_f32(row + 4 * i, load_f32(x + 4 * i))
    elif qtype == F16:
        for i in range(columns):
            store_f16(row + 2 * i, load_f32(x + 4 * i))
    else:
        for i in range(columns):
            store_bf16(row + 2 * i, load_f32(x + 4 * i))


@inline
def _write_q8_0(x, block):
    a, b, c, e = load_f32x8(x), load_f32x8(x + 32), load_f32x8(x + 64), load_f32x8(x + 96)
    most = largest(larger(larger(absolute(a), absolute(b)), larger(absolute(c), absolute(e))))
    d = (most + not_finite(a, b, c, e)) / np.float32(127)
    inverse = np.float32(0)
    if d > 0:
        inverse = np.float32(1) / d
    store_f16(block, d)
    factor = splat_f32(inverse)
    store_as_i8(block + 2, round_away(mul(a, factor)))
    store_as_i8(block + 10, round_away(mul(b, factor)))
    store_as_i8(block + 18, round_away(mul(c, factor)))
    store_as_i8(block + 26, round_away(mul(e, factor)))


@inline
def not_finite(a, b, c, d):
    """0, or NaN where one of 32 values is infinite or NaN: a scale with it added keeps the fault in sight, where codes
    would turn it into a number."""
    return total(mul(add(add(a, b), add(c, d)), splat_f32(np.float32(0))))


@inline
def quantise_block(x, low, high, scale, sums, starts, sum16):
    """Thirty-two activations, float32 at `x`, to the parts of `quant.Input`.

    All are addresses; `low` and `high` of sixteen codes each.
    """
    a, b, c, d = load_f32x8(x), load_f32x8(x + 32), load_f32x8(x + 64), load_f32x8(x + 96)
    most = largest(larger(larger(absolute(a), absolute(b)), larger(absolute(c), absolute(d))))
    inverse = np.float32(0)
    if most > 0:
        inverse = np.float32(127) / most
    factor = splat_f32(inverse)
    store_as_i8(low, round_even(mul(a, factor)))
    store_as_i8(low + 8, round_even(mul(b, factor)))
    store_as_i8(high, round_even(mul(c, factor)))
    store_as_i8(high + 8, round_even(mul(d, factor)))
    step = (most + not_finite(a, b, c, d)) / np.float32(127)
    store_f32(scale, step)
    store_start4(starts, load_pair(low, high))
    sum_low, sum_high = sum_i8x16(load_i8x16(low)), sum_i8x16(load_i8x16(high))
    store_i16(sum16, sum_low)
    store_i16(sum16 + 2, sum_high)
    store_f32(sums, step * np.float32(sum_low + sum_high))
