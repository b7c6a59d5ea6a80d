"""Distributions of llama.cpp's samplers, with which tests compare those of `pymla.text.sampling`.

    python tools/golden_samplers.py LIBRARY VERSION

LIBRARY is llama.cpp's built ``libllama.so``, VERSION that of llama-cpp-python. Written is tests/golden/samplers.json:
for every case of `cases` the tokens that are left with their probabilities, and where the samplers learn from what was
chosen, the chosen token of each of several steps.
"""

import argparse
import datetime
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pymla.text.sampling import SamplingParams
from pymla.text.tokenizer import Tokenizer

ROOT = Path(__file__).parents[1]
PATH = ROOT / "tests" / "golden" / "samplers.json"
MODEL = ROOT / "pymla" / "demo.gguf"
TOKENS, SEED, STEPS = 48, 27, 6

OFF = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
#: Without sampling, each alone, with `min_keep`, several in other orders.
PLAIN: list[dict[str, Any]] = [
    {},
    {"top_k": 5},
    {"top_p": 0.6},
    {"top_p": 0.6, "min_keep": 30},
    {"min_p": 0.1},
    {"min_p": 0.3, "min_keep": 20},
    {"typical_p": 0.3},
    {"typical_p": 0.9},
    {"typical_p": 0.2, "min_keep": 12},
    {"top_n_sigma": 1.0},
    {"top_n_sigma": 0.4},
    {"xtc_probability": 1.0, "xtc_threshold": 0.05},
    {"xtc_probability": 1.0, "xtc_threshold": 0.05, "min_keep": 47},
    {"xtc_probability": 1.0, "xtc_threshold": 0.51},
    {"temperature": 0.5},
    {"temperature": 0.0, "xtc_probability": 1.0, "xtc_threshold": 0.05},
    {"dynatemp_range": 0.5},
    {"temperature": 0.7, "dynatemp_range": 1.0, "dynatemp_exponent": 2.0},
    {"repetition_penalty": 1.3},
    {"frequency_penalty": 0.4, "presence_penalty": 0.6, "penalty_window": 5},
    {"repetition_penalty": 1.2, "frequency_penalty": -0.5, "penalty_window": 3},
    {"logit_bias": {"3": 4.0, "7": float("-inf")}, "top_k": 6},
    {"samplers": "temperature;top_p", "temperature": 2.0, "top_p": 0.7},
    {"samplers": "min_p;top_k;penalties", "min_p": 0.01, "top_k": 12, "repetition_penalty": 1.5},
    {"samplers": "temp;penalties", "temperature": 0.5, "repetition_penalty": 1.5},
    {"samplers": "top_k;xtc;typ;temp", "top_k": 20, "xtc_probability": 1.0, "typical_p": 0.8, "temperature": 1.5},
    {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05},
    {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05, "repetition_penalty": 1.1, "typical_p": 0.95}
    | {"top_n_sigma": 2.0, "xtc_probability": 1.0, "dynatemp_range": 0.3},
]
#: Those that learn.
LEARNING: list[dict[str, Any]] = [
    {"mirostat": 1, "mirostat_tau": 3.0, "mirostat_eta": 0.3},
    {"mirostat": 1, "temperature": 2.0, "mirostat_tau": 1.0},
    {"mirostat": 2, "mirostat_tau": 2.0, "mirostat_eta": 0.3},
    {"mirostat": 2, "temperature": 0.7, "mirostat_tau": 0.5, "mirostat_eta": 1.0},
    {"samplers": "top_k;adaptive_p", "top_k": 20, "adaptive_target": 0.3},
    {"samplers": "adaptive_p;min_p;temperature", "min_p": 0.02, "adaptive_target": 0.6, "adaptive_decay": 0.5},
]
SUMS = "x = a + b + c\ny = a + b + c\nz = a + b"
#: DRY, with texts whose end is repeated in them.
DRY: list[tuple[str, dict[str, Any]]] = [
    ("the cat sat on the mat and the cat sat on", {"dry_multiplier": 0.8}),
    ("the cat sat on the mat and the cat sat on", {"dry_multiplier": 2.0, "dry_base": 1.2, "dry_allowed_length": 1}),
    ("the cat sat on the mat and the cat sat on", {"dry_multiplier": 0.8, "dry_window": 13}),
    (SUMS, {"dry_multiplier": 0.8}),
    (SUMS, {"dry_multiplier": 0.8, "dry_sequence_breakers": []}),
    (SUMS, {"dry_multiplier": 0.8, "dry_sequence_breakers": ["= a"]}),
    ("def f(self):\n    return self\n\ndef g(self):\n    return", {"dry_sequence_breakers": ["):\n ", "turn self"]}),
    ("a" + 39 * " a", {"dry_multiplier": 1e-37, "dry_base": 90.0, "dry_sequence_breakers": [], "dry_window": 60}),
    ("say: one two three say: one two", {"dry_multiplier": 1.0, "dry_sequence_breakers": [":", "two three"]}),
]


class Case(NamedTuple):
    """Parameters, the text so far, and logits."""

    params: dict[str, Any]
    history: list[int]
    logits: np.ndarray  # float32 (steps, V)

    def sampling(self) -> SamplingParams:
        options = OFF | self.params
        options["logit_bias"] = {int(token): bias for token, bias in options.get("logit_bias", {}).items()}
        return SamplingParams(**options)


def cases() -> Iterator[Case]:
    """All cases. Under DRY, the tokens of the text are the likeliest ones."""
    rng = np.random.default_rng(SEED)
    history = [3, 9, 9, 1, 20, 9, 3, 41]
    for params in PLAIN:
        yield Case(params, history, 2 * rng.standard_normal((1, TOKENS), dtype=np.float32))
    for params in LEARNING:
        yield Case(params, [], 2 * rng.standard_normal((STEPS, TOKENS), dtype=np.float32))
    tokenizer = Tokenizer.from_gguf(MODEL)
    for text, params in DRY:
        ids = tokenizer.encode(text, add_bos=False)
        logits = rng.standard_normal((1, tokenizer.vocab_size), dtype=np.float32)
        logits[:, ids] += 20
        yield Case({"dry_multiplier": 0.5, "top_k": 24} | params, ids, logits)


def checksum() -> int:
    """CRC-32 of the cases' numbers, which another version of NumPy might draw otherwise."""
    total = 0
    for case in cases():
        total = zlib.crc32(case.logits.tobytes() + np.array(case.history, np.int64).tobytes(), total)
    return total


def record(library, case: Case) -> list[dict[str, Any]]:
    """For each step the distribution, likeliest tokens first, and the chosen token."""
    from llama_library import LlamaChain

    chain = LlamaChain(library, case.sampling(), case.logits.shape[1], case.history)
    steps = []
    for logits in case.logits:
        ids, probabilities, token = chain.apply(logits)
        chain.accept(token)
        left = sorted(zip(-probabilities, ids, strict=True))
        found = {int(i): float(f"{-p:.6g}") for p, i in left if p}
        steps.append({"token": token, "ids": list(found), "probabilities": list(found.values())})
    chain.close()
    return steps


def main() -> None:
    from llama_library import LlamaLibrary

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("library", metavar="LIBRARY", type=Path)
    parser.add_argument("version", metavar="VERSION")
    given = parser.parse_args()
    library = LlamaLibrary(given.library, MODEL)
    found = [{"params": case.params, "steps": record(library, case)} for case in cases()]
    golden = {
        "cases": found,
        "command": "python tools/golden_samplers.py",
        "crc32": checksum(),
        "llama.cpp": {"version": given.version, "date": datetime.date.today().isoformat()},
        "seed": SEED,
        "numpy": np.__version__,
    }
    PATH.write_text(json.dumps(golden, indent=None, sort_keys=True).replace('{"params"', '\n{"params"') + "\n")


if __name__ == "__main__":
    main()
