"""Types of floats: each weight rounded to nearest, halves to even, as `pymla.reference.quant` rounds it. No importance
changes that."""

from pymla import ggml
from pymla.cpu.machine.simd import address, load_f32, load_f32x8, store_bf16, store_f16, store_f32, store_f32x8
from pymla.cpu.machine.simd_quantise import store_bf16x8, store_f16x8
from pymla.cpu.quantise.quantiser import Quantiser
from pymla.cpu.runtime.compiling import helper


@helper
def f32(x, w, row, scratch):
    """The same bits."""
    source, target, whole = address(x), address(row), len(x) // 8 * 8
    for i in range(0, whole, 8):
        store_f32x8(target + 4 * i, load_f32x8(source + 4 * i))
    for i in range(whole, len(x)):
        store_f32(target + 4 * i, load_f32(source + 4 * i))


@helper
def f16(x, w, row, scratch):
    """IEEE halves. Weights above 65,504 are infinite: whoever writes a file refuses them."""
    source, target, whole = address(x), address(row), len(x) // 8 * 8
    for i in range(0, whole, 8):
        store_f16x8(target + 2 * i, load_f32x8(source + 4 * i))
    for i in range(whole, len(x)):
        store_f16(target + 2 * i, load_f32(source + 4 * i))


@helper
def bf16(x, w, row, scratch):
    """The upper halves of floats."""
    source, target, whole = address(x), address(row), len(x) // 8 * 8
    for i in range(0, whole, 8):
        store_bf16x8(target + 2 * i, load_f32x8(source + 4 * i))
    for i in range(whole, len(x)):
        store_bf16(target + 2 * i, load_f32(source + 4 * i))


QUANTISERS = {
    ggml.F32: Quantiser(f32, whole_rows=True),
    ggml.F16: Quantiser(f16, whole_rows=True),
    ggml.BF16: Quantiser(bf16, whole_rows=True),
}
