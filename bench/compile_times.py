"""Seconds to compile kernels from an empty cache, in a process of its own.

    python bench/compile_times.py type Q4_0    the kernels of products, experts and embeddings of a type
    python bench/compile_times.py mix q4_k_m   everything that a file of a mix needs, on a small model of its types

Both print JSON: wall seconds, and processor seconds of all processes, which other programs on the machine change less.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from pymla.errors import PymlaError

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "tests"), str(HERE.parent / "tools")]


def measure(kind: str, name: str) -> dict[str, float]:
    """Times of a new process with an empty cache.

    Parameters
    ----------
    kind : "type" or "mix"
    name : of a type that runs, or of a mix whose types all run

    Raises
    ------
    PymlaError
        The process fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"PYMLA_CACHE_DIR": folder}
        command = [sys.executable, __file__, kind, name]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise PymlaError(f"kernels of {name} were not compiled: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout)


def compile_type(name: str) -> None:
    """Compile the kernels of matrices of a type."""
    from pymla import ggml
    from pymla.cpu import moe, quant
    from pymla.cpu.runtime.compiling import compile_all

    qtype = ggml.ID[name]
    kernels = quant.matmul_kernels(qtype) + moe.experts_kernels(qtype, qtype, qtype)
    kernels += moe.ffn_kernels(qtype, qtype, qtype) + quant.embedding_rows_kernels(qtype)
    _timed(lambda: compile_all([each.compiled for each in dict.fromkeys(kernels)]))


def compile_mix(name: str) -> None:
    """Load a small model of a mix, in V2-Lite's structure and with rows that types fall back for as they do there."""
    from dataclasses import replace

    from make_model import PRESETS, make_model

    import pymla

    small = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 288, "moe_intermediate_size": 128}
    shape = replace(PRESETS["v2-lite"], **small, num_attention_heads=4, n_routed_experts=8)
    with tempfile.TemporaryDirectory() as folder:
        path = make_model(Path(folder) / "model.gguf", shape, mix=name)
        _timed(lambda: pymla.load(path, device="cpu", ctx=64).close())


def _timed(run) -> None:
    before, began = _processor_seconds(), time.perf_counter()
    run()
    seconds = time.perf_counter() - began
    print(json.dumps({"seconds": seconds, "processor_seconds": _processor_seconds() - before}))


def _processor_seconds() -> float:
    """Of this process and of those that it has started and that have ended."""
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(each.ru_utime + each.ru_stime for each in usages)


if __name__ == "__main__":
    {"type": compile_type, "mix": compile_mix}[sys.argv[1]](sys.argv[2])
