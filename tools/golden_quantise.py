"""Errors of the quantisers of llama.cpp and ik_llama.cpp, with which tests compare those of `pymla.cpu.quantise`.

    python tools/golden_quantise.py --llama LIBRARY VERSION --ik LIBRARY COMMIT [TYPE ...]

LIBRARY is llama.cpp's built ``libggml-base.so``, and ik_llama.cpp's ``libggml.so``. Written is
tests/golden/quantise_errors.json: for every type, or the given ones beside those that are there already, and every case
of `cases` the weighted squared error relative to the weighted squares of the weights. Weights are read back from blocks
by `pymla.reference`.
"""

import argparse
import datetime
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from ggml_library import GgmlLibrary

from pymla import ggml
from pymla.reference.quant import dequantise

PATH = Path(__file__).parents[1] / "tests" / "golden" / "quantise_errors.json"
ROWS, COLUMNS, SEED = 16, 1024, 26
LLAMA_TYPES = (
    *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "MXFP4"),
    *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "TQ1_0", "TQ2_0"),
)
IK_TYPES = (
    *("Q6_0", "IQ2_K", "IQ3_K", "IQ4_K", "IQ5_K", "IQ6_K"),
    *("IQ2_KS", "IQ3_KS", "IQ4_KS", "IQ5_KS", "IQ4_KSS", "IQ2_KL"),
)


class Case(NamedTuple):
    """Weights and the importance of their columns."""

    name: str
    rows: np.ndarray  # float32 (ROWS, COLUMNS)
    importance: np.ndarray | None  # float32 (COLUMNS,)


def cases() -> Iterator[Case]:
    """Weights as those of models: normal ones, and some with far outliers; each without importance, and with one whose
    largest numbers are some hundred times the smallest ones."""
    rng = np.random.default_rng(SEED)
    kinds = {
        "normal": rng.standard_normal((ROWS, COLUMNS)),
        "heavy-tailed": rng.standard_t(4, (ROWS, COLUMNS)),
    }
    importance = np.exp(rng.standard_normal(COLUMNS)).astype(np.float32)
    for name, rows in kinds.items():
        weights = (0.02 * rows).astype(np.float32)
        yield Case(name, weights, None)
        yield Case(f"{name}, importance", weights, importance)


def checksum() -> int:
    """CRC-32 of the cases' numbers, which another version of NumPy might draw otherwise."""
    total = 0
    for case in cases():
        total = zlib.crc32(case.rows.tobytes() + (b"" if case.importance is None else case.importance.tobytes()), total)
    return total


def weighted_error(data: np.ndarray, qtype: int, rows: np.ndarray, importance: np.ndarray | None) -> float:
    """The weighted squared error of blocks, relative to the weighted squares of the weights."""
    weights = np.ones(rows.shape[1]) if importance is None else importance.astype(np.float64)
    numbers = rows.astype(np.float64)
    lost = numbers - dequantise(data, qtype)
    return float((weights * lost**2).sum() / (weights * numbers**2).sum())


def errors_of(library: GgmlLibrary, qtype: int) -> dict[str, float]:
    """The errors of a type's quantiser, by case; without those that need an importance and have none."""
    errors = {}
    for case in cases():
        if case.importance is not None or not library.needs_importance(qtype):
            out = np.zeros((ROWS, ggml.row_bytes(qtype, COLUMNS)), np.uint8)
            library.quantise(case.rows, qtype, case.importance, out)
            errors[case.name] = float(f"{weighted_error(out, qtype, case.rows, case.importance):.7g}")
    return errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--llama", nargs=2, metavar=("LIBRARY", "VERSION"), help="of llama-cpp-python")
    parser.add_argument("--ik", nargs=2, metavar=("LIBRARY", "COMMIT"))
    parser.add_argument("types", nargs="*", metavar="TYPE")
    given = parser.parse_args()
    golden = json.loads(PATH.read_text()) if PATH.exists() else {}
    if golden.get("crc32") != checksum():
        golden = {"crc32": checksum(), "errors": {}}
    for engine, choice, names in (("llama.cpp", given.llama, LLAMA_TYPES), ("ik_llama.cpp", given.ik, IK_TYPES)):
        if choice is None:
            continue
        library = GgmlLibrary(Path(choice[0]), is_ik=engine == "ik_llama.cpp")
        golden[engine] = {"version" if engine == "llama.cpp" else "commit": choice[1]}
        golden[engine]["date"] = datetime.date.today().isoformat()
        for name in names:
            if not given.types or name in given.types:
                golden["errors"][name] = errors_of(library, ggml.ID[name])
    golden |= {"command": "python tools/golden_quantise.py", "seed": SEED, "numpy": np.__version__}
    PATH.write_text(json.dumps(golden, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
