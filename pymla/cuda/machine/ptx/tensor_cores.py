"""Products on the tensor cores (``mma.sync``), and loads of their fragments from shared memory (``ldmatrix``).

With ``g = lane >> 2`` and ``t = lane & 3``, a lane holds of the result (16 × 8) the elements c0, c1 = C[g, 2t],
C[g, 2t+1] and c2, c3 = C[g+8, 2t], C[g+8, 2t+1].
"""

import numpy as np

from pymla.cuda.machine.ptx.instruction import F32, I32, WARP, float32, floats, instruction, word_of, words
from pymla.cuda.runtime.driver import SIMULATED

if SIMULATED:
    from pymla.cuda.runtime import simulator

_G, _T = np.arange(WARP) >> 2, np.arange(WARP) & 3
_C_ROWS = _G[:, None] + np.array([0, 0, 8, 8])
_C_COLUMNS = 2 * _T[:, None] + np.array([0, 1, 0, 1])


def _fragments(words, kind, per_word, rows, columns):
    """A matrix from the words of 32 lanes: register i holds `per_word` elements of a row from (rows, columns)[i] on."""
    values = np.asarray(words, np.int64).astype(np.uint32).astype("<u4")[..., None].view(kind)
    matrix = np.empty((16, 4 * 2 * per_word), values.dtype)
    for i, (row, column) in enumerate(zip(rows, columns, strict=True)):
        for j in range(per_word):
            matrix[_G + row, per_word * _T + column + j] = values[:, i, j]
    return matrix


def _product(kind_a, kind_b, wide, to_value=lambda matrix: matrix):
    """The combination of lanes that multiplies their fragments in type `wide`."""

    def combine(lanes):
        words, c = np.array([each[0] for each in lanes]), np.array([each[1] for each in lanes], wide)
        per_word = 4 // np.dtype(kind_a).itemsize
        half = 4 * per_word
        a = to_value(_fragments(words[:, :4], kind_a, per_word, (0, 8, 0, 8), (0, 0, half, half)))
        # B comes by columns, so that a lane's words are elements of a row of its transpose.
        b = to_value(_fragments(words[:, 4:], kind_b, per_word, (0, 0), (0, half)))[:8]
        return (a.astype(wide) @ b.astype(wide).T)[_C_ROWS, _C_COLUMNS] + c

    return combine


def _mma_int(kind_a):
    product = _product(kind_a, "i1", np.int64)
    return lambda lanes: [tuple(word_of(each) for each in row) for row in product(lanes)]


def _mma_float(kind, to_value):
    product = _product(kind, kind, np.float64, to_value)
    return lambda lanes: [tuple(np.float32(each) for each in row) for row in product(lanes)]


_mma_s8, _mma_u8 = _mma_int("i1"), _mma_int("u1")
_mma_f16 = _mma_float("<f2", lambda matrix: matrix)
_mma_bf16 = _mma_float("<u2", lambda matrix: (matrix.astype(np.uint32) << 16).view(np.float32))
_MMA = "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"


@instruction(words(4), *[I32] * 10, asm=f"mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {_MMA}", effects="lanes")
def mma_s8(a0, a1, a2, a3, b0, b1, c0, c1, c2, c3):
    """``C + A @ B``, A 16 × 32 and B 32 × 8 of int8, C 16 × 8 of int32.

    With ``g = lane() >> 2`` and ``t = lane() & 3``, words hold four bytes of neighbouring k:
    a0 = A[g, 4t:], a1 = A[g+8, 4t:], a2 = A[g, 16+4t:], a3 = A[g+8, 16+4t:]; b0 = B[4t:, g], b1 = B[16+4t:, g];
    c0, c1 = C[g, 2t], C[g, 2t+1] and c2, c3 = C[g+8, 2t], C[g+8, 2t+1], as the result.
    """
    c = [word_of(each) for each in (c0, c1, c2, c3)]
    return simulator.meet("mma_s8", ((a0, a1, a2, a3, b0, b1), c), _mma_s8)


@instruction(
    words(4),
    *[I32] * 7,
    asm="mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32 {$0, $1, $2, $3}, {$4, $5}, {$6}, {$7, $8, $9, $10};",
    effects="lanes",
)
def mma_s8_k16(a0, a1, b0, c0, c1, c2, c3):
    """`mma_s8` of A 16 × 16 and B 16 × 8: a0, a1 and b0 are the words of that name there, or a2, a3 and b1."""
    c = [word_of(each) for each in (c0, c1, c2, c3)]
    return simulator.meet("mma_s8_k16", ((a0, a1, 0, 0, b0, 0), c), _mma_s8)


@instruction(words(4), *[I32] * 10, asm=f"mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {_MMA}", effects="lanes")
def mma_u8(a0, a1, a2, a3, b0, b1, c0, c1, c2, c3):
    """`mma_s8` with unsigned bytes in A."""
    c = [word_of(each) for each in (c0, c1, c2, c3)]
    return simulator.meet("mma_u8", ((a0, a1, a2, a3, b0, b1), c), _mma_u8)


@instruction(
    floats(4),
    *[I32] * 6,
    *[F32] * 4,
    asm=f"mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {_MMA}",
    effects="lanes",
)
def mma_f16(a0, a1, a2, a3, b0, b1, c0, c1, c2, c3):
    """``C + A @ B``, A 16 × 16 and B 16 × 8 of float16, C 16 × 8 of float32. The simulator adds up in float64.

    With ``g = lane() >> 2`` and ``t = lane() & 3``, words hold two halves of neighbouring k, the lower one first:
    a0 = A[g, 2t:], a1 = A[g+8, 2t:], a2 = A[g, 8+2t:], a3 = A[g+8, 8+2t:]; b0 = B[2t:, g], b1 = B[8+2t:, g];
    c0 to c3 and the result as for `mma_s8`.
    """
    c = [float32(each) for each in (c0, c1, c2, c3)]
    return simulator.meet("mma_f16", ((a0, a1, a2, a3, b0, b1), c), _mma_f16)


@instruction(
    floats(4),
    *[I32] * 6,
    *[F32] * 4,
    asm=f"mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {_MMA}",
    effects="lanes",
)
def mma_bf16(a0, a1, a2, a3, b0, b1, c0, c1, c2, c3):
    """`mma_f16` with bfloat16 in A and B."""
    c = [float32(each) for each in (c0, c1, c2, c3)]
    return simulator.meet("mma_bf16", ((a0, a1, a2, a3, b0, b1), c), _mma_bf16)


def _matrices(count, transposed):
    """The combination of lanes that reads `count` matrices of 8 × 8 halves, whose rows lanes 8i to 8i+7 name."""

    def combine(lanes):
        memory = simulator.running().block.shared.memory
        rows = [memory.read("<8H", address) for address in lanes[: 8 * count]]
        halves = np.array(rows, np.int64).reshape(count, 8, 8)
        if transposed:
            halves = halves.transpose(0, 2, 1)
        words = halves[:, _G, 2 * _T] | halves[:, _G, 2 * _T + 1] << 16
        return [tuple(word_of(each) for each in column) for column in words.T]

    return combine


_LDMATRIX = "ldmatrix.sync.aligned.m8n8"
_combine_x2, _combine_x2_trans = _matrices(2, False), _matrices(2, True)
_combine_x4, _combine_x4_trans = _matrices(4, False), _matrices(4, True)


@instruction(words(2), I32, asm=f"{_LDMATRIX}.x2.shared.b16 {{$0, $1}}, [$2];", effects="memory")
def ldmatrix_x2(address):
    """Two matrices of 8 rows of 16 bytes in shared memory, their rows at the addresses of lanes 0 to 7 and 8 to 15.

    Word i is bytes ``4 * (lane() & 3)`` to +3 of row ``lane() >> 2`` of matrix i.
    """
    return simulator.meet("ldmatrix_x2", address, _combine_x2)


@instruction(words(2), I32, asm=f"{_LDMATRIX}.x2.trans.shared.b16 {{$0, $1}}, [$2];", effects="memory")
def ldmatrix_x2_trans(address):
    """`ldmatrix_x2` of matrices that are transposed, as 8 × 8 halves, while they are read."""
    return simulator.meet("ldmatrix_x2_trans", address, _combine_x2_trans)


@instruction(words(4), I32, asm=f"{_LDMATRIX}.x4.shared.b16 {{$0, $1, $2, $3}}, [$4];", effects="memory")
def ldmatrix_x4(address):
    """`ldmatrix_x2` of four matrices: all 32 lanes name a row."""
    return simulator.meet("ldmatrix_x4", address, _combine_x4)


@instruction(words(4), I32, asm=f"{_LDMATRIX}.x4.trans.shared.b16 {{$0, $1, $2, $3}}, [$4];", effects="memory")
def ldmatrix_x4_trans(address):
    """`ldmatrix_x4` of matrices that are transposed, as 8 × 8 halves, while they are read."""
    return simulator.meet("ldmatrix_x4_trans", address, _combine_x4_trans)
