"""What this processor's vector instructions are: the level that kernels are compiled for.

Five levels, the best that this processor has and Numba compiles for (`pymla.cpu.machine.target`), or the one that
``PYMLA_ISA`` names: ``amx`` (and all of the next one), ``avx512vnni``, ``avxvnni``, ``avx2``, and ``portable`` vector
code that LLVM lowers on any processor. All give the same integers.
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
    if wanted and wanted not in levels():
        raise PymlaError(f"PYMLA_ISA={wanted}: kernels can be compiled for {', '.join(levels())} here")
    return wanted or levels()[0]


#: The level in use.
ISA = _isa()
#: Whether it has tiles (`simd_amx`).
AMX = ISA == "amx"
#: Whether it has the instruction that adds four products of bytes to an int32.
VNNI = ISA in ("amx", "avx512vnni", "avxvnni")

#: Whether a core reads faster when it asks memory in advance for what comes next. Intel's servers since Sapphire Rapids
#: do, rows of Q4_0 by a fifth; they alone have this feature, also where a virtual machine hides their AMX.
ASKS_AHEAD = bool(llvm.get_host_cpu_features().get("avx512fp16"))

#: Rows of a panel: the lanes of its registers.
LANES = 16 if ISA in ("amx", "avx512vnni") else 8
