"""What a ggml type is to a kernel: how to dot a row, how to unpack a row for many columns, how to read and write numbers.

Adding a type means a branch in `dot_row` and in `unpack_row`, and nothing anywhere else. A branch is taken once per row,
so it costs nothing.

Weights of a block are ``w = d * code + m`` with codes of at most 8 bits, signed: a type's constant zero point is taken off
when it is unpacked. Activations are ``x = scale * a``. So ``w · x = Σ_blocks scale * (d * Σ code * a + m * Σ a)``.

All addresses are int64; the functions run inside kernels.
"""

import numpy as np

from pymla import ggml
from pymla.cpu.jit import inline
from pymla.cpu.simd import (
    bit_or,
    bits_2,
    dot_i8,
    dot_u7,
    fma,
    high_nibbles,
    join_i8,
    load_bf16,
    load_bf16x8,
    load_f16,
    load_f16x8,
    load_f32,
    load_f32x8,
    load_i8_as_f32,
    load_i8_as_f32x8,
    load_i8x16,
    load_i8x32,
    low_nibbles,
    mul,
    splat_f32,
    splat_halves,
    store_bf16,
    store_f16,
    store_f32,
    store_f32x8,
    store_i8,
    store_i8x32,
    subtract_i8,
    to_f32,
    total,
    zero_i32x8,
)

# Kernels see module globals as constants.
F32, F16, BF16 = ggml.F32, ggml.F16, ggml.BF16
Q4_0, Q4_1, Q8_0, Q6_K = ggml.Q4_0, ggml.Q4_1, ggml.Q8_0, ggml.Q6_K


@inline
def is_float(qtype):
    """Whether products with this type are taken in float32."""
    return qtype in (F32, F16, BF16)


@inline
def dot_row(qtype, row, x, codes, scale, sums, columns):
    """A row of weights times one activation vector, float32.

    Parameters
    ----------
    qtype : int
    row : int
        Address of the row's first block.
    x, codes, scale, sums : int
        Addresses of the activations: float32 (columns,); int8 codes (columns,), float32 scale (columns // 32,) and
        float32 sums of ``scale * codes`` (columns // 32,). Float types read the first, quantised types the others.
    columns : int
    """
    if qtype == Q4_0:
        return _dot_q4_0(row, codes, scale, sums, columns)
    if qtype == Q8_0:
        return _dot_q8_0(row, codes, scale, columns)
    if qtype == Q6_K:
        return _dot_q6_k(row, codes, scale, columns)
    if qtype == Q4_1:
        return _dot_q4_1(row, codes, scale, sums, columns)
    return dot_float(qtype, row, x, columns)


@inline
def _nibbles(address):
    """Thirty-two codes of 4 bits: the low halves of sixteen bytes come first, then the high halves."""
    packed = load_i8x16(address)
    return join_i8(low_nibbles(packed), high_nibbles(packed))


@inline
def _dot_q4_0(row, codes, scale, sums, columns):
    # Codes stay unsigned, which saves three instructions in eight: the zero point of 8 comes off by the sums. Two
    # accumulators, because a block takes fewer cycles than a multiply-add takes to finish.
    a = splat_f32(np.float32(0))
    b = splat_f32(np.float32(0))
    zero = zero_i32x8()
    offset = np.float32(0)
    for _ in range(columns // 64):
        d, e = load_f16(row), load_f16(row + 18)
        a = fma(to_f32(dot_u7(zero, _nibbles(row + 2), load_i8x32(codes))), splat_f32(d * load_f32(scale)), a)
        b = fma(to_f32(dot_u7(zero, _nibbles(row + 20), load_i8x32(codes + 32))), splat_f32(e * load_f32(scale + 4)), b)
        offset += d * load_f32(sums) + e * load_f32(sums + 4)
        row += 36
        codes += 64
        scale += 8
        sums += 8
    if columns % 64:
        d = load_f16(row)
        a = fma(to_f32(dot_u7(zero, _nibbles(row + 2), load_i8x32(codes))), splat_f32(d * load_f32(scale)), a)
        offset += d * load_f32(sums)
    return total(a) + total(b) - np.float32(8) * offset


@inline
def _dot_q4_1(row, codes, scale, sums, columns):
    acc = splat_f32(np.float32(0))
    zero = zero_i32x8()
    minimum = np.float32(0)
    for _ in range(columns // 32):
        products = dot_i8(zero, _nibbles(row + 4), load_i8x32(codes))
        acc = fma(to_f32(products), splat_f32(load_f16(row) * load_f32(scale)), acc)
        minimum += load_f16(row + 2) * load_f32(sums)
        row += 20
        codes += 32
        scale += 4
        sums += 4
    return total(acc) + minimum


@inline
def _dot_q8_0(row, codes, scale, columns):
    acc = splat_f32(np.float32(0))
    zero = zero_i32x8()
    for _ in range(columns // 32):
        products = dot_i8(zero, load_i8x32(row + 2), load_i8x32(codes))
        acc = fma(to_f32(products), splat_f32(load_f16(row) * load_f32(scale)), acc)
        row += 34
        codes += 32
        scale += 4
    return total(acc)


@inline
def _q6_k_codes(block, group):
    """Codes of the `group`-th 32 weights of a Q6_K block, from -32 to 31.

    A half of 128 weights has 64 bytes of low nibbles and 32 bytes that each hold the two high bits of four weights.
    """
    low = block + 64 * (group // 4) + 32 * (group % 2)
    high = block + 128 + 32 * (group // 4)
    shift = 2 * (group % 4)
    a, b = load_i8x16(low), load_i8x16(low + 16)
    if group % 4 < 2:
        a, b = low_nibbles(a), low_nibbles(b)
    else:
        a, b = high_nibbles(a), high_nibbles(b)
    a = bit_or(a, bits_2(load_i8x16(high), shift))
    b = bit_or(b, bits_2(load_i8x16(high + 16), shift))
    return subtract_i8(join_i8(a, b), 32)


@inline
def _q6_k_scales(block, group):
    """Scales of the two sixteens of a group, each in all lanes."""
    d = load_f16(block + 208)
    scales = block + 192 + 2 * group
    return splat_f32(d * load_i8_as_f32(scales)), splat_f32(d * load_i8_as_f32(scales + 1))


@inline
def _q6_k_scale(block, group):
    """Scales of the two sixteens of a group, four lanes each: as the products of `dot_i8` lie."""
    d = load_f16(block + 208)
    scales = block + 192 + 2 * group
    return splat_halves(d * load_i8_as_f32(scales), d * load_i8_as_f32(scales + 1))


@inline
def _dot_q6_k(row, codes, scale, columns):
    acc = splat_f32(np.float32(0))
    zero = zero_i32x8()
    for _ in range(columns // 256):
        for group in range(8):
            products = dot_i8(zero, _q6_k_codes(row, group), load_i8x32(codes))
            acc = fma(to_f32(products), mul(_q6_k_scale(row, group), splat_f32(load_f32(scale))), acc)
            codes += 32
            scale += 4
        row += 210
    return total(acc)


@inline
def dot_float(qtype, row, x, columns):
    """`dot_row` of a float type: F32, F16 or BF16."""
    a = splat_f32(np.float32(0))
    b = splat_f32(np.float32(0))
    size = 4 if qtype == F32 else 2
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
def unpack_row(qtype, row, codes, d, m, columns):
    """A row of a quantised type as codes and scales, for products with many columns (`dot_unpacked`).

    Parameters
    ----------
    qtype, row, columns : as in `dot_row`
    codes : int
        Out: address of int8 (columns,).
    d : int
        Out: address of float32 (columns // 32, 8): the scale of the first sixteen weights four times, then of the last.
    m : int
        Out: address of float32 (columns // 32,); written only by types with a minimum (`has_minimum`).
    """
    for block in range(columns // 32):
        if qtype == Q6_K:
            start = row + block // 8 * 210
            unpacked = _q6_k_codes(start, block % 8)
            store_f32x8(d + 32 * block, _q6_k_scale(start, block % 8))
        elif qtype == Q8_0:
            start = row + block * 34
            unpacked = load_i8x32(start + 2)
            store_f32x8(d + 32 * block, splat_f32(load_f16(start)))
        elif qtype == Q4_0:
            start = row + block * 18
            unpacked = subtract_i8(_nibbles(start + 2), 8)
            store_f32x8(d + 32 * block, splat_f32(load_f16(start)))
        else:
            start = row + block * 20
            unpacked = _nibbles(start + 4)
            store_f32x8(d + 32 * block, splat_f32(load_f16(start)))
            store_f32(m + 4 * block, load_f16(start + 2))
        store_i8x32(codes + 32 * block, unpacked)


@inline
def has_minimum(qtype):
    """Whether blocks have a minimum beside their scale."""
    return qtype == Q4_1


@inline
def dot_unpacked(w_codes, d, m, minimum, codes, scale, sums, columns):
    """An unpacked row times one activation vector, float32; `minimum` tells whether `m` counts."""
    acc = splat_f32(np.float32(0))
    zero = zero_i32x8()
    for block in range(columns // 32):
        products = dot_i8(zero, load_i8x32(w_codes + 32 * block), load_i8x32(codes + 32 * block))
        weight = mul(load_f32x8(d + 32 * block), splat_f32(load_f32(scale + 4 * block)))
        acc = fma(to_f32(products), weight, acc)
    result = total(acc)
    if minimum:
        for block in range(columns // 32):
            result += load_f32(m + 4 * block) * load_f32(sums + 4 * block)
    return result


@inline
def dequantise_row(qtype, row, out, columns):
    """A row of any type, of weights or of the cache, as float32 at `out`; all three are addresses or sizes."""
    if is_float(qtype):
        size = 4 if qtype == F32 else 2
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
                store_i8x32(codes, subtract_i8(_nibbles(start + 2), 8))
                low = high = splat_f32(load_f16(start))
            else:
                start = row + 20 * block
                store_i8x32(codes, _nibbles(start + 4))
                low = high = splat_f32(load_f16(start))
                minimum = splat_f32(load_f16(start + 2))
        for i in range(2):
            store_f32x8(out + 32 * i, fma(load_i8_as_f32x8(codes + 8 * i), low, minimum))
        for i in range(2, 4):
            store_f32x8(out + 32 * i, fma(load_i8_as_f32x8(codes + 8 * i), high, minimum))
        out += 128


@inline
def write_row(qtype, x, row, columns):
    """Float32 values at `x` as a row of a cache type: F32, F16, BF16 or Q8_0. Same bytes as ``reference.quant.quantise``."""
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
    largest = np.float32(0)
    for i in range(32):
        largest = max(largest, abs(load_f32(x + 4 * i)))
    d = largest / np.float32(127)
    inverse = np.float32(0)
    if d > 0:
        inverse = np.float32(1) / d
    store_f16(block, d)
    for i in range(32):
        scaled = load_f32(x + 4 * i) * inverse
        # ggml rounds halves away from zero.
        rounded = np.floor(abs(scaled) + np.float32(0.5))
        store_i8(block + 2 + i, np.int8(rounded if scaled >= 0 else -rounded))
