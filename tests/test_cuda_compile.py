"""Kernels become machine code for three generations of cards, without a GPU, and keep the figures they had: those of
some types. Products of every type need no more than registers.

`tools/cuda_report.py --write` updates the table; a changed figure is looked at before it is committed.
"""

import importlib.util
import json
import os
import sys

import pytest

if importlib.util.find_spec("numba_cuda") is None:
    pytest.skip('needs numba-cuda: pip install ".[test,cuda]"', allow_module_level=True)
if os.environ.get("NUMBA_ENABLE_CUDASIM") == "1":
    pytest.skip("the simulator compiles nothing", allow_module_level=True)

import numpy as np
import side_by_side
from cuda_functions import functions
from cuda_report import TABLE, products, recorded
from numba import cuda, types

from pymla import ggml
from pymla.cuda import norm
from pymla.cuda.formats import FORMATS
from pymla.cuda.machine import ptx
from pymla.cuda.runtime import compiling
from pymla.cuda.runtime.jit import KERNELS, device, kernel

F1 = types.Array(types.float32, 1, "C")
F2 = types.Array(types.float32, 2, "A")


def table():
    """The figures of the kernels that are recorded, and those of every type's products for the oldest generation."""
    program = (
        "import json, sys, cuda_report as each; first, *_ = every = each.CAPABILITIES;"
        "tables = each.report(every, sorted(each.recorded())), each.report([first], sorted(each.products()));"
        "json.dump(tables, sys.stdout)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = side_by_side.run([sys.executable, "-c", program], env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.side_by_side(run=table)
def test_figures(beside):
    known = json.loads(TABLE.read_text(encoding="utf-8")) if TABLE.exists() else {}
    table, _ = beside
    changed = sorted(name for name in table.keys() | known.keys() if table.get(name) != known.get(name))
    assert not changed, f"other figures than in {TABLE.name}; see tools/cuda_report.py --write"


@pytest.mark.side_by_side(run=table)
def test_hot_kernels_keep_everything_in_registers(beside):
    made, (table, of_products) = recorded() | products(), beside
    for name, by_capability in (*table.items(), *of_products.items()):
        if made[name].hot:
            for capability, each in by_capability.items():
                for figure in ("spills", "float64", "divisions", "calls"):
                    assert each[figure] == 0, (name, capability, figure)


@pytest.mark.parametrize("qtype", FORMATS, ids=ggml.NAME.get)
def test_functions_of_every_type(qtype):
    """In a small kernel of their own, which needs no more than registers either."""
    code = compiling.link(compiling.to_ptx(functions(qtype), (8, 0)), (8, 0), functions(qtype))
    figures = code.figures
    assert figures.spills == figures.float64 == figures.divisions == figures.calls == 0


def compiled(body, *signature, **options):
    """A function as a kernel that nobody else sees, compiled: PTX and `Code`."""
    made = kernel(*signature, variant="test", **options)(body)
    del KERNELS[made.__name__]
    text = compiling.to_ptx(made, (8, 0))
    return text, compiling.link(text, (8, 0), made)


NUMBERS = ptx.table("test_numbers", lambda: np.arange(20, dtype=np.uint16))


def all_loads(a, out):
    w0, w1 = ptx.load_u32x2(a)
    w2, w3, w4, w5 = ptx.load_u32x4(a)
    s0, s1 = ptx.stream_u32x2(a)
    s2, s3, s4, s5 = ptx.stream_u32x4(a)
    f0, f1 = ptx.load_f32x2(a)
    f2, f3, f4, f5 = ptx.load_f32x4(a)
    g2, g3, g4, g5 = ptx.fresh_f32x4(a)
    words = w0 ^ w1 ^ w2 ^ w3 ^ w4 ^ w5 ^ s0 ^ s1 ^ s2 ^ s3 ^ s4 ^ s5 ^ ptx.stream_u16(a) ^ ptx.stream_u32(a)
    words ^= ptx.load_u8(a) ^ ptx.load_i8(a) ^ ptx.load_u16(a) ^ ptx.load_i16(a) ^ ptx.load_u32(a) ^ ptx.fresh_u32(a)
    words ^= ptx.load_u32_around(a) ^ ptx.load_u16(NUMBERS() + 2 * ptx.lane())
    ptx.store_u8(out, words)
    ptx.store_u16(out, words)
    ptx.store_u32(out, words)
    ptx.store_u32x2(out, words, w0)
    ptx.store_u32x4(out, words, w0, w1, w2)
    ptx.store_u32(out + 64, ptx.load_u64(a))
    ptx.store_f32(out, f0 + f1 + f2 + f3 + f4 + f5 + g2 + g3 + g4 + g5 + ptx.load_f32(a) + ptx.fresh_f32(a))
    ptx.store_f32x2(out + 8, f0, f1)
    ptx.store_f32x4(out + 16, f0, f1, f2, f3)
    ptx.store_f16(out + 32, ptx.load_f16(a))
    ptx.store_bf16(out + 32, ptx.load_bf16(a))


def all_shared(a, out):
    words = cuda.shared.array(256, np.int32, alignment=16)
    at = ptx.shared_address(words)
    ptx.cp_async_16(at, a, 16)
    ptx.cp_async_4(at + 16, a, 4)
    ptx.cp_async_commit()
    ptx.cp_async_wait(1)
    ptx.cp_async_wait(0)
    cuda.syncthreads()
    ptx.store_shared_u8(at + 1, 1)
    ptx.store_shared_u16(at + 2, 1)
    ptx.store_shared_u32(at + 4, 1)
    ptx.store_shared_u32x2(at + 8, 1, 2)
    ptx.store_shared_u32x4(at + 16, 1, 2, 3, 4)
    ptx.store_shared_f32(at + 32, np.float32(1))
    ptx.store_shared_u64(at + 40, ptx.kept(a))
    ptx.store_shared_f32x4(at + 48, np.float32(1), np.float32(1), np.float32(1), np.float32(1))
    ptx.syncwarp()
    at += 16 * ptx.lane()
    a0, a1, a2, a3 = ptx.ldmatrix_x4(at)
    t0, t1, t2, t3 = ptx.ldmatrix_x4_trans(at)
    b0, b1 = ptx.ldmatrix_x2(at)
    u0, u1 = ptx.ldmatrix_x2_trans(at)
    w0, w1 = ptx.load_shared_u32x2(at)
    w2, w3, w4, w5 = ptx.load_shared_u32x4(at)
    d0, d1 = ptx.load_shared_u64x2(at)
    f0, f1, f2, f3 = ptx.load_shared_f32x4(at)
    words = a0 ^ a1 ^ a2 ^ a3 ^ t0 ^ t1 ^ t2 ^ t3 ^ b0 ^ b1 ^ u0 ^ u1 ^ w0 ^ w1 ^ w2 ^ w3 ^ w4 ^ w5 ^ d0 ^ d1
    ptx.store_u32(out, words ^ ptx.load_shared_u8(at) ^ ptx.load_shared_u16(at) ^ ptx.load_shared_u32(at))
    ptx.store_f32(out + 4, f0 + f1 + f2 + f3 + ptx.load_shared_f32(at))


def all_arithmetic(a, out):
    x, y, w = ptx.load_f32(a), ptx.load_f32(a + 4), ptx.load_u32(a + 8)
    w = ptx.dp4a(w, w, 1) ^ ptx.dp4a_us(w, w, 1) ^ ptx.prmt(w, w, 0x1234) ^ ptx.funnel_shift_r(w, w, 3)
    w ^= ptx.valid_index(w, ptx.load_u32(a + 12))
    x = ptx.fma(x, y, ptx.exp2(x)) + ptx.log2(x) + ptx.rcp(x) + ptx.rsqrt(x) + ptx.sqrt(x) + ptx.div(x, y)
    x = ptx.fmax(x, y) + ptx.fmin(x, y) + ptx.to_f32(w) + ptx.as_f32(w)
    w ^= ptx.as_word(x) ^ ptx.nearest_int(x) ^ ptx.f16_bits(x) ^ ptx.bf16_bits(x)
    w ^= ptx.pack_f16x2(x, y) ^ ptx.pack_bf16x2(x, y) ^ ptx.fma_f16x2(w, w, w) ^ ptx.fma_bf16x2(w, w, w)
    h0, h1 = ptx.unpack_f16x2(w)
    b0, b1 = ptx.unpack_bf16x2(w)
    x += h0 + h1 + b0 + b1 + ptx.f16_value(w) + ptx.bf16_value(w)
    w ^= ptx.ballot(x > y) ^ ptx.shfl_idx(w, 3) ^ ptx.warp_sum(w)
    x = ptx.warp_sum(x) + ptx.warp_max(x) + ptx.group_sum(x, 8) + ptx.shfl_idx(x, 0)
    c0, c1, c2, c3 = ptx.mma_s8(w, w, w, w, w, w, 0, 0, 0, 0)
    c0, c1, c2, c3 = ptx.mma_u8(w, w, w, w, w, w, c0, c1, c2, c3)
    c0, c1, c2, c3 = ptx.mma_s8_k16(w, w, w, c0, c1, c2, c3)
    f0, f1, f2, f3 = ptx.mma_f16(w, w, w, w, w, w, x, x, x, x)
    f0, f1, f2, f3 = ptx.mma_bf16(w, w, w, w, w, w, f0, f1, f2, f3)
    ptx.store_u32x4(out, c0, c1, c2, c3)
    ptx.store_f32x4(out + 16, f0, f1, f2, f3)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (
            all_loads,
            "ld.global.nc.v2.u32 ld.global.nc.v4.u32 ld.global.nc.v4.f32 ld.global.nc.u8 "
            "ld.global.nc.u64 ld.global.nc.L1::no_allocate.v4.b32 ld.relaxed.gpu.global.v4.f32 st.global.v4.u32 "
            "st.global.v4.f32 st.global.u8 cvt.rn.bf16.f32 test_numbers[40]",
        ),
        (
            all_shared,
            "cp.async.cg.shared.global cp.async.ca.shared.global cp.async.commit_group cp.async.wait_group "
            "bar.warp.sync ld.shared.v4.u32 "
            "ld.shared.v2.u64 st.shared.u64 mov.b64 st.shared.v4.u32 ld.shared.v4.f32 st.shared.v4.f32 "
            "ldmatrix.sync.aligned.m8n8.x4.shared.b16 "
            "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 ldmatrix.sync.aligned.m8n8.x2.shared.b16",
        ),
        (
            all_arithmetic,
            "dp4a.s32.s32 dp4a.u32.s32 min.u32 prmt.b32 shf.r.wrap.b32 fma.rn.f32 ex2.approx.ftz.f32 "
            "lg2.approx.ftz.f32 cvt.rni.s32.f32 cvt.rn.f16x2.f32 cvt.rn.bf16x2.f32 fma.rn.f16x2 fma.rn.bf16x2 "
            "vote.sync.ballot.b32 shfl.sync.bfly.b32 shfl.sync.idx.b32 mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
            "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32 "
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32",
        ),
    ],
    ids=["loads", "shared", "arithmetic"],
)
def test_instructions(body, expected):
    text, code = compiled(body, types.int64, types.int64, max_threads=128)
    for instruction in expected.split():
        assert instruction in text
    assert code.cubin.startswith(b"\x7fELF")
    assert code.figures.spills == code.figures.float64 == code.figures.calls == 0


def test_figures_tell_mistakes():
    def body(n, out):
        i = cuda.threadIdx.x
        out[i // n] = out[i] * 0.1

    _, code = compiled(body, types.int64, F1)
    assert code.figures.float64 > 0
    assert code.figures.divisions > 0
    shared = compiled(lambda out: ptx.store_u32(out, ptx.shared_address(cuda.shared.array(100, np.int32))), types.int64)
    assert shared[1].figures.shared == 400


def test_parameters_of_every_kind():
    @device
    def first(pair):
        return pair[0]

    def body(n, flag, x, pair, small, wide):
        if flag:
            x[n, 0] = first(pair) + np.float32(small) + np.float32(wide)

    pair = types.UniTuple(types.float32, 2)
    text, _ = compiled(body, types.int64, types.boolean, F2, pair, types.int8, types.float64)
    assert text.count(".param .") >= 1 + 1 + 9 + 2 + 1 + 1


def test_damaged_machine_code_is_compiled_again(tmp_path, monkeypatch):
    monkeypatch.setenv("PYMLA_CACHE_DIR", str(tmp_path))
    made = norm._add  # only kernels of the package are kept
    first = compiling.compile_kernel(made, (8, 0))
    (path,) = tmp_path.glob("*/*")
    content = path.read_bytes()
    monkeypatch.setattr(compiling, "to_ptx", None)  # it is not compiled
    assert compiling.compile_kernel(made, (8, 0)) == first
    monkeypatch.undo()
    monkeypatch.setenv("PYMLA_CACHE_DIR", str(tmp_path))
    for damage in (b"", content[:50], content[:-1], content[:-1] + bytes([content[-1] ^ 1])):
        path.write_bytes(damage)
        # The name of the machine code is another one in every compilation.
        again = compiling.compile_kernel(made, (8, 0))
        assert again.figures == first.figures
        assert compiling._unpacked(compiling.CACHE.read(compiling.entry_name(made, (8, 0)))) == again
