"""Types of floats: each weight rounded to nearest, halves to even, as `pymla.reference.quant` rounds it. No importance
changes that."""

from pymla import ggml
from pymla.cpu.machine.simd import address, load_f32, load_f32x8, store_bf16, store_f16, store_f32, store_f32x8
from pymla.cpu.machine.simd_quantise import store_bf16x8, store_f16x8
from pymla.cpu.quantise.quantiser import Quantiser
from pymla.cpu.runtime.compiling import helper


def _rounded(store_eight, store, nbytes):
    """The quantiser of a type of `nbytes` bytes: `store_eight` and `store` round eight weights and one."""

    @helper
    def quantise_row(x, w, row, scratch):
        source, target, whole = address(x), address(row), len(x) // 8 * 8
        for i in range(0, whole, 8):
            store_eight(target + nbytes * i, load_f32x8(source + 4 * i))
        for i in range(whole, len(x)):
            store(target + nbytes * i, load_f32(source + 4 * i))

    return Quantiser(quantise_row, whole_rows=True)


QUANTISERS = {
    ggml.F32: _rounded(store_f32x8, store_f32, 4),  # the same bits
    ggml.F16: _rounded(store_f16x8, store_f16, 2),  # infinite above 65,504: whoever writes a file refuses such weights
    ggml.BF16: _rounded(store_bf16x8, store_bf16, 2),  # the upper halves of floats
}
