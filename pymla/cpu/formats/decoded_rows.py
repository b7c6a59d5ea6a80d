"""Rows of types that can be decoded, times the activations of one token (gemv)."""

import numpy as np

from pymla.cpu.formats.decoder import REGISTER, REGISTERS, no_minima
from pymla.cpu.machine.simd import (
    fma,
    load_f32,
    load_f32x8,
    load_i8x32,
    load_i8xL,
    load_i16,
    mul,
    splat_f32,
    splat_f32xL,
    total,
    totals,
)
from pymla.cpu.machine.simd_512 import (
    halve,
    halves_of_blocks,
    spread_pairs,
    times_integers,
    twice_in_quarters,
    zero_f32x16,
)
from pymla.cpu.machine.simd_bytes import dot_i8, dot_i16, load_i16x16, to_f32, zero_i32x8
from pymla.cpu.machine.simd_decoded import (
    dot_signed_codes,
    dot_unsigned,
    folded_products,
    load_f32x8_pairs,
    load_i16_as_f32,
    splat_fours,
    splat_quarters,
    spread_16,
    spread_32,
    with_aligned_stack,
)
from pymla.cpu.machine.simd_panels import finish8
from pymla.cpu.machine.simd_words import zero_words
from pymla.cpu.memory import fetch_ahead
from pymla.cpu.runtime.compiling import helper, inlined
from pymla.cpu.runtime.isa import LANES


def dot_four_for(decoder):
    """Make `dot_four`."""
    header, nbytes = decoder.header, decoder.nbytes
    (look_up, add_first, add_second), rest = _add_256_of_two_for(decoder), _rest_for(decoder)
    inputs, begin, finish = _inputs_for(decoder), _begin_for(decoder), _finish_for(decoder)

    if LANES == 16:

        @inlined
        def whole(rows, activations, columns):
            """Four rows at a time, so that activations are loaded once."""
            a, b, c, d = rows
            at, bt, ct, dt = a + header, b + header, c + header, d + header
            _, codes, scale, sums, _, sum16 = activations
            codes = with_aligned_stack(codes)
            acc, acc_b, acc_c, acc_d = begin(), begin(), begin(), begin()
            for _ in range(columns // 256):
                x = inputs(scale, sums, sum16)
                found, found_cd = look_up(at, bt, ct, dt)
                acc = add_first(a, at, found, codes, x, acc)
                acc_b = add_second(b, bt, found, codes, x, acc_b)
                acc_c = add_first(c, ct, found_cd, codes, x, acc_c)
                acc_d = add_second(d, dt, found_cd, codes, x, acc_d)
                at, bt, ct, dt = at + nbytes, bt + nbytes, ct + nbytes, dt + nbytes
                codes, scale, sums, sum16 = codes + 256, scale + 32, sums + 32, sum16 + 32
            return totals(finish(acc), finish(acc_b), finish(acc_c), finish(acc_d))

    else:

        @helper
        def one(row, activations, columns):
            _, codes, scale, sums, _, sum16 = activations
            at, acc = row + header, begin()
            for _ in range(columns // 256):
                acc = add_first(row, at, 0, codes, inputs(scale, sums, sum16), acc)
                at, codes, scale, sums, sum16 = at + nbytes, codes + 256, scale + 32, sums + 32, sum16 + 32
            return total(finish(acc))

        @inlined
        def whole(rows, activations, columns):
            """The four rows follow each other: there are too few registers for more than one."""
            a, b, c, d = rows
            return (
                one(a, activations, columns),
                one(b, activations, columns),
                one(c, activations, columns),
                one(d, activations, columns),
            )

    if not decoder.has_rest:
        return whole

    @inlined
    def dot_four(rows, activations, columns):
        a, b, c, d = whole(rows, activations, columns)
        if columns % 256:
            a += rest(rows[0], activations, columns)
            b += rest(rows[1], activations, columns)
            c += rest(rows[2], activations, columns)
            d += rest(rows[3], activations, columns)
        return a, b, c, d

    return dot_four


def dot_tokens_for(decoder):
    """Make `dot_tokens`; None where registers have 32 bytes, or where rows are decoded together."""
    if LANES != 16 or decoder.together is not None:
        return None
    header, nbytes = decoder.header, decoder.nbytes
    _, add, _ = _add_256_of_two_for(decoder)
    inputs, begin, finish, rest = _inputs_for(decoder), _begin_for(decoder), _finish_for(decoder), _rest_for(decoder)
    has_rest = decoder.has_rest

    @inlined
    def add_of_token(row, at, token, i, acc):
        """Add the products of 256 weights with the i-th 256 activations of a token."""
        _, codes, scale, sums, _, sum16 = token
        return add(row, at, 0, codes + 256 * i, inputs(scale + 32 * i, sums + 32 * i, sum16 + 32 * i), acc)

    @inlined
    def dot_tokens(row, tokens, columns):
        """What is said of the row for each token is done once: the compiler sees that it is the same."""
        a, b, c, d = tokens
        acc_a, acc_b, acc_c, acc_d = begin(), begin(), begin(), begin()
        at = row + header
        for i in range(columns // 256):
            acc_a = add_of_token(row, at, a, i, acc_a)
            acc_b = add_of_token(row, at, b, i, acc_b)
            acc_c = add_of_token(row, at, c, i, acc_c)
            acc_d = add_of_token(row, at, d, i, acc_d)
            at += nbytes
        first, second, third, fourth = totals(finish(acc_a), finish(acc_b), finish(acc_c), finish(acc_d))
        if has_rest and columns % 256:
            first += rest(row, a, columns)
            second += rest(row, b, columns)
            third += rest(row, c, columns)
            fourth += rest(row, d, columns)
        return first, second, third, fourth

    return dot_tokens


def _needs_sums(decoder):
    """Whether products take the sums of activations: for minima, or for what codes in registers are too large."""
    return decoder.load_minima is not None or decoder.moved_scales is not None or decoder.offset != 0


def _inputs_for(decoder):
    """Make a function that loads the scales of 256 activations, and the sums of those of each small block."""
    if decoder.integers is not None:

        @inlined
        def inputs(scale, sums, sum16):
            return load_f32x8(scale), load_i16x16(sum16)

    elif decoder.each == 32:

        @inlined
        def inputs(scale, sums, sum16):
            return load_f32x8(scale), load_f32x8(sums)

    else:

        @inlined
        def inputs(scale, sums, sum16):
            s = load_f32x8_pairs(scale)
            return s, mul(load_i16_as_f32(sum16), s)

    return inputs


def _begin_for(decoder):
    """Make a function that gives the sums to begin with: of products, and of minima or offsets."""
    zero = np.float32(0)
    if decoder.each == 32 or decoder.integers is not None:

        @inlined
        def begin():
            return splat_f32xL(zero), splat_f32(zero)

    else:

        @inlined
        def begin():
            return splat_f32xL(zero), zero_f32x16()

    return begin


def _finish_for(decoder):
    """Make a function that gives eight numbers whose sum is the result."""
    is_whole = decoder.load_minima is not None or decoder.moved_scales is not None
    factor, needs_sums = np.float32(1 if is_whole else -decoder.offset), _needs_sums(decoder)
    if decoder.integers is not None and decoder.load_minima is not None:
        factor = np.float32(-1)  # integers are what is taken off
    if decoder.each == 32 or decoder.integers is not None:

        @inlined
        def finish(acc):
            products, sums = acc
            products = folded_products(products)
            return fma(sums, splat_f32(factor), products) if needs_sums else products

    else:

        @inlined
        def finish(acc):
            products, sums = acc
            products = folded_products(products)
            return fma(halve(sums), splat_f32(factor), products) if needs_sums else products

    return finish


def _add_256_of_two_for(decoder):
    """Make `Together.look_up`, and the functions of `_add_256_for` for the first and the second of two rows."""
    if decoder.together is None:
        add_256 = _add_256_for(decoder, _load_eights_for(decoder) if decoder.load_eights is not None else None)
        return _look_up_nothing, add_256, add_256
    look_up, (load_first, load_second) = decoder.together
    return look_up, _add_256_for(decoder, load_first), _add_256_for(decoder, load_second)


@inlined
def _look_up_nothing(a, b, c, d):
    """Stands for `Together.look_up` of types whose rows are not decoded together."""
    return 0, 0


def _load_eights_for(decoder):
    """Make `Together.load_eights` for types whose rows are not decoded together."""
    load_eights = decoder.load_eights

    @inlined
    def load(found, address):
        return load_eights(address, 0), load_eights(address, 1), load_eights(address, 2), load_eights(address, 3)

    return load


def _add_256_for(decoder, load):
    """Make a function ``(row, address, found, codes, x, acc)`` that adds the products of 256 weights of a row, whose
    blocks begin at `address`. `load` is one of `Together.load_eights`, which takes `found`; None: registers are in the
    order of the columns."""
    if decoder.integers is not None:
        return _add_integers_for(decoder, load)
    load_scales, load_minima = decoder.load_scales, decoder.load_minima or no_minima
    has_minima, needs_sums = decoder.load_minima is not None, _needs_sums(decoder)
    nbytes, add_products = decoder.nbytes, _add_eights_for(decoder, load) if load else _add_products_for(decoder)
    has_variants, moved_scales = decoder.moved_scales is not None, decoder.moved_scales or _not_moved

    @inlined
    def add_256(row, address, found, codes, x, acc):
        fetch_ahead(address, nbytes)
        s, m = x
        products, sums = acc
        scales = load_scales(row, address)
        if has_minima:
            sums = fma(load_minima(address), m, sums)
        elif has_variants:
            sums = fma(moved_scales(scales, address), m, sums)
        elif needs_sums:
            sums = fma(scales, m, sums)
        return add_products(address, found, codes, mul(scales, s), products), sums

    return add_256


@inlined
def _not_moved(scales, address):
    """Stands for `moved_scales` of a type without variants, where no branch that is left calls it."""
    return scales


def _add_products_for(decoder):
    """Make a function ``(address, found, codes, factor, products)``: add the products of 256 weights to lanes of
    `products`, with a factor for each small block."""
    load_codes, spread = decoder.load_codes, spread_32 if decoder.each == 32 else spread_16
    dot = dot_signed_codes if decoder.lowest + decoder.offset < 0 else dot_unsigned

    @inlined
    def add_products(address, found, codes, factor, products):
        zero = zero_words()
        dots = dot(zero, load_codes(address, 0), load_i8xL(codes))
        products = fma(finish8(dots), spread(factor, 0), products)
        dots = dot(zero, load_codes(address, 1), load_i8xL(codes + REGISTER))
        products = fma(finish8(dots), spread(factor, 1), products)
        dots = dot(zero, load_codes(address, 2), load_i8xL(codes + 2 * REGISTER))
        products = fma(finish8(dots), spread(factor, 2), products)
        dots = dot(zero, load_codes(address, 3), load_i8xL(codes + 3 * REGISTER))
        products = fma(finish8(dots), spread(factor, 3), products)
        if REGISTERS == 8:
            dots = dot(zero, load_codes(address, 4), load_i8xL(codes + 4 * REGISTER))
            products = fma(finish8(dots), spread(factor, 4), products)
            dots = dot(zero, load_codes(address, 5), load_i8xL(codes + 5 * REGISTER))
            products = fma(finish8(dots), spread(factor, 5), products)
            dots = dot(zero, load_codes(address, 6), load_i8xL(codes + 6 * REGISTER))
            products = fma(finish8(dots), spread(factor, 6), products)
            dots = dot(zero, load_codes(address, 7), load_i8xL(codes + 7 * REGISTER))
            products = fma(finish8(dots), spread(factor, 7), products)
        return products

    return add_products


def _add_eights_for(decoder, load):
    """`_add_products_for` of registers that have eight codes of each of eight blocks: a lane has a block's products
    from all four registers, or where small blocks have 16 weights from two of them."""
    in_halves = decoder.each == 16

    @inlined
    def add_products(address, found, codes, factor, products):
        a, b, c, d = load(found, address)
        dots = dot_unsigned(zero_words(), a, load_i8xL(codes))
        dots = dot_unsigned(dots, c, load_i8xL(codes + 128))
        if in_halves:
            products = fma(finish8(dots), halves_of_blocks(factor, 0), products)
            dots = zero_words()
        dots = dot_unsigned(dots, b, load_i8xL(codes + 64))
        dots = dot_unsigned(dots, d, load_i8xL(codes + 192))
        return fma(finish8(dots), halves_of_blocks(factor, 1) if in_halves else spread_pairs(factor), products)

    return add_products


def _add_integers_for(decoder, load):
    """`_add_256_for` of types whose small blocks have integer scales, in registers of the order `EIGHTS`."""
    nbytes = decoder.nbytes
    load_scales, load_unit, load_minima, load_minimum_unit = decoder.integers
    has_minima, needs_sums = load_minima is not None, _needs_sums(decoder)
    load_minima, load_minimum_unit = load_minima or load_scales, load_minimum_unit or load_unit

    @inlined
    def add_256(row, address, found, codes, x, acc):
        fetch_ahead(address, nbytes)
        s, sum16 = x
        products, sums = acc
        scales, factor = load_scales(address), mul(load_unit(address), s)
        if has_minima:
            sums = fma(to_f32(dot_i16(load_minima(address), sum16)), mul(load_minimum_unit(address), s), sums)
        elif needs_sums:
            sums = fma(to_f32(dot_i16(scales, sum16)), factor, sums)
        a, b, c, d = load(found, address)
        first = dot_unsigned(zero_words(), a, load_i8xL(codes))
        first = dot_unsigned(first, c, load_i8xL(codes + 128))
        second = dot_unsigned(zero_words(), b, load_i8xL(codes + 64))
        second = dot_unsigned(second, d, load_i8xL(codes + 192))
        dots = times_integers(first, second, scales)
        return fma(finish8(dots), twice_in_quarters(factor), products), sums

    return add_256


def _rest_for(decoder):
    """Make a function for the blocks of a row behind the last 256 columns, of types with smaller blocks."""
    header, load_codes_32, load_scale = decoder.header, decoder.load_codes_32, decoder.load_scale
    in_fours, nbytes = decoder.load_fours is not None, decoder.nbytes
    dot_fours = _dot_fours_for(decoder) if in_fours else _no_fours

    @helper
    def rest(row, activations, columns):
        _, codes, scale, _, _, sum16 = activations
        acc, result, first = splat_f32(np.float32(0)), np.float32(0), columns // 256 * 8
        if in_fours and columns % 256 >= 128:
            result = dot_fours(row, row + header + first // 8 * nbytes, first, codes, scale, sum16)
            first += 4
        for block in range(first, columns // 32):
            low, high = load_scale(row, row + header, block)
            s = load_f32(scale + 4 * block)
            weights = load_codes_32(row + header, block)
            products = dot_i8(zero_i32x8(), weights, load_i8x32(codes + 32 * block))
            acc = fma(to_f32(products), splat_fours(low * s, high * s), acc)
        return result + total(acc)

    return rest


@inlined
def _no_fours(row, address, first, codes, scale, sum16):
    """Stands for the function of `_dot_fours_for` where no branch that is left calls it."""
    return np.float32(0)


def _dot_fours_for(decoder):
    """Make a function for four blocks of a row, from block `first` on, of which registers have sixteen codes each
    (`FOURS`). `address` is that of the blocks."""
    header, load_fours, load_scale = decoder.header, decoder.load_fours, decoder.load_scale
    offset = np.float32(decoder.offset)

    @inlined
    def scales_of(row, block, codes, scale, sum16):
        """Of a block: the scales of its halves times that of the activations, and what is taken off its products."""
        low, high = load_scale(row, row + header, block)
        s = load_f32(scale + 4 * block)
        low, high = low * s, high * s
        sums = np.float32(load_i16(sum16 + 4 * block)), np.float32(load_i16(sum16 + 4 * block + 2))
        return low, high, offset * (low * sums[0] + high * sums[1])

    @inlined
    def dot_fours(row, address, first, codes, scale, sum16):
        a, a_high, off_a = scales_of(row, first, codes, scale, sum16)
        b, b_high, off_b = scales_of(row, first + 1, codes, scale, sum16)
        c, c_high, off_c = scales_of(row, first + 2, codes, scale, sum16)
        d, d_high, off_d = scales_of(row, first + 3, codes, scale, sum16)
        at = codes + 32 * first
        dots = dot_unsigned(zero_words(), load_fours(address, 0), load_i8xL(at))
        products = mul(finish8(dots), splat_quarters(a, b, c, d))
        dots = dot_unsigned(zero_words(), load_fours(address, 1), load_i8xL(at + 64))
        products = fma(finish8(dots), splat_quarters(a_high, b_high, c_high, d_high), products)
        return total(products) - (off_a + off_b + off_c + off_d)

    return dot_fours
