"""What `pymla.cuda.machine.ptx` says that instructions do, and the simulator around it, without a GPU.

The layouts of fragments are written out here once more, element by element, as the PTX ISA gives them (sections "Matrix
Fragments for mma.m16n8k32" and "mma.m16n8k16", "ldmatrix").
"""

import re

import numpy as np
import pytest
import simulated  # noqa: F401
from numba import cuda, types

from pymla.cuda import available, describe, memory
from pymla.cuda.graph import Graph
from pymla.cuda.machine import ptx
from pymla.cuda.machine.ptx import warps
from pymla.cuda.machine.ptx.instruction import word_of
from pymla.cuda.runtime.jit import KERNELS, device, kernel
from pymla.errors import PymlaError

F1 = types.Array(types.float32, 1, "C")
F2 = types.Array(types.float32, 2, "C")
I1 = types.Array(types.int32, 1, "C")
I2 = types.Array(types.int32, 2, "C")
RNG = np.random.default_rng(0)


def of_warp(function, *columns, results=1, dtype=np.int32):
    """What the 32 lanes get from a function, given a value each: (32, results)."""
    out = memory.empty((32, results), dtype)
    columns = [np.asarray(column).tolist() for column in columns]
    kind = np.float32 if columns and isinstance(columns[0][0], float) else int

    def body(out):
        lane = cuda.threadIdx.x
        value = function(*(kind(column[lane]) for column in columns))
        for i, each in enumerate(value if isinstance(value, tuple) else (value,)):
            out[lane, i] = each

    run_kernel(body, (types.Array(types.int32 if dtype == np.int32 else types.float32, 2, "C"),), 32, out)
    return memory.to_host(out)


def run_kernel(body, signature, threads, *arguments, blocks=1, shared_bytes=0):
    """Launch a function as a kernel that nobody else sees."""
    made = kernel(*signature, variant="test")(body)
    del KERNELS[made.__name__]
    made[blocks, threads, shared_bytes](*arguments)


def random_words(*shape):
    return RNG.integers(-(2**31), 2**31, shape, dtype=np.int64)


def as_bytes(words, kind):
    return np.asarray(words).astype(np.int32).astype("<i4")[..., None].view(kind)


# Memory.


def test_loads_and_stores():
    raw = RNG.integers(0, 256, 64, dtype=np.uint8)
    x = memory.to_device(raw)
    at = x.address
    assert ptx.load_u8(at + 3) == raw[3]
    assert ptx.load_i8(at + 3) == raw.view(np.int8)[3]
    assert ptx.load_u16(at + 6) == raw.view("<u2")[3] == ptx.stream_u16(at + 6)
    assert ptx.load_i16(at + 6) == raw.view("<i2")[3]
    assert ptx.load_u32(at + 12) == raw.view("<i4")[3] == ptx.stream_u32(at + 12) == ptx.fresh_u32(at + 12)
    part = memory.to_device(raw[:6])
    assert ptx.load_u32_around(part.address + 4) == np.array([*raw[4:6], 0xFF, 0xFF], np.uint8).view("<i4")[0]
    assert ptx.load_u64(at + 8) == raw.view("<i8")[1]
    assert ptx.load_u32x2(at + 8) == tuple(raw.view("<i4")[2:4]) == ptx.stream_u32x2(at + 8)
    assert ptx.load_u32x4(at + 16) == tuple(raw.view("<i4")[4:8]) == ptx.stream_u32x4(at + 16)
    floats = memory.to_device(np.arange(8, dtype=np.float32))
    assert ptx.load_f32(floats.address + 4) == 1
    assert ptx.load_f32x2(floats.address + 8) == (2, 3)
    assert ptx.load_f32x4(floats.address + 16) == (4, 5, 6, 7) == ptx.fresh_f32x4(floats.address + 16)
    y = memory.empty(64, np.uint8)
    at = y.address
    ptx.store_u8(at, 0x1FF)
    ptx.store_u16(at + 2, -2)
    ptx.store_u32(at + 4, 0xFFFFFFFE)
    ptx.store_u32x2(at + 8, 1, -1)
    ptx.store_u32x4(at + 16, 1, 2, 3, 4)
    ptx.store_f32(at + 32, np.float32(0.5))
    ptx.store_f16(at + 36, np.float32(1.5))
    ptx.store_bf16(at + 38, np.float32(-2))
    ptx.store_f32x2(at + 40, np.float32(1), np.float32(2))
    ptx.store_f32x4(at + 48, *np.arange(4, dtype=np.float32))
    result = memory.to_host(y)
    assert result[:4].tolist() == [0xFF, 0xFF, 0xFE, 0xFF]
    assert result[4:32].view("<i4").tolist() == [-2, 1, -1, 1, 2, 3, 4]
    assert result[32:36].view("<f4") == 0.5
    assert result[40:64].view("<f4").tolist() == [1, 2, 0, 1, 2, 3]
    assert ptx.load_f16(at + 36) == 1.5
    assert ptx.load_bf16(at + 38) == -2


def test_tables():
    numbers = np.arange(40000, 40020, dtype=np.uint16).reshape(4, 5)
    address = ptx.table("test_numbers", lambda: numbers)
    assert address() == address()
    assert address() % 16 == 0
    assert [ptx.load_u16(address() + 2 * i) for i in range(20)] == numbers.reshape(-1).tolist()


def test_wrong_addresses():
    x = memory.empty(16, np.uint8)
    with pytest.raises(IndexError, match="outside device memory: byte 16 of an array of 16"):
        ptx.load_u8(x.address + 16)
    with pytest.raises(IndexError, match="not aligned: byte 2"):
        ptx.load_u32(x.address + 2)
    at = x.address
    del x
    with pytest.raises(IndexError, match="outside"):
        ptx.load_u8(at)


def test_shared_memory():
    def body(out):
        words = cuda.shared.array(64, np.int32, alignment=16)
        floats = cuda.shared.array(4, np.float32, alignment=16)
        at = ptx.shared_address(words)
        if cuda.threadIdx.x == 0:
            ptx.store_shared_u32(at, 1)
            ptx.store_shared_u16(at + 4, 0x1FFFF)
            ptx.store_shared_u8(at + 6, 0)
            ptx.store_shared_u8(at + 7, 0)
            ptx.store_shared_u32x2(at + 8, 3, 4)
            ptx.store_shared_u32x4(at + 16, 5, 6, 7, 8)
            ptx.store_shared_u64(at + 32, -2 << 40)
            ptx.store_shared_u64(at + 40, 9)
            ptx.store_shared_f32x4(
                ptx.shared_address(floats), np.float32(1), np.float32(2), np.float32(3), np.float32(4)
            )
        cuda.syncthreads()
        i = cuda.threadIdx.x
        if i < 8:
            out[i] = words[i]
            assert ptx.load_shared_u32(at + 4 * i) == words[i]
        assert ptx.load_shared_u32x4(at + 16) == (5, 6, 7, 8)
        assert ptx.load_shared_u32x2(at + 8) == (3, 4)
        assert ptx.load_shared_u64x2(at + 32) == (-2 << 40, 9)
        assert ptx.load_shared_u16(at + 4) == 0xFFFF
        assert ptx.load_shared_u8(at + 8) == 3
        assert ptx.load_shared_f32(ptx.shared_address(floats) + 8) == 3
        assert ptx.load_shared_f32x4(ptx.shared_address(floats)) == (1, 2, 3, 4)
        assert words[63] == -1  # poison

    out = memory.empty(8, np.int32)
    run_kernel(body, (I1,), 64, out)
    assert memory.to_host(out).tolist() == [1, 0xFFFF, 3, 4, 5, 6, 7, 8]


def test_dynamic_shared_memory():
    def body(out):
        floats = cuda.shared.array(0, np.float32)
        floats[cuda.threadIdx.x] = np.float32(cuda.threadIdx.x)
        cuda.syncthreads()
        out[cuda.threadIdx.x] = floats[31 - cuda.threadIdx.x]
        assert len(floats) == 40

    out = memory.empty(32, np.float32)
    run_kernel(body, (F1,), 32, out, shared_bytes=160)
    assert memory.to_host(out).tolist() == list(range(31, -1, -1))


def test_asynchronous_copies_arrive_when_they_are_waited_for():
    x = memory.to_device(np.arange(12, dtype=np.int32))

    def body(address, out):
        words = cuda.shared.array(12, np.int32, alignment=16)
        at = ptx.shared_address(words)
        ptx.cp_async_16(at, address, 16)
        ptx.cp_async_commit()
        ptx.cp_async_16(at + 16, address + 16, 8)
        ptx.cp_async_16(at + 32, address + 32, 0)
        ptx.cp_async_commit()
        ptx.cp_async_wait(1)
        out[0] = words[3]
        out[1] = words[4]
        ptx.cp_async_wait(0)
        for i in range(4, 12):
            out[i - 2] = words[i]

    out = memory.empty(10, np.int32)
    run_kernel(body, (types.int64, I1), 1, x.address, out)
    assert memory.to_host(out).tolist() == [3, -1, 4, 5, 0, 0, 0, 0, 0, 0]


def test_asynchronous_copies_of_words():
    x = memory.to_device(np.arange(2, dtype=np.int32))

    def body(array, out):
        words = cuda.shared.array(4, np.int32, alignment=16)
        at, address = ptx.shared_address(words), ptx.global_address(array)
        ptx.cp_async_4(at, address + 4, 4)
        ptx.cp_async_4(at + 4, address, 0)
        ptx.cp_async_commit()
        assert words[0] == -1
        ptx.cp_async_wait(0)
        out[0], out[1] = words[0], words[1]

    out = memory.empty(2, np.int32)
    run_kernel(body, (I1, I1), 1, x, out)
    assert memory.to_host(out).tolist() == [1, 0]


def test_asynchronous_copies_reach_beyond_an_array():
    """The 16 bytes around its last ones, of which those behind are poison; other 16 bytes are an error."""
    x = memory.to_device(np.arange(18, dtype=np.uint8))

    def body(address, out):
        words = cuda.shared.array(4, np.int32, alignment=16)
        ptx.cp_async_16(ptx.shared_address(words), address, 16)
        ptx.cp_async_commit()
        ptx.cp_async_wait(0)
        for i in range(4):
            out[i] = words[i]

    out = memory.empty(4, np.int32)
    run_kernel(body, (types.int64, I1), 1, x.address + 16, out)
    assert memory.to_host(out).view(np.uint8).tolist() == [16, 17, *[255] * 14]
    for at in (-16, 32):
        with pytest.raises(IndexError, match="outside device memory"):
            run_kernel(body, (types.int64, I1), 1, x.address + at, out)


# Integers and floats.


def test_dot_products_of_bytes():
    for a, b, c in random_words(50, 3):
        signed, unsigned, right = as_bytes(a, "i1"), as_bytes(a, "u1"), as_bytes(b, "i1").astype(int)
        assert ptx.dp4a(a, b, c) == np.int64(c + signed.astype(int) @ right).astype(np.int32)
        assert ptx.dp4a_us(a, b, c) == np.int64(c + unsigned.astype(int) @ right).astype(np.int32)


def test_bytes_and_bits():
    assert ptx.prmt(0x33221100, 0x77665544, 0x7410) == 0x77441100
    assert (
        ptx.prmt(0x000080FF, 0, 0x0098) == 0xFFFFFFFF - 2**32 & ~0xFFFF0000 | ptx.prmt(0xFF, 0, 0) & 0xFFFF0000 - 2**32
    )
    assert [ptx.valid_index(i, 5) for i in (0, 4, 5, 2**31 - 1, -1, -(2**31))] == [0, 4, 4, 4, 4, 4]
    assert ptx.funnel_shift_r(0x33221100, 0x77665544, 8) == 0x44332211
    assert ptx.funnel_shift_r(0x33221100, 0x77665544, 40) == 0x44332211
    assert ptx.as_word(np.float32(1)) == 0x3F800000
    assert ptx.as_f32(0x3F800000) == 1


def test_conversions():
    for x in np.float32([0, 1, -2.5, 65504, 1e-7, 0.1, np.inf, -np.inf]):
        assert ptx.f16_value(ptx.f16_bits(x)) == np.float16(x)
    assert np.isnan(ptx.f16_value(ptx.f16_bits(np.float32(np.nan))))
    # Ties go to the even number.
    assert ptx.bf16_bits(ptx.as_f32(0x3F808000)) == 0x3F80
    assert ptx.bf16_bits(ptx.as_f32(0x3F818000)) == 0x3F82
    assert ptx.bf16_bits(ptx.as_f32(0x3F808001)) == 0x3F81
    assert np.isnan(ptx.bf16_value(ptx.bf16_bits(np.float32(np.nan))))
    word = ptx.pack_f16x2(np.float32(1.5), np.float32(-2))
    assert ptx.unpack_f16x2(word) == (1.5, -2)
    assert word & 0xFFFF == ptx.f16_bits(np.float32(1.5))
    word = ptx.pack_bf16x2(np.float32(1.5), np.float32(-2))
    assert ptx.unpack_bf16x2(word) == (1.5, -2)
    three, four, five = (ptx.pack_f16x2(np.float32(x), np.float32(-x)) for x in (3, 4, 5))
    assert ptx.unpack_f16x2(ptx.fma_f16x2(three, four, five)) == (17, 7)
    three, four, five = (ptx.pack_bf16x2(np.float32(x), np.float32(-x)) for x in (3, 4, 5))
    assert ptx.unpack_bf16x2(ptx.fma_bf16x2(three, four, five)) == (17, 7)
    assert [ptx.nearest_int(np.float32(x)) for x in (0.5, 1.5, -2.5, 3e9, -3e9, np.nan)] == [
        0,
        2,
        -2,
        2**31 - 1,
        -(2**31),
        0,
    ]
    assert ptx.to_f32(2**24 + 1) == 2**24


def test_functions():
    for x in np.float32([0.5, 1, 3, 10]):
        assert ptx.exp2(x) == pytest.approx(2.0**x, rel=1e-6)
        assert ptx.log2(x) == pytest.approx(np.log2(x), abs=1e-6)
        assert ptx.rcp(x) == pytest.approx(1 / x, rel=1e-6)
        assert ptx.rsqrt(x) == pytest.approx(x**-0.5, rel=1e-6)
        assert ptx.sqrt(x) == np.sqrt(x)
        assert ptx.div(x, np.float32(3)) == x / np.float32(3)
    assert ptx.exp2(np.float32(-np.inf)) == 0 == ptx.exp2(np.float32(-140))
    assert ptx.fma(np.float32(1 + 2**-12), np.float32(1 + 2**-12), np.float32(-1)) == 2**-11 + 2**-24
    assert ptx.fmax(np.float32(np.nan), np.float32(1)) == 1 == ptx.fmin(np.float32(1), np.float32(2))
    with pytest.raises(TypeError, match="expected float32, got float"):
        ptx.exp2(0.5)


# Warps.


def test_shuffles():
    values, sources = random_words(32), RNG.integers(0, 32, 32)
    np.testing.assert_array_equal(
        of_warp(lambda x: ptx.shfl_xor(x, 5), values)[:, 0], values.astype(np.int32)[np.arange(32) ^ 5]
    )
    np.testing.assert_array_equal(of_warp(ptx.shfl_idx, values, sources)[:, 0], values.astype(np.int32)[sources])
    floats = RNG.standard_normal(32).astype(np.float32)
    actual = of_warp(lambda x: ptx.shfl_xor(x, 16), floats, dtype=np.float32)[:, 0]
    np.testing.assert_array_equal(actual, np.roll(floats, 16))


def test_reductions():
    floats = RNG.standard_normal(32).astype(np.float32)
    np.testing.assert_allclose(of_warp(ptx.warp_sum, floats, dtype=np.float32)[:, 0], floats.sum(), rtol=1e-5)
    np.testing.assert_array_equal(of_warp(ptx.warp_max, floats, dtype=np.float32)[:, 0], floats.max())
    values = RNG.integers(-100, 100, 32)
    np.testing.assert_array_equal(of_warp(ptx.warp_sum, values)[:, 0], values.sum())
    actual = of_warp(lambda x: ptx.group_sum(x, 8), values)[:, 0]
    np.testing.assert_array_equal(actual, np.repeat(values.reshape(4, 8).sum(1), 8))
    actual = of_warp(lambda x: ptx.group_max(x, 4), values)[:, 0]
    np.testing.assert_array_equal(actual, np.repeat(values.reshape(8, 4).max(1), 4))


@pytest.mark.parametrize("width", [1, 2, 4, 8, 16, 32])
def test_reductions_are_those_by_shuffles(width):
    """The functions that are compiled give the bits that the simulator's give."""
    floats, values = RNG.standard_normal(32).astype(np.float32), random_words(32)
    for together, by_shuffles in (
        (ptx.group_sum, warps.sum_by_shuffles),
        (ptx.group_max, warps.max_by_shuffles),
    ):
        actual = of_warp(lambda x, reduce=together: reduce(x, width), floats, dtype=np.float32)
        expected = of_warp(lambda x, reduce=by_shuffles: reduce(x, width), floats, dtype=np.float32)
        np.testing.assert_array_equal(actual, expected)
        actual = of_warp(lambda x, reduce=together: word_of(reduce(x, width)), values)
        expected = of_warp(lambda x, reduce=by_shuffles: word_of(reduce(x, width)), values)
        np.testing.assert_array_equal(actual, expected)


def test_ballot_and_lane():
    ballots = of_warp(lambda x: ptx.ballot(x % 3 == 0), np.arange(32))[:, 0]
    assert set(ballots.view(np.uint32)) == {sum(1 << i for i in range(0, 32, 3))}
    np.testing.assert_array_equal(of_warp(lambda x: ptx.lane(), np.arange(32))[:, 0], np.arange(32))


def test_warps_of_a_block_are_apart():
    def body(out):
        i = cuda.threadIdx.x
        if i < 64:  # a condition that holds for whole warps
            out[i] = ptx.warp_sum(i)

    out = memory.zeros(96, np.int32)
    run_kernel(body, (I1,), 96, out)
    expected = np.concatenate([np.full(32, sum(range(32))), np.full(32, sum(range(32, 64))), np.zeros(32)])
    np.testing.assert_array_equal(memory.to_host(out), expected)


def test_diverged_warps_are_errors():
    def waits_for_ever():
        if cuda.threadIdx.x < 16:
            ptx.syncwarp()
        else:
            cuda.syncthreads()

    with pytest.raises(RuntimeError, match="0–15 wait in syncwarp; 16–31 wait in syncthreads"):
        run_kernel(waits_for_ever, (), 32)

    def ends_early():
        if cuda.threadIdx.x != 7:
            ptx.warp_sum(1)

    with pytest.raises(RuntimeError, match="0–6, 8–31 wait in group_sum; 7 have ended"):
        run_kernel(ends_early, (), 32)

    def differs():
        if cuda.threadIdx.x < 16:
            ptx.warp_sum(1)
        else:
            ptx.syncwarp()

    with pytest.raises(RuntimeError, match="comes to syncwarp, and lanes 0–15 of its warp wait in group_sum"):
        run_kernel(differs, (), 32)
    with pytest.raises(RuntimeError, match="whole warps"):
        run_kernel(lambda: ptx.syncwarp(), (), 48)


# Tensor cores.


def pack(elements):
    """Little-endian elements of a register as a word."""
    return int(np.array(elements).view("<i4")[0])


def c_index(lane, i):
    return (lane >> 2) + 8 * (i >> 1), 2 * (lane & 3) + (i & 1)


@pytest.mark.parametrize(("function", "kind"), [(ptx.mma_s8, np.int8), (ptx.mma_u8, np.uint8)])
def test_mma_of_bytes(function, kind):
    limits = np.iinfo(kind)
    a = RNG.integers(limits.min, limits.max + 1, (16, 32)).astype(kind)
    b = RNG.integers(-128, 128, (32, 8)).astype(np.int8)
    c = RNG.integers(-(2**20), 2**20, (16, 8)).astype(np.int32)
    words = np.zeros((32, 10), np.int64)
    for lane in range(32):
        group, member = lane >> 2, lane & 3
        for register in range(4):
            # PTX ISA: row = groupID for a_i with i < 4 or 8 <= i < 12; column = member * 4 + (i & 3), + 16 for i >= 8.
            numbers = range(4 * register, 4 * register + 4)
            rows = [group if i < 4 or 8 <= i < 12 else group + 8 for i in numbers]
            columns = [4 * member + (i & 3) + (16 if i >= 8 else 0) for i in numbers]
            words[lane, register] = pack(a[rows, columns])
        for register in range(2):
            numbers = range(4 * register, 4 * register + 4)
            rows = [4 * member + (i & 3) + (16 if i >= 4 else 0) for i in numbers]
            words[lane, 4 + register] = pack(b[rows, group])
        words[lane, 6:] = [c[c_index(lane, i)] for i in range(4)]
    result = of_warp(function, *words.T, results=4)
    expected = c + a.astype(np.int64) @ b.astype(np.int64)
    for lane in range(32):
        assert result[lane].tolist() == [expected[c_index(lane, i)] for i in range(4)]


def test_mma_of_16_columns():
    """Two of them are one of 32."""
    words = random_words(6, 32)

    def body(out):
        me = ptx.lane()
        a0, a1, a2, a3, b0, b1 = (int(each) for each in words[:, me])
        whole = ptx.mma_s8(a0, a1, a2, a3, b0, b1, 0, 1, 2, 3)
        first = ptx.mma_s8_k16(a0, a1, b0, 0, 1, 2, 3)
        assert ptx.mma_s8_k16(a2, a3, b1, *first) == whole
        out[me] = 1

    out = memory.empty(32, np.int32)
    run_kernel(body, (I1,), 32, out)
    assert (memory.to_host(out) == 1).all()


@pytest.mark.parametrize("name", ["mma_f16", "mma_bf16"])
def test_mma_of_halves(name):
    a, b, c = (RNG.standard_normal(shape).astype(np.float32) for shape in ((16, 16), (16, 8), (16, 8)))
    if name == "mma_f16":
        bits, value = (lambda x: x.astype(np.float16).view("<u2")), lambda x: x.view(np.float16).astype(np.float64)
    else:
        bits = lambda x: (x.view(np.uint32) >> 16).astype("<u2")  # noqa: E731
        value = lambda x: (x.astype(np.uint32) << 16).view(np.float32).astype(np.float64)  # noqa: E731
    a, b = bits(a), bits(b)
    words, sums = np.zeros((32, 6), np.int64), np.zeros((32, 4), np.float32)
    for lane in range(32):
        group, member = lane >> 2, lane & 3
        for register in range(4):
            # PTX ISA: row = groupID for a_i with i < 2 or 4 <= i < 6; column = member * 2 + (i & 1), + 8 for i >= 4.
            numbers = (2 * register, 2 * register + 1)
            rows = [group if i < 2 or 4 <= i < 6 else group + 8 for i in numbers]
            columns = [2 * member + (i & 1) + (8 if i >= 4 else 0) for i in numbers]
            words[lane, register] = pack(a[rows, columns])
        for register in range(2):
            numbers = (2 * register, 2 * register + 1)
            rows = [2 * member + (i & 1) + (8 if i >= 2 else 0) for i in numbers]
            words[lane, 4 + register] = pack(b[rows, group])
        sums[lane] = [c[c_index(lane, i)] for i in range(4)]
    out = memory.empty((32, 4), np.float32)

    def body(words, sums, out):
        lane = cuda.threadIdx.x
        value = getattr(ptx, name)(*(words[lane, i] for i in range(6)), *(sums[lane, i] for i in range(4)))
        for i in range(4):
            out[lane, i] = value[i]

    run_kernel(body, (I2, F2, F2), 32, memory.to_device(words.astype(np.int32)), memory.to_device(sums), out)
    expected = value(a) @ value(b) + c
    for lane in range(32):
        for i in range(4):
            assert memory.to_host(out)[lane, i] == pytest.approx(expected[c_index(lane, i)], rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix(count, transposed):
    halves = RNG.integers(0, 2**16, (count, 8, 8)).astype("<u2")
    data = memory.to_device(halves.reshape(-1).view("<i4").astype(np.int32))
    read = getattr(ptx, f"ldmatrix_x{count}" + ("_trans" if transposed else ""))
    out = memory.empty((32, count), np.int32)

    def body(data, out):
        lane = cuda.threadIdx.x
        # Rows are 48 bytes apart, in another order than their matrices'.
        words = cuda.shared.array(8 * 4 * 12, np.int32, alignment=16)
        row = (lane * 5) % (8 * count)
        if lane < 8 * count:
            for i in range(4):
                words[12 * row + i] = data[4 * lane + i]
        cuda.syncthreads()
        value = read(ptx.shared_address(words) + 48 * row)
        for i in range(count):
            out[lane, i] = value[i]

    run_kernel(body, (I1, I2), 32, data, out)
    for lane in range(32):
        for i in range(count):
            row, column = lane >> 2, 2 * (lane & 3)
            pair = halves[i, column : column + 2, row] if transposed else halves[i, row, column : column + 2]
            assert memory.to_host(out)[lane, i] == pack(pair)


# The simulator.


def test_order_of_threads_alternates():
    order = []
    run_kernel(lambda: order.append((cuda.blockIdx.x, cuda.threadIdx.x)), (), 3, blocks=2)
    assert order == [(0, 0), (0, 1), (0, 2), (1, 2), (1, 1), (1, 0)]


def test_shapes_and_atomics():
    @device
    def number():
        return cuda.grid(1)

    def body(out):
        assert cuda.gridDim.x == 3
        assert (cuda.blockDim.x, cuda.blockDim.y) == (2, 2)
        out[3 + number() % 1] = -1
        cuda.atomic.add(out, 0, 1)
        out[1] = cuda.syncthreads_count(cuda.threadIdx.x == 0)
        out[2] = cuda.syncthreads_or(cuda.threadIdx.x == 1) + cuda.syncthreads_and(cuda.threadIdx.y == 0)

    out = memory.zeros(4, np.int32)
    run_kernel(body, (I1,), (2, 2), out, blocks=(3, 1, 1))
    assert memory.to_host(out).tolist() == [12, 2, 1, -1]


def test_integers_in_kernels_are_wide():
    def body(x, out):
        out[0] = x[0] * x[0] >> 32  # int64, as for Numba
        out[1] = x[0] << 1  # and wrapped here

    out = memory.zeros(2, np.int32)
    run_kernel(body, (I1, I1), 1, memory.to_device(np.array([2**30], np.int32)), out)
    assert memory.to_host(out).tolist() == [2**28, -(2**31)]


def test_exceptions_name_the_thread():
    def body():
        cuda.syncthreads()
        if cuda.threadIdx.x == 2:
            raise ValueError("mistake")
        cuda.syncthreads()

    with pytest.raises(ValueError, match="mistake") as caught:
        run_kernel(body, (), 4)
    assert getattr(caught.value, "__notes__", ["thread (2, 0, 0)"])[0].endswith("thread (2, 0, 0)")


# Launches, memory, graphs.


def test_arguments():
    made = kernel(types.int32, F2, types.UniTuple(types.float32, 2), types.boolean, variant="arguments")(
        lambda *_: None
    )
    del KERNELS[made.__name__]
    x = memory.zeros((4, 6), np.float32)
    good = 1, x, (1, 2.5), True
    made[1, 1](*good)
    for position, wrong, message in (
        (0, 2**31, "2147483648 is no int32"),
        (0, 0.5, "0.5 is no int32"),
        (1, x[:, :2], "strides"),
        (1, x[0], "1 dimensions"),
        (1, np.zeros((4, 6), np.float32), "contiguous"),
        (2, (1,), "expected 2 values, got 1"),
    ):
        arguments = [wrong if i == position else each for i, each in enumerate(good)]
        with pytest.raises(TypeError, match=f"argument {position} of kernel .*{message}"):
            made[1, 1](*arguments)
    with pytest.raises(TypeError, match="takes 4 arguments, not 1"):
        made[1, 1](1)
    made[0, 1](*good)


def test_kernels_have_one_name_each():
    def twice():
        pass

    kernel(variant="q4_0")(twice)
    with pytest.raises(ValueError, match=re.escape("two kernels twice[q4_0]")):
        kernel(variant="q4_0")(twice)
    assert KERNELS.pop("twice[q4_0]").__doc__ is None


def test_device_arrays():
    host = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    x = memory.to_device(host)
    for index in (1, slice(1, 2), (slice(None), slice(1, 3)), (0, None), (Ellipsis, 2), (1, 2, 3), (slice(None), -1)):
        view = x[index]
        np.testing.assert_array_equal(memory.to_host(view), host[index])
        assert (view.shape, view.dtype) == (np.shape(host[index]), host.dtype)
        assert (
            view.address - x.address == (host[index].__array_interface__["data"][0] - host.ctypes.data)
            or view.ndim == 0
        )
    assert memory.to_host(x.reshape(6, -1)).shape == (6, 4)
    assert memory.to_host(x.view(np.int32)).dtype == np.int32
    assert (len(x), x.size, x.nbytes, x.ndim, x.strides) == (2, 24, 96, 3, (48, 16, 4))
    with pytest.raises(ValueError, match="cannot be reshaped"):
        x[:, :2].reshape(-1)
    with pytest.raises(TypeError, match="index of type ndarray"):
        x[np.array([0])]
    with pytest.raises(TypeError, match="to_host"):
        np.asarray(x)
    with pytest.raises(ValueError, match="does not fit"):
        memory.write(x, host[0])
    memory.write(x[0], 2 * host[0])
    np.testing.assert_array_equal(memory.to_host(x)[0], 2 * host[0])
    y = memory.empty((24,), np.float32)
    assert np.isnan(memory.to_host(y)).all()
    memory.copy(x, y)
    np.testing.assert_array_equal(memory.to_host(y), memory.to_host(x).reshape(-1))
    seen = []
    z = memory.to_device(host, lambda done, total: seen.append((done, total)))
    np.testing.assert_array_equal(memory.to_host(z), host)
    assert seen[-1] == (96, 96)
    assert memory.empty((0, 4), np.float32).size == 0
    assert memory.free_memory() > 0


def test_graph():
    def body(x):
        x[cuda.threadIdx.x] += np.float32(1)

    made = kernel(F1, variant="graph")(body)
    del KERNELS[made.__name__]
    x = memory.zeros(2, np.float32)

    def step():
        made[1, 2](x)
        return x

    graph = Graph(step)
    assert memory.to_host(graph.replay()).tolist() == [1, 1]
    assert memory.to_host(graph.replay()).tolist() == [2, 2]


def test_simulator_counts_as_a_device():
    assert available() == (True, "")
    assert describe()["capability"] == (8, 0)


def test_too_large_blocks():
    with pytest.raises(PymlaError, match="1025 threads"):
        run_kernel(lambda: None, (), 1025)
