"""What this processor's vector instructions are: the level that kernels are compiled for.

Four levels, the best that the processor has, or the one that ``PYMLA_ISA`` names: ``avx512vnni``, ``avxvnni``,
``avx2``, and ``portable`` vector code that LLVM lowers on any processor. All give the same integers.
"""

import os

import llvmlite.binding as llvm

from pymla.errors import PymlaError


def levels():
    """The levels that this processor runs, best first."""
    features = llvm.get_host_cpu_features()
    found = ["portable"]
    if features.get("avx2") and features.get("fma"):
        found.insert(0, "avx2")
        if features.get("avxvnni"):
            found.insert(0, "avxvnni")
        if features.get("avx512vnni") and features.get("avx512vl") and features.get("avx512bw"):
            found.insert(0, "avx512vnni")
    return found


def _isa():
    wanted = os.environ.get("PYMLA_ISA", "")
    if wanted and wanted not in levels():
        raise PymlaError(f"PYMLA_ISA={wanted}: this processor runs {', '.join(levels())}")
    return wanted or levels()[0]


#: The level in use.
ISA = _isa()
#: Whether it has the instruction that adds four products of bytes to an int32.
VNNI = ISA in ("avx512vnni", "avxvnni")

#: Rows of a panel: the lanes of its registers.
LANES = 16 if ISA == "avx512vnni" else 8
