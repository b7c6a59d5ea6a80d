"""The processor that Numba compiles for: this one, or what ``NUMBA_CPU_NAME`` and ``NUMBA_CPU_FEATURES`` say."""

import os
import tempfile

import llvmlite.binding as llvm
from numba.core import config
from numba.core.codegen import get_host_cpu_features

from pymla.errors import PymlaError


def features():
    """Names of the features, as LLVM spells them, that machine code may use and that this processor has.

    Raises
    ------
    PymlaError
        Numba's environment variables name what LLVM does not know, or what this processor lacks.
    """
    if config.CPU_FEATURES is None:
        text = get_host_cpu_features()
    else:
        text = config.CPU_FEATURES
        _check_features(text)
    if config.CPU_NAME is not None or config.CPU_FEATURES is not None:
        _check_llvm_knows(config.CPU_NAME or "", text)
    # LLVM takes the last word on a feature.
    wanted = {flag[1:]: flag[0] == "+" for flag in text.split(",") if flag}
    return {name for name, used in wanted.items() if used and llvm.get_host_cpu_features().get(name)}


def check_jit():
    """Refuse ``NUMBA_DISABLE_JIT``: Numba's functions then are no longer those that kernels are made of.

    Raises
    ------
    PymlaError
    """
    if config.DISABLE_JIT:
        raise PymlaError(
            f"NUMBA_DISABLE_JIT={os.environ.get('NUMBA_DISABLE_JIT', 1)}: kernels must be compiled; unset it, or "
            "set PYMLA_ISA=python to run kernels as Python, or choose the device reference, which needs no compiler"
        )


def _check_features(text):
    host = llvm.get_host_cpu_features()
    for flag in filter(None, text.split(",")):
        # LLVM ends the process where a flag has no sign.
        if flag[0] not in "+-" or len(flag) == 1:
            raise PymlaError(f"NUMBA_CPU_FEATURES={text}: {flag!r} does not begin with + or -; write +avx2,-avx512f")
        if flag[0] == "+" and host.get(flag[1:], True) is False:
            raise PymlaError(f"NUMBA_CPU_FEATURES={text}: this processor lacks {flag[1:]}; leave {flag} out")


def _check_llvm_knows(name, text):
    """LLVM prints what it does not know on standard error, again and again, and compiles for another processor."""
    llvm.initialize_native_target()
    with tempfile.TemporaryFile() as said:
        stderr = os.dup(2)
        os.dup2(said.fileno(), 2)
        try:
            llvm.Target.from_triple(llvm.get_process_triple()).create_target_machine(cpu=name, features=text)
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
        said.seek(0)
        complaint = said.readline().decode(errors="replace").partition(" (")[0].strip()
    if complaint:
        variable, value = ("NUMBA_CPU_FEATURES", text) if "feature" in complaint else ("NUMBA_CPU_NAME", name)
        raise PymlaError(f"{variable}={value}: {complaint}; unset it, or write a name that LLVM knows")
