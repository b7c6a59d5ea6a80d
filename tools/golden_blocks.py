"""Golden blocks of the types that gguf-py cannot dequantise, from ik_llama.cpp and llama.cpp.

    python tools/golden_blocks.py IK_PROGRAM LLAMA_PROGRAM IK_COMMIT LLAMA_VERSION

The programs are tools/golden_blocks.cpp, built with the sources of each. Written are tests/golden/types.npz and its
provenance, types.json. For every type the file has

- NAME: rows of random bytes with finite scales, uint8 (rows, row_bytes), and NAME.weights: float32 (rows, columns);
- NAME.quantised and NAME.quantised.weights: the same for a row that the program quantised. Rows of interleaved types
  hold the bits of plain ones, so that random bytes are enough there.
"""

import datetime
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from pymla import ggml
from pymla.ik_types import IK_LAYOUTS

GOLDEN = Path(__file__).parents[1] / "tests" / "golden"
BLOCKS = 2
#: Types of llama.cpp that gguf-py names and cannot read.
LLAMA_TYPES = ("Q1_0", "Q2_0", "NVFP4")
#: Interleaved types that ik_llama.cpp writes and cannot read: it has no function for BF16_R16, and that of MXFP4_R8
#: goes past the ends of its arrays. Their weights are those of the plain type.
PLAIN = {"BF16_R16": "BF16", "MXFP4_R8": "MXFP4"}
SEED = 24


def run(program: str, what: str, qtype: int, data: np.ndarray, columns: int, dtype: type) -> np.ndarray:
    """Rows through the program: bytes to float32 numbers, or the other way round."""
    command = [program, what, str(qtype), str(len(data)), str(columns)]
    done = subprocess.run(command, input=data.tobytes(), stdout=subprocess.PIPE, check=True)
    return np.frombuffer(done.stdout, dtype).reshape(len(data), -1)


def finite_halves(rng: np.random.Generator, count: int) -> np.ndarray:
    """Halves of every kind but infinities and NaN, as bytes (2 * count,)."""
    bits = rng.integers(0, 1 << 16, count, np.uint16)
    is_special = (bits & 0x7C00) == 0x7C00
    return np.where(is_special, bits & 0x83FF, bits).astype(np.uint16).view(np.uint8)


def random_row_group(rng: np.random.Generator, qtype: int, columns: int) -> np.ndarray:
    """Random bytes as the rows that lie together, with scales that are finite: uint8 (rows, row_bytes)."""
    rows, header = ggml.ROWS_TOGETHER[qtype], ggml.ROW_HEADER[qtype]
    name = ggml.NAME[qtype]
    nbytes = ggml.row_bytes(qtype, columns)
    data = rng.integers(0, 256, rows * nbytes, np.uint8)
    if header in (4, 8):
        exponents = rng.uniform(-9, 9, rows * header // 4)
        floats = rng.choice([-1, 1], len(exponents)) * np.exp(exponents)
        data[: rows * header] = floats.astype(np.float32).view(np.uint8)
    elif header == 2:
        data[: 2 * rows] = finite_halves(rng, rows)
    elif not name.startswith(("MXFP4", "NVFP4", "BF16")):
        # Two halves of each row in types with minima.
        halves = rows * (2 if name in ("Q2_K_R4", "Q4_K_R4", "Q5_K_R4") else 1)
        block = rows * ggml.BLOCK_BYTES[qtype]
        for start in range(0, len(data), block):
            data[start : start + 2 * halves] = finite_halves(rng, halves)
    return data.reshape(rows, nbytes)


def blocks_of(program: str, qtype: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Golden arrays of a type."""
    name, rows = ggml.NAME[qtype], ggml.ROWS_TOGETHER[qtype]
    columns = BLOCKS * ggml.BLOCK_SIZE[qtype]
    if name in PLAIN:
        plain = ggml.ID[PLAIN[name]]
        # Numbers of bfloat16, because ik_llama.cpp rounds others in two ways.
        weights = (rng.standard_normal((rows, columns), np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32)
        mixed = run(program, "quantise", qtype, weights, columns, np.uint8)
        apart = run(program, "quantise", plain, weights, columns, np.uint8)
        return {name: mixed, f"{name}.weights": run(program, "dequantise", plain, apart, columns, np.float32)}
    random = random_row_group(rng, qtype, columns)
    golden = {name: random, f"{name}.weights": run(program, "dequantise", qtype, random, columns, np.float32)}
    if rows == 1:
        weights = rng.standard_normal((1, columns), np.float32)
        quantised = run(program, "quantise", qtype, weights, columns, np.uint8)
        golden[f"{name}.quantised"] = quantised
        golden[f"{name}.quantised.weights"] = run(program, "dequantise", qtype, quantised, columns, np.float32)
    return golden


def main(ik_program: str, llama_program: str, ik_commit: str, llama_version: str) -> None:
    rng = np.random.default_rng(SEED)
    golden: dict[str, np.ndarray] = {}
    for each in IK_LAYOUTS:
        golden |= blocks_of(ik_program, each.qtype, rng)
    for name in LLAMA_TYPES:
        golden |= blocks_of(llama_program, ggml.ID[name], rng)
    np.savez_compressed(GOLDEN / "types.npz", **golden)
    provenance = {
        "command": "python tools/golden_blocks.py",
        "date": datetime.date.today().isoformat(),
        "ik_llama.cpp": {"repository": "github.com/ikawrakow/ik_llama.cpp", "commit": ik_commit},
        "llama.cpp": {"source": f"llama-cpp-python {llama_version}, vendor/llama.cpp", "types": LLAMA_TYPES},
        "seed": SEED,
    }
    (GOLDEN / "types.json").write_text(json.dumps(provenance, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
