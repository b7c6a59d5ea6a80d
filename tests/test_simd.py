"""Every operation on registers: its machine code against its NumPy function, bit for bit, at the level in use.

`test_isa` runs these tests at the other levels. All operations are compiled in one function, as calls of Numba are slow
to compile one by one. Each call has registers and memory of its own in an arena, from which both sides read and to
which both write.
"""

import inspect

import numba
import numpy as np
import pytest
from llvmlite import ir
from numba import types

from pymla.cpu.formats import fifth_bits
from pymla.cpu.machine import (
    simd,
    simd_512,
    simd_amx,
    simd_bytes,
    simd_decoded,
    simd_ordered,
    simd_panels,
    simd_quantise,
    simd_rows,
    simd_search,
    simd_words,
)
from pymla.cpu.machine.intrinsics import (
    LITERAL,
    OPERATIONS,
    Vector,
    f32x8,
    i8x32,
    i8xL,
    ir_type,
    operation,
    read,
    write,
)
from pymla.cpu.machine.lanes import fused, view
from pymla.cpu.runtime.isa import AMX, ISA, LANES, VNNI

MODULES = (
    simd,
    simd_512,
    simd_amx,
    simd_bytes,
    simd_decoded,
    simd_ordered,
    simd_panels,
    simd_quantise,
    simd_rows,
    simd_search,
    simd_words,
    fifth_bits,
)
#: Operations that are made for a type, of which tests/test_cpu_formats.py compiles those of every type, and
#: tests/test_simd_levels.py those of every table of levels.
OF_TYPES = tuple(
    f"pymla.cpu.machine.simd_{name}." for name in ("planes", "scales", "vectors", "trellis", "trits", "ik", "levels")
)
PACKAGE = {
    name: each for name, each in OPERATIONS.items() if name.startswith("pymla.") and not name.startswith(OF_TYPES)
}
#: Operations of the tiles, which need each other: `test_tiles`.
TILES = "configure", "release", "zero_tile", "load_tile", "store_tile", "dot_tiles", "dot_tiles_u8"
#: Sets of arguments for each call.
CASES = 24
#: Bytes of a call's registers and memory in the arena, of its registers, from one address to the next, and of a result.
SLOT, REGISTERS, APART, RESULT = 8192, 2048, 640, 1024

#: Types of the arguments of operations that take several.
ELEMENTWISE = {name: 3 * [f32x8] for name in ("fma", "add", "sub", "mul", "div", "larger", "farther", "where_positive")}
ELEMENTWISE |= {name: [f32x8] for name in ("absolute", "round_even", "round_away", "exp", "exp2")}
ELEMENTWISE |= {name: [f32x8] for name in ("total", "largest", "farthest")}
ELEMENTWISE |= {name: [i8x32, i8x32] for name in ("low_nibbles", "high_nibbles", "bit_or")}
ELEMENTWISE |= {"bits_2": [i8x32, types.int64], "subtract_i8": [i8x32, types.int64], "panel_codes8": [i8xL]}
ELEMENTWISE |= {"add_i8": [i8x32, types.int64]}

#: Literals of operations, of which each set is a call.
LITERALS = {"load_nibbles_f32": [(0,), (8,)], "load_quarters": [(18, 2), (20, 4), (34, 2), (34, 18)]}
LITERALS |= {"quarters": [(22, 6), (24, 8)], "fifth_bits_4": [(22, 6), (24, 8)], "halves_4": [(22,), (24,)]}
LITERALS |= {"add_fifth_bits_64": [(0,), (1,)], "load_pairs_4": [(22,), (24,)], "load_firsts": [(2,), (-3,)]}
LITERALS |= {"spread": [(0,), (1,)], "add_times": [(k,) for k in range(8)], "halves_of_blocks": [(0,), (1,)]}
LITERALS |= {name: [(0,), (1,), (64 // LANES - 1,)] for name in ("spread_32", "spread_16")}
LITERALS |= {"times_eighths": [(1,), (12,), (16,)]}
LITERALS |= {"unpack_codes": [(4,), (5,), (6,)]}

#: Arguments of int64 that are addresses; for the others, the numbers that they may be.
ADDRESSES = {"address", "target", "codes", "first", "second", "panel", "row", "factors", "sums"}
ADDRESSES |= {f"row_{i}" for i in range(4)} | set("abcd")
NUMBERS = {"stride": [18, 20, 34, 64], "factor_stride": [4, 12], "offset": [0, 2, 33], "value": [8, 32, 200]}
NUMBERS |= {"count": range(1, LANES + 4), "shift": [0, 2, 4, 6], "right": [0, 3, 31], "left": [0, 5, 31]}
NUMBERS |= {"bits": [1, 6, 40, 1 << 15, (1 << 16) - 1], "number": [-128, -4, 0, 97, 128]}
NUMBERS |= {"mask": [0x0F0F0F0F, 0xFFFFFFFF, 0x80000001]}

EDGES = np.array([0, -0.0, 0.5, 1.5, 2.5, -0.5, -2.5, 0.49999997, 1e-40, -1e-45, 3e38, -3e38, np.inf, -np.inf, np.nan])
EDGES = np.concatenate(
    [EDGES, [65504, 65519.996, 65520, 6e-8, 2.9e-8, 1 + 2**-11, 1 + 2**-8, 1 + 3 * 2**-9, 88.3, -87.4]]
)


def floats(rng, count):
    """Numbers of all sizes, and the edges among them."""
    numbers = rng.standard_normal(count) * 10.0 ** rng.integers(-6, 7, count)
    return np.where(rng.random(count) < 0.3, rng.choice(EDGES, count), numbers).astype(np.float32)


def positive(rng, count):
    return np.abs(floats(rng, count))


def whole(first, last):
    return lambda rng, count: rng.integers(first, last + 1, count)


def at_most(limit):
    return lambda rng, count: np.minimum(floats(rng, count), np.float32(limit))


#: Arguments that an operation takes from a smaller range than their type has: (operation, argument).
SMALL = whole(-1000, 1000)
RANGES = {("dot_i8", "b"): whole(-127, 127), ("dot_u7", "a"): whole(0, 127), ("dot_u6", "acc"): SMALL}
RANGES |= {("dot_u6", "a"): whole(0, 63), ("dot_u6", "b"): whole(-127, 127)}
RANGES |= {("dot_unsigned", "codes"): whole(0, 127), ("dot_unsigned", "activations"): whole(-127, 127)}
RANGES |= {("dot_signed_codes", "activations"): whole(-127, 127)}
RANGES |= {("times_eighths", "starts"): lambda rng, count: 8 * rng.integers(-2032, 2033, count)}
RANGES |= {("times_integers", sums): whole(-32767, 32767) for sums in ("first", "second")}
RANGES |= {("times_integers", "integers"): whole(-32, 63)}
RANGES |= {
    ("dot4", "acc"): SMALL,
    ("dot4", "codes"): whole(0, 255 if VNNI else 15),
    ("dot8", "activations"): whole(-127, 127),
}
RANGES |= {("store_as_i16", "value"): whole(-32768, 32767), ("store_as_i8", "value"): whole(-128, 255)}
RANGES |= {("store_as_u16xL", "value"): whole(0, 65535)}
RANGES |= {("store_codes", "value"): whole(-128, 255), ("exp2", "x"): at_most(127)}
RANGES |= {("store_words", column): whole(-128, 255) for column in "abcd"}
RANGES |= {("farther", "x"): positive, ("farther", "y"): positive, ("farthest", "x"): positive}
RANGES |= {("sum_blocks", sums): SMALL for sums in "abcd"} | {("first_lanes", "count"): whole(0, LANES)}
RANGES |= {("store_as_bytes", "value"): whole(-128, 255), ("lane_value", "lane"): whole(0, 15)}
RANGES |= {("store_nibbles", codes): whole(0, 255) for codes in ("low", "high")}
RANGES |= {("store_sixteenths", codes): whole(0, 255) for codes in ("low", "high")}
RANGES |= {("store_high_pairs", codes): whole(0, 63) for codes in ("low", "high")}
RANGES |= {("times_scales_8", sums): whole(-40000, 40000) for sums in ("low", "high")}


def dtype_of(kind):
    """The dtype of a register's lanes, or of a number."""
    element = kind.element if isinstance(kind, Vector) else kind.name
    return np.dtype({"f32": "float32", "i32": "int32", "i16": "int16", "i8": "int8"}.get(element, element))


def count_of(kind):
    return kind.count if isinstance(kind, Vector) else 1


def parts(kind):
    """The registers or numbers of an argument or result."""
    return [] if kind is types.void else list(kind) if isinstance(kind, types.BaseTuple) else [kind]


class Call:
    """A call of an operation: where its arguments are in its slot of the arena."""

    def __init__(self, made, literals):
        self.operation, self.literals = made, literals
        self.names = list(inspect.signature(made).parameters)
        if made.signature is None:
            kinds = ELEMENTWISE[made.__name__][: len(self.names)]
            self.result = types.float32 if made.__name__ in ("total", "largest", "farthest") else kinds[0]
        else:
            self.result, kinds = made.signature
        self.kinds = [kind for kind in kinds if kind is not LITERAL]

    def registers(self):
        """(name, type, number, offset) of each register and number that is passed."""
        at = 0
        for name, kind in zip(self.names, self.kinds, strict=False):
            for number, part in enumerate(parts(kind)):
                yield name, part, number, at
                at += 64 * -(-count_of(part) * dtype_of(part).itemsize // 64)

    def fill(self, slot, rng):
        """Random arguments, and random memory that addresses point to."""
        slot[:] = rng.integers(0, 256, SLOT)
        memory, addresses = slot.ctypes.data + REGISTERS + 3, 0
        for name, kind, number, at in self.registers():
            dtype, count = dtype_of(kind), count_of(kind)
            key = self.operation.__name__, name
            if key in RANGES:
                values = RANGES[key](rng, count)
            elif kind == types.int64 and name == "rows":
                values = memory + 100 * number
            elif kind == types.int64 and name in ADDRESSES:
                values, addresses = memory + APART * addresses, addresses + 1
            elif kind == types.int64:
                values = rng.choice(NUMBERS[name])
            elif dtype.kind == "f":
                values = floats(rng, count)
            else:
                info = np.iinfo(dtype)
                values = rng.integers(info.min, info.max, count, endpoint=True)
            view(slot.ctypes.data + at, dtype, count)[:] = np.asarray(values).astype(dtype)

    def source(self, number):
        """The lines of the compiled function: base + number * SLOT is the slot, out + number * RESULT the result's."""
        slot, given = f"base + {number * SLOT}", {}
        for name, kind, _, at in self.registers():
            given.setdefault(name, []).append(f"load_{kind.name.replace('x', '_')}({slot} + {at})")
        arguments = [
            f"({', '.join(given[name])},)" if isinstance(kind, types.BaseTuple) else given[name][0]
            for name, kind in zip(self.names, self.kinds, strict=False)
        ]
        is_first = self.operation.signature and self.operation.signature[1][:1] == (LITERAL,)
        literals = [str(each) for each in self.literals]
        arguments = [*literals, *arguments] if is_first else [*arguments, *literals]
        call = f"f{number}({', '.join(arguments)})"
        results = parts(self.result)
        if not results:
            return [call]
        values = ["r"] if len(results) == 1 else [f"r[{i}]" for i in range(len(results))]
        stores = [
            f"store_{kind.name.replace('x', '_')}(out + {number * RESULT + 64 * i}, {value})"
            for i, (kind, value) in enumerate(zip(results, values, strict=True))
        ]
        return [f"r = {call}", *stores]

    def as_python(self, slot, out):
        """The same by NumPy."""
        given = {}
        for name, kind, _, at in self.registers():
            value = view(slot.ctypes.data + at, dtype_of(kind), count_of(kind)).copy()
            given.setdefault(name, []).append(value if isinstance(kind, Vector) else value[0])
        arguments = [
            tuple(given[name]) if isinstance(kind, types.BaseTuple) else given[name][0]
            for name, kind in zip(self.names, self.kinds, strict=False)
        ]
        results = self.operation(*arguments, *self.literals)
        if not isinstance(self.result, types.BaseTuple):
            results = (results,)
        for i, (kind, value) in enumerate(zip(parts(self.result), results, strict=False)):
            value = np.asarray(value).reshape(-1)
            assert value.dtype == dtype_of(kind) or kind == types.int64, (self.operation, value.dtype)
            view(out.ctypes.data + 64 * i, dtype_of(kind), count_of(kind))[:] = value


def compiles(made):
    """Whether the level has the instructions of an operation."""
    module = made.__module__.rpartition(".")[2]
    by_name = {"dot_signed_codes": LANES == 8}
    return by_name.get(made.__name__, {"simd_512": LANES == 16, "simd_amx": AMX}.get(module, True))


CALLS = [
    Call(made, literals)
    for made in PACKAGE.values()
    if made.__name__ not in TILES and compiles(made)
    for literals in LITERALS.get(made.__name__, [()])
]


@pytest.fixture(scope="module")
def run():
    """The compiled function (base, out), which makes every call."""
    scope = {f"f{i}": call.operation for i, call in enumerate(CALLS)}
    kinds = {kind for call in CALLS for each in (*call.kinds, call.result) for kind in parts(each)}
    for kind in kinds:
        name = kind.name.replace("x", "_")
        target = ir_type(kind) if isinstance(kind, Vector) else None
        scope[f"load_{name}"], scope[f"store_{name}"] = loader(kind, target), storer(kind)
    lines = [line for number, call in enumerate(CALLS) for line in call.source(number)]
    exec("def run(base, out):\n    " + "\n    ".join(lines), scope)
    return numba.njit("void(int64, int64)", error_model="numpy")(scope["run"])


def loader(kind, target):
    def emit(builder, address):
        bits = {"float32": ir.FloatType(), "int64": ir.IntType(64), "int32": ir.IntType(32), "int16": ir.IntType(16)}
        return read(builder, address, target or bits[kind.name])

    def load(address):
        """A register or number of the arena."""

    return operation(kind, types.int64, emit=emit)(load)


def storer(kind):
    def store(address, value):
        """A register or number to the results."""

    return operation(types.void, types.int64, kind, emit=write)(store)


def same(actual, expected):
    """Equal bits, or NaN in place of each other."""
    if actual.tobytes() == expected.tobytes():
        return True
    a, b = actual.view(np.float32), expected.view(np.float32)
    return bool(((actual.view(np.int32) == expected.view(np.int32)) | (np.isnan(a) & np.isnan(b))).all())


def test_machine_code_does_what_numpy_does(run):
    rng = np.random.default_rng(0)
    arena = np.zeros((len(CALLS), SLOT), np.uint8)
    for case in range(CASES):
        for call, slot in zip(CALLS, arena, strict=True):
            call.fill(slot, rng)
        given, out, expected = arena.copy(), *np.full((2, len(CALLS), RESULT), 255, np.uint8)
        run(arena.ctypes.data, out.ctypes.data)
        found = arena.copy()
        arena[:] = given
        with np.errstate(all="ignore"):
            for call, slot, result in zip(CALLS, arena, expected, strict=True):
                call.as_python(slot, result)
        for i, call in enumerate(CALLS):
            assert same(out[i], expected[i]), (call.operation, call.literals, case)
            assert same(found[i], arena[i]), (call.operation, call.literals, case, "memory")


def test_every_operation_is_described():
    """Operations that a level does not have are compiled at another one."""
    assert len(PACKAGE) > 110
    for made in PACKAGE.values():
        assert made.__doc__, made
        assert made.__name__ != "<lambda>"
        assert len(inspect.signature(made).parameters) == len(inspect.signature(made.py_func).parameters)
    public = {name for module in MODULES for name, each in vars(module).items() if each in PACKAGE.values()}
    assert public == {made.__name__ for made in PACKAGE.values()}


def test_fused_rounds_once():
    """Against the exact sum, in integers: numbers are multiples of powers of 2."""
    rng = np.random.default_rng(1)
    x, y = (rng.integers(-(2**24) + 1, 2**24, 20000).astype(np.float32) for _ in range(2))
    # Addends that lie on, or near, half of the last place of the product.
    near = rng.integers(-1, 2, 20000) * 2.0 ** rng.integers(-40, 3, 20000)
    half = rng.choice([-1, 1], 20000) * 2.0 ** rng.integers(20, 26, 20000)
    for z in (near.astype(np.float32), half.astype(np.float32), (half + near).astype(np.float32)):
        found = fused(x, y, z)
        scale = 1 << 60
        for a, b, c, result in zip(x[:2000], y, z, found, strict=False):
            exact = int(a) * int(b) * scale + int(float(c) * scale)
            low, high = (int(float(np.nextafter(result, to, dtype=np.float32)) * scale) for to in (-np.inf, np.inf))
            error = abs(int(float(result) * scale) - exact)
            assert error <= min(abs(low - exact), abs(high - exact))
            if error in (abs(low - exact), abs(high - exact)):
                assert result.view(np.int32) % 2 == 0


def tile_program(rows, panel, sums):
    simd_amx.configure()
    simd_amx.load_tile(4, rows, 32)
    simd_amx.load_tile(6, panel, 64)
    simd_amx.zero_tile(0)
    simd_amx.dot_tiles(0, 4, 6)
    simd_amx.load_tile(1, sums + 1024, 64)
    simd_amx.dot_tiles_u8(1, 4, 6)
    simd_amx.store_tile(0, sums, 64)
    simd_amx.store_tile(1, sums + 1024, 64)
    simd_amx.release()


def test_tiles():
    rng = np.random.default_rng(2)
    rows, weights = (rng.integers(-128, 128, (16, 32)).astype(np.int8) for _ in range(2))
    panel = np.ascontiguousarray(weights.reshape(16, 8, 4).transpose(1, 0, 2))
    sums = rng.integers(-1000, 1000, (2, 16, 16)).astype(np.int32)
    signed, unsigned = (x.astype(np.int32) @ weights.T.astype(np.int32) for x in (rows, rows.view(np.uint8)))
    expected = np.array([signed, sums[1] + unsigned])
    programs = [tile_program, numba.njit(tile_program)] if AMX else [tile_program]
    for program in programs:
        found = sums.copy()
        program(rows.ctypes.data, panel.ctypes.data, found.ctypes.data)
        np.testing.assert_array_equal(found, expected)


def test_levels_differ_in_their_registers():
    assert (16 if ISA in ("amx", "avx512vnni") else 8) == LANES
    assert (4 if VNNI else 2) == simd_words.WORD
    assert simd.load_f32xL(np.zeros(LANES, np.float32).ctypes.data).shape == (LANES,)
