"""Float types: loads of one weight, and of four neighbours."""

from pymla.cuda.formats.format import FloatFormat
from pymla.cuda.machine.ptx import load_bf16, load_f16, load_f32, load_f32x4, load_u32x2, unpack_bf16x2, unpack_f16x2
from pymla.cuda.runtime.jit import device


@device
def load_f16x4(at):
    """Four float16, as float32."""
    low, high = load_u32x2(at)
    a, b = unpack_f16x2(low)
    c, d = unpack_f16x2(high)
    return a, b, c, d


@device
def load_bf16x4(at):
    """Four bfloat16, as float32."""
    low, high = load_u32x2(at)
    a, b = unpack_bf16x2(low)
    c, d = unpack_bf16x2(high)
    return a, b, c, d


F32 = FloatFormat(load_f32, load_f32x4, 4)
F16 = FloatFormat(load_f16, load_f16x4, 2)
BF16 = FloatFormat(load_bf16, load_bf16x4, 2)
