"""The level of vector instructions that kernels are compiled for.

There are five levels: ``amx`` (and all of the next one), ``avx512vnni``, ``avxvnni``, ``avx2``, and ``portable`` vector
code that LLVM lowers on any processor. All give the same integers. Kernels are compiled for the best level that this
processor has and Numba compiles for (`pymla.cpu.machine.target`), or for the one that ``PYMLA_ISA`` names.

With ``PYMLA_ISA=python`` nothing is compiled: kernels run as Python, at the portable level, with registers as NumPy
arrays. ``python-amx``, or another level, runs the code of that level, whether or not this processor has it.
"""

import ctypes
import functools
import os
import sys

import llvmlite.binding as llvm

from pymla.cpu.machine import target
from pymla.errors import PymlaError

# Linux: arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA), <asm/prctl.h>; programs ask before they use tiles.
_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA = 158, 0x1023, 18


#: All levels, best first.
LEVELS = "amx", "avx512vnni", "avxvnni", "avx2", "portable"
_PYTHON = {"python": "portable", **{f"python-{level}": level for level in LEVELS}}


@functools.cache
def levels():
    """The levels that this processor runs and Numba compiles for, best first."""
    features = target.features()
    found = ["portable"]
    if features >= {"avx2", "fma"}:
        found.insert(0, "avx2")
        if "avxvnni" in features:
            found.insert(0, "avxvnni")
        if features >= {"avx512vnni", "avx512vl", "avx512bw"}:
            found.insert(0, "avx512vnni")
            if features >= {"amx-tile", "amx-int8"} and _may_use_tiles():
                found.insert(0, "amx")
    return found


def _may_use_tiles():
    """Ask the system for AMX, for all threads of this process that follow."""
    if not sys.platform.startswith("linux"):
        return False
    return ctypes.CDLL(None).syscall(_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA) == 0


def _isa():
    target.check_jit()
    wanted = os.environ.get("PYMLA_ISA", "")
    if wanted in _PYTHON:
        return _PYTHON[wanted], True
    if wanted and wanted not in levels():
        raise PymlaError(f"PYMLA_ISA={wanted}: kernels can be compiled for {', '.join(levels())} here; or python")
    return wanted or levels()[0], False


#: The level in use, and whether kernels run as Python instead of being compiled for it.
ISA, PYTHON = _isa()
#: Whether the level has tiles (`simd_amx`).
AMX = ISA == "amx"
#: Whether the level has the instruction that adds four products of bytes to an int32.
VNNI = ISA in ("amx", "avx512vnni", "avxvnni")

#: Whether a core reads faster when kernels prefetch the memory that they read next. Intel's servers since Sapphire
#: Rapids do, rows of Q4_0 by a fifth; they alone have this feature, also where a virtual machine hides their AMX.
ASKS_AHEAD = bool(llvm.get_host_cpu_features().get("avx512fp16"))

#: Rows of a panel: the lanes of its registers.
LANES = 16 if ISA in ("amx", "avx512vnni") else 8
